"""Root-mean-square normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from braeburn.config import Execution
from braeburn.layers.spec import ParamSpec
from braeburn.parallel.collectives import TENSOR, all_gather
from braeburn.parallel.rules import mesh_axes


def rms_norm(
    x: Float[Array, "*S D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "*S D"]:
    """Each vector divided by the root of its mean square, in float32, and multiplied by a scale.

    The type of `x` is kept.
    """
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normal * scale).astype(x.dtype)


def rms_norm_of_heads(
    x_BTNH: Float[Array, "B T N H"],
    scale_NH: Float[Array, "N H"],
    spec: ParamSpec,
    epsilon: float,
    execution: Execution,
) -> Float[Array, "B T N H"]:
    """`rms_norm` over all heads of a token, of which this device may hold a part.

    Args:
        x_BTNH: this device's heads.
        scale_NH: their scales, float32.
        spec: of the scales of all heads, [..., heads, head_dim].
        epsilon: added to the mean square.
        execution: resolved sizes of the mesh, and rules.

    Returns:
        This device's heads, normalised, in the type of `x_BTNH`.
    """
    mesh, heads = execution.mesh, spec.shape[-2]
    wide = x_BTNH.astype(jnp.float32)
    squares = jnp.sum(jnp.square(wide), axis=(-2, -1))
    along = mesh_axes(spec.axes, spec.shape, "activations", execution, spec.role)[-2]
    if mesh.tensor > 1 and not along:
        # Shards that share a head each hold it, and only one of them counts it.
        squares = squares * (heads / mesh.tensor)
    if mesh.tensor > 1:
        # Gathered and summed here: the transpose of a sum that leaves copies is not unambiguous.
        squares = jnp.sum(all_gather(squares[..., None], TENSOR, squares.ndim, mesh), axis=-1)
    mean = squares / (heads * spec.shape[-1])
    normal = wide * jax.lax.rsqrt(mean + epsilon)[..., None, None]
    return (normal * scale_NH).astype(x_BTNH.dtype)
