"""Checks that settings go together, and that they have an effect."""

from __future__ import annotations

from collections.abc import Iterator

from trpo_jax.config import FIELDS, Config, check_setting
from trpo_jax.fields import as_text
from trpo_jax.sentences import UsageError, shown

IN_ENVIRONMENT = "channels", "initial_log_std", "state_dependent_std"  # some environments have no use for these
_MOST_SAMPLES = 2**31 - 1  # largest index in an int32
_REFUSED = "constraint", "radius_rule", "reuse", "value_clip"  # these need a certain method
_OF_NETWORKS = (
    "hidden",
    "value_hidden",
    "activation",
    "layer_norm",
    "initialisation",
    "action_distribution",
    "value_observation",
)  # networks of the user's have their own layers


def validate(config: Config) -> None:
    """Check every setting with a concrete value, and whether they go together; raise `UsageError` with one sentence.

    Traced values cannot be inspected and pass. Arrays of values (a sweep) are checked value by value.
    """
    if not isinstance(config, Config):
        raise UsageError(f"config must be a Config, such as Config(env='CartPole-v1'), got {shown(config)}.")
    for name, field in FIELDS.items():
        if (value := getattr(config, name)) is not field.default:
            check_setting(name, value)
    for name, number in minibatches(config):
        if config.steps_per_iteration % number:
            raise UsageError(
                f"{name}={number} does not divide the batch of num_envs x num_steps = {config.num_envs} x "
                f"{config.num_steps} = {config.steps_per_iteration}; choose a divisor of it."
            )
    if (samples := config.steps_per_iteration * config.reuse) > _MOST_SAMPLES:
        raise UsageError(
            f"num_envs x num_steps x reuse = {samples:,} samples per update are more than {_MOST_SAMPLES:,}; lower one "
            "of them."
        )
    if config.eval_every > config.num_iterations:
        raise UsageError(
            f"eval_every={config.eval_every} is more than num_iterations={config.num_iterations}, so nothing "
            "would be evaluated; lower it."
        )
    low, high = config.smallest_max_kl, config.largest_max_kl
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise UsageError(f"smallest_max_kl must not be above largest_max_kl, got {low} and {high}.")
    for name in (*_REFUSED, *_OF_NETWORKS):
        value, default = getattr(config, name), FIELDS[name].default
        if isinstance(value, (int, float, str, tuple)) and value != default and (why := without_effect(config, name)):
            raise UsageError(f"{name}={as_text(value)} {why}.")
    if config.network == "gru" and () in (config.hidden, config.shared_trunk or config.value_hidden):
        raise UsageError("network=gru needs at least one width in hidden and value_hidden, its units.")


def minibatches(config: Config) -> Iterator[tuple[str, int]]:
    """Names and numbers of the minibatches that these settings define; a method of the user's may use none."""
    for name, method in (("value_minibatches", config.value_fit), ("policy_minibatches", config.update)):
        if isinstance(method, str) and not without_effect(config, name):
            yield name, getattr(config, name)


def without_effect(config: Config, name: str) -> str:
    """Why a setting has no effect with the others: "needs update=ppo; with …"; empty if it has one."""
    alternatives = FIELDS[name].metadata["used"]
    missing: list[str] = []
    for conditions in alternatives:
        chosen = {n: getattr(config, n) for n in conditions}
        unmet = [
            n
            for n, values in conditions.items()
            if (chosen[n] not in values and not callable(chosen[n])) or without_effect(config, n)
        ]
        if not unmet:
            return ""
        missing.append(unmet[0])
    if not alternatives:
        return ""
    needs = [
        f"{unmet}={' or '.join(map(str, conditions[unmet]))}"
        for unmet, conditions in zip(missing, alternatives, strict=True)
    ]
    found = " and ".join(
        f"{unmet}={'a Network' if hasattr(chosen, 'initial_carry') else as_text(chosen)}"
        for unmet in dict.fromkeys(missing)
        for chosen in (getattr(config, unmet),)
    )
    return f"needs {' or '.join(dict.fromkeys(needs))}; with {found} it has no effect"
