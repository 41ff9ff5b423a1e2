"""Kernel initialisers, and matrix products and convolutions in the form whose gradient suits the backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import backend
from trpo_jax.steps.types import Array

_FEW_COLUMNS = 4
_SMALL_KERNEL = 9  # largest filter, in entries per channel, that an accelerator computes by patches
_LARGEST_KERNEL = 400  # the same on a CPU; a grid of 84 x 84 needs 361
_SAMPLES_PER_PRODUCT = 16  # most samples per product in a convolution on an accelerator
_LARGE_BATCH = 4096  # samples; a dense layer on a GPU splits larger batches into groups
_GROUPS = range(128, 513)  # possible samples per group


@functools.cache
def orthogonal(scale: float) -> Callable[..., Array]:
    """Make an initialiser of matrices [rows, columns] with orthonormal rows or columns (whichever fit) times `scale`.

    It takes the polar factor of a Gaussian matrix, which is uniform over such matrices, by Newton–Schulz: X ← X (3 I −
    XᵀX) / 2. The usual way, a QR decomposition by LAPACK, can deadlock XLA's CPU thread pool when several run at once,
    as with many agents in one program.
    """

    # Linen asks for its shape in every `apply`; jit traces it only once.
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def initialise(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        rows, columns = shape
        x = jax.random.normal(key, (max(shape), min(shape)), dtype)
        x = x / jnp.linalg.norm(x)  # singular values in (0, 1], where the iteration converges
        identity = jnp.eye(min(shape), dtype=dtype)

        def improve(_: int, x: Array) -> Array:
            gram = jnp.matmul(x.T, x, precision="highest")
            return jnp.matmul(x, 1.5 * identity - 0.5 * gram, precision="highest")

        # A singular value grows by 3/2 per step until it is near 1: 40 steps bring it there from 10⁻⁶.
        x = jax.lax.fori_loop(0, 40, improve, x)
        return scale * (x if rows >= columns else x.T)

    return initialise


def product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """Compute x @ kernel for x [..., inputs], in the form whose gradient suits the backend.

    On CPU, few columns are computed one by one: the gradient of a kernel of two columns is three times faster as two
    products with a vector, since XLA's matrix product on CPU is made for larger ones. On a GPU, a large batch is
    computed in groups. Otherwise the gradient of a kernel with as few entries as one processor handles is a single sum
    over all samples.
    """
    columns, samples = kernel.shape[-1], math.prod(x.shape[:-1])
    if backend.columns_one_by_one() and columns <= _FEW_COLUMNS:
        contract = (((0,), (x.ndim - 1,)), ((), ()))
        return jnp.stack([jax.lax.dot_general(kernel[:, i], x, contract, **options) for i in range(columns)], axis=-1)
    if backend.sums_in_groups() and samples > _LARGE_BATCH:
        together = max((size for size in _GROUPS if samples % size == 0), default=samples)
        groups = x.reshape(samples // together, together, x.shape[-1])
        products = jnp.matmul(groups, jnp.broadcast_to(kernel, (samples // together, *kernel.shape)), **options)
        return products.reshape(*x.shape[:-1], columns)
    return jax.lax.dot_general(x, kernel, dimension_numbers, **options)


def convolution(x: Array, kernel: Array, strides: Sequence[int], padding: str, **options: Any) -> Array:
    """Compute the convolution of a small kernel as matrix products with patches of the input.

    On CPU the reason is that XLA uses its fast convolution only in a program's main computation. In a loop, where all
    training runs, the gradient of a kernel takes thirty times as long as by patches. There two neighbouring outputs
    share a patch, if a row has an even number of them. On an accelerator the reason is that many agents have as many
    kernels: XLA turns a convolution mapped over them into one of grouped filters, and a product into a batch of
    products. There only a few samples share a product. Otherwise the gradient of a kernel with as few entries as one
    processor handles is a single sum over all pixels of all samples.
    """
    height, width, _, filters = kernel.shape
    cpu = backend.all_convolutions_by_patches()
    if height * width > (_LARGEST_KERNEL if cpu else _SMALL_KERNEL) or padding != "SAME":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    samples, *sizes, _ = x.shape
    margins = jax.lax.padtype_to_pads(sizes, (height, width), strides, padding)
    padded = jnp.pad(x, ((0, 0), *margins, (0, 0)))
    rows, columns = (-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    if cpu and columns % 2 == 0:
        patches, matrix = _patches_of_pairs(padded, kernel, strides, rows, columns)
    else:
        patches, matrix = _patches(padded, kernel, strides, rows, columns)
    together = samples if cpu else math.gcd(samples, _SAMPLES_PER_PRODUCT)
    patches = patches.reshape(samples // together, -1, matrix.shape[0])
    products = jnp.matmul(
        patches, jnp.broadcast_to(matrix, (samples // together, *matrix.shape)), precision=options["precision"]
    )
    return products.reshape(samples, rows, columns, filters)


def _patches(padded: Array, kernel: Array, strides: Sequence[int], rows: int, columns: int) -> tuple[Array, Array]:
    """Make patches [B, rows, columns, P] of what each output sees, and the matrix [P, filters] that they multiply."""
    height, width, _, filters = kernel.shape
    down, right = strides
    shifted = [
        padded[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, filters)


def _patches_of_pairs(
    padded: Array, kernel: Array, strides: Sequence[int], rows: int, columns: int
) -> tuple[Array, Array]:
    """Make patches [B, rows, columns / 2 · P] of what two neighbouring outputs see, and the matrix [P, 2 · filters].

    Most of what the two see is the same: for filters of 3 x 3 there is a third less to copy than with a patch for each
    output, in longer strips. A quarter of the matrix is zeros, which costs less than that saves, since XLA's product on
    CPU is slow with as few columns as one output has filters.
    """
    height, width, channels, filters = kernel.shape
    down, right = strides
    strip = right + width  # pixels of a row that the two see
    flat = padded.reshape(*padded.shape[:2], -1)
    strips = [
        flat[:, i : i + (rows - 1) * down + 1 : down, first * channels : (first + strip) * channels]
        for first in range(0, columns * right, 2 * right)
        for i in range(height)
    ]
    both = [jnp.pad(kernel, ((0, 0), beside, (0, 0), (0, 0))) for beside in ((0, right), (right, 0))]
    matrix = jnp.stack(both, axis=-2).reshape(height * strip * channels, 2 * filters)
    return jnp.concatenate(strips, axis=-1), matrix


@functools.cache
def kernel_initializer(initialisation: str, gain: float) -> Callable[..., Array]:
    """Make an initialiser of kernels [..., outputs], orthogonal or lecun-normal, with all other axes as one.

    The orthogonal one is scaled by `gain`. LeCun's has variance 1 / inputs, and is scaled by `gain` only if that is
    less than 1, as in a policy's last layer; √2 is not part of it.
    """

    def initialise(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        if initialisation == "lecun-normal":
            return min(gain, 1.0) * jax.nn.initializers.lecun_normal()(key, shape, dtype)
        matrix = orthogonal(gain)(key, (math.prod(shape[:-1]), shape[-1]), dtype)
        return matrix.reshape(shape)

    return initialise
