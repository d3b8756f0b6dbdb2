"""How important each unit of a model is, told without training.

Scores come by logical axis, in the shapes of `pruning.score_specs`, float32; the higher, the more
important.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from braeburn.config import ModelConfig, Precision
from braeburn.layers.attention import attention
from braeburn.layers.spec import LAYERS, Tree, random_key, walk
from braeburn.models import decoder
from braeburn.parallel.collectives import CONTEXT, TENSOR, all_sum, axis_index
from braeburn.parallel.layout import Layout
from braeburn.parallel.rules import mesh_axes
from braeburn.transforms.pruning import RULES, Keep, score_specs

# A unit that never does anything has no logarithm; none counts for less than this share of its
# layer's largest.
FLOOR = 1e-6


def magnitude(params: Tree, model: ModelConfig, keep: Keep) -> Tree:
    """The L2 norm of all weights of each unit: of every parameter that has its axis."""
    squares = {
        axis: jnp.zeros(spec.shape, jnp.float32) for axis, spec in score_specs(model, keep).items()
    }
    specs = dict(walk(decoder.param_specs(model)))
    for path, weight in walk(params):
        for axis in keep:
            if axis in specs[path].axes:
                own = (LAYERS, axis) if RULES[axis].per_layer else (axis,)
                others = tuple(dim for dim, name in enumerate(specs[path].axes) if name not in own)
                squares[axis] += jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=others)
    return jax.tree.map(jnp.sqrt, squares)


def random(model: ModelConfig, keep: Keep, seed: int) -> Tree:
    """Importance by lot, log-normal: the choice of units that every other must beat."""
    keys = {axis: jax.random.fold_in(random_key(seed), number) for number, axis in enumerate(RULES)}
    return {
        axis: jnp.exp(jax.random.normal(keys[axis], spec.shape, jnp.float32))
        for axis, spec in score_specs(model, keep).items()
    }


def activation_importance(
    layout: Layout, model: ModelConfig, precision: Precision, keep: Keep
) -> Callable[[Tree, dict[str, Any]], Tree]:
    """A compiled function from parameters and a batch to sums, to be added over batches and given
    to `activation`.

    The activations of Minitron (arXiv 2407.14679, section 2.2): the FFN's hidden units, the L2 norm
    of what each query head has attended to, and for `embed` the normalised values that both blocks
    of every layer read, these summed over layers. A sequence's score is the mean of their absolute
    values over its tokens; sequences are joined by the L2 norm (the best of the paper's ways to
    aggregate), of which these sums are the squares. A sequence is a row of the batch, of which
    padding (segment 0 or weight 0) does not count.

    Args:
        layout: where parameters and batches lie.
        model: sizes and RoPE base.
        precision: the type to compute in; sums are in float32.
        keep: whose keys are the axes to look at.
    """
    mesh, specs = layout.sizes, score_specs(model, keep)
    split = {
        axis: TENSOR in mesh_axes(axis, spec.shape[-1], "activations", mesh)
        for axis, spec in specs.items()
    }

    def nothing(axis: str) -> Array:
        """Sums over no token yet of the units that this device works with."""
        units = specs[axis].shape[-1] // (mesh.tensor if split[axis] else 1)
        return jnp.zeros((model.num_layers, units), jnp.float32)

    def sums(params: Tree, batch: dict[str, Array]) -> Tree:
        real_BT = (batch["weights"] > 0) & (batch["segment_ids"] > 0)
        tokens_B = jnp.maximum(
            all_sum(jnp.sum(real_BT, axis=1, dtype=jnp.float32), CONTEXT, mesh), 1.0
        )

        def attend(query: Array, key: Array, value: Array, state: Tree) -> tuple[Array, Tree]:
            return attention(query, key, value, batch["segment_ids"], mesh), state

        def observe(axis: str, activations: Array, state: Tree) -> Tree:
            if axis not in keep:
                return state
            wide = activations.astype(jnp.float32)
            size_BTU = jnp.linalg.norm(wide, axis=-1) if axis == "heads" else jnp.abs(wide)
            # Padding may hold anything, also what is not a number.
            sum_BU = jnp.sum(jnp.where(real_BT[..., None], size_BTU, 0.0), axis=1)
            mean_BU = all_sum(sum_BU, CONTEXT, mesh) / tokens_B[:, None]
            return state | {axis: state[axis] + jnp.sum(jnp.square(mean_BU), axis=0)}

        def whole(axis: str, shard: Array) -> Array:
            """This device's share of the sums over all devices, in its place among all units."""
            if not RULES[axis].per_layer:
                shard = jnp.sum(shard, axis=0)
            if not split[axis]:
                return shard / (mesh.tensor * mesh.context)
            start = axis_index(TENSOR, mesh) * shard.shape[-1]
            everything = jnp.zeros(specs[axis].shape, jnp.float32)
            return lax.dynamic_update_slice_in_dim(everything, shard / mesh.context, start, -1)

        inputs, states = (
            (batch["inputs"], batch["positions"]),
            {axis: nothing(axis) for axis in keep},
        )
        _, states = decoder.decoder(
            params, *inputs, attend, states, model, precision, mesh=mesh, observe=observe
        )
        return {axis: whole(axis, shard) for axis, shard in states.items()}

    compiled = jax.jit(layout.total(sums))

    def measure(params: Tree, batch: dict[str, Any]) -> Tree:
        with layout.compiling():
            return compiled(params, batch)

    return measure


def activation(sums: Tree) -> Tree:
    """The importance of units from the sums of `activation_importance` over all batches."""
    return jax.tree.map(jnp.sqrt, sums)


def standardised(importance: Tree) -> Tree:
    """The logarithm of importance, brought to mean 0 and standard deviation 1: the scores that
    Soft-Top-K starts with.

    Each layer is standardised by itself and as a whole, so that heads of different groups stay
    comparable in spread. Where all units are alike, their scores are 0.
    """

    def one(values: Array) -> Array:
        floor = FLOOR * jnp.max(values, axis=-1, keepdims=True)
        logs = jnp.log(jnp.maximum(jnp.maximum(values, floor), jnp.finfo(jnp.float32).tiny))
        centred = logs - jnp.mean(logs, axis=-1, keepdims=True)
        spread = jnp.std(logs, axis=-1, keepdims=True)
        # What rounding leaves of equal logarithms is no spread.
        return jnp.where(spread > FLOOR, centred / jnp.maximum(spread, FLOOR), 0.0)

    return jax.tree.map(one, importance)
