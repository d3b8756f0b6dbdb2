"""The grouped product as one loop over blocks of rows, whose number is known before it runs.

It is for what `triton` does not take on NVIDIA's GPUs. These would wait for the host to tell how
long any other loop is, and XLA has no kernel of `ragged_dot` for them. There are as many blocks as
rows and groups can need at most: M / `BLOCK` and one for each group. Those that are not needed work
on rows behind all others. The last block of a group may reach into the rows of the next group,
which then writes over what it left there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Rows of a block. More would waste more where groups are small, of whose blocks half is empty on
# average; fewer are slower a row.
BLOCK = 256


class Blocks(NamedTuple):
    """What blocks work on.

    Attributes:
        groups: the group of each block, int32.
        starts: its first row.
        counts: how many of its rows are those of the group.
    """

    groups: Int[Array, " N"]
    starts: Int[Array, " N"]
    counts: Int[Array, " N"]


def blocks_of(sizes: Int[Array, " E"], num_rows: Any, rows: int) -> Blocks:
    """The blocks of groups of rows: as many as there can be at most.

    Args:
        sizes: rows of each group.
        num_rows: of all, those behind the last group among them.
        rows: of a block.
    """
    num_groups = sizes.shape[0]
    needed = -(-sizes // rows)
    ends = jnp.cumsum(needed)
    numbers = jnp.arange(-(-num_rows // rows) + num_groups, dtype=sizes.dtype)
    groups = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), num_groups - 1)
    groups = groups.astype(sizes.dtype)
    before = (numbers - (ends - needed)[groups]) * rows
    is_needed = numbers < ends[-1]
    first = (jnp.cumsum(sizes) - sizes)[groups]
    starts = jnp.where(is_needed, first + before, num_rows)
    counts = jnp.where(is_needed, jnp.minimum(sizes[groups] - before, rows), 0)
    return Blocks(groups, starts, counts)


@jax.custom_vjp
def product(
    rows: Float[Array, "M D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """As `grouped_product`, but for the rows behind the last group, which may hold anything."""
    return _products(rows, matrices, sizes)


def _forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, Any]:
    return product(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: Any, cotangent: Float[Array, "M F"]) -> tuple[Array, Array, None]:
    rows, matrices, sizes = kept
    of_rows = _products(cotangent, matrices.swapaxes(1, 2), sizes)
    return of_rows, _outer_products(rows, cotangent, sizes), None


product.defvjp(_forward, _backward)


def _with_room(rows: Array) -> Array:
    """The rows with a block behind them, for blocks that are not needed or reach too far."""
    return jnp.pad(rows, ((0, BLOCK), (0, 0)))


def _products(rows: Array, matrices: Array, sizes: Int[Array, " E"]) -> Array:
    """The products of rows and the matrices of their groups."""
    padded = _with_room(rows)

    def one(result: Array, block: Blocks) -> tuple[Array, None]:
        part = lax.dynamic_slice_in_dim(padded, block.starts, BLOCK)
        found = part @ lax.dynamic_index_in_dim(matrices, block.groups, 0, keepdims=False)
        return lax.dynamic_update_slice_in_dim(result, found, block.starts, 0), None

    nothing = jnp.zeros((padded.shape[0], matrices.shape[2]), rows.dtype)
    result, _ = lax.scan(one, nothing, blocks_of(sizes, rows.shape[0], BLOCK))
    return result[: rows.shape[0]]


def _outer_products(
    rows: Float[Array, "M D"], others: Float[Array, "M F"], sizes: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """For each group, the sum over its rows of the outer product of a row and its other one."""
    blocks = blocks_of(sizes, rows.shape[0], BLOCK)
    padded, other_padded = _with_room(rows), _with_room(others)

    def one(totals: Array, block: Blocks) -> tuple[Array, None]:
        part = lax.dynamic_slice_in_dim(padded, block.starts, BLOCK)
        other = lax.dynamic_slice_in_dim(other_padded, block.starts, BLOCK)
        other = jnp.where((jnp.arange(BLOCK) < block.counts)[:, None], other, 0)
        found = lax.dot_general(
            part, other, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return totals.at[block.groups].add(found), None

    zeros = jnp.zeros((sizes.shape[0], rows.shape[1], others.shape[1]), jnp.float32)
    return lax.scan(one, zeros, blocks)[0].astype(rows.dtype)
