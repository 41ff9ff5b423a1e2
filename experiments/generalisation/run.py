"""How much of what an update gains on its own batch is there on the next batch, which it has not seen.

    python experiments/generalisation/run.py                        # CartPole, Acrobot, Pendulum: minutes on a CPU
    python experiments/generalisation/run.py --env Breakout-MinAtar --preset minatar-cnn --iterations 20 60
    python experiments/generalisation/run.py --run runs/mine        # a trained run, as it stands

A policy is trained, then frozen. Batch after batch of the frozen policy, every update is computed from the batch and
judged on the one after it.
"""

import argparse
import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import trpo_jax
from trpo_jax import (
    Algorithm,
    Batch,
    Config,
    Solver,
    TrainState,
    ValueFit,
    load_preset,
    mean_kl,
    surrogate,
    trpo_update,
)

CASES = [
    ("CartPole-v1", "classic", [3, 6, 60]),
    ("Acrobot-v1", "classic", [6, 15, 60]),
    ("Pendulum-v1", "classic", [15, 60]),
]


class Candidates(NamedTuple):
    """The updates from the newest batch, and what was found of them and of those before.

    Attributes:
      params: parameters after each of the U updates, [U, P].
      own: gain, KL, largest KL, step fraction and residual on the batch that they were computed from, [U, 5].
      judged: for the updates from the batch before: `own`, and gain and KL on the newest batch, [U, 7].
    """

    params: jax.Array
    own: jax.Array
    judged: jax.Array


def natural(damping: float, fraction: float, max_kl: Any) -> Any:
    """A TRPO update: `update(policy_apply, params, batch)` -> (new parameters, `UpdateInfo`)."""
    return functools.partial(trpo_update, max_kl=max_kl, fisher_fraction=fraction, solver=Solver(damping=damping))


def clipped(rate: float, epochs: int) -> Any:
    """PPO's update, by an Adam that knows no earlier batch."""
    optimizer = optax.adam(rate)

    def update(policy_apply: Any, params: jax.Array, batch: Batch) -> tuple[jax.Array, Any]:
        params, _, info = trpo_jax.first_order_update(
            policy_apply,
            params,
            optimizer.init(params),
            batch,
            optimizer=optimizer,
            objective=trpo_jax.clipped_objective(0.2),
            epochs=epochs,
            minibatches=8,
            key=jax.random.key(0),
            max_grad_norm=0.5,
        )
        return params, info

    return update


def updates_of(config: Config) -> dict[str, Any]:
    """The updates that are compared, by name."""
    dampings, fractions = (0.01, 0.1, 1.0, 10.0), (0.1, 1.0)
    trpo = {
        f"TRPO, Fisher on {f:.0%}, damping {d:g}": natural(d, f, config.max_kl) for f in fractions for d in dampings
    }
    return trpo | {
        f"PPO, {epochs} x 8, Adam {rate:g}": clipped(rate, epochs) for rate in (3e-4, 1e-3) for epochs in (1, 4)
    }


def frozen(updates: list[Any]) -> Any:
    """An algorithm that leaves the policy as it is, and computes and judges updates on the way."""

    def init(params: jax.Array, statistics: Any) -> Candidates:
        number = len(updates)
        return Candidates(jnp.tile(params, (number, 1)), jnp.zeros((number, 5)), jnp.zeros((number, 7)))

    def update(policy_apply: Any, params: jax.Array, state: Candidates, experience: Any, key: Any) -> Any:
        batch = experience.batch
        old = policy_apply(params, batch.observation)
        old_log_prob = old.log_prob(batch.action)

        def judge(candidate: jax.Array) -> jax.Array:
            new = policy_apply(candidate, batch.observation)
            gain = surrogate(new, old_log_prob, batch.action, batch.advantage) - jnp.mean(batch.advantage)
            return jnp.stack([gain, mean_kl(old, new)])

        judged = jnp.concatenate([state.own, jax.lax.map(judge, state.params)], axis=1)
        found, own = [], []
        for one in updates:
            new_params, info = one(policy_apply, params, batch)
            found.append(new_params)
            own.append([info.surrogate_gain, info.mean_kl, info.maximum_kl, info.step_fraction, info.cg_residual])
        return params, Candidates(jnp.stack(found), jnp.array(own), judged), info

    return lambda config: Algorithm(init, update)


def no_fit(config: Config) -> ValueFit:
    """A value fit that leaves the value function as it is."""
    return ValueFit(lambda params: None, lambda apply, params, state, targets, key: (params, state, jnp.float32(0)))


def measure(config: Config, trained: TrainState, num_batches: int) -> list[dict[str, Any]]:
    """A row of figures per update: means over batches, and the standard error of the held-out gain."""
    updates = updates_of(config)
    probe = config.replace(update=frozen(list(updates.values())), value_fit=no_fit, reuse=1)
    state = trpo_jax.warm_start(probe, jax.random.key(1), trained)
    step = jax.jit(trpo_jax.train_step)
    judged = []
    # Environments start afresh: the first batches are not those that the policy sees in the long run.
    skipped = max(2, num_batches // 4)
    for _ in range(skipped + num_batches):
        state, _ = step(probe, state)
        judged.append(np.asarray(state.learner.update.judged))
    figures = np.array(judged[skipped:])  # [batches, U, 7]
    means, error = figures.mean(axis=0), figures[:, :, 5].std(axis=0, ddof=1) / num_batches**0.5
    names = ("gain", "kl", "maximum_kl", "step_fraction", "cg_residual", "held_out_gain", "held_out_kl")
    return [
        {"update": name, **{k: float(f"{v:.4g}") for k, v in zip(names, row, strict=True)}, "error": float(f"{e:.2g}")}
        for name, row, e in zip(updates, means, error, strict=True)
    ]


def cases(arguments: argparse.Namespace) -> Any:
    """Configs with their policies: (config, state, iterations done)."""
    if arguments.run:
        config, state = trpo_jax.load_run(arguments.run, agent=0)
        yield config, state, int(state.iteration)
        return
    chosen = [(arguments.env, arguments.preset, arguments.iterations)] if arguments.env else CASES
    for env, preset, iterations in chosen:
        config = Config(env=env, **load_preset(preset).settings).replace(num_iterations=max(iterations))
        state, step = jax.jit(trpo_jax.init)(config, jax.random.key(7)), jax.jit(trpo_jax.train_step)
        for iteration in range(1, max(iterations) + 1):
            state, _ = step(config, state)
            if iteration in iterations:
                yield config, state, iteration


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task | iterations | parameters | samples | update | KL | largest KL | step fraction | CG residual "
        "| gain | held-out gain | per √(2 KL) |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        rate = row["held_out_gain"] / (2 * row["held_out_kl"]) ** 0.5 if row["held_out_kl"] > 0 else 0.0
        lines.append(
            f"| {row['env']} | {row['iterations']} | {row['parameters']:,} | {row['samples']:,} | {row['update']} "
            f"| {row['kl']:.3f} | {row['maximum_kl']:.2g} | {row['step_fraction']:.2f} | {row['cg_residual']:.2g} "
            f"| {row['gain']:.4f} | {row['held_out_gain']:.4f} ± {row['error']:.4f} | {rate:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", help="one task, instead of three of classic control")
    parser.add_argument("--preset", default="classic", help="its settings")
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=[15, 60], help="how long its policies were trained"
    )
    parser.add_argument("--run", type=Path, help="a run's folder, instead; its first agent")
    parser.add_argument("--num-batches", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/generalisation"), help="folder for the results")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for config, state, iterations in cases(arguments):
        env = getattr(config.env, "name", config.env)
        size = sum(leaf.size for leaf in jax.tree.leaves(state.learner.policy_params))
        about = {"env": env, "iterations": iterations, "parameters": size, "samples": config.steps_per_iteration}
        new = [about | row for row in measure(config, state, arguments.num_batches)]
        rows += new
        sys.stdout.write(table(new))
        sys.stdout.flush()
    arguments.output.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("jax", "gymnax", "trpo_jax")}
    record = {"device": jax.devices()[0].device_kind, **versions, "num_batches": arguments.num_batches, "rows": rows}
    (arguments.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "results.md").write_text(table(rows))


if __name__ == "__main__":
    main()
