"""The back end "splash": the block-sparse Pallas kernel for TPUs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers.attention.backend import ATTENTION, EVERYTHING, Backend, Request, Scope
from braeburn.parallel.collectives import CONTEXT, axis_index
from braeburn.parallel.sequence import gather_sequence, zigzag

SPLASH_TILE = 128
# Sizes of heads that every TPU's compiler was seen to take (`docs/decisions.md`).
HEAD_DIM_STEP = 16
# Numbers of a row of a TPU's memory.
LANES = 128
# Whether the kernel is interpreted, as tests have it, instead of compiled for a TPU.
INTERPRET = False


def splash_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K W"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig = ONE_DEVICE,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N W"]:
    """The block-sparse Pallas kernel for TPU, one call for each sequence of the batch.

    Args:
        query: this context shard's queries; N is a multiple of K, H and W of 16.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; with several context shards the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `query`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads, head_dim = query.shape[1:]
    shards = mesh.context
    key, value, key_ids = (gather_sequence(x, mesh) for x in (key, value, segment_ids))
    order = zigzag(length * shards, shards)
    mask = masks.MultiHeadMask([splash_mask(order, scope.window)] * num_heads)
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
        interpret=INTERPRET,
    )
    if shards > 1:
        kernel = jax.tree.map(lambda array: _own_queries(array, mesh), kernel)

    ids = splash.SegmentIds(segment_ids, key_ids)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query / math.sqrt(head_dim), key, value)]
    arrays: list[Any] = [*heads_first, ids]
    of_each: list[int | None] = [0] * len(arrays)
    if scope.sinks is not None:
        # The kernel gives their gradient in the type of its result, whatever theirs is.
        arrays.append(scope.sinks.astype(query.dtype))
        of_each.append(None)
    output = jax.vmap(kernel, in_axes=tuple(of_each))(*arrays)
    return jnp.swapaxes(output, 1, 2).astype(query.dtype)


def splash_mask(positions: np.ndarray, window: int | None = None) -> Any:
    """Splash attention's mask for queries at `positions`, int [T], over keys in the order of the
    sequence: causal, and of the last `window` positions where there is a window.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (positions.size, positions.size)
    left = positions.size if window is None else window - 1

    class ByTiles:
        """Of a tile all of whose entries are equal it gives only one: the rest would take 20 s at
        64k tokens.
        """

        q_sequence: np.ndarray

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            rows, columns = self.q_sequence[index[0]], index[1]
            first, last = columns.start, columns.stop - 1
            if rows.min() >= last and rows.max() - left <= first:
                return np.ones((1, 1), np.bool_)
            if rows.max() < first or rows.min() - left > last:
                return np.zeros((1, 1), np.bool_)
            entries: np.ndarray = super().__getitem__(index)  # type: ignore[misc]
            return entries

    class CausalByTiles(ByTiles, masks.CausalMask):
        """A causal mask."""

    class LocalByTiles(ByTiles, masks.LocalMask):
        """A causal mask of a window."""

    mask = CausalByTiles(shape) if window is None else LocalByTiles(shape, (left, 0), 0)
    mask.q_sequence = positions.astype(np.int32)
    return mask


def _own_queries(array: Array, mesh: MeshConfig) -> Array:
    """This shard's part of an array of the splash kernel: [heads, query blocks, key blocks] or
    [queries].
    """
    axis = min(1, array.ndim - 1)
    size = array.shape[axis] // mesh.context
    return jax.lax.dynamic_slice_in_dim(array, axis_index(CONTEXT, mesh) * size, size, axis)


def _why_not(request: Request) -> str | None:
    if request.platform != "tpu":
        return "it needs a TPU"
    multiple = SPLASH_TILE * request.context_shards
    if request.sequence_length % multiple:
        return (
            f"it needs a sequence_length that is a multiple of {multiple}, not "
            f"{request.sequence_length}"
        )
    for size in (request.head_dim, request.value_dim):
        if size % HEAD_DIM_STEP:
            return f"it needs a head_dim that is a multiple of {HEAD_DIM_STEP}, not {size}"
    return None


def _filled_bytes(request: Request, batch: int) -> int:
    """Of queries, keys, values, the result and their gradients, of heads that fill no whole lanes:
    they are copied for the kernel, filled up.
    """
    queries = request.num_heads * request.sequence_length // request.context_shards
    keys = request.num_kv_heads * request.sequence_length
    uneven = [size for size in (request.head_dim, request.value_dim) if size % LANES]
    numbers = sum(2 * (queries + keys) * SPLASH.filled(size) for size in uneven)
    return batch * numbers * request.dtype.itemsize


SPLASH = Backend("splash", _why_not, splash_attention, _filled_bytes, lanes=LANES)
