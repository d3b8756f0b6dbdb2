"""Clipping, and skipping of bad steps, around any optax transformation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from braeburn.layers.spec import Tree

# (updates, new state, parameters, steps of the stage so far) -> (additive updates, learning rate).
Finish = Callable[[Tree, optax.OptState, Tree, Int[Array, ""]], tuple[Tree, Float[Array, ""]]]


class OptimizerState(NamedTuple):
    """What the optimizer remembers.

    Attributes:
        stage_steps: valid steps since the stage began, the schedule's clock.
        skipped: invalid steps since the run began.
        grad_norm: global L2 norm of the last gradient, before clipping.
        learning_rate: of the last step, schedule included; 0 where it is not known.
        direction: the inner transformation's state, advanced by valid steps only.
    """

    stage_steps: Int[Array, ""]
    skipped: Int[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    direction: optax.OptState


def _as_they_are(
    updates: Tree, state: optax.OptState, params: Tree, steps: Int[Array, ""]
) -> tuple[Tree, Float[Array, ""]]:
    return updates, jnp.zeros((), jnp.float32)


def guarded(
    inner: optax.GradientTransformation,
    *,
    clip_norm: float,
    skip_norm: float,
    finish: Finish = _as_they_are,
) -> optax.GradientTransformation:
    """A transformation that is given clipped gradients, and only good ones.

    A step is valid if its gradient is finite and of norm below `skip_norm`; an invalid one changes
    only `skipped`.

    Args:
        inner: as `optax.adamw(1e-3)`; its updates are added to the parameters as they are, unless
            `finish` says otherwise.
        clip_norm: the global L2 norm that gradients are clipped to.
        skip_norm: of a gradient too large to be used.
        finish: turns the inner transformation's updates into what is added to the parameters.
    """

    def init(params: Tree) -> OptimizerState:
        zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return OptimizerState(zero, zero, nothing, nothing, inner.init(params))

    def update(
        gradients: Tree, state: OptimizerState, params: Tree | None = None
    ) -> tuple[Tree, OptimizerState]:
        norm = optax.global_norm(gradients)
        # False for a norm that is not a number, too.
        valid = norm < skip_norm
        clip = jnp.minimum(1.0, clip_norm / (norm + 1e-8))
        updates, moved = inner.update(
            jax.tree.map(lambda g: g * clip, gradients), state.direction, params
        )
        assert params is not None  # weight decay needs them
        updates, rate = finish(updates, moved, params, state.stage_steps)
        advance = valid.astype(jnp.int32)
        return jax.tree.map(lambda update: jnp.where(valid, update, 0.0), updates), OptimizerState(
            stage_steps=state.stage_steps + advance,
            skipped=state.skipped + 1 - advance,
            grad_norm=norm,
            learning_rate=rate,
            direction=jax.tree.map(
                lambda new, old: jnp.where(valid, new, old), moved, state.direction
            ),
        )

    return optax.GradientTransformation(init, update)


def begin_stage(state: OptimizerState) -> OptimizerState:
    """The state with the schedule at its start; moments and counts of the run stay."""
    return state._replace(stage_steps=jnp.zeros_like(state.stage_steps))
