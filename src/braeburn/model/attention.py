"""Causal attention that stays within documents, as an ordered list of back ends.

`attention` takes the first back end that supports what is asked and logs which, and why the ones
before were passed
over. All share one meaning: query t of a sequence sees the keys s <= t of the same segment. Where
sequences are split over devices, each attends from its own tokens, in zigzag order, to the keys of
all.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, Mesh
from braeburn.hardware.catalogue import chip_of
from braeburn.model import cudnn
from braeburn.parallel.collectives import CONTEXT, axis_index
from braeburn.parallel.context import (
    ATTENTION,
    BLOCK,
    MASKED,
    gather_sequence,
    gathered_attention,
    ring_attention,
    token_indices,
    zigzag,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is known about a call when it is traced.

    Attributes:
        platform: "cpu", "tpu", "cuda" or "rocm".
        dtype: of queries, keys and values.
        sequence_length: tokens of the whole sequence.
        num_heads: of the queries on this device.
        num_kv_heads: of its keys and values.
        head_dim: of each head.
        context_shards: devices that share out a sequence.
        ring: whether keys travel from shard to shard; otherwise they are gathered.
        compute_capability: of an NVIDIA GPU, as (9, 0); None where it is unknown.
    """

    platform: str
    dtype: jnp.dtype
    sequence_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_shards: int = 1
    ring: bool = False
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation. `why_not` returns the reason that a request is not supported, or None."""

    name: str
    why_not: Callable[[Request], str | None]
    run: Callable[[Array, Array, Array, Array, Mesh], Array]

    def is_supported(self, request: Request) -> bool:
        """Whether this back end can answer the request."""
        return self.why_not(request) is None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    mesh: Mesh = ONE_DEVICE,
) -> Float[Array, "B T N H"]:
    """Softmax attention scaled by 1/sqrt(H); each of the K key heads serves N/K neighbouring query
    heads.

    With several context shards, T counts the tokens of this shard, and the call must be inside a
    `shard_map` over `mesh`; the sum of all devices' losses is what it can be differentiated for.
    Each back end gives its result, with what its backward pass needs besides, the name "attention".
    """
    platform, compute_capability = traced_for()
    request = Request(
        platform=platform,
        dtype=query.dtype,
        sequence_length=query.shape[1] * mesh.context,
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        context_shards=mesh.context,
        ring=mesh.context > 1 and mesh.context_attention == "ring",
        compute_capability=compute_capability,
    )
    return select(request).run(query, key, value, segment_ids, mesh)


def traced_for() -> tuple[str, tuple[int, int] | None]:
    """The platform of the devices that the traced program is for, and of NVIDIA GPUs their compute
    capability.

    The devices need not be there. JAX calls the GPUs of all makers "gpu": what is installed here
    tells which they are, and GPUs that are not here are NVIDIA's, since no others can be compiled
    for without them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = (device and device.platform) or jax.default_backend()
    if platform not in ("gpu", "cuda", "rocm"):
        return platform, None
    here = jax.local_devices()[0] if jax.default_backend() == "gpu" else None
    if here and "rocm" in here.client.platform_version.lower():
        return "rocm", None
    if here and (device is None or device.device_kind == here.device_kind):
        major, minor = here.compute_capability.split(".")
        return "cuda", (int(major), int(minor))
    chip = chip_of(device.device_kind) if device else None
    return platform.replace("gpu", "cuda"), chip.compute_capability if chip else None


@functools.cache
def select(request: Request) -> Backend:
    """The first back end that supports the request; the choice is logged once for each distinct
    request.
    """
    passed_over: list[str] = []
    for backend in (RING,) if request.ring else BACKENDS:
        reason = backend.why_not(request)
        if reason is None:
            over = f" over {request.context_shards} shards" if request.context_shards > 1 else ""
            because = f" ({'; '.join(passed_over)})" if passed_over else ""
            logger.info(
                "attention over %d tokens: %s%s%s",
                request.sequence_length,
                backend.name,
                over,
                because,
            )
            return backend
        passed_over.append(f"not {backend.name}: {reason}")
    raise NotImplementedError("; ".join(passed_over))


def cudnn_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, mesh: Mesh = ONE_DEVICE
) -> Array:
    """The fused kernel of cuDNN, told where documents begin and end."""
    return cudnn.packed_attention(query, key, value, segment_ids, mesh)


def _why_not_cudnn(request: Request) -> str | None:
    if reason := _why_no_kernel_of_cudnn(request):
        return reason
    if request.compute_capability and request.compute_capability < (9, 0):
        major, minor = request.compute_capability
        return (
            f"it needs a GPU of compute capability 9.0 to keep documents apart without a "
            f"mask, not {major}.{minor}"
        )
    if cudnn.too_long(request.sequence_length, request.num_heads, request.head_dim):
        return (
            f"it counts the elements of a sequence in 31 bits, too few for "
            f"{request.sequence_length} tokens"
        )
    return None


def _why_no_kernel_of_cudnn(request: Request) -> str | None:
    """Why cuDNN's attention takes no such heads, whatever tells documents apart."""
    if request.platform != "cuda":
        return "it needs an NVIDIA GPU"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return "it computes in 16 bits only"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, not {request.head_dim}"
    return None


# Longest sequence whose mask is formed: 128 MiB.
MASKED_LENGTH = 8192


def cudnn_masked_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, mesh: Mesh = ONE_DEVICE
) -> Array:
    """The fused kernel of cuDNN under a mask of the sequence's length squared, for GPUs before
    Hopper.
    """
    key, value, key_ids = (gather_sequence(x, mesh) for x in (key, value, segment_ids))
    positions = token_indices(query.shape[1], axis_index(CONTEXT, mesh), mesh.context)
    causal = positions[:, None] >= jnp.arange(key.shape[1])
    visible = causal & (segment_ids[:, :, None] == key_ids[:, None, :])
    return cudnn.masked_attention(query, key, value, visible)


def _why_not_masked(request: Request) -> str | None:
    if reason := _why_no_kernel_of_cudnn(request):
        return reason
    if request.sequence_length > MASKED_LENGTH:
        return (
            f"it forms a mask for each sequence, at most {MASKED_LENGTH} tokens long, not "
            f"{request.sequence_length}"
        )
    return None


SPLASH_TILE = 128


def splash_attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    mesh: Mesh = ONE_DEVICE,
    *,
    interpret: bool = False,
) -> Array:
    """The block-sparse Pallas kernel for TPU, one call for each sequence of the batch."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads, head_dim = query.shape[1:]
    shards = mesh.context
    key, value, key_ids = (gather_sequence(x, mesh) for x in (key, value, segment_ids))
    mask = masks.MultiHeadMask([splash_mask(zigzag(length * shards, shards))] * num_heads)
    # As large as divide a run of neighbouring tokens, up to the 512 that suit every TPU's memory.
    run = length // 2 if shards > 1 else length
    tile = next((size for size in (512, 256) if run % size == 0), SPLASH_TILE)
    passes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    tiles: dict[str, Any] = {f"block_{name}": tile for name in passes}
    kernel = splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=shards,
        block_sizes=splash.BlockSizes(**tiles),
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    if shards > 1:
        kernel = jax.tree.map(lambda array: _own_queries(array, mesh), kernel)

    ids = splash.SegmentIds(segment_ids, key_ids)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query / math.sqrt(head_dim), key, value)]
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, ids), 1, 2).astype(query.dtype)


def splash_mask(positions: np.ndarray) -> Any:
    """Splash attention's causal mask for queries at `positions`, int [T], over keys in the order of
    the sequence.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    class BlockCausalMask(masks.CausalMask):
        """Of a tile all of whose entries are equal it gives only one: the rest would take 20 s at
        64k tokens.
        """

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            rows, columns = self.q_sequence[index[0]], index[1]
            if rows.min() >= columns.stop - 1:
                return np.ones((1, 1), np.bool_)
            if rows.max() < columns.start:
                return np.zeros((1, 1), np.bool_)
            return super().__getitem__(index)

    mask = BlockCausalMask((positions.size, positions.size))
    mask.q_sequence = positions.astype(np.int32)
    return mask


def _own_queries(array: Array, mesh: Mesh) -> Array:
    """This shard's part of an array of the splash kernel: [heads, query blocks, key blocks] or
    [queries].
    """
    axis = min(1, array.ndim - 1)
    size = array.shape[axis] // mesh.context
    return jax.lax.dynamic_slice_in_dim(array, axis_index(CONTEXT, mesh) * size, size, axis)


def _why_not_splash(request: Request) -> str | None:
    if request.platform != "tpu":
        return "it needs a TPU"
    multiple = SPLASH_TILE * request.context_shards
    if request.sequence_length % multiple:
        return (
            f"it needs a sequence_length that is a multiple of {multiple}, not "
            f"{request.sequence_length}"
        )
    if request.head_dim % 128:
        return f"it needs a head_dim that is a multiple of 128, not {request.head_dim}"
    return None


LONG_SEQUENCE = 2048


def blocked_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, mesh: Mesh = ONE_DEVICE
) -> Array:
    """Attention in plain XLA that skips the causal upper half, span by span of queries.

    A span sees only the keys up to its own end: with 8 spans or more, at most 9/16 of the products
    are formed. In long sequences a span is worked through in blocks, one after the other, whose
    weights are formed again in the backward
    pass: memory stays linear in the length.
    """
    if mesh.context > 1:
        return gathered_attention(query, key, value, segment_ids, mesh)
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    query = query.reshape(
        batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim
    ).transpose(0, 2, 3, 1, 4)
    # Positions last: on CPUs the products and their gradients are up to twice as fast as with
    # positions first.
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
    output = (
        jnp.concatenate(outputs, axis=3)
        .transpose(0, 3, 1, 2, 4)
        .reshape(batch, length, num_heads, head_dim)
    )
    return checkpoint_name(output, ATTENTION)


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
        return jnp.moveaxis(
            array.reshape(*array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :]), axis, 0
        )

    @jax.checkpoint
    def one_block(_: None, block: tuple[Array, Array, Array]) -> tuple[None, Array]:
        return None, _attend_span(*block, key, value, key_ids)

    _, output = jax.lax.scan(
        one_block, None, (blocks(query, 3), blocks(positions, 1), blocks(query_ids, 1))
    )
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
    """Attention of new tokens over a cache whose slot s holds position s: query at p sees the slots
    up to p.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(
        batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim
    ).transpose(0, 2, 3, 1, 4)
    visible = jnp.arange(key.shape[1])[None, None, :] <= positions[:, :, None]
    output = _attend(grouped, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1), visible)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


BACKENDS = (
    Backend("cudnn", _why_not_cudnn, cudnn_attention),
    Backend("cudnn-masked", _why_not_masked, cudnn_masked_attention),
    Backend("splash", _why_not_splash, splash_attention),
    Backend("blocked", lambda request: None, blocked_attention),
)
RING = Backend("ring", lambda request: None, ring_attention)
