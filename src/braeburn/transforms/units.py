"""Units cut out of a model: masks over its weights while they are chosen, then a smaller model of
those that stay.

Everything goes by the logical axes of the parameters' specs, so that the transformer knows nothing
of it: `RULES` has one line for each axis that can be pruned. A mask multiplies weights, and where
it is 0 the unit might as well not be there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from braeburn.config import PRUNABLE, ModelConfig
from braeburn.layers.spec import LAYERS, ParamSpec, Tree, map_specs, walk
from braeburn.models.decoder import param_specs, stacks
from braeburn.transforms.soft_top_k import soft_top_k, top_k_indices

# How many units of each logical axis stay.
Keep = Mapping[Any, int]


@dataclass(frozen=True)
class AxisRule:
    """How the units of one logical axis are masked and chosen.

    Attributes:
        masked: the matrices that carry the mask: those that read the axis, summing over it, or
            those that write it. A table of embeddings carries it too, since it writes what the
            layers read, and reads what they wrote.
        per_layer: each layer has its own choice; otherwise all share one.
        groups: the field of the model that counts the equal groups in which units come, if they do;
            each keeps as many.
    """

    masked: Literal["readers", "writers"]
    per_layer: bool = True
    groups: str | None = None


RULES: dict[str, AxisRule] = {
    "ffn": AxisRule("readers"),
    # Query heads that share a key head follow one another.
    "heads": AxisRule("readers", groups="num_kv_heads"),
    "embed": AxisRule("writers", per_layer=False),
}


def score_specs(model: ModelConfig, keep: Iterable[str]) -> Tree:
    """The specs of the units' scores, by axis: [layers, units], or [units] where all layers share
    one choice.

    A model whose layers are in several stacks has a tree of scores for an axis, in which they stand
    at the paths of the stacks.
    """
    specs: Tree = {}
    for axis in keep:
        units = getattr(model, PRUNABLE[axis])
        if RULES[axis].per_layer:

            def scores(layers: int, units: int = units, axis: str = axis) -> ParamSpec:
                return ParamSpec((layers, units), (LAYERS, axis), "mask")

            specs[axis] = by_stack(model, scores)
        else:
            specs[axis] = ParamSpec((units,), (axis,), "mask")
    return specs


def by_stack(model: ModelConfig, make: Callable[[int], Any]) -> Any:
    """`make(number of layers)` of each stack of layers, at its path; alone where there is one."""
    found = stacks(model)
    if len(found) == 1:
        return make(len(found[0].numbers))
    tree: Tree = {}
    for stack in found:
        *parents, last = stack.path
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = make(len(stack.numbers))
    return tree


def at_path(values: Any, path: str) -> Any:
    """What a value of `by_stack` has for the stack of a parameter."""
    for name in path.split("/"):
        if not isinstance(values, dict):
            break
        values = values[name]
    return values


def masks(scores: Tree, keep: Keep, model: ModelConfig, temperature: Array | float) -> Tree:
    """The masks of units, by `soft_top_k`.

    Args:
        scores: float32, of the shapes of `score_specs`.
        keep: how many units stay of each axis.
        model: that they are units of.
        temperature: of the masks; at 0 they are zeros and ones.

    Returns:
        Masks of the scores' shapes, float32. Those of one layer sum to what is kept.
    """
    found = {}
    for axis, size in keep.items():
        groups = _groups(axis, model)

        def one(scores: Array, groups: int = groups, size: int = size) -> Array:
            within = soft_top_k(_grouped(scores, groups), size // groups, temperature)
            return within.reshape(scores.shape)

        found[axis] = jax.tree.map(one, scores[axis])
    return found


def kept(scores: Tree, keep: Keep, model: ModelConfig) -> dict[str, Any]:
    """The units that stay, [layers, kept] or [kept], int32, ascending: those whose `masks` at
    temperature 0 are 1.
    """
    found = {}
    for axis, size in keep.items():
        groups = _groups(axis, model)

        def one(scores: Array, groups: int = groups, size: int = size) -> Array:
            within = top_k_indices(_grouped(scores, groups), size // groups)
            first = jnp.arange(groups, dtype=jnp.int32)[:, None] * (scores.shape[-1] // groups)
            return (first + within).reshape(*scores.shape[:-1], size)

        found[axis] = jax.tree.map(one, scores[axis])
    return found


def masked(params: Tree, masks: Tree, model: ModelConfig) -> Tree:
    """The parameters with each unit's weights multiplied by its mask; differentiable in both.

    The logits are those of the smaller model where masks are zeros and ones. RMSNorm then takes its
    mean over fewer dimensions, so that over a pruned axis its scales are multiplied by sqrt(kept /
    all). What remains is its epsilon, which stays as configured: where k of n dimensions are kept,
    of mean square v, the smaller model's normal values are larger by a factor of about 1 + (n / k -
    1) epsilon / (2 v).

    Args:
        params: float32 arrays as `param_specs(model)` describes them.
        masks: by axis, of the shapes in `score_specs`.
        model: the larger model.
    """
    specs = param_specs(model)
    # A norm over an axis must not count units that are not there: what writes them is masked too.
    normed = {
        (path.rpartition("/")[0], axis)
        for path, spec in walk(specs)
        if spec.role == "norm"
        for axis in spec.axes
        if axis in masks and RULES[axis].masked == "readers"
    }
    weights = dict(walk(params))

    def one(path: str, spec: ParamSpec) -> Array:
        weight = weights[path]
        for axis in masks:
            if axis not in spec.axes:
                continue
            mask = at_path(masks[axis], path)
            is_normed = (path.rpartition("/")[0], axis) in normed
            if spec.role == "norm":
                # The mean of a mask is a given number, not something to learn.
                weight = weight * jnp.sqrt(jax.lax.stop_gradient(jnp.mean(mask)))
            elif (
                spec.role == "embedding"
                or is_normed
                or (axis in spec.fan_in) == (RULES[axis].masked == "readers")
            ):
                own = (LAYERS, axis) if RULES[axis].per_layer else (axis,)
                others = [dim for dim, name in enumerate(spec.axes) if name not in own]
                weight = weight * jnp.expand_dims(mask, others)
        return weight

    return map_specs(one, specs)


def sliced(tree: Tree, indices: Mapping[str, Any], specs: Tree) -> Tree:
    """A tree with only the kept units of each leaf, along every axis that was pruned.

    Args:
        tree: arrays of the shapes that `specs` has, as parameters or moments of all or some of
            them. Under jit they may be global arrays split over a mesh; how the results lie is then
            the caller's to say.
        indices: of the units that stay, by axis, as from `kept`.
        specs: those of the larger model.
    """

    spec_of = dict(walk(specs))

    def one(keys: Any, leaf: Array) -> Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        spec = spec_of[path]
        for axis in indices:
            if axis not in spec.axes:
                continue
            units = at_path(indices[axis], path)
            dim = spec.axes.index(axis)
            if units.ndim == 1:
                leaf = jnp.take(leaf, units, axis=dim)
            else:
                leaf = jax.vmap(partial(jnp.take, axis=dim - 1))(leaf, units)
        return leaf

    return jax.tree.map_with_path(one, tree)


def sliced_block(
    block: np.ndarray, path: str, spec: ParamSpec, indices: Mapping[str, Any], layer: int | None
) -> np.ndarray:
    """The part of `sliced` that comes of one layer of a parameter, or of one that is not stacked.

    Args:
        block: the layer, or the whole parameter where `layer` is None.
        path: of the parameter.
        spec: of the parameter.
        indices: of the units that stay, by axis, as from `kept`.
        layer: which of the stack.
    """
    for axis in indices:
        if axis in spec.axes:
            units = np.asarray(at_path(indices[axis], path))
            dim = spec.axes.index(axis) - (0 if layer is None else 1)
            block = np.take(block, units if units.ndim == 1 else units[layer], axis=dim)
    return block


def _groups(axis: str, model: ModelConfig) -> int:
    field = RULES[axis].groups
    return getattr(model, field) if field else 1


def _grouped(scores: Array, groups: int) -> Array:
    return scores.reshape(*scores.shape[:-1], groups, -1)
