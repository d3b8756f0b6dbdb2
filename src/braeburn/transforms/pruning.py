"""Units cut out of a model: masks over its weights while they are chosen, then a smaller model of
those that stay.

Everything goes by the logical axes of the parameters' specs, so that the transformer knows nothing
of it: `RULES` has one line for each axis that can be pruned. A mask multiplies weights, and where
it is 0 the unit might as well not be there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from braeburn.config import PRUNABLE, ModelConfig
from braeburn.layers.spec import LAYERS, ParamSpec, Tree
from braeburn.models.decoder import param_specs
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
    """
    specs = {}
    for axis in keep:
        units = getattr(model, PRUNABLE[axis])
        if RULES[axis].per_layer:
            specs[axis] = ParamSpec((model.num_layers, units), (LAYERS, axis), "mask")
        else:
            specs[axis] = ParamSpec((units,), (axis,), "mask")
    return specs


def masks(scores: Tree, keep: Keep, model: ModelConfig, temperature: Array | float) -> Tree:
    """Masks of the scores' shapes, float32, each summing to what is kept of its axis: see
    `soft_top_k`.
    """
    found = {}
    for axis, size in keep.items():
        groups = _groups(axis, model)
        within = soft_top_k(_grouped(scores[axis], groups), size // groups, temperature)
        found[axis] = within.reshape(scores[axis].shape)
    return found


def kept(scores: Tree, keep: Keep, model: ModelConfig) -> dict[str, Array]:
    """The units that stay, [layers, kept] or [kept], int32, ascending: those whose `masks` at
    temperature 0 are 1.
    """
    found = {}
    for axis, size in keep.items():
        groups = _groups(axis, model)
        within = top_k_indices(_grouped(scores[axis], groups), size // groups)
        first = jnp.arange(groups, dtype=jnp.int32)[:, None] * (scores[axis].shape[-1] // groups)
        found[axis] = (first + within).reshape(*scores[axis].shape[:-1], size)
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
    scores = score_specs(model, masks)

    def one(weight: Array, spec: ParamSpec) -> Array:
        for axis, mask in masks.items():
            if axis not in spec.axes:
                continue
            if spec.role == "norm":
                # The mean of a mask is a given number, not something to learn.
                weight = weight * jnp.sqrt(jax.lax.stop_gradient(jnp.mean(mask)))
            elif spec.role == "embedding" or (axis in spec.fan_in) == (
                RULES[axis].masked == "readers"
            ):
                others = [
                    dim for dim, name in enumerate(spec.axes) if name not in scores[axis].axes
                ]
                weight = weight * jnp.expand_dims(mask, others)
        return weight

    return jax.tree.map(one, params, param_specs(model))


def sliced(tree: Tree, indices: Mapping[str, Array], specs: Tree) -> Tree:
    """A tree with only the kept units of each leaf, along every axis that was pruned.

    Args:
        tree: arrays of the shapes that `specs` has, as parameters or moments of them. Under jit
            they may be global arrays split over a mesh; how the results lie is then the caller's to
            say.
        indices: of the units that stay, by axis, as from `kept`.
        specs: those of the larger model.
    """

    def one(leaf: Array, spec: ParamSpec) -> Array:
        for axis, units in indices.items():
            if axis not in spec.axes:
                continue
            dim = spec.axes.index(axis)
            if units.ndim == 1:
                leaf = jnp.take(leaf, units, axis=dim)
            else:
                leaf = jax.vmap(partial(jnp.take, axis=dim - 1))(leaf, units)
        return leaf

    return jax.tree.map(one, tree, specs)


def _groups(axis: str, model: ModelConfig) -> int:
    field = RULES[axis].groups
    return getattr(model, field) if field else 1


def _grouped(scores: Array, groups: int) -> Array:
    return scores.reshape(*scores.shape[:-1], groups, -1)
