"""The back end "blocked": attention in plain XLA, on every platform; and that over a cache."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers.attention.backend import (
    ATTENTION,
    BLOCK,
    EVERYTHING,
    MASKED,
    Backend,
    Scope,
    is_visible,
)
from braeburn.layers.attention.ring import gathered_attention

LONG_SEQUENCE = 2048


def blocked_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K W"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig = ONE_DEVICE,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N W"]:
    """Attention in plain XLA that skips the causal upper half, span by span of queries.

    A span sees only the keys up to its own end, and of these only those in reach of its window:
    with 8 spans or more, at most 9/16 of the products are formed. In long sequences a span is
    worked through in blocks, one after the other, whose weights are formed again in the backward
    pass: memory stays linear in the length.

    Args:
        query: this context shard's queries; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; with several context shards the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `query`.
    """
    if mesh.context > 1:
        return gathered_attention(query, key, value, segment_ids, mesh, scope)
    batch, length = query.shape[:2]
    grouped = _by_key_head(query, key.shape[2])
    # Positions last: on CPUs the products and their gradients are up to twice as fast as with
    # positions first.
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)
    if not isinstance(length, int):
        # Not known while the program is traced: one span, and its upper half is not skipped.
        spans, attend = [(0, length)], _attend_span_in_blocks
    elif length <= LONG_SEQUENCE:
        spans, attend = _spans(length, BLOCK), _attend_span
    else:
        spans, attend = (
            _spans(length, math.ceil(length / 8 / BLOCK) * BLOCK),
            _attend_span_in_blocks,
        )
    window, outputs = scope.window, []
    for start, stop in spans:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (batch, stop - start))
        first = 0 if window is None or start == 0 else max(0, start - window + 1)
        output = attend(
            (grouped[:, :, :, start:stop], positions, segment_ids[:, start:stop]),
            (key[..., first:stop], value[..., first:stop], segment_ids[:, first:stop]),
            first,
            scope,
        )
        outputs.append(output)
    return checkpoint_name(_by_head(jnp.concatenate(outputs, axis=3)), ATTENTION)


def _spans(length: int, size: int) -> list[tuple[int, int]]:
    """Where the spans of a size begin and end, of which the last may be shorter."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _by_key_head(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K G T H"]:
    """Queries by the key head that serves them."""
    batch, length, num_heads, head_dim = query.shape
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return grouped.transpose(0, 2, 3, 1, 4)


def _by_head(output: Float[Array, "B K G T W"]) -> Float[Array, "B T N W"]:
    """What `_by_key_head` separated, together again."""
    batch, _, _, length, value_dim = output.shape
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, value_dim)


# Of queries: they [B, K, G, Q, H], their positions and their segments [B, Q].
Queries = tuple[Array, Array, Array]
# Of keys that follow one another: they [B, K, H, S], their values [B, K, W, S], and their segments
# [B, S].
Keys = tuple[Array, Array, Array]


def _attend_span(
    queries: Queries, keys: Keys, first: int, scope: Scope
) -> Float[Array, "B K G Q W"]:
    """Queries over keys of which the first is at position `first`."""
    query, positions, query_ids = queries
    key, value, key_ids = keys
    key_positions = jnp.arange(first, first + key.shape[3])
    earlier = is_visible(positions[:, :, None], key_positions, scope.window)
    visible = earlier & (query_ids[:, :, None] == key_ids[:, None, :])
    return _attend(query, key, value, visible, scope.sinks)


def _attend_span_in_blocks(
    queries: Queries, keys: Keys, first: int, scope: Scope
) -> Float[Array, "B K G Q W"]:
    """`_attend_span`, a block of queries at a time."""
    query, positions, query_ids = queries
    length = query.shape[3]

    def blocks(array: Array, axis: int) -> Array:
        widths = [(0, -length % BLOCK if dim == axis else 0) for dim in range(array.ndim)]
        array = jnp.pad(array, widths)
        return jnp.moveaxis(
            array.reshape(*array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :]), axis, 0
        )

    @jax.checkpoint
    def one_block(_: None, block: Queries) -> tuple[None, Array]:
        return None, _attend_span(block, keys, first, scope)

    _, output = jax.lax.scan(
        one_block, None, (blocks(query, 3), blocks(positions, 1), blocks(query_ids, 1))
    )
    output = jnp.moveaxis(output, 0, 3)
    return output.reshape(*query.shape[:3], -1, output.shape[-1])[:, :, :, :length]


def _attend(
    query: Float[Array, "B K G Q H"],
    key: Float[Array, "B K H S"],
    value: Float[Array, "B K W S"],
    visible: Bool[Array, "B Q S"],
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B K G Q W"]:
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("BKGQH,BKHS->BKGQS", query, key, preferred_element_type=jnp.float32) * scale
    weights = _softmax(jnp.where(visible[:, None, None], scores, MASKED), sinks)
    return jnp.einsum("BKGQS,BKWS->BKGQW", weights.astype(value.dtype), value)


def _softmax(
    scores: Float[Array, "B K G Q S"], sinks: Float[Array, " N"] | None
) -> Float[Array, "B K G Q S"]:
    """The weights of keys, whose sum with that of a sink is 1."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    logits = sinks.astype(scores.dtype).reshape(1, *scores.shape[1:3], 1, 1)
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), logits)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(scores - peak)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(logits - peak))


def cached_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S W"],
    positions: Int[Array, "B T"],
    scope: Scope = EVERYTHING,
) -> Float[Array, "B T N W"]:
    """Attention of new tokens over a cache whose slot s holds the newest position p with p mod S =
    s.

    Args:
        query: of the new tokens; N is a multiple of K.
        key: the cached keys, those of the new tokens among them. Slots before head_dim: a CPU runs
            this, with one new token, in a third of the time that slots before the heads take.
        value: the cached values.
        positions: of the new tokens; a query at position p sees no position behind p. Where there
            are several new tokens, all are below S.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `value`.
    """
    grouped = _by_key_head(query, key.shape[1])
    newest = positions[:, :, None]
    # A slot behind the newest holds a position of the round before; in the first round, none yet.
    held = newest - (newest - jnp.arange(key.shape[2])) % key.shape[2]
    visible = (held >= 0) & is_visible(newest, held, scope.window)
    scores = jnp.einsum("BKGQH,BKSH->BKGQS", grouped, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    weights = _softmax(jnp.where(visible[:, None, None], scores, MASKED), scope.sinks)
    return _by_head(jnp.einsum("BKGQS,BKSW->BKGQW", weights.astype(value.dtype), value))


BLOCKED = Backend("blocked", lambda request: None, blocked_attention)
