"""The grouped product as kernels of Triton, for NVIDIA's GPUs.

Each program of the first kernel multiplies a block of one group's rows by some columns of the
group's matrix; there are as many blocks as rows and groups can need at most, and those that are not
needed end at once. Rows behind the last group are a group of their own, whose results are zeros.
The second kernel sums, for some rows and columns of a group's gradient, over the rows of the group.
So nothing is copied, and no more is multiplied than blocks that are full but for the last of each
group.

Pallas, in which they are written, has Triton in JAX 0.10 to 0.12 and calls it deprecated there.
"""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from braeburn.layers.grouped.counted import blocks_of
from braeburn.layers.grouped.request import Request

# Rows of a block, and the most columns that a program works out and sums over at once. With these
# a program holds 96 KiB of a multiprocessor's 228, so that two run on each.
BLOCK, COLUMNS, SUMMED = 128, 128, 64
WARPS, STAGES = 8, 3
# The least that a tensor core multiplies.
LEAST = 16
# Kernels for what has no tensor core: for tests.
INTERPRET = False


def why_not(request: Request) -> str | None:
    """The reason that the kernels do not take a request, or None."""
    if request.platform != "cuda":
        return f"it is for NVIDIA's GPUs, not {request.platform}"
    if find_spec("jax.experimental.pallas.triton") is None:
        return "this version of JAX has no Triton"
    if jnp.dtype(request.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it would round products of {jnp.dtype(request.dtype).name}"
    if request.compute_capability is None or request.compute_capability < (8, 0):
        return "it needs compute capability 8.0"
    if request.inputs % LEAST or request.outputs % LEAST:
        return (
            f"matrices of {request.inputs} x {request.outputs} are no multiples of {LEAST} "
            f"in both dimensions"
        )
    return None


@jax.custom_vjp
def product(
    rows: Float[Array, "M D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """As `grouped_product`."""
    return _products(rows, matrices, sizes, transposed=False)


def _forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, Any]:
    return product(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: Any, cotangent: Float[Array, "M F"]) -> tuple[Array, Array, None]:
    rows, matrices, sizes = kept
    of_rows = _products(cotangent, matrices, sizes, transposed=True)
    return of_rows, _outer_products(rows, cotangent, sizes), None


product.defvjp(_forward, _backward)


def _tile(size: int, most: int) -> int:
    """The largest power of two that divides a size, up to the most."""
    return min(size & -size, most)


def _call(kernel: Any, name: str, grid: tuple[int, ...], result: Any) -> Any:
    """A kernel that is called with arrays, each of which it sees whole."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    return pallas.pallas_call(
        kernel,
        out_shape=result,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=INTERPRET,
        name=name,
    )


def _multiply(one: Array, other: Array, summed: tuple[int, int]) -> Array:
    dimensions = (((summed[0],), (summed[1],)), ((), ()))
    return lax.dot_general(one, other, dimensions, preferred_element_type=jnp.float32)


def _products(
    rows: Array, matrices: Float[Array, "E D F"], sizes: Int[Array, " E"], *, transposed: bool
) -> Array:
    """The products of rows and the matrices of their groups, or these transposed."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    count, inputs = rows.shape
    num_groups = sizes.shape[0]
    outputs = matrices.shape[1 if transposed else 2]
    columns, summed = _tile(outputs, COLUMNS), _tile(inputs, SUMMED)

    def kernel(
        groups: Any, starts: Any, counts: Any, rows: Any, matrices: Any, result: Any
    ) -> None:
        block = pallas.program_id(0)
        start, group = starts[block], groups[block]
        column = pallas.ds(pallas.program_id(1) * columns, columns)
        is_of_group = (jnp.arange(BLOCK) < counts[block])[:, None]

        def add(step: Array, total: Array) -> Array:
            part = pallas.ds(step * summed, summed)
            of_rows = triton.load(
                rows.at[pallas.ds(start, BLOCK), part], mask=is_of_group, other=0.0
            )
            if transposed:
                return total + _multiply(of_rows, matrices[group, column, part], (1, 1))
            return total + _multiply(of_rows, matrices[group, part, column], (1, 0))

        def store(total: Array) -> None:
            where = result.at[pallas.ds(start, BLOCK), column]
            triton.store(where, total.astype(result.dtype), mask=is_of_group)

        nothing = jnp.zeros((BLOCK, columns), jnp.float32)

        @pallas.when((counts[block] > 0) & (group < num_groups))
        def _() -> None:
            store(lax.fori_loop(0, inputs // summed, add, nothing))

        @pallas.when((counts[block] > 0) & (group == num_groups))
        def _() -> None:
            store(nothing)

    behind = (count - jnp.sum(sizes)).astype(sizes.dtype)
    blocks = blocks_of(jnp.append(sizes, behind), count, BLOCK)
    result = jax.ShapeDtypeStruct((count, outputs), rows.dtype)
    grid = (blocks.groups.shape[0], outputs // columns)
    return _call(kernel, "grouped_products", grid, result)(*blocks, rows, matrices)


def _outer_products(
    rows: Float[Array, "M D"], others: Float[Array, "M F"], sizes: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """For each group, the sum over its rows of the outer product of a row and its other one."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    inputs, outputs = rows.shape[1], others.shape[1]
    height, width = _tile(inputs, COLUMNS), _tile(outputs, COLUMNS)

    def kernel(starts: Any, sizes: Any, rows: Any, others: Any, result: Any) -> None:
        group = pallas.program_id(0)
        row = pallas.ds(pallas.program_id(1) * height, height)
        column = pallas.ds(pallas.program_id(2) * width, width)
        start, size = starts[group], sizes[group]

        def add(step: Array, total: Array) -> Array:
            first = step * SUMMED
            is_of_group = (first + jnp.arange(SUMMED) < size)[:, None]
            part = pallas.ds(start + first, SUMMED)
            one, other = (
                triton.load(each.at[part, where], mask=is_of_group, other=0.0)
                for each, where in ((rows, row), (others, column))
            )
            return total + _multiply(one.T, other, (1, 0))

        steps = lax.div(size + (SUMMED - 1), jnp.int32(SUMMED))
        total = lax.fori_loop(0, steps, add, jnp.zeros((height, width), jnp.float32))
        result[group, row, column] = total.astype(result.dtype)

    starts = jnp.cumsum(sizes) - sizes
    result = jax.ShapeDtypeStruct((sizes.shape[0], inputs, outputs), rows.dtype)
    grid = (sizes.shape[0], inputs // height, outputs // width)
    call = _call(kernel, "grouped_outer_products", grid, result)
    return call(starts.astype(sizes.dtype), sizes, rows, others)
