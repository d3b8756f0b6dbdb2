"""The complete optimizer of a stage: guard, transformation, schedule and weight decay.

Its state has the same structure in every stage, so that it carries over; `guard.begin_stage`
restarts the schedule alone.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from braeburn.config import Execution, ModelConfig, OptimizerConfig, Stage
from braeburn.layers.spec import ParamSpec, Tree, map_specs, walk
from braeburn.optim.definition import ALONE, Parameters, by_path, definition_of
from braeburn.optim.guard import OptimizerState, guarded
from braeburn.optim.schedules import multiplier

# Scores of masks, factors of scales and biases of routers are not weights.
NO_WEIGHTS = frozenset({"mask", "scale", "balance"})
# An expert keeps its bias where its load differs from an even one by less than this share of it,
# which is less than one assignment below a million of them. Larger whole numbers are rounded in
# float32, and in another way on another mesh.
EVEN = 1e-6


def build_optimizer(
    config: OptimizerConfig,
    stage: Stage,
    specs: Tree,
    model: ModelConfig,
    execution: Execution = ALONE,
) -> optax.GradientTransformation:
    """The transformation from raw gradients to additive updates for one stage.

    Scores of masks have a learning rate of their own. A layer's scores move by their gradients'
    shares of the layer's root-mean-square: element by element, those that hardly matter would move
    by their noise as far as those that decide.

    Args:
        config: of the optimizer.
        stage: its learning rate, weight decay, schedule and pruning.
        specs: of the parameters.
        model: that they are of.
        execution: the mesh that updates are made on, and its rules. The state does not depend on
            it.

    Returns:
        A transformation with the state `guard.OptimizerState`.
    """
    definition = definition_of(config)
    score_rate = stage.pruning.learning_rate if stage.pruning else stage.learning_rate
    rates = map_specs(
        lambda _, spec: score_rate if spec.role == "mask" else stage.learning_rate, specs
    )
    no_decay, weight_decay = definition.no_decay | NO_WEIGHTS, definition.weight_decay(stage)
    decay = map_specs(lambda _, spec: 0.0 if spec.role in no_decay else weight_decay, specs)

    def in_proportion(spec: ParamSpec, update: Array, second_moment: Array | None) -> Array:
        if spec.role != "mask" or second_moment is None:
            return update
        mean = jnp.mean(second_moment, axis=spec.block_dims, keepdims=True)
        return update * jnp.sqrt(second_moment / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

    def finish(
        updates: Tree, moved: optax.OptState, params: Tree, steps: Int[Array, ""]
    ) -> tuple[Tree, Float[Array, ""]]:
        update_of, moment_of = by_path(updates), by_path(definition.second_moment(moved))
        updates = map_specs(
            lambda path, spec: in_proportion(spec, update_of[path], moment_of.get(path)), specs
        )
        factor = multiplier(stage.schedule, stage.steps, steps + 1)

        def delta(update: Array, rate: float, decay: float, param: Array) -> Array:
            return -factor * (rate * update + decay * param)

        return jax.tree.map(delta, updates, rates, decay, params), factor * stage.learning_rate

    optimizer = guarded(
        definition.transformation(config, Parameters(specs, model, execution)),
        clip_norm=config.clip_norm,
        skip_norm=config.skip_norm,
        finish=finish,
    )
    has_balances = any(spec.role == "balance" for _, spec in walk(specs))
    return balancing(optimizer, specs, config.balance_rate) if has_balances else optimizer


def balancing(
    optimizer: optax.GradientTransformation, specs: Tree, rate: float
) -> optax.GradientTransformation:
    """An optimizer that moves the biases of routers by a rule of their own (arXiv 2408.15664).

    Their gradients are how many assignments each expert had. They have no part in the norm that
    gradients are clipped to, and stay where a step is skipped.

    Args:
        optimizer: of all other parameters, with the state `guard.OptimizerState`.
        specs: of all parameters.
        rate: what a bias moves by in a step.
    """

    def others(spec: ParamSpec, gradient: Array) -> Array:
        return jnp.zeros_like(gradient) if spec.role == "balance" else gradient

    def update(
        gradients: Tree, state: OptimizerState, params: Tree | None = None
    ) -> tuple[Tree, OptimizerState]:
        updates, moved = optimizer.update(jax.tree.map(others, specs, gradients), state, params)
        step = jnp.where(moved.skipped == state.skipped, rate, 0.0)

        def balanced(spec: ParamSpec, update: Array, load: Array) -> Array:
            if spec.role != "balance":
                return update
            total = jnp.sum(load, axis=-1, keepdims=True)
            missing = total - load.shape[-1] * load
            return step * jnp.sign(jnp.where(jnp.abs(missing) < EVEN * total, 0.0, missing))

        return jax.tree.map(balanced, specs, updates, gradients), moved

    return optax.GradientTransformation(optimizer.init, update)
