"""Placing agents: programs for blocks of them, as many as memory holds, apart from each other, on every device."""

import logging
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest
from probes import Faulty, RewardedAction, raw, same_bits, small_config

from trpo_jax import Config, UsageError, sweep, train
from trpo_jax.runs.metrics import METRICS
from trpo_jax.sweeps import placement
from trpo_jax.sweeps.grids import Spec
from trpo_jax.sweeps.in_folder import run_sweep
from trpo_jax.sweeps.plans import stack_configs
from trpo_jax.sweeps.storage import Folder
from trpo_jax.training import checkpoints


@pytest.mark.long
def test_384_agents_are_one_program_compiled_once(caplog):
    config = Config(num_envs=2, num_steps=8, num_iterations=1, cg_iterations=2, value_cg_iterations=2)
    grid = {"max_kl": [0.003, 0.01, 0.03, 0.1], "gae_lambda": [0.9, 0.95, 0.98]}
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        result = sweep(config, grid, jax.random.key(0), num_seeds=32, num_episodes=1)
    assert result.final_return.shape == (12, 32) and np.isfinite(result.final_return).all()
    names = re.findall(r"Finished XLA compilation of jit\(([\w<>]+)\)", caplog.text)
    assert [name for name in names if name in ("init", "train", "evaluate")] == ["init", "train", "evaluate"]


def test_sweep_hands_out_what_it_was_asked_for():
    config = small_config(num_iterations=2)
    grid = {"max_kl": [0.01, 0.03], "num_iterations": [2, 3]}
    result = sweep(config, grid, jax.random.key(5), num_seeds=2, num_episodes=0)
    assert result.points[1] == {"max_kl": 0.01, "num_iterations": 3}
    assert result.metrics.mean_kl.shape == (4, 2, 3)
    assert np.isnan(result.metrics.mean_kl[[0, 2], :, 2]).all() and np.isfinite(result.metrics.mean_kl[[1, 3]]).all()
    key = jax.random.split(jax.random.key(5), 2)[1]
    _, expected = jax.jit(train)(config.replace(max_kl=0.03, num_iterations=3), key)
    for name in METRICS:
        np.testing.assert_allclose(getattr(result.metrics, name)[3, 1], getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert np.isnan(result.final_return).all() and (result.failed_at == 0).all()


def test_a_sweep_draws_from_the_generator_of_its_key():
    config, key = small_config(num_iterations=2), jax.random.key(5, impl="rbg")
    result = sweep(config, {"max_kl": [0.01, 0.03]}, key, num_seeds=2, num_episodes=1, keep="all")
    state, metrics = jax.jit(train)(config.replace(max_kl=0.03), jax.random.split(key, 2)[1])
    np.testing.assert_allclose(result.metrics.mean_kl[1, 1], metrics.mean_kl, rtol=1e-5)
    assert same_bits(result.states[1].key[1], state.key) and state.key.dtype == key.dtype


def test_a_grid_may_vary_the_length_in_steps():
    config = small_config(num_iterations=2)
    per_iteration = config.steps_per_iteration
    result = sweep(config, {"total_steps": [per_iteration, 3 * per_iteration]}, jax.random.key(5), num_episodes=0)
    assert np.isfinite(result.metrics.mean_kl).sum(-1).tolist() == [[1], [3]]


def test_the_final_score_is_of_the_mode_or_of_sampled_actions_as_the_setting_says():
    """One step, whose two actions earn −1 and 1: the mode earns one of them in every episode, a new policy both."""
    config = small_config(RewardedAction(), num_iterations=1)
    grid = {"eval_stochastic": [False, True]}
    mode, sampled = sweep(config, grid, jax.random.key(0), num_seeds=2, num_episodes=40).final_return
    assert (np.abs(mode) == 1).all() and (np.abs(sampled) < 1).all()


@pytest.mark.long
def test_a_poisoned_agent_is_flagged_and_leaves_the_others_alone():
    config = small_config(Faulty(16, 16), num_iterations=4, num_steps=8)  # NaN in the third iteration, step 17
    sound = small_config(Faulty(-1, -1), num_iterations=4, num_steps=8)
    healthy = sweep(sound, {}, jax.random.key(0), num_seeds=3, num_episodes=0)
    assert (healthy.failed_at == 0).all() and (healthy.metrics.finite == 1).all()
    poisoned = sweep(config, {}, jax.random.key(0), num_seeds=3, num_episodes=0)
    assert (poisoned.failed_at == 3).all()
    np.testing.assert_array_equal(poisoned.metrics.finite[0], [[1, 1, 0, 1]] * 3)
    assert (poisoned.metrics.accepted[0, :, 2] == 0).all()


class SometimesFaulty(Faulty):
    """`value` as a reward or an observation of about a tenth of the environments: each one's reset draws which."""

    def __init__(self, value, where):
        super().__init__(10, 10)
        self.value, self.where = value, where

    def start(self, key):
        state, time = super().start(key)
        return (state, jax.random.bernoulli(key, 0.1)), time

    def observe(self, state):
        (observed, marked), time = state
        bad = marked & (time == 10) if self.where == "observation" else False
        return jnp.where(bad, self.value, super().observe((observed, time)))

    def move(self, key, state, action):
        (observed, marked), time = state
        (new, _), reward, terminated, truncated = super().move(key, (observed, time), action)
        spoiled = marked & jnp.isnan(reward) if self.where == "reward" else False
        reward = jnp.where(spoiled, self.value, jnp.where(jnp.isnan(reward), 0.0, reward))
        return ((new, marked), time), reward, terminated, truncated


@pytest.mark.long
@pytest.mark.parametrize("where, poison", [("reward", np.nan), ("observation", np.inf)])
def test_poison_in_one_agent_leaves_every_bit_of_the_others(where, poison):
    def trained(value):  # programs that differ in one constant
        config = small_config(SometimesFaulty(value, where), num_iterations=3, num_envs=2)
        return sweep(config, {}, jax.random.key(0), num_seeds=12, num_episodes=0)

    clean, poisoned = trained(0.5), trained(poison)
    failed = poisoned.failed_at[0] > 0
    assert 0 < failed.sum() < 12 and set(poisoned.failed_at[0][failed]) == {2} and not clean.failed_at.any()
    for name in METRICS:
        ours, theirs = getattr(poisoned.metrics, name)[0, ~failed], getattr(clean.metrics, name)[0, ~failed]
        assert ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize("free, fits", [(10_000, 64), (5_000, 39), (1_200, 9), (170, 1)])
def test_fewer_agents_a_program_where_memory_is_short(free, fits, monkeypatch):
    asked = []

    def compile_programs(config, agents, num_episodes, devices):  # a constant and a share for each agent
        asked.append(agents)
        return placement.Programs(None, None, None, None, agents, 1, 30 + 100 * agents, None)

    monkeypatch.setattr(placement, "compile_programs", compile_programs)
    monkeypatch.setattr(placement, "free_memory", lambda devices: free)
    found = placement.fit_programs(small_config(), 64, 0, jax.local_devices()[:1])
    assert found.memory <= 0.8 * free
    assert 0.7 * fits <= found.agents_per_block <= fits and len(asked) <= 4


@pytest.mark.parametrize("agents, devices, size", [(1, 2, 1), (96, 2, 48), (544, 2, 136), (10_000, 2, 250), (7, 3, 3)])
def test_blocks_share_the_agents_out_evenly(agents, devices, size):
    assert placement.agents_per_block(small_config(), agents, devices) == size
    rounds = -(-agents // (size * devices))
    assert size * devices * rounds - agents < devices * rounds  # at most one repeated agent a block


def test_an_agent_that_does_not_fit_is_one_sentence(monkeypatch):
    monkeypatch.setattr(placement, "free_memory", lambda devices: 100)
    with pytest.raises(UsageError, match=r"one agent needs .* MiB, but the device has 0 MiB free; lower num_envs"):
        placement.fit_programs(small_config(), 1, 0, jax.local_devices()[:1])


def test_free_memory_is_less_than_there_is():
    free = placement.free_memory(jax.local_devices()[:1])
    assert 2**20 < free < 2**50
    assert placement.free_memory([jax.local_devices()[0]] * 4) == pytest.approx(free / 4, rel=0.2)


def test_a_host_keeps_states_bit_for_bit():
    config = small_config(num_envs=2)
    programs = placement.compile_programs(config, 2, 0, jax.local_devices()[:1])
    states = programs.start(stack_configs([config] * 2), jax.random.split(jax.random.key(3), 2))
    host = checkpoints.to_host(states)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    back = checkpoints.from_host(host, programs.states)
    assert same_bits(states, jax.tree.map(jnp.asarray, back))
    assert raw(back.key).tobytes() == raw(states.key).tobytes()


def test_hosts_meet_only_where_there_are_several(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert placement.connect_hosts() == (0, 1)
    assert placement.connect_hosts(None, 5, 3) == (3, 5)  # a job array
    met = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: met.append(arguments))
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert placement.connect_hosts() == (0, 1) and not met
    monkeypatch.setenv("SLURM_NTASKS", "2")
    placement.connect_hosts()
    assert met == [(None, None, None)]


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:abc", ":1", "a:0", "a:65536", "a:-1", "a:²"])
def test_an_address_that_jax_cannot_use_is_one_sentence(address, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: pytest.fail("it is used"))
    with pytest.raises(UsageError, match=r"coordinator must be HOST:PORT with a port from 1 to 65535, got '"):
        placement.connect_hosts(address, 2, 0)


@pytest.fixture
def compiled(monkeypatch):
    """Whether each compilation ran in the main thread, and its `hidden`; in another thread, those of `broken` fail."""
    found, broken, compile_programs = [], [], placement.compile_programs

    def watched(config, *others):
        found.append((threading.current_thread() is threading.main_thread(), config.hidden))
        if config.hidden in broken and not found[-1][0]:
            raise RuntimeError("no memory beside a training")
        return compile_programs(config, *others)

    monkeypatch.setattr(placement, "compile_programs", watched)
    return found, broken


def trained_in(path, **options):
    """The results of a sweep of three programs."""
    base = {"env": "CartPole-v1", "num_envs": 2, "num_steps": 4, "num_iterations": 3}
    spec = Spec(base=base, grid={"hidden": [[2], [3], [4]]}, num_seeds=2, num_episodes=0)
    assert run_sweep(path, spec, most_agents=1, **options) == "complete"
    rows = parquet.ParquetDataset(path / "results").read()
    return [rows[name].to_pylist() for name in ("point", "mean_kl", "entropy")]


def test_the_next_program_is_compiled_while_the_one_before_trains(tmp_path, compiled):
    found, broken = compiled
    usual = trained_in(tmp_path / "usual")
    assert found == [(True, (2,)), (False, (3,)), (False, (4,))]
    found.clear()
    broken.append((3,))  # is compiled again when its turn comes; the one after it again beside it
    assert trained_in(tmp_path / "broken") == usual
    assert found == [(True, (2,)), (False, (3,)), (True, (3,)), (False, (4,))]


def test_programs_are_compiled_with_the_settings_of_the_thread_that_asks(tmp_path, compiled):
    with jax.default_matmul_precision("highest"):  # holds for this thread only
        trained_in(tmp_path)
    assert compiled[0] == [(True, (2,)), (True, (3,)), (True, (4,))]


def test_results_are_written_while_the_next_agents_train(tmp_path, monkeypatch):
    write, usual = Folder.write_results, trained_in(tmp_path / "usual")
    trained, waited = threading.Semaphore(0), []

    def written_after_the_next_chunk(self, block, columns):
        last = block.group == 2 and block.last == 2  # no agents come after it
        waited.append(last or trained.acquire(timeout=60))
        write(self, block, columns)

    def report(progress):
        if progress.blocks[0].group or progress.blocks[0].first:
            trained.release(2)

    monkeypatch.setattr(Folder, "write_results", written_after_the_next_chunk)
    assert trained_in(tmp_path / "late", report=report) == usual
    assert all(waited) and len(waited) == 6


def test_a_failure_to_write_results_ends_the_sweep_while_the_next_agents_train(tmp_path, monkeypatch):
    reports = []

    def full(self, block, columns):
        raise UsageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_results", full)
        patch.setattr("trpo_jax.runs.runner._CHUNK_SECONDS", 0)  # a chunk per iteration
        with pytest.raises(UsageError, match="the disk is full"):
            trained_in(tmp_path, report=lambda progress: reports.append((progress.blocks[0].group, progress.iteration)))
    assert (0, 3) in reports and (2, 1) not in reports
    assert trained_in(tmp_path)
