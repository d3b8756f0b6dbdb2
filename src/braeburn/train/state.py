"""Everything that training changes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from braeburn.layers.spec import Tree


class TrainState(NamedTuple):
    """Steps made, float32 parameters and the optimizer's state."""

    step: Int[Array, ""] | Any
    params: Tree
    optimizer: optax.OptState


def new_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
