"""Write the README's tables of settings and metrics anew, from `Config` and `Metrics`.

python scripts/readme_tables.py
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from trpo_jax import Config, Metrics

README = Path(__file__).parent.parent / "README.md"


def settings_rows() -> Iterator[str]:
    """The rows of the README's table of settings, as `Config` has them."""
    for field in dataclasses.fields(Config):
        kind = "static" if field.metadata["static"] else "traced"
        default = "the default MLP" if field.default is None else f"`{field.default}`"
        yield f"| `{field.name}` = {default} | {kind} | {field.metadata['help']} |"


def metrics_rows() -> Iterator[str]:
    """The rows of the README's table of metrics, as the docstring of `Metrics` has them."""
    entries = re.findall(r"^      ?(\w+): (.*(?:\n        .*)*)", Metrics.__doc__ or "", re.MULTILINE)
    for name, meaning in entries:
        sentence = " ".join(meaning.split()).rstrip(".")
        yield f"| `{name}` | {sentence} |"


def main() -> None:
    text = README.read_text()
    for head, rows in (("| setting | kind | meaning |", settings_rows()), ("| metric | meaning |", metrics_rows())):
        start = text.index("\n", text.index(head) + len(head) + 1) + 1
        end = text.index("\n\n", start)
        text = text[:start] + "\n".join(rows) + text[end:]
    README.write_text(text)


if __name__ == "__main__":
    main()
