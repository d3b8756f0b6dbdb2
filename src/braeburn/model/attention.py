"""Causal attention that stays within documents, as an ordered list of back ends.

`attention` takes the first back end that supports what is asked and logs which, and why the ones before were passed
over. All share one meaning: query t of a sequence sees the keys s <= t of the same segment.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

logger = logging.getLogger(__name__)

# Finite, so that a padding query whose keys are all masked gives a mean instead of NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True)
class Request:
    """What is known about a call when it is traced."""

    platform: str
    dtype: jnp.dtype
    sequence_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Backend:
    """One implementation. `why_not` returns the reason that a request is not supported, or None."""

    name: str
    why_not: Callable[[Request], str | None]
    run: Callable[[Array, Array, Array, Array], Array]

    def is_supported(self, request: Request) -> bool:
        """Whether this back end can answer the request."""
        return self.why_not(request) is None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Softmax attention scaled by 1/sqrt(H); each of the K key heads serves N/K neighbouring query heads."""
    request = Request(
        platform=jax.default_backend(),
        dtype=query.dtype,
        sequence_length=query.shape[1],
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
    )
    return select(request).run(query, key, value, segment_ids)


@functools.cache
def select(request: Request) -> Backend:
    """The first back end that supports the request; the choice is logged once for each distinct request."""
    passed_over: list[str] = []
    for backend in BACKENDS:
        reason = backend.why_not(request)
        if reason is None:
            because = f" ({'; '.join(passed_over)})" if passed_over else ""
            logger.info("attention over %d tokens: %s%s", request.sequence_length, backend.name, because)
            return backend
        passed_over.append(f"not {backend.name}: {reason}")
    raise NotImplementedError("; ".join(passed_over))


def cudnn_attention(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
    """The fused kernel of cuDNN; documents are told apart by a mask of one byte a pair of positions."""
    same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=same_document, is_causal=True, implementation="cudnn")


def _why_not_cudnn(request: Request) -> str | None:
    if request.platform not in ("gpu", "cuda"):
        return "it needs an NVIDIA GPU"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return "it computes in 16 bits only"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, not {request.head_dim}"
    return None


SPLASH_TILE = 128


def splash_attention(query: Array, key: Array, value: Array, segment_ids: Array, *, interpret: bool = False) -> Array:
    """The block-sparse Pallas kernel for TPU, one call for each sequence of the batch."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads, head_dim = query.shape[1:]
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads)
    # As large as divide the sequence, up to the 512 that suit every TPU's memory.
    tile = next(size for size in (512, 256, SPLASH_TILE) if length % size == 0)
    passes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    tiles: dict[str, Any] = {f"block_{name}": tile for name in passes}
    kernel = splash.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=splash.BlockSizes(**tiles), interpret=interpret
    )

    ids = splash.SegmentIds(segment_ids, segment_ids)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query / math.sqrt(head_dim), key, value)]
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, ids), 1, 2).astype(query.dtype)


def _why_not_splash(request: Request) -> str | None:
    if request.platform != "tpu":
        return "it needs a TPU"
    if request.sequence_length % SPLASH_TILE:
        return f"it needs a sequence_length that is a multiple of {SPLASH_TILE}, not {request.sequence_length}"
    if request.head_dim % 128:
        return f"it needs a head_dim that is a multiple of 128, not {request.head_dim}"
    return None


LONG_SEQUENCE = 2048
BLOCK = 128


def blocked_attention(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
    """Attention in plain XLA that skips the causal upper half, span by span of queries.

    A span sees only the keys up to its own end: with 8 spans or more, at most 9/16 of the products are formed. In long
    sequences a span is worked through in blocks, one after the other, whose weights are formed again in the backward
    pass: memory stays linear in the length.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    query = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # Positions last: on CPUs the products and their gradients are up to twice as fast as with positions first.
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)
    if length <= LONG_SEQUENCE:
        span, attend = BLOCK, _attend_span
    else:
        span, attend = math.ceil(length / 8 / BLOCK) * BLOCK, _attend_span_in_blocks
    outputs = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        positions = jnp.broadcast_to(jnp.arange(start, stop), (batch, stop - start))
        output = attend(
            query[:, :, :, start:stop],
            positions,
            segment_ids[:, start:stop],
            key[..., :stop],
            value[..., :stop],
            segment_ids[:, :stop],
        )
        outputs.append(output)
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _attend_span(
    query: Float[Array, "B K G Q H"],
    positions: Int[Array, "B Q"],
    query_ids: Int[Array, "B Q"],
    key: Float[Array, "B K H S"],
    value: Float[Array, "B K H S"],
    key_ids: Int[Array, "B S"],
) -> Float[Array, "B K G Q H"]:
    """Queries at `positions` over the keys from position 0 on."""
    earlier = positions[:, :, None] >= jnp.arange(key.shape[3])
    return _attend(query, key, value, earlier & (query_ids[:, :, None] == key_ids[:, None, :]))


def _attend_span_in_blocks(
    query: Array, positions: Array, query_ids: Array, key: Array, value: Array, key_ids: Array
) -> Array:
    """`_attend_span`, a block of queries at a time."""
    length = query.shape[3]

    def blocks(array: Array, axis: int) -> Array:
        widths = [(0, -length % BLOCK if dim == axis else 0) for dim in range(array.ndim)]
        array = jnp.pad(array, widths)
        return jnp.moveaxis(array.reshape(*array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def one_block(_: None, block: tuple[Array, Array, Array]) -> tuple[None, Array]:
        return None, _attend_span(*block, key, value, key_ids)

    _, output = jax.lax.scan(one_block, None, (blocks(query, 3), blocks(positions, 1), blocks(query_ids, 1)))
    output = jnp.moveaxis(output, 0, 3)
    return output.reshape(*query.shape[:3], -1, query.shape[4])[:, :, :, :length]


def _attend(
    query: Float[Array, "B K G Q H"],
    key: Float[Array, "B K H S"],
    value: Float[Array, "B K H S"],
    visible: Array,  # bool [B, Q, S]
) -> Float[Array, "B K G Q H"]:
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("BKGQH,BKHS->BKGQS", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    return jnp.einsum("BKGQS,BKHS->BKGQH", weights.astype(value.dtype), value)


def cached_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attention of new tokens over a cache whose slot s holds position s: query at p sees the slots up to p."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    visible = jnp.arange(key.shape[1])[None, None, :] <= positions[:, :, None]
    output = _attend(grouped, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1), visible)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


BACKENDS = (
    Backend("cudnn", _why_not_cudnn, cudnn_attention),
    Backend("splash", _why_not_splash, splash_attention),
    Backend("blocked", lambda request: None, blocked_attention),
)
