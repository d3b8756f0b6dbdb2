"""The complete optimizer of a stage: guard, direction, schedule and weight decay.

Its state has the same structure in every stage, so that it carries over; `guard.begin_stage`
restarts the schedule alone.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from braeburn.config import ModelConfig, OptimizerConfig, Stage
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.optim.definition import definition_of
from braeburn.optim.guard import guarded
from braeburn.optim.schedules import multiplier

# Scores of masks and factors of scales are not weights.
NO_WEIGHTS = frozenset({"mask", "scale"})


def build_optimizer(
    config: OptimizerConfig, stage: Stage, specs: Tree, model: ModelConfig
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

    def in_proportion(spec: ParamSpec, update: Array, second_moment: Array) -> Array:
        if spec.role != "mask":
            return update
        mean = jnp.mean(second_moment, axis=spec.block_dims, keepdims=True)
        return update * jnp.sqrt(second_moment / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

    def finish(
        updates: Tree, moved: optax.OptState, params: Tree, steps: Int[Array, ""]
    ) -> tuple[Tree, Float[Array, ""]]:
        second_moment = definition.second_moment(moved)
        if second_moment is not None:
            updates = jax.tree.map(in_proportion, specs, updates, second_moment)
        sigma = multiplier(stage.schedule, stage.steps, steps + 1)

        def delta(update: Array, rate: float, decay: float, param: Array) -> Array:
            return -sigma * (rate * update + decay * param)

        return jax.tree.map(delta, updates, rates, decay, params), sigma * stage.learning_rate

    return guarded(
        definition.direction(config, specs, model),
        clip_norm=config.clip_norm,
        skip_norm=config.skip_norm,
        finish=finish,
    )
