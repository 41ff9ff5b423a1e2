"""A report as files: one page with everything, its pictures, and a table."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trpo_jax.files import remove_temporaries, write_atomically
from trpo_jax.sweeps.pictures import SOFTWARE, draw_curves, draw_settings, png
from trpo_jax.sweeps.reports import Report, table_of, text_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .8em; text-align: right; }
th { border-bottom: 2px solid #888; } tr:nth-child(even) td { background: #f4f6f8; }
img { max-width: 100%; display: block; margin: 1em 0; } pre { background: #f4f6f8; padding: 1em; overflow-x: auto; }
"""


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write report.html, its pictures as PNG files, and table.csv into the folder; return the page's path.

    Pictures of a report before it that it does not have go.
    """
    folder = Path(path)
    pictures: dict[str, list[tuple[str, bytes]]] = {}
    for env, rows in report.rows.items():
        suffix = f"_{_file_name(env)}" if len(report.rows) > 1 else ""
        drawn = {"learning_curves": draw_curves(env, rows), "settings": draw_settings(env, rows)}
        pictures[env] = [(f"{kind}{suffix}.png", png(figure)) for kind, figure in drawn.items() if figure]
    files = dict(picture for drawn_there in pictures.values() for picture in drawn_there)
    for name, data in files.items():
        write_atomically(folder / name, data)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for env, rows in report.rows.items():
        titles, _ = table_of(rows)
        interval = ["iqm", "low", "high", "mean", "worst", "seeds", "failed"]
        writer.writerow(["env", *titles[: len(rows[0].settings)], *interval])
        for row in rows:
            numbers = [row.iqm, *row.interval, row.mean, row.worst, row.num_seeds, row.num_failed]
            writer.writerow([env, *row.settings.values(), *numbers])
    write_atomically(folder / "table.csv", text.getvalue())
    page = folder / "report.html"
    write_atomically(page, _page(folder.resolve().name, report, pictures))
    _remove_stale(folder, files)
    remove_temporaries(folder)
    return page


def _file_name(name: str) -> str:
    """A name as a part of a file's name. Where it cannot stand as it is, a checksum keeps it apart from its like."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:48]
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _remove_stale(folder: Path, files: Mapping[str, bytes]) -> None:
    """Remove the pictures of earlier reports that this one does not have."""
    for file in [*folder.glob("learning_curves*.png"), *folder.glob("settings*.png")]:
        with contextlib.suppress(OSError):
            if file.name not in files and SOFTWARE.encode() in file.read_bytes()[:256]:
                file.unlink()


def _page(title: str, report: Report, pictures: Mapping[str, Sequence[tuple[str, bytes]]]) -> str:
    made_by = report.description.get("made_by", {})
    parts = [
        "<!DOCTYPE html>",
        f"<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
        f"<p>{report.extent}. Score: {report.score}. IQM: mean of the middle half of the seeds, with a "
        "95 % percentile interval of the stratified bootstrap.</p>",
    ]
    if report.overall:
        parts.append("<h2>All environments</h2>")
        parts.append("<p>Scores scaled in each environment from its worst point's IQM (0) to its best's (1).</p>")
        names = list(report.overall[0][0])
        cells = [
            [*(text_of(settings[name]) for name in names), f"{iqm:.3f}", f"{low:.3f} … {high:.3f}"]
            for settings, iqm, (low, high) in report.overall
        ]
        parts.append(_html_table([*names, "IQM", "95 % interval"], cells))
    for env, rows in report.rows.items():
        parts.append(f"<h2>{html.escape(env)}</h2>")
        parts.append(_html_table(*table_of(rows)))
        for name, data in pictures[env]:
            encoded = base64.b64encode(data).decode()
            parts.append(f"<img alt='{html.escape(name)}' src='data:image/png;base64,{encoded}'>")
    parts.append("<h2>Failures</h2>")
    if report.failures:
        parts.append("<p>Agents that met a number that was not finite, at which iteration.</p>")
        cells = [
            [env, ", ".join(f"{n}={text_of(v)}" for n, v in settings.items()), str(seed), str(iteration)]
            for env, settings, seed, iteration in report.failures
        ]
        parts.append(_html_table(["environment", "settings", "seed", "iteration"], cells))
    else:
        parts.append("<p>None: every reward, observation and parameter was a finite number.</p>")
    asked = {name: value for name, value in report.description.items() if name != "made_by"}
    parts.append("<h2>The sweep</h2>")
    parts.append(f"<pre>{html.escape(json.dumps(asked, indent=1))}</pre>")
    parts.append(f"<p>Made by {html.escape(', '.join(f'{n} {v}' for n, v in made_by.items()))}.</p></body></html>")
    return "\n".join(parts) + "\n"


def _html_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
