"""What the chapters share: what a computation returns, and one colour for each thing."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

TRUE, SURROGATE, BOUND, LIMITED, PLAIN, NATURAL, FAINT = (
    "black",
    "tab:purple",
    "tab:green",
    "tab:blue",
    "tab:red",
    "tab:orange",
    "gray",
)
SHADES = ("#9ecae1", "#4292c6", "#08519c", "#041f4a")  # of the limited step's blue, from little to much


class Findings(NamedTuple):
    """What a figure is drawn from, and the numbers that the README quotes of it."""

    curves: dict[str, Any]
    numbers: dict[str, Any]


def panels(count: int, width: float = 4.2, height: float = 3.5, **options: Any) -> tuple[Figure, Any]:
    """A figure of panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def finish(axes: Any, legend: str | None = "best", **labels: Any) -> None:
    """Titles and labels as keywords of `Axes.set`, a faint grid, a small legend."""
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8, loc=legend)


def decades(sizes: Any, works: Any) -> float:
    """Width of the longest run of neighbouring settings that work, in powers of ten."""
    widest, start = 0.0, None
    for i, fine in enumerate(works):
        start = (i if start is None else start) if fine else None
        if start is not None:
            widest = max(widest, float(np.log10(sizes[i] / sizes[start])))
    return widest
