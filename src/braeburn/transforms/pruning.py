"""A stage of pruning: masks that learn which units stay, or a cut as the stage begins."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from braeburn.config import ModelConfig, Pruning, StageModels
from braeburn.layers.spec import Tree
from braeburn.models.decoder import param_specs
from braeburn.transforms import importance
from braeburn.transforms.definition import ADDED, Change, Definition, Found, Transform, without
from braeburn.transforms.units import kept, masked, masks, score_specs, sliced

# The name of the scores, at the top of the tree of what a stage trains.
MASKS = "masks"


def temperature(pruning: Pruning, total_steps: int, step: Any) -> Float[Array, ""]:
    """The masks' temperature at a 0-based step of the stage: it falls by equal ratios, and is 0 for
    the last `exact` steps.
    """
    soft_steps = max(1, round((1 - pruning.exact) * total_steps))
    progress = jnp.asarray(step, jnp.float32) / soft_steps
    falling = pruning.temperature * (pruning.final_temperature / pruning.temperature) ** progress
    return jnp.where(progress < 1, falling, 0.0)


def importance_of_units(pruning: Pruning, found: Found) -> Tree:
    """The importance of a model's units, by axis, as the pruning's method measures it without
    training.

    The batches of `found` are read where the method measures activations, and not otherwise.
    """
    model, keep = found.model, pruning.keep
    if pruning.method == "magnitude":
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.params)):
            return importance.magnitude(found.params, model, keep)  # from the disk
        return jax.jit(lambda params: importance.magnitude(params, model, keep))(found.params)
    if pruning.method == "random":
        # As NumPy has it, an array that is the same in all processes belongs to no device.
        return jax.tree.map(np.asarray, importance.random(model, keep, found.seed))
    measure = importance.activation_importance(found.layout, model, keep)

    def add(sums: Tree, more: Tree) -> Tree:
        # A batch is read while the one before is at work, and no sooner: devices would hold them
        # all, and what shows how many are done would be far ahead.
        return jax.tree.map(jnp.add, jax.block_until_ready(sums), more)

    sums = functools.reduce(add, (measure(found.params, batch) for batch in found.batches))
    return importance.activation(sums)


def cutting(pruning: Pruning, model: ModelConfig) -> Change:
    """The change that leaves only the units of the highest scores, which decide it.

    Args:
        pruning: how many units stay.
        model: the model before.
    """
    specs = param_specs(model)

    def cut(tree: Tree, scores: Tree) -> Tree:
        return sliced(tree, kept(scores, pruning.keep, model), specs)

    return Change(cut, cut)


def _transform(pruning: Pruning, models: StageModels, steps: int) -> Transform:
    change = cutting(pruning, models.found)
    if not pruning.learned:
        return Transform(measure=lambda found: importance_of_units(pruning, found), enter=change)
    model = models.trained
    extras = {MASKS: score_specs(model, pruning.keep)}

    def effective(params: Tree, step: Any) -> Tree:
        now = masks(params[MASKS], pruning.keep, model, temperature(pruning, steps, step))
        return masked(without(params, extras), now, model)

    def measure(found: Found) -> Tree:
        return {MASKS: importance.standardised(importance_of_units(pruning, found))}

    def cut(tree: Tree, params: Tree) -> Tree:
        return change.params(without(tree, extras), params[MASKS])

    return Transform(
        extra_specs=extras,
        effective=effective,
        measure=measure,
        enter=ADDED,
        leave=Change(cut, cut),
    )


DEFINITION: Definition = _transform
