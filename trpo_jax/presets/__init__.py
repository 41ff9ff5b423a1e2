"""Presets: the settings of the published result tables, one file per suite and method."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trpo_jax.config import Config
from trpo_jax.sentences import UsageError, nearest, shown
from trpo_jax.settings import TOTAL_STEPS, checked_settings, read_toml

_FOLDER = Path(__file__).parent
_LENGTH = (TOTAL_STEPS, "num_iterations")
# If an environment is in several tables, its preset is that of the first.
_ORDER = (
    *("classic", "mujoco", "mujoco-large", "mujoco-swimmer", "box2d", "brax"),
    *("minatar-cnn", "minatar", "gridworlds", "memory", "gymnax"),
)


class Preset(NamedTuple):
    """Settings for all tasks of a suite.

    Attributes:
      name: name of the preset.
      about: one sentence about its purpose.
      settings: settings of `Config`, by name.
      tasks: env steps per agent in the table of results, by the environment's name.
    """

    name: str
    about: str
    settings: Mapping[str, Any]
    tasks: Mapping[str, int]

    def settings_for(self, env: str | None) -> dict[str, Any]:
        """The settings, with `total_steps` from the table of results if the environment is in it."""
        length = {TOTAL_STEPS: self.tasks[env]} if env is not None and env in self.tasks else {}
        return {**self.settings, **length}


def available_presets() -> list[str]:
    """Names of the presets: those of TRPO in the order in which one is chosen for an environment, then the others."""
    found = sorted(file.stem for file in _FOLDER.glob("*.toml"))
    return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def load_preset(name: str) -> Preset:
    """Load a preset by its name, such as "classic"; raise `UsageError` if there is none."""
    if not isinstance(name, str) or name not in available_presets():
        hint = nearest(name, available_presets()) if isinstance(name, str) else "."
        raise UsageError(f"there is no preset {shown(name)}{hint} `trpo-jax presets` lists them.")
    file = f"{name}.toml"
    table = read_toml(_FOLDER / file)
    about, tasks = table.pop("about"), table.pop("tasks")
    return Preset(name, about, checked_settings(table, file), tasks)


def preset_of(env: str) -> Preset:
    """The first preset with an environment in its table of results; raise `UsageError` if there is none."""
    presets = map(load_preset, available_presets())
    found = next((preset for preset in presets if env in preset.tasks), None)
    if found is None:
        raise UsageError(
            f"no preset has {shown(env)}; choose one, such as --preset {_ORDER[0]}: `trpo-jax presets` lists them."
        )
    return found


def with_preset(
    table: Mapping[str, Any], source: str, *, env: str | None = None, elsewhere: Container[str] = ()
) -> dict[str, Any]:
    """Check the settings in a file; if `preset` in it names a preset, they change that one's settings.

    Args:
      table: settings, in the form of the file.
      source: the file, for messages.
      env: the environment, if it is named outside of the file.
      elsewhere: names of settings that are set in other places.
    """
    own = checked_settings({name: value for name, value in table.items() if name != "preset"}, source)
    if "preset" not in table:
        return own
    env = None if "env" in elsewhere else env or own.get("env", Config.env)
    return changed(load_preset(table["preset"]), own, env, elsewhere=elsewhere)


def changed(
    preset: Preset, own: Mapping[str, Any], env: str | None, *, elsewhere: Container[str] = ()
) -> dict[str, Any]:
    """The settings of a preset for an environment, changed by `own`, which may also set another length.

    Those that are set `elsewhere` are left out.
    """
    settings = {name: value for name, value in preset.settings_for(env).items() if name not in elsewhere}
    if any(name in own or name in elsewhere for name in _LENGTH):
        settings.pop(TOTAL_STEPS, None)
    return {**settings, **own}
