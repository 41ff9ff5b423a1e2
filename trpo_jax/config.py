"""Every setting once: its name, default, meaning and range. Imports no JAX, so the command line can show it at once.

A setting is *static* if it changes a shape, a loop length or a Python branch: each value compiles a program of its
own. Every other setting is a float that is *traced*: one program serves all its values, and `jax.vmap` over it works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trpo_jax import fields
from trpo_jax.env_args import EnvArgs
from trpo_jax.fields import as_held, check_value, own_object, static, text, traced, widths
from trpo_jax.sentences import UsageError, nearest
from trpo_jax.steps import defaults


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run. A pytree: floats are leaves, the rest is static.

    `help` and ranges stand in each field's metadata; `trpo-jax train --help` prints them. `config.replace(name=value)`
    returns a changed copy. Each value is checked as the Config is made, which is the last moment at which it is
    concrete; whether values go together is checked at use, by `validate`, so that they can be replaced one by one.
    """

    env: Any = own_object("CartPole-v1", "a gymnax name, an Environment, or any object with gymnax's six-value step")
    env_args: Any = own_object(EnvArgs(), "settings of the environment by name: floats are traced, the others static")
    max_steps: int = static(
        0, "time limit of an episode, beside the environment's; 0: none", interval="[0, 2147483647]"
    )
    randomize: Any = text(fields.NONE, "ranges that settings of the environment are drawn from, as gravity=5..20")
    wrappers: str = text(fields.NONE, "what changes the environment, first to last: hide_entries=1,3 stack_frames=4")
    policy: Any = own_object(None, "a Network whose apply returns a distribution; None: see `network`")
    value: Any = own_object(None, "a Network whose apply returns V, [...]; None: see `network`")
    num_envs: int = static(16, "environments stepped in parallel, N", high=10_000_000)
    num_steps: int = static(128, "steps in each environment per iteration, T", high=10_000_000)
    num_iterations: int = static(150, "iterations (one rollout and one update each)", high=10_000_000)
    gamma: float = traced(0.99, "discount γ", interval="[0, 1]")
    gae_lambda: float = traced(0.98, "λ of generalized advantage estimation", interval="[0, 1]")
    baseline: bool = static(True, "weight actions by advantages; False: by returns, as REINFORCE without a baseline")
    update: Any = static(
        "trpo",
        "how the policy is updated; all but trpo take gradient steps: one (policy-gradient), or epochs of minibatches "
        "on the clipped (ppo) or the penalised surrogate (kl-penalty)",
        choices=tuple(fields.ALGORITHMS),
    )
    max_kl: float = traced(
        defaults.MAX_KL,
        "trust-region radius δ: bound on the divergence of an update, nats; the first, if it adapts",
        interval="(0, 1e6]",
        used=fields.TRPO,
    )
    constraint: str = static(
        "mean-kl",
        "the divergence that δ bounds: mean or maximum of KL(old‖new) over the batch, or the mean of KL(new‖old)",
        choices=("mean-kl", "max-kl", "reverse-kl"),
        used=fields.TRPO,
    )
    radius_rule: str = static(
        "fixed",
        "ratio: δ grows while the realised gain, measured on the next batch, is near the predicted one, and shrinks "
        "where it is not; divergence: δ moves until the divergence is near target_kl",
        choices=("fixed", "ratio", "divergence"),
        used=fields.TRPO,
    )
    smallest_max_kl: float = traced(
        1e-5, "radius_rule: lower bound of δ, nats", interval="(0, 1e6]", used=fields.ADAPTIVE
    )
    largest_max_kl: float = traced(
        1.0, "radius_rule: upper bound of δ, nats", interval="(0, 1e6]", used=fields.ADAPTIVE
    )
    target_kl: float = traced(
        0.01,
        "divergence that radius_rule=divergence and kl-penalty aim at",
        interval="(0, 1e6]",
        used=({"radius_rule": ("divergence",)}, {"update": ("kl-penalty",)}),
    )
    anneal_max_kl: float = traced(
        0.0,
        "share of δ that is gone at the end of the run, linearly; 1: shrinks towards 0",
        interval="[0, 1]",
        used=fields.TRPO,
    )
    reuse: int = static(
        1, "batches an update learns from: the newest and reuse − 1 before it", used=fields.TRPO, high=1_000
    )
    entropy_coefficient: float = traced(
        0.0,
        "weight of the policy's mean entropy in the objective; of a default Gaussian it asks for log σ up to 2 at "
        "most, in units of half the action range",
        interval="[0, 1e6]",
    )
    cg_damping: float = traced(
        defaults.CG_DAMPING, "damping λ_d of the Fisher matrix in the solver", interval="[0, 1e6]", used=fields.TRPO
    )
    cg_iterations: int = static(defaults.CG_ITERATIONS, "conjugate-gradient iterations k at most", used=fields.TRPO)
    cg_tolerance: float = traced(
        defaults.CG_TOLERANCE,
        "relative residual at which conjugate gradient stops before k; 0: never",
        interval="[0, 1)",
        used=fields.CURVATURE,
    )
    fisher_fraction: float = static(
        defaults.FISHER_FRACTION, "share of the batch for the curvature", interval="(0, 1]", used=fields.CURVATURE
    )
    line_search: str = static(
        "auto",
        "one candidate after the other, or all in one batched pass; auto: parallel on accelerators; none: the full "
        "step is taken as it is, which is the natural gradient method",
        choices=("auto", "backtracking", "parallel", "none"),
        used=fields.TRPO,
    )
    line_search_shrink: float = traced(
        defaults.LINE_SEARCH_SHRINK, "factor α from one candidate to the next", interval="(0, 1)", used=fields.SEARCH
    )
    line_search_steps: int = static(
        defaults.LINE_SEARCH_STEPS, "candidates that the line search tries", used=fields.SEARCH, high=1_000
    )
    policy_optimizer: str = static(
        "adam",
        "gradient steps: by Adam, or plain, θ + learning rate · gradient",
        choices=("adam", "sgd"),
        used=fields.GRADIENT_STEPS,
    )
    policy_learning_rate: float = traced(
        1e-3, "gradient steps: learning rate", interval="[0, 1e6]", used=fields.GRADIENT_STEPS
    )
    policy_epochs: int = static(10, "ppo, kl-penalty: passes over the batch", used=fields.EPOCHS)
    policy_minibatches: int = static(
        8,
        "ppo, kl-penalty: minibatches per pass, shuffled anew in each; must divide the batch",
        used=fields.EPOCHS,
        high=10_000_000,
    )
    clip_ratio: float = traced(
        0.2, "ppo: ε, the ratio counts within [1 − ε, 1 + ε]", interval="(0, 1e6]", used=({"update": ("ppo",)},)
    )
    max_grad_norm: float = traced(
        0.5,
        "ppo, kl-penalty: a longer gradient of a minibatch is scaled to this norm; 0: never",
        interval="[0, 1e6]",
        used=fields.EPOCHS,
    )
    initial_penalty: float = traced(
        1.0,
        "kl-penalty: coefficient β of the KL at the start; adapts to target_kl",
        interval="(0, 1e6]",
        used=({"update": ("kl-penalty",)},),
    )
    value_fit: Any = static(
        "gauss-newton",
        "how the value function is fitted: one damped Gauss-Newton step, or epochs of minibatches by Adam",
        choices=tuple(fields.VALUE_FITS),
    )
    value_damping: float = traced(
        defaults.VALUE_DAMPING,
        "gauss-newton: damping λ of the value function's matrix",
        interval="[0, 1e6]",
        used=fields.GAUSS_NEWTON,
    )
    value_cg_iterations: int = static(
        defaults.VALUE_CG_ITERATIONS, "gauss-newton: conjugate-gradient iterations at most", used=fields.GAUSS_NEWTON
    )
    value_learning_rate: float = traced(3e-3, "adam: learning rate", interval="[0, 1e6]", used=fields.ADAM)
    value_clip: float = traced(
        0.0,
        "adam: V counts within ± this of what it was, where that raises the loss; 0: everywhere",
        interval="[0, 1e12]",
        used=fields.ADAM,
    )
    anneal_learning_rates: float = traced(
        0.0,
        "share of both learning rates that is gone at the end of the run, linearly",
        interval="[0, 1]",
        used=(*fields.GRADIENT_STEPS, *fields.ADAM),
    )
    value_epochs: int = static(5, "adam: passes over the batch", used=fields.ADAM)
    value_minibatches: int = static(
        8, "adam: minibatches per pass; must divide num_envs x num_steps", used=fields.ADAM, high=10_000_000
    )
    normalize_advantages: bool = static(
        True,
        "shift and scale the advantages of a batch to mean 0 and variance 1; with baseline=False only scale the "
        "returns, to a mean square of 1",
    )
    normalize_observations: bool = static(
        False,
        "running normalisation of observations, frozen within an iteration; starts from a rollout that nothing is "
        "learned from",
    )
    observation_clip: float = traced(
        defaults.OBSERVATION_CLIP,
        "normalize_observations: clip to ± this many standard deviations",
        interval="(0, 1e6]",
        used=({"normalize_observations": (True,)},),
    )
    normalize_rewards: bool = static(False, "divide rewards by the running standard deviation of the discounted return")
    reward_clip: float = traced(
        0.0, "clip rewards to ± this, after their normalisation; 0: never", interval="[0, 1e12]"
    )
    network: str = static(
        "auto",
        "what the default policy and value function are made of; auto: cnn for observations of rank 3, else mlp; gru "
        "remembers",
        choices=("auto", "mlp", "cnn", "gru"),
    )
    hidden: Sequence[int] | str = widths(
        "auto",
        "widths of the layers, the last also a gru's units; auto: 64,64, of a gru 64, of a cnn 128",
        used=fields.HIDDEN,
    )
    value_hidden: Sequence[int] | str = widths(
        "auto", "those of the value function; auto: as hidden, or 64 on a shared trunk", used=fields.OWN_VALUE
    )
    channels: Sequence[int] | str = widths(
        (16,), "cnn: filters of each convolution, of which the first spans grids of any size", used=fields.CONVOLUTIONS
    )
    activation: str = static(
        "auto",
        "what follows each layer but the last; auto: tanh, in a cnn relu",
        choices=("auto", "tanh", "relu", "swish", "gelu"),
        used=fields.OWN_NETWORK,
    )
    layer_norm: bool = static(
        False, "normalise what each layer but the last gives, before its activation", used=fields.OWN_NETWORK
    )
    initialisation: str = static(
        "orthogonal",
        "weights at the start: orthogonal with a gain of √2, or lecun-normal; the policy's last layer times 0.01",
        choices=("orthogonal", "lecun-normal"),
        used=fields.OWN_NETWORK,
    )
    shared_trunk: bool = static(
        False,
        "the value function is a small network on what the policy's last layer sees; nothing below learns from it",
    )
    action_distribution: str = static(
        "gaussian",
        "of actions in a Box: unbounded, through tanh, or beta; the last two need bounds",
        choices=("gaussian", "tanh", "beta"),
        used=fields.OWN_POLICY,
    )
    value_observation: str = text(
        "auto", "entries of a dict that the value function sees, as a,b; auto: as the policy", used=fields.VIEW
    )
    state_dependent_std: bool = static(False, "a Gaussian's σ depends on the observation", used=fields.GAUSSIAN)
    initial_log_std: float = traced(
        0.0,
        "log σ of a Gaussian policy at the start, in units of half the action range; of tanh before it",
        interval="[-20, 20]",
        used=fields.GAUSSIAN,
    )
    eval_every: int = static(
        0, "iterations from one evaluation during training to the next; 0: none", interval="[0, 10000000]"
    )
    eval_episodes: int = static(32, "episodes of an evaluation during training", used=fields.EVALUATED, high=1_000_000)
    eval_stochastic: bool = static(
        False, "evaluation during training samples actions instead of taking the mode", used=fields.EVALUATED
    )
    stop_at_return: float = static(
        fields.NEVER,
        "mean return of an evaluation during training at which the agent's training ends; from 1e30 on: never",
        interval="[-1e38, 1e38]",
        used=fields.EVALUATED,
    )

    def __post_init__(self) -> None:
        axes = any(getattr(self, name) is None for name in _TRACED)  # a tree of axes for `jax.vmap`: integers and None
        for name, field in FIELDS.items():
            value = as_held(field, getattr(self, name), self.env)
            object.__setattr__(self, name, value)
            if value is not field.default and not (axes and name in _TRACED):
                check_setting(name, value)

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed."""
        for name in changes:
            if name not in FIELDS:
                raise UsageError(f"Config has no setting {name!r}{nearest(name, FIELDS)}")
        return dataclasses.replace(self, **changes)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps per iteration, T · N."""
        return self.num_envs * self.num_steps


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TRACED = frozenset(name for name, field in FIELDS.items() if not field.metadata["static"])


def check_setting(name: str, value: Any, source: str = "") -> None:
    """Raise `UsageError` unless a setting, from the file `source`, may have this value; traced ones all pass."""
    check_value(FIELDS[name], f"{name} in {source}" if source else name, value)
