"""Arguments from Python: what a folder cannot hold or a program cannot use is one sentence, and leaves nothing."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from trpo_jax import (
    Config,
    UsageError,
    compare,
    continue_run,
    create_run,
    evaluate,
    init,
    load_agent,
    load_run,
    make_environment,
    open_run,
    probability_of_improvement,
    run_sweep,
    shard_environments,
    stratified_bootstrap,
    sweep,
    train,
    train_step,
    warm_start,
)
from trpo_jax.cli import main
from trpo_jax.deployment import export_policy
from trpo_jax.runs.descriptions import origin
from trpo_jax.sweeps.grids import Spec, make_spec, read_spec
from trpo_jax.sweeps.reports import make_report
from trpo_jax.sweeps.search import tune
from trpo_jax.sweeps.storage import Folder
from trpo_jax.training.checkpoints import load, save
from trpo_jax.training.devices import devices_of

TINY = {"num_envs": 2, "num_steps": 4, "num_iterations": 1, "cg_iterations": 1, "value_cg_iterations": 1}
CONFIG = Config(**TINY)
SPEC = Spec(base=TINY, grid={"max_kl": [0.01, 0.02]}, num_episodes=0)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"num_seeds": 0}, "num_seeds must be a whole number"),
        ({"num_seeds": 1.5}, "num_seeds must be a whole number"),
        ({"keep_every": -1}, "keep_every must be a whole number"),
        ({"seed": 2**31 - 1, "num_seeds": 2}, "the largest seed"),
        ({"init_from": "runs/a"}, "init_from must be a TrainState"),
    ],
    ids=str,
)
def test_a_run_is_not_made_from_wrong_numbers(changes, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        create_run(tmp_path / "run", CONFIG, **{"seed": 0, "num_seeds": 1} | changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_holds_numbers_of_numpy_and_no_objects(tmp_path):
    config = dataclasses.replace(CONFIG, num_envs=np.int64(2), max_kl=jax.numpy.float32(0.25))
    create_run(tmp_path / "run", config, np.int64(1), np.int64(2))
    create_run(tmp_path / "run", CONFIG.replace(max_kl=0.25), 1, 2)  # the same one
    found = open_run(tmp_path / "run")
    assert (found.seed, found.num_seeds, found.config.max_kl, found.config.num_envs) == (1, 2, 0.25, 2)
    with pytest.raises(UsageError, match=r"^env in a folder must be a name or numbers"):
        create_run(tmp_path / "other", CONFIG.replace(env=make_environment("CartPole-v1")), 0, 1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_seeds": 0}, "num_seeds in the sweep must be"),
        ({"num_seeds": 1.5}, "num_seeds in the sweep must be"),
        ({"seed": -1}, "seed in the sweep must be"),
        ({"seed": 2**31 - 1, "num_seeds": 2}, "the largest seed"),
        ({"keep": "x"}, "keep in the sweep must be"),
        ({"num_episodes": -1}, "num_episodes in the sweep must be"),
        ({"grid": {"max_kl": []}}, "max_kl in .grid. of the sweep must be a list"),
        ({"grid": {"num_envs": [2]}}, "num_envs is set in more than one section"),
        ({"zip": {"gamma": [0.9, 0.99], "gae_lambda": [0.9]}}, "must have the same length"),
        ({"random": {"gamma": {"uniform": [0.9, 0.99]}}}, "needs count"),
        ({"base": None}, "base in the sweep must be a table"),
    ],
    ids=str,
)
def test_a_sweep_from_python_is_checked_like_one_from_a_file(changes, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        run_sweep(tmp_path / "sweep", dataclasses.replace(SPEC, **changes))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"process": (0, 0)}, "num_processes must be a whole number from 1"),
        ({"process": (2, 2)}, "process 2 of 2 does not exist"),
        ({"process": (-1, 2)}, "process_id must be a whole number from 0"),
        ({"most_agents": 0}, "agents_per_device must be a whole number from 1"),
        ({"most_agents": -1}, "agents_per_device must be a whole number from 1"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must lie in"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds must lie in"),
        ({"spec": {"base": TINY}}, "spec must be a Spec"),
    ],
    ids=str,
)
def test_how_a_sweep_runs_is_checked_before_its_folder_is_made(arguments, sentence, tmp_path):
    with pytest.raises(UsageError, match=f"^{sentence}"):
        run_sweep(tmp_path / "sweep", **{"spec": SPEC} | arguments)
    assert not (tmp_path / "sweep").exists()


def test_a_search_from_python_is_checked_like_one_from_a_file(tmp_path):
    spec = dataclasses.replace(SPEC, grid={}, random={"gamma": {"uniform": [0.9, 0.99]}})
    with pytest.raises(UsageError, match="needs count"):
        tune(tmp_path / "search", spec)
    assert not (tmp_path / "search").exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep whose values and numbers are NumPy's."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    grid = {"max_kl": np.array([0.25, 0.5], np.float32)}
    assert run_sweep(folder, dataclasses.replace(SPEC, grid=grid, num_seeds=np.int64(1), keep="all")) == "complete"
    return folder


def test_agents_are_named_by_whole_numbers(swept):
    assert load_agent(swept, np.int64(1), 0)[0].max_kl == 0.5
    for wrong in ({"point": [0, 1]}, {"seed": True}, {"seed": np.array([0, 1])}):
        with pytest.raises(UsageError, match="must be a whole number"):
            load_agent(swept, **wrong)
    assert len(compare(str(swept), by="max_kl").methods) == 2
    with pytest.raises(UsageError, match="needs the folder of a run or a sweep"):
        compare([])


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": {"env": {"evil:make_env": 1}}},
        {"before": [{"base": TINY, "grid": {"env": ["evil:make_env"]}}]},
        {"before": "x"},
        {"before": [3]},
        {"before": [{"base": 3}]},
        {"base": None},
        {"random": {"gamma": 1}},
        {"seed": "x"},
    ],
    ids=str,
)
def test_a_changed_sweep_json_is_one_sentence_and_imports_nothing(changes, swept, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    file = swept / "sweep.json"
    before = file.read_bytes()
    table = {"begun_as": origin(file), **json.loads(before), **changes}
    table.pop("checksum")
    try:
        file.write_text(json.dumps(table))
        assert main(["evaluate", str(swept), "--num-episodes", "1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "sweep.json" in error
    finally:
        file.write_bytes(before)


def test_what_a_sweep_lacks_is_named(swept, tmp_path):
    program = Folder(swept).path / "programs" / "00.json"
    program.rename(tmp_path / "00.json")
    try:
        with pytest.raises(UsageError, match=r"lacks programs/00\.json; the command of the sweep"):
            load_agent(swept, 0, 0)
    finally:
        (tmp_path / "00.json").rename(program)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((None, {}), "sweep takes a Config and a grid"),
        ((CONFIG, None), "sweep takes a Config and a grid"),
        ((CONFIG, [("max_kl", [0.1])]), "sweep takes a Config and a grid"),
        ((CONFIG, {3: [1]}), "the grid must name settings"),
        ((CONFIG, {3: [1], "max_kl": [0.1]}), "the grid must name settings"),
        ((CONFIG, {"max_kl": np.float32(0.1)}), "must be a list of values"),
    ],
    ids=str,
)
def test_a_sweep_in_memory_checks_its_arguments(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        sweep(*arguments, jax.random.key(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: sweep(CONFIG, {}, jax.random.key(x.astype(int))),
        lambda x: sweep(CONFIG, {"max_kl": [x, 0.1]}, jax.random.key(0)),
        lambda x: sweep(dataclasses.replace(CONFIG, max_kl=x), {}, jax.random.key(0)),
    ],
    ids=("key", "grid", "config"),
)
def test_a_sweep_inside_jit_is_refused(call):
    with pytest.raises(UsageError, match=r"^sweep compiles and runs by itself, so it cannot be called inside jit"):
        jax.jit(call)(0.1)


def test_keys_and_devices_of_a_sweep_are_checked():
    own = define_prng_impl(
        key_shape=(2,), seed=lambda seed: jnp.zeros(2, jnp.uint32), split=None, random_bits=None, fold_in=None
    )
    with pytest.raises(UsageError, match=r"^sweeps need a key of one of JAX's own types, got key<"):
        sweep(CONFIG, {}, jax.random.key(0, impl=own))
    for wrong in ([], 1, jax.devices()[0]):
        with pytest.raises(UsageError, match=r"^devices must be a list of one or more"):
            sweep(CONFIG, {"max_kl": [0.01]}, jax.random.key(0), devices=wrong)
        with pytest.raises(UsageError, match=r"^devices must be a list of one or more"):
            shard_environments(init(CONFIG, jax.random.key(0)), wrong)
    for number in (0, -1, 1.5):
        with pytest.raises(UsageError, match=r"^num_devices must be a whole number"):
            devices_of(number, 4, 1)


def test_a_table_that_is_no_table_is_one_sentence():
    for wrong in (None, []):
        with pytest.raises(UsageError, match=r"^the sweep must be a table"):
            make_spec(wrong)


def test_a_checkpoint_may_be_named_by_a_number(tmp_path):
    create_run(tmp_path / "run", CONFIG, 0, 1)
    for wrong in (None, 1.5, True):
        with pytest.raises(UsageError, match=r"^checkpoint must be best, last or a number"):
            load_run(tmp_path / "run", checkpoint=wrong)
    with pytest.raises(UsageError, match=r"^trained must be a TrainState"):
        warm_start(CONFIG, jax.random.key(0), None)


@pytest.fixture(scope="module")
def trained():
    config = Config(env="CartPole-v1", num_envs=4, num_steps=16, num_iterations=1, hidden=(8,))
    return config, jax.jit(init)(config, jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": (4,)}, r"policy_params\['params'\]\['Dense_0'\]\['bias'\] is \[8\], but they need \[4\]"),
        ({"env": "Acrobot-v1"}, r"policy_params.* is \[4, 8\], but they need \[6, 8\]"),
        ({"value_hidden": (4,)}, r"value_params.* is \[8\], but they need \[4\]"),
        ({"num_envs": 8}, r"\['observation'\] is \[4, 4\], but they need \[8, 4\]"),
        ({"update": "ppo"}, "update.* is missing"),
        ({"value_fit": "adam"}, "value_fit.* is missing"),
        ({"normalize_rewards": True}, "return_statistics.count is missing"),
        ({"reuse": 2}, "not trained with reuse=2"),
        ({"network": "gru", "hidden": (8,)}, "GRUCell.* is missing"),
    ],
)
def test_training_goes_on_only_from_a_state_that_fits(trained, changes, named):
    config, state = trained
    with pytest.raises(UsageError, match=named):
        jax.eval_shape(train_step, config.replace(**changes), state)


def test_only_a_state_that_fits_can_act(trained, tmp_path):
    config, state = trained
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    wider = config.replace(hidden=(4,))
    for act in (
        lambda config, state: jax.eval_shape(evaluate, config, state, jax.random.key(0)),
        lambda config, state: export_policy(config, state, tmp_path),
    ):
        with pytest.raises(UsageError, match=r"is \[8\], but they need \[4\]; use the settings"):
            act(wider, state)
        with pytest.raises(UsageError, match=r"is \[2, 8\], but they need \[8\]; .* jax.vmap for several agents"):
            act(config, many)
        with pytest.raises(UsageError, match="state must be a TrainState"):
            act(config, state.learner)
        with pytest.raises(UsageError, match="config must be a Config"):
            act(state, config)
    with pytest.raises(UsageError, match="state must be a TrainState"):
        shard_environments(3)
    jax.eval_shape(jax.vmap(lambda state: evaluate(config, state, jax.random.key(0))), many)
    jax.eval_shape(evaluate, config.replace(num_envs=8, value_hidden=(4,)), state, jax.random.key(0))


def test_a_run_of_another_environment_is_not_loaded_as_this_one(tmp_path):
    create_run(tmp_path, CONFIG, seed=0, num_seeds=1)
    with pytest.raises(UsageError, match="was trained on 'CartPole-v1', but env is 'Acrobot-v1'; leave env out"):
        load_run(tmp_path, env="Acrobot-v1")
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        load_run(tmp_path, env="CartPole-v1")


@pytest.mark.parametrize("path", ["a\0b", b"a", 3, None], ids=repr)
def test_what_is_no_path_is_one_sentence(path):
    state = {"a": jnp.zeros(2)}
    for use in (
        lambda: create_run(path, CONFIG, seed=0, num_seeds=1),
        lambda: open_run(path),
        lambda: load_run(path),
        lambda: load_agent(path),
        lambda: run_sweep(path, SPEC),
        lambda: make_report(path),
        lambda: read_spec(path),
        lambda: compare([path]),
        lambda: compare(path),
        lambda: save(path, state),
        lambda: load(path, state),
    ):
        with pytest.raises(UsageError, match="is not the path of a file or folder"):
            use()


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_checkpoint_is_not_saved_as_a_folder(path):
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        save(path, {"a": jnp.zeros(2)})


@pytest.mark.parametrize("leaf", [3, 2.5, "text", object, np.array(["a"]), np.array([None])], ids=repr)
def test_a_checkpoint_holds_arrays_alone(leaf, tmp_path):
    with pytest.raises(UsageError, match=r"holds arrays of numbers, but \['a'\] is"):
        save(tmp_path / "x.npz", {"a": leaf})
    save(tmp_path / "x.npz", {"a": np.zeros(2)})
    with pytest.raises(UsageError, match=r"holds arrays of numbers, but \['a'\] is"):
        load(tmp_path / "x.npz", {"a": leaf})


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: continue_run("runs/a"), "run must be what create_run or open_run returned, got"),
        (lambda: train(TINY, jax.random.key(0)), "config must be a Config, such as"),
        (lambda: train(Config, jax.random.key(0)), "config must be a Config, such as"),
        (
            lambda: train(CONFIG.replace(update=lambda config: 3), jax.random.key(0)),
            "function update must return an ob",
        ),
        (
            lambda: train(CONFIG.replace(value_fit=lambda config: 3), jax.random.key(0)),
            "function value_fit must return",
        ),
        (lambda: stratified_bootstrap(np.arange(3.0)), "scores must be a list of one array per task, got"),
        (lambda: probability_of_improvement([[1, 2]], [[1, 2], [3]]), "of the same tasks, got 1 and 2 tasks"),
    ],
)
def test_what_is_no_run_no_config_or_no_algorithm_is_one_sentence(call, sentence):
    with pytest.raises(UsageError, match=sentence):
        call()


def test_env_args_cannot_be_changed_and_survive_a_copy():
    config = Config(env_args={"gravity": 9.0})
    for change in (
        lambda a: a.update(gravity=3.0),
        lambda a: a.pop("gravity"),
        lambda a: a.__setitem__("gravity", 3.0),
    ):
        with pytest.raises(TypeError, match=r"^env_args cannot be changed; give others with config\.replace"):
            change(config.env_args)
    copied = copy.deepcopy(config)
    assert copied == config and copied.env_args.traced == ("gravity",)
