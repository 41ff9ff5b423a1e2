"""An environment of your own: two functions, checked and then trained in."""

import jax
import jax.numpy as jnp

from trpo_jax import Box, Config, Environment, Step, check_environment, train


def reset(key):
    """Start at rest, somewhere on the line; the state is any pytree of arrays."""
    position = jax.random.uniform(key, minval=-1.0, maxval=1.0)
    state = {"position": position, "velocity": jnp.float32(0), "time": jnp.int32(0)}
    return observe(state), state


def step(key, state, action):
    """Push a cart by `action`, [1], towards the origin. The trainer begins the next episode."""
    velocity = 0.9 * state["velocity"] + 0.1 * action[0]
    position = state["position"] + velocity
    state = {"position": position, "velocity": velocity, "time": state["time"] + 1}
    reward = -(position**2) - 0.01 * action[0] ** 2
    terminated = jnp.abs(position) > 3  # a terminal state has no future
    truncated = state["time"] >= 50  # a time limit only cuts the episode off
    reward = jnp.where(terminated, -50.0, reward)
    return Step(observe(state), state, reward, terminated, truncated)


def observe(state):
    """What the policy sees, float32 [2]."""
    return jnp.stack([state["position"], state["velocity"]])


environment = Environment(
    name="Cart",
    observation_shape=(2,),
    action_space=Box([-1.0], [1.0]),
    max_steps=50,
    reset=reset,
    step=step,
)

print("wrong with it:", check_environment(environment) or "nothing")
config = Config(env=environment, num_iterations=40, gamma=0.95)
state, metrics = jax.jit(train)(config, jax.random.key(0))
print("return of the first iteration:", metrics.episode_return[0])
print("return of the last iteration:", metrics.episode_return[-1])
