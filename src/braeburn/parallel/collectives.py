"""Collectives along one mesh axis, for programs that run on each device's part alone.

Such a program is differentiated as the sum of all devices' results: each of these functions has its
exact transpose there (a gather's is a sum that scatters, and the other way round). Sums that leave
a copy everywhere have none that is unambiguous, so they appear only where no gradient flows. Along
an axis of one device they do nothing. `FSDP` stands for all axes that weights are fully sharded
along (`MeshConfig.sharded`), taken together.
"""

from jax import lax
from jaxtyping import Array

from braeburn.config import MeshConfig

FSDP, EXPERT, PIPELINE = "fsdp", "expert", "pipeline"
CONTEXT, TENSOR = "context", "tensor"


def names(axis: str, mesh: MeshConfig) -> str | tuple[str, ...]:
    """What JAX's collectives are to run along, empty where that is one device."""
    along = mesh.split_along((axis,))
    return along[0] if len(along) == 1 else along


def axis_index(axis: str, mesh: MeshConfig) -> Array | int:
    """This device's place along `axis`, a Python 0 where the axis has one device."""
    along = names(axis, mesh)
    return lax.axis_index(along) if along else 0


def all_gather(x: Array, axis: str, dim: int, mesh: MeshConfig) -> Array:
    """Joins the shards of a dimension on every device of a mesh axis.

    Args:
        x: this device's shard, of any type.
        axis: the mesh axis.
        dim: the dimension to join.
        mesh: resolved sizes.

    Returns:
        The whole array, `mesh.sizes[axis]` times as long in `dim`.
    """
    along = names(axis, mesh)
    return lax.all_gather(x, along, axis=dim, tiled=True) if along else x


def reduce_scatter(x: Array, axis: str, dim: int, mesh: MeshConfig) -> Array:
    """Sums over the devices of a mesh axis; each keeps its shard of the sum.

    Args:
        x: this device's term, of any type.
        axis: the mesh axis.
        dim: the dimension that the sum is split along.
        mesh: resolved sizes, of which that of `axis` divides the dimension.

    Returns:
        This device's shard of the sum, in the type of `x`.
    """
    along = names(axis, mesh)
    return lax.psum_scatter(x, along, scatter_dimension=dim, tiled=True) if along else x


def all_to_all(x: Array, axis: str, split: int, join: int, mesh: MeshConfig) -> Array:
    """Splits one dimension over the devices of a mesh axis, and joins another.

    Args:
        x: this device's shard, of any type.
        axis: the mesh axis, whose devices hold the shards of dimension `join`.
        split: the dimension to split.
        join: the dimension to join.
        mesh: resolved sizes, of which that of `axis` divides dimension `split`.

    Returns:
        This device's shard of the same array, split along `split` in place of `join`.
    """
    along = names(axis, mesh)
    return lax.all_to_all(x, along, split, join, tiled=True) if along else x


def all_sum(x: Array, axis: str, mesh: MeshConfig) -> Array:
    """The sum over the devices of `axis`, on each of them. Not to be differentiated."""
    along = names(axis, mesh)
    return lax.psum(x, along) if along else x


def all_max(x: Array, axis: str, mesh: MeshConfig) -> Array:
    """The maximum over the devices of `axis`, on each of them. Not to be differentiated."""
    along = names(axis, mesh)
    return lax.pmax(x, along) if along else x


def gather_tokens(x_BTD: Array, mesh: MeshConfig, split: bool = True) -> Array:
    """Enters a tensor-parallel region: the tokens of all tensor shards, [B, T / tensor, D] -> [B,
    T, D].

    Where tokens are not `split`, each shard has them all.
    """
    return all_gather(x_BTD, TENSOR, 1, mesh) if split else x_BTD


def scatter_tokens(x_BTD: Array, mesh: MeshConfig, split: bool = True) -> Array:
    """Leaves a tensor-parallel region: partial sums [B, T, D] -> the sum, of which each shard keeps
    its own tokens.

    Where tokens are not `split`, each shard keeps all of the sum, which is not to be
    differentiated.
    """
    return reduce_scatter(x_BTD, TENSOR, 1, mesh) if split else all_sum(x_BTD, TENSOR, mesh)
