"""rejax's PPO: iterations per second at given settings, and time to a return threshold at its published ones."""

import json
import sys
import time
from importlib.metadata import version

import jax
from rejax import PPO

# configs/gymnax/cartpole.yaml of rejax; its networks are 64-64 by default.
PUBLISHED = {
    "agent_kwargs": {"activation": "tanh"},
    "num_envs": 5,
    "num_steps": 100,
    "num_epochs": 5,
    "num_minibatches": 5,
    "learning_rate": 0.00075,
    "max_grad_norm": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_eps": 0.2,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
}
EPISODES = 32


def prepare(request):
    """Compile and warm up `iterations` training iterations at the envs x steps asked for."""
    settings = {
        "env": request["env"],
        "agent_kwargs": {"activation": "tanh"},
        "num_envs": request["num_envs"],
        "num_steps": request["num_steps"],
        "num_epochs": 4,
        "num_minibatches": 4,
        "gamma": request["gamma"],
        "gae_lambda": request["gae_lambda"],
        "skip_initial_evaluation": True,
    }
    agent, iterations, num_agents = PPO.create(**settings), request["iterations"], request.get("num_agents", 1)
    step, init_state = agent.train_iteration, agent.init_state
    key = jax.random.PRNGKey(0)
    if num_agents > 1:
        step, init_state, key = jax.vmap(step), jax.vmap(init_state), jax.random.split(key, num_agents)
    run = jax.jit(lambda ts: jax.lax.scan(lambda ts, _: (step(ts), None), ts, None, iterations)[0])
    state = init_state(key)
    start = time.perf_counter()
    program = run.lower(state).compile()
    compile_seconds = time.perf_counter() - start
    state = jax.block_until_ready(program(state))
    versions = {name: version(name) for name in ("rejax", "gymnax", "jax", "jaxlib", "flax", "optax")}
    settings.pop("agent_kwargs")
    return (program, state, iterations), {"compile_seconds": compile_seconds, "versions": versions, **settings}


def prepare_threshold(request):
    """Compile training at the published settings and its judge."""
    agent = PPO.create(env=request["env"], skip_initial_evaluation=True, **PUBLISHED)
    per_iteration = PUBLISHED["num_envs"] * PUBLISHED["num_steps"]
    state = agent.init_state(jax.random.PRNGKey(0))
    # Judged as often as the other side: after a stretch of about as many env steps.
    stretch = max(1, request["judge_every"] // per_iteration)
    advance = (
        jax.jit(lambda ts: jax.lax.fori_loop(0, stretch, lambda _, ts: agent.train_iteration(ts), ts))
        .lower(state)
        .compile()
    )

    @jax.jit
    def judge(state, key):
        from rejax.evaluate import evaluate

        limit = agent.env_params.max_steps_in_episode
        return evaluate(agent.make_act(state), key, agent.env, agent.env_params, EPISODES, limit)[1].mean()

    jax.block_until_ready(advance(state))
    structure = jax.tree.structure(state)

    def first_state(seed):  # every call of init_state makes a class of its own, which no compiled program accepts
        return jax.tree.unflatten(structure, jax.tree.leaves(agent.init_state(jax.random.PRNGKey(seed))))

    return (first_state, advance, judge, stretch * per_iteration, request), {"settings": PUBLISHED}


def time_to_threshold(prepared, seed):
    """Train a stretch at a time until 32 sampled episodes reach the threshold; only training is timed."""
    first_state, advance, judge, steps_each, request = prepared
    state, seconds, steps = first_state(seed), 0.0, 0
    while steps < request["max_steps"]:
        start = time.perf_counter()
        state = jax.block_until_ready(advance(state))
        seconds, steps = seconds + time.perf_counter() - start, steps + steps_each
        if judge(state, jax.random.PRNGKey(steps)) >= request["threshold"]:
            return {"seed": seed, "seconds": seconds, "env_steps": steps}
    return {"seed": seed, "seconds": float("inf"), "env_steps": float("inf")}


def main():
    """Answer requests until standard input closes."""
    prepared = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            prepared, answer = prepare(request)
        elif request["do"] == "run":
            program, state, iterations = prepared
            start = time.perf_counter()
            state = jax.block_until_ready(program(state))
            answer = {"seconds": (time.perf_counter() - start) / iterations}
            prepared = program, state, iterations
        elif request["do"] == "prepare threshold":
            prepared, answer = prepare_threshold(request)
        else:
            answer = time_to_threshold(prepared, request["seed"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
