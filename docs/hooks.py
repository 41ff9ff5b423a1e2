"""What the site has beside its pages: pictures of the experiments, tables, examples, and mathematics as MathML."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from trpo_jax import Config, Metrics

ROOT = Path(__file__).parent.parent
_INCLUDE = re.compile(r"^<!-- (example|table): (\S+) -->$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the experiments, as pictures/EXPERIMENT/NAME.png."""
    for picture in sorted((ROOT / "experiments").glob("*/*.png")):
        name = f"pictures/{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put examples and tables where a page names them: `<!-- example: sweep.py -->`, `<!-- table: settings -->`."""
    return _INCLUDE.sub(lambda found: _included(*found.groups()), markdown)


def _included(kind: str, name: str) -> str:
    if kind == "example":
        return f"```python\n{(ROOT / 'docs' / 'examples' / name).read_text().rstrip()}\n```"
    head, rows = {
        "settings": ("| setting | kind | meaning |\n|---|---|---|", settings_rows),
        "metrics": ("| metric | meaning |\n|---|---|", metrics_rows),
    }[name]
    return "\n".join([head, *rows()])


def settings_rows() -> Iterator[str]:
    """The rows of the table of settings, as `Config` has them."""
    for field in dataclasses.fields(Config):
        kind = "static" if field.metadata["static"] else "traced"
        default = "the default" if field.default is None else f"`{field.default}`"
        yield f"| `{field.name}` = {default} | {kind} | {field.metadata['help']} |"


def metrics_rows() -> Iterator[str]:
    """The rows of the table of metrics, as the docstring of `Metrics` has them."""
    for name, meaning in re.findall(r"^      ?(\w+): (.*(?:\n        .*)*)", Metrics.__doc__ or "", re.MULTILINE):
        yield f"| `{name}` | {' '.join(meaning.split()).rstrip('.')} |"


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, which every browser draws by itself: no script and no font is needed."""

    def draw(found: re.Match[str]) -> str:
        if found[1] == "span":
            return convert(html.unescape(found[2]))
        return f'<div class="formula">{convert(html.unescape(found[2]), display="block")}</div>'

    return _FORMULA.sub(draw, content)
