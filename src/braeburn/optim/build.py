"""The complete optimizer of a stage: guard, transformation, schedule and weight decay.

Its state has the same structure in every stage, so that it carries over; `guard.begin_stage`
restarts the schedule alone.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from braeburn.config import Execution, ModelConfig, OptimizerConfig, Stage
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.optim.definition import ALONE, Parameters, by_path, definition_of
from braeburn.optim.guard import guarded
from braeburn.optim.schedules import multiplier

# Scores of masks and factors of scales are not weights.
NO_WEIGHTS = frozenset({"mask", "scale"})


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

    return guarded(
        definition.transformation(config, Parameters(specs, model, execution)),
        clip_norm=config.clip_norm,
        skip_norm=config.skip_norm,
        finish=finish,
    )
