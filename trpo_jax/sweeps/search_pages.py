"""A search as a self-contained page: its history, which settings matter, and the best trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from trpo_jax.files import write_atomically
from trpo_jax.sentences import counted, name_of
from trpo_jax.sweeps.drawing import (
    heading,
    html_table,
    image,
    number,
    page,
    paragraph,
    plain,
    png,
    scale_axis,
    sized_figure,
    text_of,
)

_GROUPS = 4  # groups of a setting's values
_FEWEST = 8  # trials needed for an estimate of importance
_SHOWN = 20  # best trials in the table


def write_search_page(folder: Path, trials: Sequence[Any], count: int, space: Mapping[str, Any]) -> Path:
    """Write report.html into the folder of a search, and return its path.

    Args:
      folder: folder of the search.
      trials: Optuna's finished trials, at least one.
      count: number of trials requested.
      space: the distributions, {setting: {kind: values}}.
    """
    file = folder / "report.html"
    ended = sorted(trials, key=_index)
    scored = sorted((trial for trial in ended if _is_complete(trial)), key=lambda t: (-t.value, _index(t)))
    share = f" of {count:,}" if len(ended) < count else ""
    parts = [
        paragraph(
            f"{len(ended):,}{share} trials: {len(scored)} trained to the end, {len(ended) - len(scored)} stopped early "
            "or without a score. Scores: IQM over the seeds that only tuning uses."
        ),
        heading("Best"),
        *_best(scored, list(space)),
        heading("History"),
        image("history", png(_draw_history(ended))),
        heading("Importance of the settings"),
        *_importance(ended, space),
        *_failures(ended),
    ]
    write_atomically(file, page(name_of(folder), parts))
    return file


def _index(trial: Any) -> int:
    """The position of a trial in the search; those left by a killed process have none."""
    return int(trial.user_attrs.get("index", trial.number))


def _is_complete(trial: Any) -> bool:
    return bool(trial.state.name == "COMPLETE")


def _best(scored: Sequence[Any], names: Sequence[str]) -> list[str]:
    """The best trials that were trained to the end, as a table."""
    if not scored:
        return [paragraph("No trial has a score yet.")]
    cells = [
        [str(_index(trial)), number(trial.value), *(text_of(trial.params.get(name, "")) for name in names)]
        for trial in scored[:_SHOWN]
    ]
    more = [paragraph(f"And {len(scored) - _SHOWN} more.")] if len(scored) > _SHOWN else []
    said = paragraph(
        "The settings of the first row are in best.toml. The best of many scores is biased upwards: train them again."
    )
    return [html_table(["trial", "score", *names], cells), *more, said]


def _draw_history(trials: Sequence[Any]) -> Any:
    """Draw the scores in the order of the trials: trained to the end, stopped early, and the best so far."""
    figure = sized_figure(7.5, 4)
    axes = figure.add_subplot()
    early = [trial for trial in trials if not _is_complete(trial) and trial.intermediate_values]
    axes.scatter(
        [_index(trial) for trial in early],
        [trial.intermediate_values[max(trial.intermediate_values)] for trial in early],
        s=18,
        color="tab:gray",
        alpha=0.6,
        label="stopped early, its last score",
    )
    complete = [trial for trial in trials if _is_complete(trial)]
    at, scores = [_index(trial) for trial in complete], [trial.value for trial in complete]
    axes.scatter(at, scores, s=24, label="trained to the end")
    if complete:
        last = _index(trials[-1])
        axes.step([*at, last], [*np.maximum.accumulate(scores), max(scores)], where="post", label="best so far")
    axes.set(xlabel="trial", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _importance(trials: Sequence[Any], space: Mapping[str, Any]) -> list[str]:
    """The importance of each setting for the score after the first stage, which all trials have."""
    first = [trial for trial in trials if trial.intermediate_values]
    if len(first) < _FEWEST:
        return [paragraph(f"Importance needs at least {counted(_FEWEST, 'trial')} with a score.")]
    scores = np.array([trial.intermediate_values[min(trial.intermediate_values)] for trial in first])
    values = {name: [trial.params[name] for trial in first] for name in space}
    found = {name: importance(values[name], scores) for name in space}
    ranked = sorted(found, key=lambda name: -found[name])
    said = (
        "Share of the variance of the scores' ranks after the first stage, where all trials have scores, that groups "
        "of a setting's values (quarters, or choices) explain by themselves, corrected for chance: ε² of Kelley 1935. "
        "Joint effects of several settings are not included."
    )
    cells = [[name, f"{found[name]:.0%}"] for name in ranked]
    pictures = [image("settings", png(_draw_values(ranked, values, scores, space)))]
    return [paragraph(said), html_table(["setting", "importance"], cells), *pictures]


def importance(values: Sequence[Any], scores: np.ndarray) -> float:
    """Share of the variance of the ranks of scores [n] that groups of a setting's values explain, in [0, 1].

    ε² = (SS_between − (k − 1) MS_within) / SS_total for k groups: the quarters of numbers, or each choice. It is 0 on
    average for a setting without influence, and never negative here.

    Source: Kelley 1935, *An unbiased correlation ratio measure*.
    """
    ranks = rankdata(scores)
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        groups = np.ceil(rankdata(values) * _GROUPS / len(values)).astype(int)
    else:
        groups = np.unique([str(value) for value in values], return_inverse=True)[1]
    total = float(((ranks - ranks.mean()) ** 2).sum())
    kinds = np.unique(groups)
    within = sum(float(((ranks[groups == kind] - ranks[groups == kind].mean()) ** 2).sum()) for kind in kinds)
    freedom = len(ranks) - len(kinds)
    if not total or freedom < 1 or len(kinds) < 2:
        return 0.0
    return max(0.0, (total - within - (len(kinds) - 1) * within / freedom) / total)


def _draw_values(
    names: Sequence[str], values: Mapping[str, Sequence[Any]], scores: np.ndarray, space: Mapping[str, Any]
) -> Any:
    """Draw the score after the first stage against each setting, the most important first."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = sized_figure(7.5 if columns > 1 else 5, 2.6 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        kinds = sorted(set(values[name]), key=lambda value: (type(value).__name__, value))
        if "choice" in space[name]:
            axes.scatter([kinds.index(value) for value in values[name]], scores, s=14)
            axes.set_xticks(range(len(kinds)), [plain(text_of(kind)) for kind in kinds])
            axes.set_xlim(-0.5, len(kinds) - 0.5)
        else:
            axes.scatter(values[name], scores, s=14)
            scale_axis(axes, values[name], logarithmic="log_uniform" in space[name])
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    for axes in panels[: len(names) : columns]:
        axes.set_ylabel("score, first stage")
    return figure


def _failures(trials: Sequence[Any]) -> list[str]:
    """The reasons why trials have no score, if there are any."""
    reasons = Counter(trial.user_attrs["why"] for trial in trials if "why" in trial.user_attrs)
    if not reasons:
        return []
    cells = [[why, str(times)] for why, times in reasons.most_common()]
    return [heading("Without a score"), html_table(["why", "trials"], cells)]
