"""No silent hang: many agents in one program finish on a machine with two cores. Every child has a hard time limit.

A batched LAPACK call on the CPU spreads its work over XLA's thread pool and blocks a thread of that very pool until it
is done (jaxlib 0.10.2); as many such calls at once as there are threads wait for ever. The QR inside
`flax.linen.initializers.orthogonal`, mapped over agents, is one. The programs of the library therefore contain none.
"""

import jax
import pytest

from trpo_jax import Config, train

# As many agents and networks as large as by default, which is where threads could wait; few steps.
MANY_AGENTS = """
import jax
from trpo_jax import Config, train
keys = jax.vmap(jax.random.key)(jax.numpy.arange(32))
run = jax.jit(jax.vmap(train, in_axes=(None, 0)))
config = Config(num_envs=4, num_steps=32, num_iterations=2)
for _ in range(5):
    state, metrics = jax.block_until_ready(run(config, keys))
print("finished", metrics.mean_kl.shape)
"""


@pytest.mark.long
def test_32_agents_finish(python):
    # subprocess.run kills the child with SIGKILL when the time is over, which a deadlocked process obeys.
    result = python("-c", MANY_AGENTS, env={"NPROC": "2"}, timeout=200)
    assert result.stdout == "finished (32, 2)\n", result.stderr


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("value_fit", ["gauss-newton", "adam"])
def test_programs_call_no_lapack(env, value_fit):
    config = Config(env=env, num_iterations=2, value_fit=value_fit)
    lowered = jax.jit(jax.vmap(train, in_axes=(None, 0))).lower(config, jax.random.split(jax.random.key(0), 2))
    assert "lapack" not in lowered.as_text()


def test_lapack_would_be_seen():
    lowered = jax.jit(jax.vmap(lambda a: jax.numpy.linalg.qr(a)[0])).lower(jax.numpy.ones((2, 3, 3)))
    if jax.default_backend() == "cpu":
        assert "lapack" in lowered.as_text()
