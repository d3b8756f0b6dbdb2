"""The optimizer of the Apple Foundation Models (AXLearn's `adastar_optimizer`)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from braeburn.config import AfmOptimizer
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.optim.definition import Definition, Parameters


class AfmState(NamedTuple):
    """Moments, float32, and the number of updates made."""

    updates: Int[Array, ""]
    second_moment: Tree
    momentum: Tree


def scale_by_afm(optimizer: AfmOptimizer, parameters: Parameters) -> optax.GradientTransformation:
    """Clipped gradients to updates before the learning rate.

    The second moment is bias-corrected with its epsilon inside the average; the normalised gradient
    of each block (one layer's tensor) is held to a root-mean-square of `update_rms`, then averaged
    without bias correction. Matrices are scaled by min(mup_base_width / d_model, 1): muP-simple,
    arXiv 2309.14322, section 3.2.4.
    """
    specs = parameters.specs
    mup_scale = min(optimizer.mup_base_width / parameters.model.d_model, 1.0)

    def init(params: Tree) -> AfmState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AfmState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: Tree, state: AfmState, params: Tree | None = None
    ) -> tuple[Tree, AfmState]:
        count = state.updates + 1
        decay = optimizer.second_moment_decay
        # 1 - decay^count without the cancellation of a power near one; decay 0 keeps no history.
        correction = -jnp.expm1(count.astype(jnp.float32) * math.log(decay)) if decay else 1.0

        second_moment = jax.tree.map(
            lambda v, g: decay * v + (1 - decay) * (jnp.square(g) + optimizer.epsilon),
            state.second_moment,
            gradients,
        )

        def momentum(spec: ParamSpec, m: Array, g: Array, v: Array) -> Array:
            ratio = g * jax.lax.rsqrt(v / correction)
            rms = jnp.sqrt(jnp.mean(jnp.square(ratio), axis=spec.block_dims, keepdims=True))
            ratio = ratio / jnp.maximum(1.0, rms / optimizer.update_rms)
            return optimizer.momentum * m + (1 - optimizer.momentum) * ratio

        new_momentum = jax.tree.map(momentum, specs, state.momentum, gradients, second_moment)
        scales = map_specs(lambda _, spec: mup_scale if spec.role == "matrix" else 1.0, specs)
        updates = jax.tree.map(lambda scale, m: scale * m, scales, new_momentum)
        return updates, AfmState(count, second_moment, new_momentum)

    return optax.GradientTransformation(init, update)


DEFINITION = Definition(
    transformation=scale_by_afm,
    second_moment=lambda state: state.second_moment,
    weight_decay=lambda stage: stage.weight_decay,
    no_decay=frozenset(),
)
