"""The ideas behind TRPO in pictures and measured numbers; README.md tells the story.

    python experiments/article/run.py exact      # the figures that are exact mathematics
    python experiments/article/run.py hump       # one figure
    python experiments/article/run.py            # all figures

Each figure has a function that computes and one that draws, in the module of its chapter. The numbers are printed and
merged into results.json. Pictures and numbers are written to runs/article, which git ignores; `--output
experiments/article` replaces those of the page.
"""

import argparse
import importlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
OUTPUT = Path("runs/article")
# Figure: its chapter, and whether it is exact mathematics, done in double precision.
FIGURES = {
    "estimator": ("gradients", True),
    "hump": ("gradients", True),
    "terrain": ("gradients", True),
    "cliff": ("cliff", False),
    "distance": ("distances", True),
    "neighbours": ("networks", False),
    "minorizer": ("minorizers", True),
    "model": ("minorizers", True),
    "climbing": ("minorizers", True),
    "circles": ("regions", True),
    "radius": ("regions", True),
    "importance": ("samples", True),
    "reuse": ("samples", True),
    "batches": ("agents", False),
    "objectives": ("samples", True),
    "bounds": ("bounds", True),
    "judgement": ("candidates", True),
    "spread": ("networks", False),
    "efficiency": ("agents", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", nargs="?", choices=["all", "exact", *FIGURES], default="all")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the pictures and results.json")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in figures(arguments.figure):
        make(name, arguments.output)
    print(f"Pictures and results.json are in {arguments.output}.")


def figures(which: str) -> list[str]:
    """The names of all figures, of the exact ones, or of one."""
    if which in FIGURES:
        return [which]
    return [name for name, (_, exact) in FIGURES.items() if exact or which == "all"]


def make(name: str, output: Path) -> None:
    """Compute and draw one figure, print its numbers and keep them."""
    start = time.perf_counter()
    findings = compute(name)
    figure = getattr(chapter(name), f"draw_{name}")(findings)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    # 256 colours are enough, and a third of the bytes.
    Image.open(picture).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        output / f"{name}.png", optimize=True
    )
    numbers = {key: rounded(value) for key, value in findings.numbers.items()}
    print(f"{name}  ({time.perf_counter() - start:.0f} s)")
    for key, value in numbers.items():
        print(f"  {key}: {value}")
    file = output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = numbers
    ordered = {figure: results[figure] for figure in FIGURES if figure in results}
    file.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def compute(name: str, **sizes: Any) -> Any:
    """The `Findings` of a figure; smaller sizes than the defaults are for tests."""
    with jax.enable_x64(FIGURES[name][1]):
        findings = getattr(chapter(name), f"compute_{name}")(**sizes)
    return findings._replace(curves=to_numpy(findings.curves), numbers=to_numpy(findings.numbers))


def chapter(name: str) -> Any:
    """The module that holds a figure."""
    root = str(HERE.parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"experiments.article.{FIGURES[name][0]}")


def to_numpy(value: Any) -> Any:
    """JAX's arrays as NumPy's; dictionaries keep their order, as under `jax.tree.map` they would not."""
    if isinstance(value, dict):
        return {key: to_numpy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_numpy(entry) for entry in value]
    return np.asarray(value) if isinstance(value, jax.Array) else value


def rounded(value: Any) -> Any:
    """Plain Python with six significant digits, for JSON."""
    if isinstance(value, dict):
        return {str(key): rounded(entry) for key, entry in value.items()}
    if isinstance(value, (str, bool, int)):
        return value
    array = np.asarray(value)
    if array.ndim:
        return [rounded(entry) for entry in array]
    return array.item() if array.dtype.kind in "biu" else float(f"{array.item():.6g}")


if __name__ == "__main__":
    main()
