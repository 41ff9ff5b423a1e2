"""Style, tables, pictures and curves for the pages of sweeps, searches and comparisons.

A page is one self-contained file, with its pictures inside.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trpo_jax.runs.learning_curve import make_figure
from trpo_jax.sweeps.iqm import Band

SOFTWARE = "trpo_jax report"  # marks every picture of ours, so that no other one is ever removed
_LARGEST = 40  # inches, width and height of a picture
_TICKS = 6  # most values of a setting that a logarithmic axis labels one by one
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
div { overflow-x: auto; } table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; text-align: right; } td { white-space: nowrap; } th { border-bottom: 2px solid #888; }
tr:nth-child(even) td { background: #f4f6f8; } img { max-width: 100%; display: block; margin: 1em 0; }
img.small { display: inline-block; width: 32%; min-width: 20em; margin: 0; }
pre { background: #f4f6f8; padding: 1em; overflow-x: auto; }
@media (max-width: 40em) { body { margin: 1em auto; font-size: 14px; } th, td { padding: .2em .4em; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Make an HTML page from its title and the parts of its body, which are HTML; it is readable on a phone, too."""
    head = [
        "<!DOCTYPE html>",
        f"<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def html_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Make a table that scrolls if it is wider than the screen."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def image(name: str, data: bytes, *, small: bool = False) -> str:
    """Embed a picture, the content of a PNG file; small ones stand side by side if there is room."""
    kind = " class='small'" if small else ""
    return f"<img{kind} alt='{html.escape(name)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"


def png(figure: Any) -> bytes:
    """Convert a figure to the content of a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png", metadata={"Software": SOFTWARE})
    return data.getvalue()


def sized_figure(width: float, height: float) -> Any:
    """Make a figure of so many inches, at most 40 each way."""
    return make_figure(min(width, _LARGEST), min(height, _LARGEST))


def plain(text: str) -> str:
    """Escape dollar signs, which would begin a formula."""
    return text.replace("$", r"\$")


def number(value: float) -> str:
    """A score in a table: one decimal, or three significant digits; "–" if there is none."""
    if np.isnan(value):
        return "–"
    return f"{value:.1f}" if value == 0 or 1 <= abs(value) < 1e6 else f"{value:.3g}"


def text_of(value: Any) -> str:
    """The value of a setting in a table: as it was typed, and four significant digits of one that was drawn."""
    if value is None:  # a setting of an environment that is not given
        return "default"
    if not isinstance(value, float):
        return str(value)
    return typed if float(typed := f"{value:.7g}") == value else f"{value:.4g}"


def texts_of(values: Iterable[Any]) -> dict[Any, str]:
    """The values of a setting with their texts; different values have different ones."""
    texts = {value: text_of(value) for value in values}
    known = list(texts.values())
    return {value: text if known.count(text) == 1 else repr(value) for value, text in texts.items()}


def interval_text(low: float, high: float) -> str:
    """An interval in a table."""
    return f"{number(low)} … {number(high)}"


def label_of(settings: Mapping[str, Any]) -> str:
    """Settings in a legend, on lines of about fifty characters."""
    parts = ", ".join(f"{name}={text_of(value)}" for name, value in settings.items())
    return textwrap.fill(plain(parts or "all"), 50, break_long_words=False, break_on_hyphens=False)


def plot_band(axes: Any, band: Band, label: str, *, stretch: float = 1, shade: float = 0.18) -> None:
    """Draw a curve with its interval shaded; a single point becomes a dot, since a line needs two."""
    alone = np.isfinite(band.middle).sum() == 1
    x = stretch * band.x
    (line,) = axes.plot(x, band.middle, linewidth=1.5, label=label, marker="o" if alone else "")
    axes.fill_between(x, band.low, band.high, color=line.get_color(), alpha=shade, linewidth=0)


def scale_axis(axes: Any, values: Sequence[float], *, logarithmic: bool = False) -> None:
    """Make an axis of positive values logarithmic, if requested or if they are spread more evenly on it.

    Its numbers are formatted as in the tables; few values become the ticks themselves.
    """
    known = sorted(set(values))
    if known[0] <= 0 or known[-1] < 4 * known[0]:
        return
    gaps, ratios = np.diff(known), np.diff(np.log(known))
    even = len(known) > 2 and ratios.std() / ratios.mean() < gaps.std() / gaps.mean()
    if logarithmic or even or known[-1] > 20 * known[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: text_of(float(value)))
        if len(known) <= _TICKS:
            axes.set_xticks(known)
            axes.minorticks_off()
