"""The back end "cudnn": the fused kernel of cuDNN on documents in packed layout."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers.attention import cudnn
from braeburn.layers.attention.backend import EVERYTHING, Backend, Request, Scope, nothing


def cudnn_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K H"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig = ONE_DEVICE,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N H"]:
    """The fused kernel of cuDNN, told where documents begin and end.

    Args:
        query: this context shard's queries, float16 or bfloat16; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; with several context shards the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over; the kernel knows no window.

    Returns:
        The attended values, in the type of `query`.
    """
    assert scope.window is None
    return cudnn.packed_attention(query, key, value, segment_ids, mesh, scope.sinks)


def _why_not(request: Request) -> str | None:
    if reason := why_no_kernel_of_cudnn(request):
        return reason
    if request.window is not None:
        return f"it has no window of {request.window} positions"
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


def why_no_kernel_of_cudnn(request: Request) -> str | None:
    """Why cuDNN's attention takes no such heads, whatever tells documents apart."""
    if request.platform != "cuda":
        return "it needs an NVIDIA GPU"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return "it computes in 16 bits only"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, not {request.head_dim}"
    if request.value_dim != request.head_dim:
        return f"it needs values of the keys' head_dim {request.head_dim}, not {request.value_dim}"
    return None


PACKED = Backend("cudnn", _why_not, cudnn_attention, nothing)
