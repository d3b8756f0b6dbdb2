"""The decoder with what it keeps of earlier tokens, to generate from.

Prompts are read in one pass of `read`. From then on each pass of `forward_cached` takes the newest
token of each row, and looks up the earlier ones' keys and values, or the latents that these would
be made of. A layer's are [B, K, S, H]: K heads, and S slots, where position p has slot p mod S. A
layer with a window has no more slots than its window, so that a token takes the place of one that
no later token sees.

A pass over one token reads every weight once, so layers are `apart`: where they are stacked, a CPU
copies each layer's weights out of the stack, which takes longer than to multiply by them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from braeburn.config import Execution, LayerConfig, ModelConfig
from braeburn.layers.attention import Scope, cached_attention
from braeburn.layers.spec import ParamSpec, Tree
from braeburn.layers.sublayers.definition import Kept, sizes_of, sublayer_of
from braeburn.models import decoder
from braeburn.models.decoder import Packed, Surroundings, Tokens
from braeburn.parallel.collectives import TENSOR
from braeburn.parallel.rules import BATCH, mesh_axes, partition


class Cached:
    """Keys and values of a cache; of the new tokens of a row only the first may be beyond what the
    cache has slots for.
    """

    holds_past = True

    def __init__(self, positions: Tokens):
        """Takes the positions of the new tokens."""
        self._positions = jnp.asarray(positions)
        self._rows = jnp.arange(positions.shape[0])[:, None]

    def keep(self, arrays: tuple[Array, ...], state: Any) -> tuple[tuple[Array, ...], Any]:
        """The caches with the new tokens' arrays in their slots."""
        at = (self._rows, slice(None), self._positions % state[0].shape[2])
        caches = tuple(cache.at[at].set(array) for cache, array in zip(state, arrays, strict=True))
        return caches, caches

    def attend(self, query: Array, keys_and_values: Any, scope: Scope) -> Array:
        """Attention of new tokens to the positions that they see."""
        keys, values = keys_and_values
        return cached_attention(query, keys, values, self._positions, scope)


class Prompts(Packed):
    """Keys and values of prompts, which are also what is kept of them, [B, K, T, H]."""

    def keep(self, arrays: tuple[Array, ...], state: Any) -> tuple[tuple[Array, ...], Any]:
        """The arrays as they are, and as they are kept."""
        return arrays, tuple(array.swapaxes(1, 2) for array in arrays)


def apart(model: ModelConfig, tree: Tree, take: Callable[[Any, int], Any]) -> Tree:
    """A tree like that of the parameters with those of each layer by themselves.

    Args:
        model: whose.
        tree: with leaves for all layers of a stack.
        take: (such a leaf, the number of a layer in its stack) -> that layer's.

    Returns:
        What stands under the name of a segment becomes a tuple over its repeats.
    """
    found = dict(tree)
    for segment in model.segments:
        found[segment.name] = tuple(
            jax.tree.map(lambda leaf, i=i: take(leaf, i), tree[segment.name])
            for i in range(segment.repeats)
        )
    return found


def apart_specs(model: ModelConfig) -> Tree:
    """The specs of the parameters where layers are apart."""

    def one(spec: ParamSpec, _: int) -> ParamSpec:
        return replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])

    return apart(model, decoder.param_specs(model), one)


def kept_by_layer(model: ModelConfig) -> Tree:
    """What each layer keeps of tokens, where layers are apart: a tuple of `Kept` each.

    A layer whose keys and values a later one attends to keeps those of all tokens.
    """
    layers = model.layer_configs
    numbers = {
        (stack.path, repeat): number
        for stack in decoder.stacks(model)
        for repeat, number in enumerate(stack.numbers)
    }

    def of_layer(layer: LayerConfig, number: int) -> tuple[Kept, ...]:
        kept = sublayer_of(layer.attention).cache(layer.attention)
        following = layers[number + 1 : number + 2]
        if any(each.attention.reuses_keys for each in following):
            return tuple(replace(each, window=None) for each in kept)
        return kept

    found: Tree = {}
    for segment in model.segments:
        count = len(segment.pattern)
        repeats = []
        for repeat in range(segment.repeats):
            each = [
                of_layer(layer, numbers[_path(segment.name, i, count), repeat])
                for i, layer in enumerate(segment.pattern)
            ]
            repeats.append(each[0] if count == 1 else {str(i): one for i, one in enumerate(each)})
        found[segment.name] = tuple(repeats)
    return found


def _path(segment: str, index: int, count: int) -> tuple[str, ...]:
    return (segment,) if count == 1 else (segment, str(index))


def _is_kept(node: Any) -> bool:
    return isinstance(node, Kept)


def _heads(kept: Kept, model: ModelConfig, execution: Execution) -> tuple[list[int], list[Any]]:
    """The sizes of one token's dimensions on a device, and the mesh axes that they are split along.

    Where key heads are fewer than the shards of `tensor`, each shard keeps the one that its query
    heads share.
    """
    sizes_by_axis = sizes_of(model)
    shape = kept.sizes or tuple(sizes_by_axis[axis] for axis in kept.axes)
    split = mesh_axes(kept.axes, shape, "activations", execution)
    sizes: list[int] = []
    along: list[Any] = []
    for axis, size, axes in zip(kept.axes, shape, split, strict=True):
        if axis == "kv_heads" and not axes and execution.mesh.tensor > 1:
            sizes.append(1)
            along.append(TENSOR)
            continue
        for name in axes:
            size //= execution.mesh.sizes[name]
        sizes.append(size)
        along.append(axes or None)
    return sizes, along


def cache_partitions(model: ModelConfig, execution: Execution) -> Tree:
    """How the cache is split over a mesh, where layers are apart."""
    (rows,) = partition((BATCH,), (0,), "activations", execution)

    def one(kept: Kept) -> PartitionSpec:
        *outer, last = _heads(kept, model, execution)[1]
        return PartitionSpec(rows, *outer, None, last)

    return jax.tree.map(one, kept_by_layer(model), is_leaf=_is_kept)


def empty_cache(
    model: ModelConfig, batch: int, length: int, execution: Execution, *, stacked: bool = False
) -> Any:
    """What layers keep to generate from, before the first token.

    Args:
        model: whose layers.
        batch: sequences of this device.
        length: positions of each.
        execution: tells the type of keys and values, and what part of them a device has.
        stacked: whether layers are stacked, and all positions kept, as several new tokens at once
            need it.

    Returns:
        Zeros, for each layer [batch, heads, slots, head_dim], where slots are `length`, or the
        layer's window if that is less. Where layers are stacked, the first dimension counts them.
    """
    dtype = execution.precision.compute

    def zeros(kept: Kept, leading: tuple[int, ...] = ()) -> Array:
        *outer, last = _heads(kept, model, execution)[0]
        slots = length if stacked or kept.window is None else min(kept.window, length)
        return jnp.zeros((*leading, batch, *outer, slots, last), dtype)

    if not stacked:
        return jax.tree.map(zeros, kept_by_layer(model), is_leaf=_is_kept)
    return decoder.layer_states(
        model,
        lambda layer, repeats: tuple(
            zeros(kept, (repeats,)) for kept in sublayer_of(layer.attention).cache(layer.attention)
        ),
    )


def forward_cached(
    params: Tree,
    tokens: tuple[Tokens, Tokens],
    cache: Any,
    model: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "B T D"], Any]:
    """Final hidden states of new tokens, and the cache with their keys and values.

    Args:
        params: this device's part of the parameters, of any float type; `apart` or stacked, as the
            cache is.
        tokens: vocabulary ids and positions of the new tokens.
        cache: from `empty_cache` or `read`, or from an earlier call. Where a row has more than one
            new token, it has slots for all positions.
        model: what is computed.
        execution: how it is carried out; splits no tokens.

    Returns:
        [B, T, D] in the type to compute in, and the cache.
    """
    surroundings = Surroundings(Cached(tokens[1]), cache)
    decoded = decoder.decoder(params, tokens, surroundings, model, execution)
    return decoded.hidden, decoded.states


def read(
    params: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    slots: int,
    model: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "B D"], Any]:
    """Reads prompts, which are padded on the right.

    The slots of the padding hold its keys and values, but a query sees only positions up to its
    own, and a row overwrites each of them before it gets there.

    Args:
        params: this device's part of the parameters, of any float type, `apart`.
        tokens: vocabulary ids of the prompts, int32 [B, T].
        lengths: tokens of each prompt without its padding, int32 [B].
        slots: for how many positions the cache is to have room, at least T.
        model: what is computed.
        execution: how it is carried out; splits no tokens.

    Returns:
        The hidden states of each prompt's last token in the type to compute in, and the cache.
    """
    hidden, kept = read_all(params, tokens, model, execution)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    wanted = jax.eval_shape(lambda: empty_cache(model, tokens.shape[0], slots, execution))
    cache = jax.tree.map(lambda found, wants: _in_slots(found, lengths, wants.shape), kept, wanted)
    return last, cache


def read_all(
    params: Tree, tokens: Int[Array, "B T"], model: ModelConfig, execution: Execution
) -> tuple[Float[Array, "B T D"], Any]:
    """Reads prompts as `read`, and gives all that comes of it.

    Args:
        params: this device's part of the parameters, of any float type, `apart`.
        tokens: vocabulary ids of the prompts, int32 [B, T].
        model: what is computed.
        execution: how it is carried out; splits no tokens.

    Returns:
        The hidden states of all tokens in the type to compute in; and a cache of all positions, in
        which also layers with a window have T slots.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    nothing = jax.tree.map(lambda _: (), kept_by_layer(model), is_leaf=_is_layer)
    memory = Prompts(jnp.zeros_like(tokens), execution)
    surroundings = Surroundings(memory, nothing)
    hidden, kept, _ = decoder.decoder(params, (tokens, positions), surroundings, model, execution)
    return hidden, kept


def in_windows(cache: Any, lengths: Int[Array, " B"], model: ModelConfig) -> Any:
    """A cache of `read_all` in which a layer with a window has as many slots as that, however long
    the prompts are.

    Args:
        cache: of all positions.
        lengths: tokens of each prompt without its padding, int32 [B].
        model: what is computed.
    """

    def of_layer(kept: Kept, found: Array) -> Array:
        return found if kept.window is None else _newest(found, lengths, kept.window)

    return jax.tree.map(of_layer, kept_by_layer(model), cache, is_leaf=_is_kept)


def _is_layer(node: Any) -> bool:
    """Whether a node of `kept_by_layer` is what one layer keeps, which may be nothing."""
    return isinstance(node, tuple) and all(map(_is_kept, node))


def _in_slots(found: Array, lengths: Array, shape: tuple[int, ...]) -> Array:
    """What is kept of T positions, [B, ..., T, H], in slots of which there may be fewer."""
    slots, length = shape[-2], found.shape[-2]
    if slots >= length:
        return grown(found, slots)
    return _newest(found, lengths, slots)


def _newest(found: Array, lengths: Array, slots: int) -> Array:
    """What is kept of the newest of T positions, [B, ..., T, H], each in its slot. A slot that no
    position has yet holds what no query sees.
    """
    newest = (lengths - 1)[:, None]
    held = newest - (newest - jnp.arange(slots)) % slots
    index = jnp.maximum(held, 0).reshape(held.shape[0], *(1,) * (found.ndim - 3), slots, 1)
    return jnp.take_along_axis(found, index, axis=-2)


def grown(cache: Array, slots: int) -> Array:
    """A layer's cache with room for more positions, of which none has taken another's slot yet."""
    widths = [(0, 0)] * cache.ndim
    widths[-2] = (0, slots - cache.shape[-2])
    return jnp.pad(cache, widths)
