"""How important each unit of a model is, measured without training.

Scores come by logical axis, in the shapes of `units.score_specs`, float32; the higher, the more
important.
"""

import functools
import operator
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from braeburn.config import PRUNABLE, LayerConfig, ModelConfig
from braeburn.data.packing import Batch
from braeburn.layers.spec import LAYERS, ParamSpec, Tree, map_specs, random_key, walk
from braeburn.models import decoder
from braeburn.parallel.collectives import CONTEXT, TENSOR, all_sum, axis_index
from braeburn.parallel.layout import Layout
from braeburn.parallel.rules import mesh_axes
from braeburn.transforms.units import RULES, Keep, by_stack, score_specs

# A unit that never does anything has no logarithm; none counts for less than this share of its
# layer's largest.
FLOOR = 1e-6


def magnitude(params: Tree, model: ModelConfig, keep: Keep) -> Tree:
    """The L2 norm of all weights of each unit: of every parameter that has its axis.

    Args:
        params: arrays, or what gives a layer of them for an index and the whole for `np.asarray`.
        model: whose parameters.
        keep: whose keys are the axes to look at.
    """
    specs = dict(walk(decoder.param_specs(model)))
    squares: dict[str, Any] = {}
    for path, weight in walk(params):
        for axis in keep:
            if axis in specs[path].axes:
                own = (LAYERS, axis) if RULES[axis].per_layer else (axis,)
                others = tuple(dim for dim, name in enumerate(specs[path].axes) if name not in own)
                square = _squares(weight, others, specs[path].stacked)
                stack = path.rpartition("/")[0] if RULES[axis].per_layer else ""
                sums = squares.setdefault(axis, {})
                sums[stack] = sums.get(stack, 0.0) + square
    return {axis: jax.tree.map(jnp.sqrt, _as_scores(axis, squares[axis], model)) for axis in keep}


def _squares(weight: Any, over: tuple[int, ...], stacked: bool) -> Array:
    """The sum of squares over some dimensions, in float32; of what is read layer by layer, one
    layer after the other.
    """

    def one(block: Array | np.ndarray, over: tuple[int, ...]) -> Array:
        return jnp.sum(jnp.square(jnp.asarray(block, jnp.float32)), axis=over)

    if isinstance(weight, jax.Array) or not stacked:
        return one(weight if isinstance(weight, jax.Array) else np.asarray(weight), over)
    within = tuple(dim - 1 for dim in over if dim > 0)
    # Each before the next is read: JAX would otherwise hold all that it has still to sum.
    layers = jnp.stack(
        [jax.block_until_ready(one(weight[layer], within)) for layer in range(weight.shape[0])]
    )
    return jnp.sum(layers, axis=0) if 0 in over else layers


def _as_scores(axis: str, values: dict[str, Array], model: ModelConfig) -> Any:
    """Values by the paths of stacks of layers, or at "" for all layers, in the form of scores."""
    if not RULES[axis].per_layer:
        return values[""]
    in_order = iter(["/".join(stack.path) for stack in decoder.stacks(model)])
    return by_stack(model, lambda layers: values[next(in_order)])


def random(model: ModelConfig, keep: Keep, seed: int) -> Tree:
    """Importance drawn at random, log-normal: the choice of units that every other must beat."""
    keys = {axis: jax.random.fold_in(random_key(seed), number) for number, axis in enumerate(RULES)}

    def draw(path: str, spec: ParamSpec) -> Array:
        axis, _, stack = path.partition("/")
        key = keys[axis]
        if stack:
            key = jax.random.fold_in(key, zlib.crc32(stack.encode()))
        return jnp.exp(jax.random.normal(key, spec.shape, jnp.float32))

    return map_specs(draw, score_specs(model, keep))


def activation_importance(
    layout: Layout, model: ModelConfig, keep: Keep
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
        layout: where parameters and batches lie, and the type to compute in; sums are float32.
        model: what is computed.
        keep: whose keys are the axes to look at.
    """
    execution = layout.execution.forward_only
    mesh, sizes = execution.mesh, {axis: getattr(model, PRUNABLE[axis]) for axis in keep}
    split = {
        axis: TENSOR in mesh_axes((axis,), (size,), "activations", execution)[0]
        for axis, size in sizes.items()
    }

    def nothing(layer: LayerConfig, layers: int) -> Tree:
        """Sums over no token yet of the units that this device works with."""
        own = {axis: sizes[axis] // (mesh.tensor if split[axis] else 1) for axis in keep}
        return {axis: jnp.zeros((layers, units), jnp.float32) for axis, units in own.items()}

    def sums(params: Tree, batch: Batch) -> Tree:
        real_BT = (batch["weights"] > 0) & (batch["segment_ids"] > 0)
        tokens_B = jnp.maximum(
            all_sum(jnp.sum(real_BT, axis=1, dtype=jnp.float32), CONTEXT, mesh), 1.0
        )

        def activation_hook(axis: str, activations: Array, state: Tree) -> Tree:
            if axis not in keep:
                return state
            wide = activations.astype(jnp.float32)
            size_BTU = jnp.linalg.norm(wide, axis=-1) if axis == "heads" else jnp.abs(wide)
            # Padding may hold anything, also what is not a number.
            sum_BU = jnp.sum(jnp.where(real_BT[..., None], size_BTU, 0.0), axis=1)
            mean_BU = all_sum(sum_BU, CONTEXT, mesh) / tokens_B[:, None]
            return state | {axis: state[axis] + jnp.sum(jnp.square(mean_BU), axis=0)}

        def whole(axis: str, shard: Array) -> Array:
            """This device's part of the sums over all devices, at its units' indices."""
            if not split[axis]:
                return shard / (mesh.tensor * mesh.context)
            start = axis_index(TENSOR, mesh) * shard.shape[-1]
            everything = jnp.zeros((*shard.shape[:-1], sizes[axis]), jnp.float32)
            return lax.dynamic_update_slice_in_dim(everything, shard / mesh.context, start, -1)

        tokens = (batch["inputs"], batch["positions"])
        memory = decoder.Packed(batch["segment_ids"], execution)
        states = decoder.layer_states(model, nothing)
        surroundings = decoder.Surroundings(memory, states, activation_hook)
        states = decoder.decoder(params, tokens, surroundings, model, execution).states
        by_path = {
            "/".join(stack.path): functools.reduce(operator.getitem, stack.path, states)
            for stack in decoder.stacks(model)
        }
        found = {}
        for axis in keep:
            values = {path: sums[axis] for path, sums in by_path.items()}
            if not RULES[axis].per_layer:
                values = {"": sum(jnp.sum(each, axis=0) for each in values.values())}
            values = {path: whole(axis, shard) for path, shard in values.items()}
            found[axis] = _as_scores(axis, values, model)
        return found

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
    comparable in spread. Where all units have one value, their scores are 0.
    """

    def one(values: Array) -> Array:
        floor = FLOOR * jnp.max(values, axis=-1, keepdims=True)
        logs = jnp.log(jnp.maximum(jnp.maximum(values, floor), jnp.finfo(jnp.float32).tiny))
        centred = logs - jnp.mean(logs, axis=-1, keepdims=True)
        spread = jnp.std(logs, axis=-1, keepdims=True)
        # What rounding leaves of equal logarithms is no spread.
        return jnp.where(spread > FLOOR, centred / jnp.maximum(spread, FLOOR), 0.0)

    return jax.tree.map(one, importance)
