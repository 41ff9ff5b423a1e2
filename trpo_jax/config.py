"""All settings, each defined once with its name, default, meaning and range. Imports no JAX, so that help is fast.

A setting is *static* if it changes a shape, a loop length or a Python branch: each value compiles its own program.
Every other setting is a *traced* float: one program serves all its values, and `jax.vmap` maps over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trpo_jax import fields
from trpo_jax.env_args import EnvArgs
from trpo_jax.fields import as_held, check_value, one_of, own_object, static, text, traced, widths
from trpo_jax.sentences import check_known
from trpo_jax.steps import defaults

if TYPE_CHECKING:  # they import JAX
    from trpo_jax.algorithms.base import Algorithm, ValueFit
    from trpo_jax.networks.recurrent import Network
    from trpo_jax.steps.types import Scalar


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run: a pytree whose leaves are the traced floats. All other settings are static.

    The metadata of each field hold its help and range, printed by `trpo-jax train --help`. `config.replace(name=value)`
    returns a changed copy. Each value is checked when the Config is made, the last moment at which it is concrete.
    `validate` checks at use whether values go together, so that they can be replaced one by one.
    """

    env: Any = own_object("CartPole-v1", "a name, an Environment, or any object with gymnax's six-value step")
    env_args: Mapping[str, Any] = own_object(
        EnvArgs(), "environment settings by name: floats are traced, all others static"
    )
    max_steps: int = static(
        0, "time limit of an episode in steps, in addition to the environment's; 0: none", interval="[0, 2147483647]"
    )
    randomize: str | Mapping[str, Any] | Callable[..., Any] = text(
        fields.NONE, "ranges from which environment settings are drawn, such as gravity=5..20", kind="ranges"
    )
    wrappers: str = text(fields.NONE, "wrappers of the environment, innermost first: hide_entries=1,3 stack_frames=4")
    policy: Network | None = own_object(None, "a Network whose apply returns a distribution; None: see `network`")
    value: Network | None = own_object(None, "a Network whose apply returns V, [...]; None: see `network`")
    num_envs: int = static(16, "environments stepped in parallel, N", high=10_000_000)
    num_steps: int = static(128, "steps per environment and iteration, T", high=10_000_000)
    num_iterations: int = static(150, "iterations (one rollout and one update each)", high=10_000_000)
    gamma: Scalar = traced(0.99, "discount γ", interval="[0, 1]")
    gae_lambda: Scalar = traced(0.98, "λ of generalized advantage estimation", interval="[0, 1]")
    baseline: bool = static(True, "weight actions by advantages; False: by returns, as in REINFORCE without a baseline")
    update: fields.UpdateName | Callable[[Config], Algorithm] = one_of(
        fields.UpdateName,
        "policy update; all but trpo take gradient steps: one per batch (policy-gradient), or epochs of minibatches on "
        "the clipped (ppo) or penalised surrogate (kl-penalty)",
    )
    max_kl: Scalar = traced(
        defaults.MAX_KL,
        "trust-region radius δ: upper bound on the divergence of an update, nats; the initial one if it adapts",
        interval="(0, 1e6]",
        used=fields.TRPO,
    )
    kl_penalty: Scalar = traced(
        0.0,
        "penalty c on the divergence: no natural-gradient step is longer than the one that maximises gain − c · KL, in "
        "units of advantages per nat, so that small advantages make small steps; 0: none, all steps use δ",
        interval="[0, 1e6]",
        used=fields.TRPO,
    )
    constraint: fields.Constraint = one_of(
        fields.Constraint,
        "the divergence that δ bounds: mean or maximum of KL(old‖new) over the batch, or mean of KL(new‖old)",
        used=fields.TRPO,
    )
    radius_rule: fields.RadiusRule = one_of(
        fields.RadiusRule,
        "ratio: δ grows while the realised gain, measured on the next batch, is near the predicted gain, and shrinks "
        "otherwise; divergence: δ adapts until the divergence is near target_kl",
        used=fields.TRPO,
    )
    smallest_max_kl: Scalar = traced(
        1e-5, "radius_rule: lower bound of δ, nats", interval="(0, 1e6]", used=fields.ADAPTIVE
    )
    largest_max_kl: Scalar = traced(
        1.0, "radius_rule: upper bound of δ, nats", interval="(0, 1e6]", used=fields.ADAPTIVE
    )
    target_kl: Scalar = traced(
        0.01,
        "target divergence of radius_rule=divergence and of kl-penalty, nats",
        interval="(0, 1e6]",
        used=({"radius_rule": ("divergence",)}, {"update": ("kl-penalty",)}),
    )
    anneal_max_kl: Scalar = traced(
        0.0, "share by which δ falls linearly over the run; 1: towards 0", interval="[0, 1]", used=fields.TRPO
    )
    smallest_explained_variance: Scalar = traced(
        0.0,
        "explained variance of the value function below which δ shrinks in proportion, so that errors of the value "
        "function do not move a policy that has nothing left to gain; 0: never",
        interval="[0, 1]",
        used=fields.TRPO,
    )
    reuse: int = static(
        1, "batches per update: the newest one and the reuse − 1 before it", used=fields.TRPO, high=1_000
    )
    bonus: fields.Bonus = one_of(
        fields.Bonus,
        "what entropy_coefficient weighs: the entropy, whose slope vanishes where an action has become improbable, or "
        "for discrete actions the log barrier, −KL(uniform ‖ π), whose slope does not",
    )
    entropy_coefficient: Scalar = traced(
        0.0,
        "weight of the policy's mean entropy, or of another bonus, in the objective; a default Gaussian's bonus grows "
        "up to log σ = 2, in units of half the action range",
        interval="[0, 1e6]",
    )
    natural_gradient_steps: int = static(
        1,
        "steps per update within δ, each linearised anew on the whole batch; those after the first are on the "
        "clipped surrogate, so that few samples cannot use up δ",
        used=fields.TRPO,
        high=1_000,
    )
    cg_damping: Scalar = traced(
        defaults.CG_DAMPING, "damping λ_d of the Fisher matrix in the solver", interval="[0, 1e6]", used=fields.TRPO
    )
    cg_iterations: int = static(defaults.CG_ITERATIONS, "at most k conjugate-gradient iterations", used=fields.TRPO)
    cg_tolerance: Scalar = traced(
        defaults.CG_TOLERANCE,
        "relative residual at which conjugate gradient stops early; 0: never",
        interval="[0, 1)",
        used=fields.CURVATURE,
    )
    fisher_fraction: float = static(
        defaults.FISHER_FRACTION, "share of the batch for curvature", interval="(0, 1]", used=fields.CURVATURE
    )
    line_search: fields.LineSearch = one_of(
        fields.LineSearch,
        "backtracking: one candidate after the other; parallel: all in one batched pass, in four times the memory; "
        "auto: backtracking; none: take the full step, as in the natural gradient method",
        used=fields.TRPO,
    )
    line_search_shrink: Scalar = traced(
        defaults.LINE_SEARCH_SHRINK, "factor α from one candidate to the next", interval="(0, 1)", used=fields.SEARCH
    )
    line_search_steps: int = static(
        defaults.LINE_SEARCH_STEPS, "number of candidates in the line search", used=fields.SEARCH, high=1_000
    )
    policy_optimizer: fields.PolicyOptimizer = one_of(
        fields.PolicyOptimizer,
        "gradient steps: adam, or plain steps θ + learning rate · gradient (sgd)",
        used=fields.GRADIENT_STEPS,
    )
    policy_learning_rate: Scalar = traced(
        1e-3, "gradient steps: learning rate", interval="[0, 1e6]", used=fields.GRADIENT_STEPS
    )
    policy_epochs: int = static(10, "ppo, kl-penalty: passes over the batch", used=fields.EPOCHS)
    policy_minibatches: int = static(
        8,
        "ppo, kl-penalty: minibatches per pass, reshuffled in each; must divide the batch",
        used=fields.EPOCHS,
        high=10_000_000,
    )
    clip_ratio: Scalar = traced(
        defaults.CLIP_RATIO,
        "ε; ppo, and trpo from the second of natural_gradient_steps on: the ratio is clipped to [1 − ε, 1 + ε]",
        interval="(0, 1e6]",
        used=fields.CLIPPED,
    )
    max_grad_norm: Scalar = traced(
        0.5,
        "ppo, kl-penalty: largest gradient norm of a minibatch, to which longer gradients are scaled; 0: no limit",
        interval="[0, 1e6]",
        used=fields.EPOCHS,
    )
    initial_penalty: Scalar = traced(
        1.0,
        "kl-penalty: initial coefficient β of the KL; adapts to target_kl",
        interval="(0, 1e6]",
        used=fields.KL_PENALTY,
    )
    value_fit: fields.ValueFitName | Callable[[Config], ValueFit] = one_of(
        fields.ValueFitName, "value fit: damped Gauss-Newton steps, or epochs of minibatches with Adam"
    )
    value_damping: Scalar = traced(
        defaults.VALUE_DAMPING,
        "gauss-newton: damping λ of the value function's matrix",
        interval="[0, 1e6]",
        used=fields.GAUSS_NEWTON,
    )
    value_cg_iterations: int = static(
        defaults.VALUE_CG_ITERATIONS,
        "gauss-newton: at most k conjugate-gradient iterations per step",
        used=fields.GAUSS_NEWTON,
    )
    gauss_newton_steps: int = static(
        1, "gauss-newton: steps per fit, each on the whole batch", used=fields.GAUSS_NEWTON
    )
    value_learning_rate: Scalar = traced(3e-3, "adam: learning rate", interval="[0, 1e6]", used=fields.ADAM)
    value_clip: Scalar = traced(
        0.0,
        "adam: in the loss, clip V to its old value ± this where that raises the loss, as in PPO; 0: never",
        interval="[0, 1e12]",
        used=fields.ADAM,
    )
    anneal_learning_rates: Scalar = traced(
        0.0,
        "share by which both learning rates fall linearly over the run",
        interval="[0, 1]",
        used=(*fields.GRADIENT_STEPS, *fields.ADAM),
    )
    value_epochs: int = static(5, "adam: passes over the batch", used=fields.ADAM)
    value_minibatches: int = static(
        8, "adam: minibatches per pass; must divide num_envs x num_steps", used=fields.ADAM, high=10_000_000
    )
    normalize_advantages: bool = static(
        True,
        "normalise the advantages of a batch to mean 0 and variance 1; with baseline=False scale the returns to a mean "
        "square of 1",
    )
    normalize_observations: bool = static(
        False,
        "normalise observations by running statistics, which are frozen within an iteration and start from a rollout "
        "without learning",
    )
    observation_clip: Scalar = traced(
        defaults.OBSERVATION_CLIP,
        "normalize_observations: clip to ± this many standard deviations",
        interval="(0, 1e6]",
        used=({"normalize_observations": (True,)},),
    )
    normalize_rewards: bool = static(False, "divide rewards by the running standard deviation of the discounted return")
    reward_clip: Scalar = traced(0.0, "clip rewards to ± this, after any normalisation; 0: never", interval="[0, 1e12]")
    network: fields.NetworkKind = one_of(
        fields.NetworkKind,
        "kind of the default policy and value networks; auto: cnn for observations of rank 3, else mlp; gru is "
        "recurrent",
    )
    hidden: Sequence[int] | str = widths(
        "auto",
        "widths of the layers, the last is also that of the gru; auto: 64,64 (gru: 64, cnn: 128)",
        used=fields.HIDDEN,
    )
    value_hidden: Sequence[int] | str = widths(
        "auto", "layer widths of the value function; auto: as hidden, or 64 on a shared trunk", used=fields.OWN_VALUE
    )
    channels: Sequence[int] | str = widths(
        (16,), "cnn: filters per convolution; the first reduces larger grids to about 10 x 10", used=fields.CONVOLUTIONS
    )
    activation: fields.Activation = one_of(
        fields.Activation, "activation after each layer but the last; auto: tanh (cnn: relu)", used=fields.OWN_NETWORK
    )
    layer_norm: bool = static(
        False, "normalise the output of each layer but the last, before its activation", used=fields.OWN_NETWORK
    )
    initialisation: fields.Initialisation = one_of(
        fields.Initialisation,
        "initial weights: orthogonal with a gain of √2, or lecun-normal; those of the policy's last layer times 0.01",
        used=fields.OWN_NETWORK,
    )
    shared_trunk: bool = static(
        False,
        "V is a small network on the input of the policy's last layer; its fit leaves the shared layers as they are",
    )
    action_distribution: fields.ActionDistribution = one_of(
        fields.ActionDistribution,
        "policy for actions in a Box: unbounded Gaussian, Gaussian through tanh, or beta; the last two need bounds",
        used=fields.OWN_POLICY,
    )
    value_observation: str = text(
        "auto", "entries of a dict that the value function sees, such as a,b; auto: as the policy", used=fields.VIEW
    )
    state_dependent_std: bool = static(False, "a Gaussian's σ depends on the observation", used=fields.GAUSSIAN)
    initial_log_std: Scalar = traced(
        0.0,
        "initial log σ of a Gaussian policy, in units of half the action range; for tanh, before squashing",
        interval="[-20, 20]",
        used=fields.GAUSSIAN,
    )
    eval_every: int = static(
        0, "iterations between evaluations during training; 0: no evaluation", interval="[0, 10000000]"
    )
    eval_episodes: int = static(32, "episodes per evaluation during training", used=fields.EVALUATED, high=1_000_000)
    eval_stochastic: bool = static(False, "sample actions in evaluations, instead of taking the policy's mode")
    stop_at_return: float = static(
        fields.NEVER,
        "training of an agent ends when an evaluation during training has this mean return; 1e30 or more: never",
        interval="[-1e38, 1e38]",
        used=fields.EVALUATED,
    )

    def __post_init__(self) -> None:
        axes = any(getattr(self, name) is None for name in _TRACED)  # a tree of axes for `jax.vmap`: integers and None
        for name, field in FIELDS.items():
            value = as_held(field, getattr(self, name), self.env)
            object.__setattr__(self, name, value)
            if value is not field.default and not (axes and name in _TRACED):
                check_setting(name, value)

    if TYPE_CHECKING:
        replace: ClassVar[type[Config]]  # to a type checker it takes what `Config` takes, and returns one
    else:

        def replace(self, **changes: Any) -> Config:
            """Return a copy with some settings changed."""
            check_known(changes, FIELDS, "Config")
            return dataclasses.replace(self, **changes)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps per iteration, T · N."""
        return self.num_envs * self.num_steps


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TRACED = frozenset(name for name, field in FIELDS.items() if not field.metadata["static"])


def check_setting(name: str, value: Any, source: str = "") -> None:
    """Raise `UsageError` unless a setting, from the file `source`, may have this value; traced values always pass."""
    check_value(FIELDS[name], f"{name} in {source}" if source else name, value)
