"""Attention over sequences that are split over the devices of the `context` axis.

A sequence of T tokens is cut into 2c chunks for c devices, and device i holds chunks i and 2c-1-i,
one after the other ("zigzag": Llama 3, arXiv 2407.21783, section 3.3.2; the balance is the aim of
striped attention, arXiv 2311.09431). Causality then leaves every device the same work: of the keys
of an earlier device (j < i) both halves of its queries see the first half, of those of a later one
(j > i) its second half of queries sees both. In either case that is

    second half of the queries x first half of the keys,    and    one half x the same half of the
    keys

where the latter is the first half if j < i and the second if j >= i. What is left is the first half
of the device's own keys. So one program without branches does all that is visible, chunk by chunk,
and no more.

The keys of other devices come around a ring (Liu et al. 2023, arXiv 2310.01889) or are gathered.
Partial results are merged by their log-sum-exp, and the weights are formed again in the backward
pass, as in FlashAttention-2 (arXiv 2307.08691), for one block of queries at a time. Beyond gathered
keys, memory is linear in the device's own tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from braeburn.config import MeshConfig
from braeburn.layers.attention.backend import (
    ATTENTION,
    BLOCK,
    EVERYTHING,
    MASKED,
    Backend,
    Scope,
    is_visible,
    sink_gradients,
    with_sinks,
)
from braeburn.parallel.collectives import CONTEXT, all_gather, axis_index, reduce_scatter
from braeburn.parallel.sequence import token_indices

# A tree of arrays with a device's tokens in parts along a leading dimension: blocks of queries, or
# halves of keys.
Parts = Any
# Segments [B, tokens] and indices in the whole sequence [tokens].
Indices = tuple[Array, Array]
# Half of a device's keys [B, K, H, S] and values [B, K, W, S], their segments and indices.
HalfOfKeys = tuple[Array, Array, Indices]
# Half of the queries, half of the keys: each 0 or 1, known when tracing or not.
Pair = tuple[Array | int, Array | int]


class Heads(NamedTuple):
    """What attention is computed of, on a device; N is a multiple of K."""

    query: Float[Array, "B t N H"]
    key: Float[Array, "B t K H"]
    value: Float[Array, "B t K W"]
    sinks: Float[Array, " N"] | None


class Way(NamedTuple):
    """How keys reach queries, and which of them a query sees.

    Attributes:
        is_ring: whether keys go round a ring; otherwise they are gathered.
        window: positions that a query sees, its own among them; None for all earlier ones.
    """

    is_ring: bool
    window: int | None


def ring_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K W"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N W"]:
    """Causal attention within segments, keys and values passed around a ring of two or more context
    shards.

    Each of the K key heads serves N/K neighbouring query heads; scores are scaled by 1/sqrt(H) and
    kept in float32. Keys take c - 1 ring steps in either pass, each while the keys at hand are
    worked on; in the backward pass their gradients, in float32, travel along and one ring step
    further, home.

    Args:
        query: this context shard's queries; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `query`.
    """
    heads = Heads(query, key, value, scope.sinks)
    return _attention(heads, segment_ids, mesh, Way(True, scope.window))


def gathered_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K W"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N W"]:
    """`ring_attention` with the keys of all shards gathered at once, in either pass.

    Args:
        query: this context shard's queries; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `query`.
    """
    heads = Heads(query, key, value, scope.sinks)
    return _attention(heads, segment_ids, mesh, Way(False, scope.window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attention(heads: Heads, segment_ids: Array, mesh: MeshConfig, way: Way) -> Array:
    return _forward(heads, segment_ids, mesh, way)[0]


def _forward(
    heads: Heads, segment_ids: Array, mesh: MeshConfig, way: Way
) -> tuple[Array, tuple[Any, ...]]:
    query, key, value, sinks = heads
    queries = (_query_blocks(query, key.shape[2]), _query_indices(segment_ids, mesh))
    keys = jax.tree.map(_halves, (key, value, segment_ids))
    index = axis_index(CONTEXT, mesh)

    def attend(state: Parts, keys: HalfOfKeys, half: Array | int) -> Parts:
        key, value, key_indices = keys

        def one_block(state: Parts, number: Array) -> tuple[Parts, None]:
            (query, indices), (output, log_z) = _at((queries, state), number)
            scores = _scores(query, indices, key, key_indices, way.window)
            peak = jnp.maximum(log_z, jnp.max(scores, axis=-1))
            weights, old = jnp.exp(scores - peak[..., None]), jnp.exp(log_z - peak)
            total = old + jnp.sum(weights, axis=-1)
            new = _product("BKGQS,BKWS->BKGQW", weights.astype(value.dtype), value)
            output = (output * old[..., None] + new) / total[..., None]
            return _put(state, (output, peak + jnp.log(total)), number), None

        return lax.scan(one_block, state, _block_numbers(queries, half))[0]

    def visit(state: Parts, keys: Parts, source: Array | int) -> Parts:
        for half, half_of_keys in _pairs(source, index):
            state = attend(state, _half_of_keys(keys, source, half_of_keys, mesh), half)
        return state

    blocks = queries[0].shape[:-1]
    state = (jnp.zeros((*blocks, value.shape[-1]), jnp.float32), jnp.full(blocks, MASKED))
    state = attend(state, _half_of_keys(keys, index, 0, mesh), 0)
    if way.is_ring:

        def ring_step(step: Array, carry: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
            state, keys = carry
            arriving = _to_next_device(keys, mesh)
            return visit(state, keys, (index - step) % mesh.context), arriving

        state, keys = lax.fori_loop(0, mesh.context - 1, ring_step, (state, keys))
        state = visit(state, keys, (index + 1) % mesh.context)
    else:
        state, _ = lax.scan(
            lambda state, x: (visit(state, *x), None), state, _everyones(keys, mesh)
        )

    output, log_z = state
    if sinks is not None:
        output, log_z = with_sinks(output, log_z, _by_key_head(sinks, key.shape[2]))
    # Named here, so that a backward pass that keeps the result need not go round the ring for what
    # belongs to it.
    output = checkpoint_name(_joined_blocks(output).astype(query.dtype), ATTENTION)
    log_z = checkpoint_name(log_z, ATTENTION)
    return output, (heads, segment_ids, output, log_z)


def _backward(
    mesh: MeshConfig, way: Way, residuals: tuple[Any, ...], output_gradient: Array
) -> tuple[Heads, None]:
    (query, key, value, sinks), segment_ids, output, log_z = residuals
    num_kv_heads, scale = key.shape[2], query.shape[3] ** -0.5
    delta = jnp.sum(output_gradient.astype(jnp.float32) * output, axis=-1, keepdims=True)
    queries = (
        _query_blocks(query, num_kv_heads),
        _query_indices(segment_ids, mesh),
        log_z,
        _query_blocks(delta, num_kv_heads),
        _query_blocks(output_gradient, num_kv_heads),
    )
    keys = jax.tree.map(_halves, (key, value, segment_ids))
    index = axis_index(CONTEXT, mesh)
    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])

    def attend(carry: tuple[Parts, Any], keys: HalfOfKeys, half: Array | int) -> tuple[Parts, Any]:
        """Gradients of all queries, and those of one half of the keys and values."""
        key, value, key_indices = keys

        def one_block(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], None]:
            gradients, sums = carry
            (query, indices, log_z, delta, cotangent), gradient = _at((queries, gradients), number)
            scores = _scores(query, indices, key, key_indices, way.window)
            weights = jnp.exp(scores - log_z[..., None])
            value_sum = sums[1] + _product(
                "BKGQS,BKGQW->BKWS", weights.astype(value.dtype), cotangent
            )
            weights = weights * (_product("BKGQW,BKWS->BKGQS", cotangent, value) - delta) * scale
            weights = weights.astype(key.dtype)
            key_sum = sums[0] + _product("BKGQS,BKGQH->BKHS", weights, query)
            gradient += _product("BKGQS,BKHS->BKGQH", weights, key)
            return (_put(gradients, gradient, number), (key_sum, value_sum)), None

        return lax.scan(one_block, carry, _block_numbers(queries, half))[0]

    def visit(gradients: Parts, keys: Parts, source: Array | int) -> tuple[Parts, Parts]:
        sums = nothing
        for half, half_of_keys in _pairs(source, index):
            own = _half_of_keys(keys, source, half_of_keys, mesh)
            gradients, new = attend((gradients, _at(sums, half_of_keys)), own, half)
            sums = _put(sums, new, half_of_keys)
        return gradients, sums

    gradients = jnp.zeros(queries[0].shape, jnp.float32)
    if way.is_ring:

        def visit_next(step: Array | int, carry: tuple[Parts, Parts, Parts]) -> tuple[Parts, Parts]:
            gradients, sums, keys = carry
            # What earlier devices found for these keys comes in while this one works on them.
            sums = _to_next_device(sums, mesh)
            gradients, new = visit(gradients, keys, (index - step) % mesh.context)
            return gradients, jax.tree.map(jnp.add, sums, new)

        def ring_step(step: Array, carry: tuple[Parts, Parts, Parts]) -> tuple[Parts, Parts, Parts]:
            arriving = _to_next_device(carry[2], mesh)
            return *visit_next(step, carry), arriving

        arriving = _to_next_device(keys, mesh)
        carry = (*visit(gradients, keys, index), arriving)
        carry = lax.fori_loop(1, mesh.context - 1, ring_step, carry)
        gradients, sums = visit_next(mesh.context - 1, carry)
        sums = _to_next_device(sums, mesh)
    else:
        gradients, sums = lax.scan(
            lambda gradients, x: visit(gradients, *x), gradients, _everyones(keys, mesh)
        )
        sums = jax.tree.map(lambda x: reduce_scatter(x, CONTEXT, 0, mesh)[0], sums)
    # Last and apart from the sums that come home, so that it can be worked on meanwhile.
    first = _half_of_keys(keys, index, 0, mesh)
    gradients, new = attend((gradients, _at(nothing, 0)), first, 0)
    key_sum, value_sum = jax.tree.map(jnp.add, sums, _put(nothing, new, 0))
    of_sinks = None
    if sinks is not None:
        own = sink_gradients(_by_key_head(sinks, num_kv_heads), log_z, queries[3][..., 0])
        of_sinks = jnp.sum(own, axis=(0, 1, 4)).reshape(-1).astype(sinks.dtype)
    return Heads(
        _joined_blocks(gradients).astype(query.dtype),
        _joined_halves(key_sum).astype(key.dtype),
        _joined_halves(value_sum).astype(value.dtype),
        of_sinks,
    ), None


_attention.defvjp(_forward, _backward)


def _pairs(source: Array | int, index: Array | int) -> tuple[Pair, Pair]:
    """The halves of queries and keys that are visible to each other, but for the first half's own
    keys.
    """
    same = jnp.where(source < index, 0, 1)
    # The diagonal first: after its own key a query's result is never that of masked keys alone.
    return (same, same), (1, 0)


def _by_key_head(sinks: Float[Array, " N"], num_kv_heads: int) -> Float[Array, "K G 1"]:
    """Sinks as they broadcast to log-sum-exps [blocks, B, K, G, Q]."""
    return sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(
    query: Float[Array, "B K G Q H"],
    indices: Indices,
    key: Float[Array, "B K H S"],
    key_indices: Indices,
    window: int | None,
) -> Float[Array, "B K G Q S"]:
    (ids, positions), (key_ids, key_positions) = indices, key_indices
    visible = is_visible(positions[:, None], key_positions, window)
    visible = visible & (ids[:, :, None] == key_ids[:, None, :])
    scores = _product("BKGQH,BKHS->BKGQS", query, key)
    return jnp.where(visible[:, None, None], scores * query.shape[-1] ** -0.5, MASKED)


def _to_next_device(tree: Parts, mesh: MeshConfig) -> Parts:
    """Every device's arrays, one device further along the ring."""
    ring = [(i, (i + 1) % mesh.context) for i in range(mesh.context)]
    return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT, ring), tree)


def _everyones(keys: Parts, mesh: MeshConfig) -> tuple[Parts, Array]:
    """The keys of all shards, stacked along a new leading dimension, and whose they are."""
    gathered = jax.tree.map(lambda x: all_gather(x[None], CONTEXT, 0, mesh), keys)
    return gathered, jnp.arange(mesh.context)


def _at(parts: Parts, number: Array | int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), parts)


def _put(parts: Parts, new: Any, number: Array | int) -> Parts:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, number, 0), parts, new)


def _block_numbers(queries: Parts, half: Array | int) -> Int[Array, " half"]:
    blocks = queries[0].shape[0] // 2
    return half * blocks + jnp.arange(blocks)


def _block_length(length: int) -> int:
    """Queries worked on at once: the most, up to BLOCK, that divide half of a device's tokens."""
    return max(size for size in range(1, BLOCK + 1) if length // 2 % size == 0)


def _query_blocks(
    x: Float[Array, "B t N H"], num_kv_heads: int
) -> Float[Array, "blocks B K G Q H"]:
    batch, length, num_heads, head_dim = x.shape
    x = x.reshape(
        batch, -1, _block_length(length), num_kv_heads, num_heads // num_kv_heads, head_dim
    )
    return x.transpose(1, 0, 3, 4, 2, 5)


def _joined_blocks(x: Float[Array, "blocks B K G Q H"]) -> Float[Array, "B t N H"]:
    blocks, batch, num_kv_heads, group, size, head_dim = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(
        batch, blocks * size, num_kv_heads * group, head_dim
    )


def _query_indices(segment_ids: Int[Array, "B t"], mesh: MeshConfig) -> Indices:
    """Segments and positions of the queries of each block, with a leading dimension of blocks."""
    batch, length = segment_ids.shape
    size = _block_length(length)
    positions = token_indices(length, axis_index(CONTEXT, mesh), mesh.context)
    return segment_ids.reshape(batch, -1, size).transpose(1, 0, 2), positions.reshape(-1, size)


def _half_of_keys(
    keys: Parts, source: Array | int, half: Array | int, mesh: MeshConfig
) -> HalfOfKeys:
    """One half of the keys and values of the shard `source`, their segments and positions."""
    key, value, ids = _at(keys, half)
    positions = token_indices(2 * ids.shape[1], source, mesh.context)
    return key, value, (ids, _at(positions.reshape(2, -1), half))


def _halves(x: Shaped[Array, "B t *KH"]) -> Shaped[Array, "2 B *KH S"]:
    # Positions last: on CPUs the products and their gradients are up to twice as fast as with
    # positions first.
    return jnp.moveaxis(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), (1, 2), (0, -1))


def _joined_halves(x: Float[Array, "2 B K H S"]) -> Float[Array, "B t K H"]:
    return jnp.moveaxis(x, (0, -1), (1, 2)).reshape(x.shape[1], -1, *x.shape[2:4])


RING = Backend("ring", lambda request: None, ring_attention)
