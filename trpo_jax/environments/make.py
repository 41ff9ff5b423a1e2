"""Construction of an `Environment` from a name or an object, and the list of all environments."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any, cast

import jax

from trpo_jax.config import Config
from trpo_jax.env_args import EnvArgs
from trpo_jax.environments import gymnax, suites
from trpo_jax.environments.base import Environment
from trpo_jax.environments.changes import apply_wrappers, draw_settings
from trpo_jax.environments.checks import check_declaration, check_space, one_sentence
from trpo_jax.environments.wrappers import limit_steps
from trpo_jax.fields import NONE, parse_ranges
from trpo_jax.sentences import UsageError, check_limits, nearest, shown

_sound: weakref.WeakSet[Environment] = weakref.WeakSet()  # checked, or built here


def make_environment(env: Any, *, params: Any = None, max_steps: int | None = None) -> Environment:
    """Make an `Environment`, the interface that the trainer uses, from a name or an object.

    Args:
      env: a gymnax name such as "CartPole-v1"; the name of another suite's with its prefix, such as "brax/hopper";
        "MODULE:FACTORY", a function in a module to import that takes `params` as keyword arguments and returns an
        environment; an `Environment`, returned as it is; or an object with gymnax's `reset(key, params)`, six-value
        `step(key, state, action, params)` and `action_space(params)`.
      params: the environment's own parameters, or a dict of those that differ from its `default_params`. An object
        without any is called without that argument. For a suite other than gymnax, a dict of keyword arguments of its
        constructor.
      max_steps: a time limit in steps, in addition to the environment's own.

    Raises:
      UsageError: if the name is unknown or the environment cannot be trained, in one sentence.
    """
    check_limits({"max_steps": max_steps})
    if isinstance(env, Environment):
        if params is not None or max_steps is not None:
            raise UsageError(
                f"{env.name} is an Environment already; set a time limit with limit_steps, params where it is made."
            )
        if env not in _sound:
            check_declaration(env)
            _sound.add(env)
        return env
    if isinstance(env, str) and params is None and max_steps is None:
        return _by_name(env, EnvArgs(), None)
    if isinstance(env, str) and isinstance(params, EnvArgs) and not params.traced:  # of a `Config`
        return _by_name(env, params, max_steps)
    return _build(env, params, max_steps)


@functools.lru_cache(maxsize=64)
def _by_name(name: str, params: EnvArgs, max_steps: int | None) -> Environment:
    # Cached so that every trace of the same configuration closes over the same environment. One with traced parameters
    # is not cached: it ends with its trace.
    return _build(name, params or None, max_steps)


def environment_of(config: Config) -> Environment:
    """Make the environment of a configuration, with its settings, its time limit and its wrappers.

    Raises:
      UsageError: if it cannot be made.
    """
    params = config.env_args if config.env_args or isinstance(config.env, str) else None
    max_steps = config.max_steps or None
    if config.wrappers == config.randomize == NONE:
        return make_environment(config.env, params=params, max_steps=max_steps)
    # Cached as `_by_name` is, and for the same reason.
    changed = _changed.__wrapped__ if cast("EnvArgs", config.env_args).traced else _changed
    return changed(config.env, params, max_steps, config.randomize, config.wrappers)


@functools.lru_cache(maxsize=64)
def _changed(env: Any, params: Any, max_steps: int | None, randomize: Any, names: str) -> Environment:
    return apply_wrappers(_randomized(env, params, max_steps, randomize), names)


def _randomized(env: Any, params: Any, max_steps: int | None, randomize: Any) -> Environment:
    """Draw what `randomize` names for each episode, from ranges or by a function."""
    suite = env.partition("/")[0] if isinstance(env, str) and "/" in env else ""
    if callable(randomize):
        if suite not in ("brax", "playground"):
            raise UsageError(f"randomize may be a function for brax/ and playground/ only, but env is {shown(env)}.")
        return _build(env, {**(params or {}), "randomization_fn": randomize}, max_steps)
    ranges = parse_ranges(randomize)
    if not ranges:
        return make_environment(env, params=params, max_steps=max_steps)
    if suite or isinstance(env, Environment) or (isinstance(env, str) and ":" in env):
        raise UsageError(f"randomize draws parameters of gymnax's environments only, but env is {shown(env)}.")
    for name in ranges if isinstance(env, str) else ():
        if not gymnax.is_traceable(env, name):
            known = [one for one in gymnax.parameters(env) if gymnax.is_traceable(env, one)]
            raise UsageError(f"{env} has no parameter {name} that can be drawn; it has {', '.join(known)}.")

    def make(values: Mapping[str, Any]) -> Environment:
        return _of_name(env, values, max_steps) if isinstance(env, str) else _of_object(env, values, max_steps)

    given = dict(params or {})
    base = make_environment(env, params=params, max_steps=max_steps)
    return draw_settings(base, lambda values: make({**given, **values}), ranges)


def mark_traced(config: Config) -> Config:
    """Mark those of the `env_args` of `config` as traced that can be traced.

    These are the floats of the environment, even if given as whole numbers, except those that bound its actions.
    """
    env, args = config.env, config.env_args
    if not args or not isinstance(env, str) or "/" in env or ":" in env:
        return config
    traced = {name for name in args if gymnax.is_traceable(env, name)}
    values = {name: float(v) if name in traced and type(v) is int else v for name, v in args.items()}
    return config.replace(env_args=EnvArgs(values, traced))


def _build(env: Any, params: Any, max_steps: int | None) -> Environment:
    # Evaluated at once even inside a trace, imports included: modules and environments keep the arrays that they make,
    # and a tracer must not outlive its trace.
    with jax.ensure_compile_time_eval():
        environment = _of_name(env, params, max_steps) if isinstance(env, str) else _of_object(env, params, max_steps)
    check_space(environment.action_space, environment.name)
    _sound.add(environment)
    return environment


def _of_name(name: str, params: Any, max_steps: int | None) -> Environment:
    suite, slash, _ = name.partition("/")
    if slash and suite in suites.SUITES:
        if not isinstance(params, (dict, type(None))):
            raise UsageError(f"params of {name} must be a dict of keyword arguments, got {params!r}.")
        return suites.make_by_name(name, params or {}, max_steps)
    if slash:
        raise UsageError(f"there is no suite {suite!r}{nearest(suite, suites.SUITES)} `trpo-jax envs` lists them.")
    if ":" in name:
        return _of_factory(name, params or {}, max_steps)
    env, defaults = gymnax.make_by_name(name)
    if not isinstance(params, (dict, type(None), type(defaults))):
        raise UsageError(f"params of {name} must be a dict of changes, or an object with all of them, got {params!r}.")
    return gymnax.from_object(env, params, name, max_steps)


def _of_factory(name: str, params: dict[str, Any], max_steps: int | None) -> Environment:
    """Call a user's function, `MODULE:FACTORY`; modules of the working directory are found, too."""
    module_name, _, factory_name = name.partition(":")
    if not (factory_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UsageError(f"env must be MODULE:FACTORY to name a function that makes it, got {shown(name)}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with one_sentence(f"import of {module_name}"):
        module = importlib.import_module(module_name)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        functions = [known for known, value in vars(module).items() if callable(value)]
        raise UsageError(f"{module_name} has no function {factory_name}{nearest(factory_name, functions)}")
    with one_sentence(name):
        made = factory(**params)
    if not isinstance(made, Environment):
        return _of_object(made, None, max_steps)
    check_declaration(made)
    return made if max_steps is None else limit_steps(made, max_steps)


def _of_object(env: Any, params: Any, max_steps: int | None) -> Environment:
    if env is None or isinstance(env, (int, float, complex, bytes, list, tuple, dict, set)):
        raise UsageError(f"env must be a name, an Environment or an environment object, got {shown(env)}.")
    if isinstance(env, type):
        raise UsageError(f"env must be an environment, but {env.__name__} is a class; give one of its instances.")
    name = env.name if isinstance(getattr(env, "name", None), str) else type(env).__name__
    suite = _suite_of(env)
    if suite is not None:
        own_name = getattr(getattr(env, "spec", None), "id", None) or "NAME"
        raise UsageError(
            f'{name} is an environment object of {suite}; give its name instead, such as env="{suite}/{own_name}".'
        )
    return gymnax.from_object(env, params, name, max_steps)


def _suite_of(env: Any) -> str | None:
    """The suite to whose interface an object belongs, if that is not gymnax's."""
    modules = {cls.__module__.partition(".")[0] for cls in type(env).__mro__}
    packages = {suites.PACKAGES.get(suite, suite): suite for suite in suites.SUITES} | {"gym": "gymnasium"}
    of_package = [suite for package, suite in packages.items() if package in modules]
    if of_package and of_package != ["craftax"]:  # whose interface is close to gymnax's
        return of_package[0]
    return None


def available_environments() -> dict[str, Environment | str]:
    """All environments by name, each as an `Environment` or a sentence that says why it cannot be made here.

    A suite other than gymnax takes long to build, so it has one entry, its prefix, and one sentence: the names of its
    environments, or what to install.
    """
    found: dict[str, Environment | str] = {}
    for name in gymnax.registered_names():
        try:
            found[name] = make_environment(name)
        except UsageError as error:
            found[name] = str(error)
    for suite in suites.SUITES:
        try:
            found[f"{suite}/"] = f"{suite}/: {', '.join(suites.adapter(suite).names())}."
        except UsageError as error:
            found[f"{suite}/"] = str(error)
    return found
