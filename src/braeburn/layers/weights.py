"""Weights as a device uses them, from the shards that it stores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from braeburn.config import MeshConfig, Precision
from braeburn.layers.spec import ParamSpec, Role, Tree
from braeburn.parallel.collectives import TENSOR, axis_index
from braeburn.parallel.rules import mesh_axes


def gathered(
    weights: Tree, specs: Tree, roles: tuple[Role, ...], precision: Precision, mesh: MeshConfig
) -> Tree:
    """The weights of `roles` joined along what the rules store split but use whole; the others as
    they are.

    Matrices travel in the type that they are multiplied in, norms in float32; the gradient, which
    takes the way back, is summed in `precision.reduce`.

    Args:
        weights: a tree of this device's shards, of one layer or of all.
        specs: the specs of the whole parameters, a tree of the same structure.
        roles: of the parameters to gather.
        precision: types.
        mesh: resolved sizes.
    """
    return jax.tree.map(
        lambda w, spec: _gather(w, spec, precision, mesh) if spec.role in roles else w,
        weights,
        specs,
    )


def _gather(weight: Array, spec: ParamSpec, precision: Precision, mesh: MeshConfig) -> Array:
    dtype = jnp.dtype(jnp.float32 if spec.role == "norm" else precision.compute)
    # One layer's weight has lost the leading axis of its spec.
    named = zip(spec.axes[-weight.ndim :], spec.shape[-weight.ndim :], strict=True)
    for dim, (name, size) in enumerate(named):
        stored = mesh_axes(name, size, "parameters", mesh, spec.role)
        used = mesh_axes(name, size, "activations", mesh, spec.role)
        over = tuple(axis for axis in stored if axis not in used)
        if over:
            weight = gather(weight, over, dim, dtype, jnp.dtype(precision.reduce))
        if name == "kv_heads" and not used and mesh.tensor > 1:
            # Fewer heads than shards: each shard stores them all and works with the one that its
            # query heads share.
            head = axis_index(TENSOR, mesh) * size // mesh.tensor
            weight = lax.dynamic_slice_in_dim(weight, head, 1, dim)
    return weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def gather(shard: Array, axes: tuple[str, ...], dim: int, dtype: Any, reduce_dtype: Any) -> Array:
    """The shards of a float32 weight joined along `dim`, in `dtype`; its gradient is summed in
    `reduce_dtype`.
    """
    return lax.all_gather(shard.astype(dtype), axes, axis=dim, tiled=True)


def _gather_forward(
    shard: Array, axes: tuple[str, ...], dim: int, dtype: Any, reduce_dtype: Any
) -> tuple[Array, None]:
    # Spelt out, for rematerialisation to see an all-gather here: through `gather` itself it would
    # keep the result.
    return lax.all_gather(shard.astype(dtype), axes, axis=dim, tiled=True), None


def _gather_backward(
    axes: tuple[str, ...], dim: int, dtype: Any, reduce_dtype: Any, _: None, slope: Array
) -> Any:
    slope = lax.psum_scatter(slope.astype(reduce_dtype), axes, scatter_dimension=dim, tiled=True)
    return (slope.astype(jnp.float32),)


gather.defvjp(_gather_forward, _gather_backward)
