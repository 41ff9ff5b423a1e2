"""A search's folder and its trials, which Optuna keeps in a database; both stay intact if the process is killed.

    study.db        Optuna's study, unless a storage URL puts it elsewhere
    search.json     the settings of the search, and the versions that run it; written after the study
    best.toml       the best settings so far, for `trpo-jax train --config`

Only one process at a time searches a folder. Machines that share a storage URL, each with a folder of the same name,
search together: each trains batches of its own, and its proposals use all trials.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.files import as_path, is_fresh, locked, read_json, write_atomically
from trpo_jax.runs.descriptions import check_equal, in_json, write_table
from trpo_jax.sentences import UsageError, first_line, name_of, shown
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.plans import own_part

_ASKED_FOR = "sweep"  # attribute of a study: the settings of the search, without the number of trials
_MEND = "restore it, or choose another --output"
_SECONDS = 60  # that a connection waits while another one writes


class Study:
    """The trials of a search.

    A trial's attributes: `index`, which decides its proposal; `owner`, whose process trains it; `why`, if it has no
    score; and `checksum`, of its result.
    """

    def __init__(self, study: Any, where: str | Path, owner: str, seed: int):
        self._study, self._where, self._owner, self._seed = study, where, owner, seed

    def ask(self, number: int) -> list[Any]:
        """Ask Optuna for so many new trials.

        For each trial the sampler is seeded by the search's seed and the trial's index: the number of trials before it,
        without those that a killed process left. So a search that is cut anywhere proposes what it would have uncut.
        """
        import optuna

        known = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
        used = {trial.user_attrs.get("index", trial.number) for trial in known}
        indices = (index for index in itertools.count() if index not in used)
        trials = []
        for index in itertools.islice(indices, number):
            seed = int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trials.append(self._study.ask())
            trials[-1].set_user_attr("index", index)
            trials[-1].set_user_attr("owner", self._owner)
        return trials

    def tell(self, ended: Sequence[tuple[Any, float | None]]) -> None:
        """End a batch: record Optuna's trials with their scores, or None for those that stopped early or have none.

        The results are first written in one piece, so that a kill in between leaves no batch half recorded.
        """
        known = {trial.number: trial for trial in self._study.get_trials(deepcopy=False)}
        for asked, score in ended:
            asked.set_user_attr("checksum", _checksum(known[asked.number], score))
        self._study.set_user_attr(f"told by {self._owner}", {str(asked.number): score for asked, score in ended})
        self.finish_interrupted()

    def finish_interrupted(self) -> None:
        """Finish what a killed process was recording, and give up the trials that it was training."""
        from optuna.trial import TrialState

        told = self._study.user_attrs.get(f"told by {self._owner}", {})
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if self._owner and trial.user_attrs.get("owner") != self._owner:
                continue  # another machine trains it
            score = told.get(str(trial.number))
            state = TrialState.PRUNED if str(trial.number) in told else TrialState.FAIL
            self._study.tell(trial.number, score, TrialState.COMPLETE if score is not None else state)

    def check(self) -> None:
        """Raise `UsageError` if a trial was changed after it was recorded: a database has no checksums of its own."""
        for trial in self.ended():
            score = trial.value if trial.state.name == "COMPLETE" else None
            if trial.user_attrs.get("checksum", _checksum(trial, score)) != _checksum(trial, score):
                what = f"trial {trial.number} was changed since it was recorded"
                raise UsageError(f"{self._where} is damaged ({what}); {_MEND}.")

    def ended(self) -> list[Any]:
        """Optuna's finished trials."""
        return [t for t in self._study.get_trials(deepcopy=False) if t.state.name in ("COMPLETE", "PRUNED")]

    def best(self) -> Any:
        """The trial with the highest score, the first of equals; None if there is no score."""
        scored = [trial for trial in self.ended() if trial.state.name == "COMPLETE"]
        return max(scored, key=lambda trial: (trial.value, -trial.number), default=None)

    def reasons(self) -> Counter[str]:
        """The reasons why trials have no score, and how many trials each has."""
        return Counter(trial.user_attrs["why"] for trial in self.ended() if "why" in trial.user_attrs)

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """Turn any error of the database into one sentence."""
        mend = "what is recorded is safe, and the same command continues when it can be read and written"
        return _said(f"cannot use the study in {self._where}", mend)


@contextlib.contextmanager
def open_study(path: str | os.PathLike[str], spec: Spec, storage: str | None, made_by: Mapping[str, Any]) -> Any:
    """Lock a folder and yield its `Study`, a new one or the one that is there.

    Args:
      path: the folder.
      spec: the requested search; all but the number of trials must be that of the study.
      storage: URL of the study; None: it is in the folder.
      made_by: the versions, for search.json.

    Raises:
      UsageError: if Optuna is missing, the folder belongs to something else or is used by another process, or the study
        is damaged or belongs to another search. Nothing is written then.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError("tune needs Optuna; install it with `pip install '.[tune]'`.") from None
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    folder = as_path(path).absolute()
    description = in_json(spec.description)
    description["random"].pop("count", None)  # the number of trials may grow
    _check(folder, storage)
    with locked(folder, mend="wait for it, or choose another --output"):
        where = storage or folder / "study.db"
        with _said(f"the study in {where} cannot be opened", _MEND):
            study = _load(folder, storage, description)
        found = study.user_attrs[_ASKED_FOR]
        if not isinstance(found, dict):
            raise UsageError(f"the study in {where} is damaged (its description is {shown(found)}); {_MEND}.")
        check_equal(folder, "search", description, own_part(found))
        try:
            read_json(folder / "search.json", "")
        except (OSError, UsageError):  # it only repeats the study
            write_table(folder / "search.json", {**description, "made_by": dict(made_by)})
        owner = f"{socket.gethostname()}:{folder}"[-400:] if storage else ""  # a database keeps 512 characters
        opened = Study(study, where, owner, spec.random.get("seed", 0))
        with opened.at_work():
            opened.finish_interrupted()
            opened.check()
        yield opened


def _check(folder: Path, storage: str | None) -> None:
    """Raise `UsageError` unless a folder belongs to a search or may become one."""
    database, description = folder / "study.db", folder / "search.json"
    if storage is None and database.exists():
        _check_database(database)
    elif storage is not None and database.exists():
        raise UsageError(f"{folder} has a {database.name} of its own; leave out --storage, or choose another --output.")
    elif storage is None and description.exists():
        raise UsageError(
            f"{database}, which has the trials of the search, is missing; restore it, give the --storage that the "
            "search was started with, or choose another --output."
        )
    elif not description.exists() and not is_fresh(folder, description.name if storage else database.name):
        raise UsageError(f"{folder} exists and is not the folder of a search; choose another --output.")


def _check_database(file: Path) -> None:
    """Raise `UsageError` unless a file is an intact database of a search."""
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=_SECONDS)) as database:
            fault = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            named = "SELECT count(*) FROM study_user_attributes WHERE key = ?"
            if fault == "ok" and not database.execute(named, (_ASKED_FOR,)).fetchone()[0]:
                fault = "it has no search"
    except (sqlite3.Error, OSError, ValueError) as error:  # a name within may be garbled
        fault = first_line(error)
    if fault != "ok":
        raise UsageError(f"{file} is damaged, or not a study of `trpo-jax tune` ({fault.splitlines()[0]}); {_MEND}.")


def _load(folder: Path, storage: str | None, description: Mapping[str, Any]) -> Any:
    """Load the study of a folder, or make it."""
    import optuna
    from sqlalchemy.pool import NullPool

    name = name_of(folder) or "search"
    if storage is not None:
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        if _ASKED_FOR not in study.user_attrs:
            if study.get_trials(deepcopy=False):
                raise UsageError(
                    f"the study {name!r} in {storage} is not one of `trpo-jax tune`; choose another --output."
                )
            study.set_user_attr(_ASKED_FOR, description)
        return study
    file = folder / "study.db"
    if not file.exists():
        _make_database(file, name, description)
    # Connect by path: in a URL the characters ?, # and % of a name would have a meaning.
    connect = lambda: sqlite3.connect(file, timeout=_SECONDS)  # noqa: E731
    found = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": NullPool})
    names = [study.study_name for study in found.get_all_studies() if _ASKED_FOR in study.user_attrs]
    return optuna.load_study(study_name=name if name in names else names[0], storage=found)  # a folder may be renamed


def _make_database(file: Path, name: str, description: Mapping[str, Any]) -> None:
    """Write the database of a new study, completely or not at all."""
    import optuna
    from sqlalchemy.pool import StaticPool

    with contextlib.closing(sqlite3.connect(":memory:", check_same_thread=False)) as memory:
        storage = optuna.storages.RDBStorage(
            "sqlite://", engine_kwargs={"creator": lambda: memory, "poolclass": StaticPool}
        )
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
        study.set_user_attr(_ASKED_FOR, description)
        storage.remove_session()
        data = memory.serialize()
        storage.engine.dispose()
    write_atomically(file, data)


def _checksum(trial: Any, score: float | None) -> int:
    """Checksum of everything about a trial that the sampler and the best settings use."""
    content = [trial.number, trial.user_attrs.get("index"), trial.params, trial.intermediate_values, score]
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def _said(what: str, mend: str) -> Iterator[None]:
    """Turn any error into one sentence that names its first cause."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # each database has its own errors
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UsageError(f"{what} ({first_line(cause)}); {mend}.") from error
