"""Steps of the library in a loop of your own: one scan in the style of PureJaxRL, and `vmap` over it."""

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp

from trpo_jax import Categorical, gae, gauss_newton_fit, trpo_update

NUM_ENVS, NUM_STEPS, NUM_UPDATES, GAMMA, LAMBDA = 16, 128, 30, 0.99, 0.98
env, env_params = gymnax.make("CartPole-v1")


class Actor(nn.Module):
    """The policy."""

    @nn.compact
    def __call__(self, obs):
        x = nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(obs))))
        return Categorical(nn.Dense(2, kernel_init=nn.initializers.normal(0.01))(x))


class Critic(nn.Module):
    """The value function."""

    @nn.compact
    def __call__(self, obs):
        return nn.Dense(1)(nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(obs)))))[..., 0]


def make_train(max_kl):
    """A function of a key, as PureJaxRL has it."""
    actor, critic = Actor(), Critic()

    def env_step(carry, key):
        params, obs, env_state, episode_return = carry
        key_action, key_step = jax.random.split(key)
        action = actor.apply(params, obs).sample(key_action)
        keys = jax.random.split(key_step, NUM_ENVS)
        next_obs, env_state, reward, terminated, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(
            keys, env_state, action, env_params
        )
        done = terminated | truncated
        final_obs = jnp.where(done[:, None], info["final_observation"], next_obs)  # before the reset
        episode_return += reward
        carry = params, next_obs, env_state, jnp.where(done, 0, episode_return)
        return carry, (obs, action, reward, terminated, truncated, final_obs, done * episode_return)

    def update(carry, key):
        actor_params, critic_params, *runner = carry
        (_, *runner), batch = jax.lax.scan(env_step, (actor_params, *runner), jax.random.split(key, NUM_STEPS))
        seen, action, reward, terminated, truncated, final_obs, returned = batch  # [T, N, ...]
        values, next_values = critic.apply(critic_params, seen), critic.apply(critic_params, final_obs)
        advantage = gae(reward, values, next_values, terminated, truncated, gamma=GAMMA, gae_lambda=LAMBDA)
        normalized = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        actor_params, info = trpo_update(actor.apply, actor_params, seen, action, normalized, max_kl=max_kl)
        critic_params, _ = gauss_newton_fit(critic.apply, critic_params, seen, advantage + values)
        episode_return = returned.sum() / jnp.maximum(jnp.sum(terminated | truncated), 1)
        return (actor_params, critic_params, *runner), {"episode_return": episode_return, "mean_kl": info.mean_kl}

    def train(key):
        key_actor, key_critic, key_reset, key_loop = jax.random.split(key, 4)
        obs, env_state = jax.vmap(env.reset, (0, None))(jax.random.split(key_reset, NUM_ENVS), env_params)
        start = actor.init(key_actor, obs[0]), critic.init(key_critic, obs[0]), obs, env_state, jnp.zeros(NUM_ENVS)
        return jax.lax.scan(update, start, jax.random.split(key_loop, NUM_UPDATES))

    return train


keys = jax.random.split(jax.random.key(0), 2)
_, metrics = jax.jit(jax.vmap(make_train(max_kl=0.01)))(keys)
print("returns of two seeds:", metrics["episode_return"][:, ::10], metrics["episode_return"][:, -1])
print("largest mean KL of an update:", metrics["mean_kl"].max())
