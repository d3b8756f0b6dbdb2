"""The back end "cudnn-masked": the fused kernel of cuDNN under a mask, for older GPUs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers.attention import cudnn
from braeburn.layers.attention.backend import EVERYTHING, Backend, Request, Scope, is_visible
from braeburn.layers.attention.packed import why_no_kernel_of_cudnn
from braeburn.parallel.collectives import CONTEXT, axis_index
from braeburn.parallel.sequence import gather_sequence, token_indices

# Longest sequence whose mask is formed: 128 MiB.
MASKED_LENGTH = 8192


def cudnn_masked_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig = ONE_DEVICE,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N H"]:
    """The fused kernel of cuDNN under a mask of the sequence's length squared, for GPUs before
    Hopper.

    Args:
        query: this context shard's queries, float16 or bfloat16; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; with several context shards the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `query`.
    """
    key, value, key_ids = (gather_sequence(x, mesh) for x in (key, value, segment_ids))
    positions = token_indices(query.shape[1], axis_index(CONTEXT, mesh), mesh.context)
    earlier = is_visible(positions[:, None], jnp.arange(key.shape[1]), scope.window)
    visible = earlier & (segment_ids[:, :, None] == key_ids[:, None, :])
    return cudnn.masked_attention(query, key, value, visible, scope.sinks)


def _why_not(request: Request) -> str | None:
    if reason := why_no_kernel_of_cudnn(request):
        return reason
    if request.sequence_length > MASKED_LENGTH:
        return (
            f"it forms a mask for each sequence, at most {MASKED_LENGTH} tokens long, not "
            f"{request.sequence_length}"
        )
    return None


def _mask_bytes(request: Request, batch: int) -> int:
    """Of the mask of each sequence, a byte for each query and key, and of one at a time in 16
    bits.
    """
    pairs = request.sequence_length**2 // request.context_shards
    return (batch + 2) * pairs


MASKED_CUDNN = Backend("cudnn-masked", _why_not, cudnn_masked_attention, _mask_bytes, skips=False)
