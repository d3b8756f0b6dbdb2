"""The grouped product as a loop over groups, and within each over blocks of its rows.

It is for CPUs. A group is worked through in large blocks while they fit, and its rest in smaller
ones. The last of these may reach into the rows of the next group, which then writes over what it
left there, so that nothing is copied to line groups up with blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from braeburn.layers.platform import Size

# Rows of blocks: products of few rows are slower a row, and a group wastes half of the smallest
# block on average.
BLOCKS = (256, 64, 16)


@jax.custom_vjp
def product(
    rows: Float[Array, "M D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """As `grouped_product`, but for the rows behind the last group, which may hold anything."""
    return _products(rows, matrices, sizes, transposed=False)


def _forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, Any]:
    return product(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: Any, cotangent: Float[Array, "M F"]) -> tuple[Array, Array, None]:
    rows, matrices, sizes = kept
    return (
        _products(cotangent, matrices, sizes, transposed=True),
        _outer_products(rows, cotangent, sizes),
        None,
    )


product.defvjp(_forward, _backward)


def _ends(sizes: Int[Array, " E"]) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Where the rows of each group begin and end."""
    last = jnp.cumsum(sizes)
    return last - sizes, last


def _with_room(rows: Array) -> Array:
    """The rows with a block behind them, which the last one of a group may reach into."""
    return jnp.pad(rows, ((0, BLOCKS[-1]), (0, 0)))


def _over_blocks(
    ends: tuple[Array, Array], body: Callable[[Array, int, Any], Any], carry: Any, most: Size
) -> Any:
    """Carries a value over the blocks of a group.

    Args:
        ends: where the group begins and ends.
        body: (first row of a block, rows of it, the value before) -> the value after.
        carry: the value before the first.
        most: rows of all groups.
    """
    start, last = ends
    for block in BLOCKS:
        # Where their number is not known while the program is traced, the smallest blocks will do.
        too_large = not isinstance(most, int) or block > most
        if too_large and block > BLOCKS[-1]:
            continue
        # But for the smallest blocks, they are only of the group's own rows.
        room = block - 1 if block > BLOCKS[-1] else 0

        def unfinished(state: tuple[Array, Any], room: int = room, last: Array = last) -> Array:
            return state[0] + room < last

        def step(state: tuple[Array, Any], block: int = block) -> tuple[Array, Any]:
            return state[0] + block, body(state[0], block, state[1])

        start, carry = lax.while_loop(unfinished, step, (start, carry))
    return carry


def _products(
    rows: Array, matrices: Float[Array, "E D F"], sizes: Int[Array, " E"], *, transposed: bool
) -> Array:
    """The products of rows and the matrices of their groups, or these transposed."""
    count, width = rows.shape[0], matrices.shape[1 if transposed else 2]
    padded = _with_room(rows)
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def of_group(result: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, *ends = group

        def of_block(start: Array, block: int, result: Array) -> Array:
            part = lax.dynamic_slice_in_dim(padded, start, block)
            found = lax.dot_general(part, matrix, contracted)
            return lax.dynamic_update_slice_in_dim(result, found, start, 0)

        return _over_blocks((ends[0], ends[1]), of_block, result, count), None

    nothing = jnp.zeros((padded.shape[0], width), rows.dtype)
    result, _ = lax.scan(of_group, nothing, (matrices, *_ends(sizes)))
    return result[:count]


def _outer_products(
    rows: Float[Array, "M D"], others: Float[Array, "M F"], sizes: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """For each group, the sum over its rows of the outer product of a row and its other one."""
    count = rows.shape[0]
    rows, others = _with_room(rows), _with_room(others)

    def of_group(_: None, ends: tuple[Array, Array]) -> tuple[None, Array]:
        def of_block(start: Array, block: int, total: Array) -> Array:
            part = lax.dynamic_slice_in_dim(rows, start, block)
            other = lax.dynamic_slice_in_dim(others, start, block)
            if block == BLOCKS[-1]:
                inside = start + jnp.arange(block) < ends[1]
                other = jnp.where(inside[:, None], other, 0)
            found = lax.dot_general(
                part, other, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            return total + found

        zeros = jnp.zeros((rows.shape[1], others.shape[1]), jnp.float32)
        return None, _over_blocks(ends, of_block, zeros, count).astype(rows.dtype)

    return lax.scan(of_group, None, _ends(sizes))[1]
