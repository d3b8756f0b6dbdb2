"""Parameters that a stage's transform leaves as they are: no gradient, no update."""

import jax
import jax.numpy as jnp
import optax

from braeburn.layers.spec import Tree, map_specs
from braeburn.transforms.definition import EffectiveWeights, Transform


def effective_weights(transform: Transform, specs: Tree) -> EffectiveWeights | None:
    """The weights that a step is computed with, whose gradients reach only what trains; None where
    they are the stored ones and all of them train.

    Args:
        transform: of the stage.
        specs: of all that the stage trains or holds.
    """
    trains = _trains(transform, specs)
    if all(jax.tree.leaves(trains)):
        return transform.effective
    effective = transform.effective or (lambda params, _: params)

    def held(params: Tree, steps: jax.Array) -> Tree:
        stopped = jax.tree.map(
            lambda value, free: value if free else jax.lax.stop_gradient(value), params, trains
        )
        return effective(stopped, steps)

    return held


def updating(
    optimizer: optax.GradientTransformation, transform: Transform, specs: Tree
) -> optax.GradientTransformation:
    """The optimizer whose updates leave alone what does not train, weight decay included.

    Its state has the same structure, so that it carries over to stages in which all trains.
    """
    trains = _trains(transform, specs)
    if all(jax.tree.leaves(trains)):
        return optimizer

    def update(
        gradients: Tree, state: optax.OptState, params: Tree | None = None
    ) -> tuple[Tree, optax.OptState]:
        updates, state = optimizer.update(gradients, state, params)
        kept = jax.tree.map(
            lambda value, free: value if free else jnp.zeros_like(value), updates, trains
        )
        return kept, state

    return optax.GradientTransformation(optimizer.init, update)


def _trains(transform: Transform, specs: Tree) -> Tree:
    """Whether each parameter trains."""
    return map_specs(transform.trains, specs)
