"""No silent hang: many agents in one program finish on a machine with two cores. Every child has a hard time limit."""

import pytest

from trpo_jax import _threads

MANY_AGENTS = """
{first}
import jax
{second}
from trpo_jax import Config, train
keys = jax.vmap(jax.random.key)(jax.numpy.arange(32))
state, metrics = jax.jit(jax.vmap(train, in_axes=(None, 0)))(Config(num_iterations=2), keys)
jax.block_until_ready(state)
print("finished", metrics.mean_kl.shape)
"""


@pytest.mark.parametrize("first, second", [("import trpo_jax", ""), ("", "import trpo_jax")])
def test_32_agents_finish(python, first, second):
    # subprocess.run kills the child with SIGKILL when the time is over, which a deadlocked process obeys.
    result = python("-c", MANY_AGENTS.format(first=first, second=second), env={"NPROC": None}, timeout=200)
    assert result.stdout == "finished (32, 2)\n", result.stderr


@pytest.mark.parametrize(
    "nproc, cores, running, expected",
    [
        (None, 2, False, _threads._SAFE_WIDTH),  # the machine that deadlocks
        (None, 8, False, None),  # a wide pool is safe
        ("7", 2, False, "7"),  # the user's choice stands
    ],
)
def test_guard(monkeypatch, nproc, cores, running, expected):
    monkeypatch.delenv("NPROC", raising=False)
    if nproc:
        monkeypatch.setenv("NPROC", nproc)
    monkeypatch.setattr(_threads, "_usable_cores", lambda: cores)
    monkeypatch.setattr(_threads, "_backend_is_running", lambda: running)
    _threads.widen_small_thread_pool()
    assert _threads.os.environ.get("NPROC") == expected


def test_guard_warns_when_it_comes_too_late(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(_threads, "_usable_cores", lambda: 2)
    monkeypatch.setattr(_threads, "_backend_is_running", lambda: True)
    with pytest.warns(RuntimeWarning, match="NPROC=4"):
        _threads.widen_small_thread_pool()
    assert "NPROC" not in _threads.os.environ


def test_running_backend_is_seen(python):
    # The check reads a name of JAX's internals: if it moves, this fails.
    code = (
        "import jax; from trpo_jax import _threads; before = _threads._backend_is_running(); "
        "jax.numpy.zeros(1); print(before, _threads._backend_is_running())"
    )
    assert python("-c", code).stdout == "False True\n"
