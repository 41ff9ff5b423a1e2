"""MuJoCo Playground: the DeepMind control suite, manipulation and locomotion in MJX."""

from __future__ import annotations

from typing import Any

from trpo_jax.environments.base import Environment
from trpo_jax.environments.brax import from_brax
from trpo_jax.environments.suites import check_name, quiet_mujoco, require
from trpo_jax.environments.wrappers import limit_steps, repeat_actions
from trpo_jax.sentences import UsageError, first_line


def make(name: str, options: dict[str, Any], max_steps: int | None) -> Environment:
    """Build `playground/{name}`; `options` override entries of its configuration."""
    check_name(name, "playground", names())
    registry = require("mujoco_playground", "playground").registry
    full_name = f"playground/{name}"
    config = registry.get_default_config(name)
    options = dict(options)
    draw = options.pop("randomization_fn", None)
    overrides = {"impl": "jax", **options}  # the default, "warp", is for CUDA only
    if "impl" not in config and "impl" not in options:
        del overrides["impl"]

    try:
        with quiet_mujoco():
            env = registry.load(name, config_overrides=overrides)
    except OSError as error:
        raise UsageError(f"{full_name} cannot be made ({first_line(error)}).") from error
    except Exception as error:
        # Robots' models are not in the package: a git clone fetches them when they are first needed.
        if type(error).__name__ != "CalledProcessError":
            raise
        raise UsageError(
            f"{full_name} needs robot models (mujoco_menagerie) that could not be downloaded; make it once with a "
            "network connection, and they are kept."
        ) from error
    config = env._config  # with the overrides
    environment = repeat_actions(from_brax(env, full_name, randomization_fn=draw), int(config.action_repeat))
    limit = int(config.episode_length) // int(config.action_repeat)
    return limit_steps(environment, limit if max_steps is None else min(limit, max_steps))


def names() -> list[str]:
    """Names of Playground's environments."""
    return sorted(require("mujoco_playground", "playground").registry.ALL_ENVS)
