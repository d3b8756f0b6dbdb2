"""Weights as a device uses them, from the shards that it stores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from braeburn.config import Execution
from braeburn.layers.spec import ParamSpec, Tree, walk
from braeburn.parallel.collectives import TENSOR, axis_index
from braeburn.parallel.rules import mesh_axes

# Of the integers that hold the bits of bfloat16 numbers: see `type_on_cpus`.
BITS = jnp.uint16


def type_on_cpus(spec: ParamSpec, dtype: Any) -> Any:
    """The type in which programs on CPUs are given a weight of some type.

    It is that type, but for the bfloat16 matrices of layers, which are given as integers of the
    same bits: XLA for CPUs has no bfloat16, and would widen the matrices of all layers to float32
    at once, ahead of a loop over layers or tokens. `linear` takes both; programs that are given
    bits have no gradients with respect to them.

    Args:
        spec: of the weight.
        dtype: that it is held in.
    """
    return jnp.dtype(BITS if spec.role == "matrix" and dtype == jnp.bfloat16 else dtype)


def from_bits(weight: Array) -> Array:
    """A weight that is given as bits as bfloat16; any other as it is."""
    return lax.bitcast_convert_type(weight, jnp.bfloat16) if weight.dtype == BITS else weight


def to_bits(weight: Array) -> Array:
    """A weight of any float type as the bits of bfloat16 numbers."""
    return lax.bitcast_convert_type(weight.astype(jnp.bfloat16), BITS)


def not_before(weight: Array, x: Array) -> Array:
    """A weight that is given as bits, to be widened when `x` is there and no sooner; any other as
    it is.

    Where layers are not in a loop, nothing else keeps XLA for CPUs from widening those of all
    layers at once: it takes out optimization barriers before it orders the work. So the bits are
    made to depend on `x`, by what is always zero but which no compiler may take for it.

    Args:
        weight: of any type.
        x: what it is to be multiplied by.
    """
    if weight.dtype != BITS:
        return weight
    return weight | (x.ravel()[0] > jnp.inf).astype(BITS)


def gathered(weight: Array, spec: ParamSpec, execution: Execution) -> Array:
    """A weight joined along the axes that the rules store it split along but use it whole.

    A matrix travels in the type that it is multiplied in, a norm in float32. The gradient, which
    takes the way back, is summed in `precision.reduce`.

    Args:
        weight: this device's shard, of one layer or of all.
        spec: of the whole parameter; a leading axis of layers may be missing from `weight`.
        execution: resolved sizes of the mesh, rules and types.

    Returns:
        This device's part of the weight that it multiplies by, in the type that it travelled in,
        or as it was stored where nothing was gathered.
    """
    mesh, precision = execution.mesh, execution.precision
    dtype = jnp.dtype(jnp.float32 if spec.is_precise else precision.compute)
    stored = mesh_axes(spec.axes, spec.shape, "parameters", execution, spec.role)
    used = mesh_axes(spec.axes, spec.shape, "activations", execution, spec.role)
    # One layer's weight has lost the leading axis of its spec.
    first = len(spec.axes) - weight.ndim
    for dim in range(weight.ndim):
        over = tuple(axis for axis in stored[first + dim] if axis not in used[first + dim])
        if over and weight.dtype == BITS:
            weight = lax.all_gather(weight, over, axis=dim, tiled=True)
        elif over:
            weight = gather(weight, over, dim, dtype, jnp.dtype(precision.reduce))
    if "kv_heads" in spec.axes and mesh.tensor > 1:
        dim = spec.axes.index("kv_heads") - first
        if not used[first + dim]:
            # Fewer heads than shards: each shard stores them all and works with the one that its
            # query heads share. Before, those of one shard may have been gathered from others.
            head = axis_index(TENSOR, mesh) * spec.shape[first + dim] // mesh.tensor
            weight = lax.dynamic_slice_in_dim(weight, head, 1, dim)
    return weight


def gathered_norms(params: Tree, specs: Tree, execution: Execution) -> Tree:
    """The parameters with all norms gathered, those of every layer at once: they are small."""
    roles = dict(walk(specs))

    def one(path: Any, leaf: Array) -> Array:
        # Where layers have arrays of their own, paths hold their indices as well.
        names = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        spec = roles["/".join(names)]
        return gathered(leaf, spec, execution) if spec.role == "norm" else leaf

    return jax.tree.map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def gather(shard: Array, axes: tuple[str, ...], dim: int, dtype: Any, reduce_dtype: Any) -> Array:
    """Joins the shards of a weight.

    Args:
        shard: this device's, float32.
        axes: the mesh axes that the weight is split along.
        dim: the dimension that is split.
        dtype: that the shards travel in.
        reduce_dtype: that the shards of the gradient are summed in.

    Returns:
        The whole weight, in `dtype`.
    """
    return lax.all_gather(shard.astype(dtype), axes, axis=dim, tiled=True)


def _gather_forward(
    shard: Array, axes: tuple[str, ...], dim: int, dtype: Any, reduce_dtype: Any
) -> tuple[Array, None]:
    # Spelt out, for rematerialisation to see an all-gather here: through `gather` itself it would
    # keep the result.
    return lax.all_gather(shard.astype(dtype), axes, axis=dim, tiled=True), None


def _gather_backward(
    axes: tuple[str, ...], dim: int, dtype: Any, reduce_dtype: Any, _: None, cotangent: Array
) -> Any:
    summed = lax.psum_scatter(
        cotangent.astype(reduce_dtype), axes, scatter_dimension=dim, tiled=True
    )
    return (summed.astype(jnp.float32),)


gather.defvjp(_gather_forward, _gather_backward)
