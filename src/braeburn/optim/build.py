"""The complete optimizer of a stage: guard, clipping, direction, schedule and weight decay.

Its state has the same structure in every stage, so that it carries over; `begin_stage` restarts the
schedule alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from braeburn.config import AfmOptimizer, Model, Optimizer, Stage
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.optim.afm import AfmState, scale_by_afm
from braeburn.optim.schedules import multiplier


class OptimizerState(NamedTuple):
    """What the optimizer remembers.

    Attributes:
        stage_steps: valid steps since the stage began, the schedule's clock.
        skipped: invalid steps since the run began.
        grad_norm: global L2 norm of the last gradient, before clipping.
        learning_rate: of the last step, schedule included.
        direction: moments, advanced by valid steps only.
    """

    stage_steps: Int[Array, ""]
    skipped: Int[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    direction: optax.OptState


def build_optimizer(
    optimizer: Optimizer, stage: Stage, specs: Tree, model: Model
) -> optax.GradientTransformation:
    """The transformation from raw gradients to additive updates for one stage.

    A step is valid if its gradient is finite and of norm below `skip_norm`; an invalid one changes
    only `skipped`. Valid gradients are clipped to `clip_norm`. AFM multiplies weight decay by the
    schedule alone and decays every parameter; AdamW multiplies it by the learning rate too and
    spares the norms. Scores of masks and factors of scales are not weights: neither decays them,
    and scores have a learning rate of their own. A layer's scores move by their gradients' shares
    of the layer's root-mean-square: element by element, those that hardly matter would move by
    their noise as far as those that decide.
    """
    score_rate = stage.pruning.learning_rate if stage.pruning else stage.learning_rate
    rates = map_specs(
        lambda _, spec: score_rate if spec.role == "mask" else stage.learning_rate, specs
    )
    if isinstance(optimizer, AfmOptimizer):
        direction = scale_by_afm(optimizer, specs, model.d_model)
        weight_decay, spared = stage.weight_decay, {"mask", "scale"}
    else:
        direction = optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)
        weight_decay, spared = stage.learning_rate * stage.weight_decay, {"mask", "scale", "norm"}
    decay = map_specs(lambda _, spec: 0.0 if spec.role in spared else weight_decay, specs)

    def init(params: Tree) -> OptimizerState:
        zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return OptimizerState(zero, zero, nothing, nothing, direction.init(params))

    def in_proportion(spec: ParamSpec, update: Array, second_moment: Array) -> Array:
        if spec.role != "mask":
            return update
        mean = jnp.mean(second_moment, axis=spec.block_dims, keepdims=True)
        return update * jnp.sqrt(second_moment / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

    def update(
        gradients: Tree, state: OptimizerState, params: Tree | None = None
    ) -> tuple[Tree, OptimizerState]:
        norm = optax.global_norm(gradients)
        # False for a norm that is not a number, too.
        valid = norm < optimizer.skip_norm
        clip = jnp.minimum(1.0, optimizer.clip_norm / (norm + 1e-8))
        updates, moved = direction.update(
            jax.tree.map(lambda g: g * clip, gradients), state.direction, params
        )
        updates = jax.tree.map(in_proportion, specs, updates, _second_moment(moved))
        sigma = multiplier(stage.schedule, stage.steps, state.stage_steps + 1)

        def delta(update: Array, rate: float, decay: float, param: Array) -> Array:
            return jnp.where(valid, -sigma * (rate * update + decay * param), 0.0)

        advance = valid.astype(jnp.int32)
        return jax.tree.map(delta, updates, rates, decay, params), OptimizerState(
            stage_steps=state.stage_steps + advance,
            skipped=state.skipped + 1 - advance,
            grad_norm=norm,
            learning_rate=sigma * stage.learning_rate,
            direction=jax.tree.map(
                lambda new, old: jnp.where(valid, new, old), moved, state.direction
            ),
        )

    return optax.GradientTransformation(init, update)


def _second_moment(direction: optax.OptState) -> Tree:
    """The running mean of squared gradients that either optimizer keeps."""
    return direction.second_moment if isinstance(direction, AfmState) else direction.nu


def begin_stage(state: OptimizerState) -> OptimizerState:
    """The state with the schedule at its start; moments and counts of the run stay."""
    return state._replace(stage_steps=jnp.zeros_like(state.stage_steps))
