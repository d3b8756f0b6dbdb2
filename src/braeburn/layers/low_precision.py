"""Products of matrices in 8 bits, with gradients of their own: what `precision.matmul` asks for.

An array is divided by a unit, which brings its largest magnitude to the end of what 8 bits hold,
and rounded; the product is multiplied by both units. The unit follows from the array as it is
(current scaling), so that nothing is cut off and nothing is remembered from step to step. There is
one for each array, or one for each row and column that is multiplied.

| matmul     | products                        | activations, weights | gradients | units     |
| ---------- | ------------------------------- | -------------------- | --------- | --------- |
| `fp8`      | all three                       | e4m3                 | e5m2      | of arrays |
| `fp8_rows` | all three                       | e4m3                 | e5m2      | of rows   |
| `int8`     | all but the gradient of weights | int8                 | int8      | of rows   |

On a mesh each device rounds the part that it has. The units of fp8 are powers of two, and leave the
digits of a number as they are: under the unit of a part a number is rounded as under that of the
whole, but for the smallest ones, below 2^-13 of the largest, where the two differ by at most 2^-17
of it. So they take no collective, and none over all devices that share out tokens. The units of
int8 are not, and are those of whole rows: where the shards of `tensor` have a part of a row each,
it is the largest of these parts. A row of what the gradient of a weight is summed over is one of
all tokens; in int8 this product stays in the type to compute in.

An array with a number that is not finite has no finite unit, and so neither has the result: the
guard of the optimizer sees it and skips the step.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from braeburn.config import Execution, Matmul
from braeburn.layers.grouped.select import planned_platform
from braeburn.layers.platform import traced_for
from braeburn.layers.spec import EXPERTS, ParamSpec
from braeburn.parallel.rules import mesh_axes

# The name of these products in a profile and in a program, by which the plan knows them.
EIGHT_BITS = "eight_bits"
MOST_INT8 = 127
# Below it a largest magnitude has no quotient in float32.
_LEAST = 1e-30


class Float8(NamedTuple):
    """A floating-point number of 8 bits, whose largest is 1.75 times a power of two.

    Attributes:
        dtype: of JAX.
        exponent: that of this power.
    """

    dtype: Any
    exponent: int


E4M3 = Float8(jnp.float8_e4m3fn, 8)
E5M2 = Float8(jnp.float8_e5m2, 15)


class Rounded(NamedTuple):
    """An array in 8 bits.

    Attributes:
        values: the rounded numbers.
        unit: that they are to be multiplied by, float32, with a dimension for each of theirs, of
            length 1 where it is shared.
    """

    values: Array
    unit: Array


@dataclass(frozen=True)
class Lowering:
    """How the products with a weight are computed in 8 bits.

    Attributes:
        matmul: as `Precision` has it.
        summed: how many dimensions of the weight, its first, are summed over.
        inputs_along: the axes of the mesh that split these.
        outputs_along: the axes of the mesh that split the others.
    """

    matmul: Matmul
    summed: int
    inputs_along: tuple[str, ...] = ()
    outputs_along: tuple[str, ...] = ()


def in_eight_bits(spec: ParamSpec) -> bool:
    """Whether the products of a parameter may be computed in 8 bits: those of layers' matrices,
    but not of experts', which are multiplied by groups.
    """
    return spec.role == "matrix" and EXPERTS not in spec.axes


def lowering(spec: ParamSpec, execution: Execution) -> Lowering | None:
    """How the products with a weight are computed in 8 bits; None where they are not.

    Args:
        spec: of the whole parameter.
        execution: resolved sizes of the mesh, rules and types.
    """
    matmul = execution.precision.matmul
    if matmul == "compute" or not in_eight_bits(spec):
        return None
    split = mesh_axes(spec.axes, spec.shape, "activations", execution, spec.role)
    inputs: list[str] = []
    outputs: list[str] = []
    for name, along in zip(spec.axes, split, strict=True):
        (inputs if name in spec.fan_in else outputs).extend(along)
    return Lowering(matmul, len(spec.fan_in), tuple(inputs), tuple(outputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "*SK"], weight: Float[Array, "*KF"], lowering: Lowering
) -> Float[Array, "*SF"]:
    """Activations times a weight.

    Args:
        x: its last `lowering.summed` dimensions are summed over.
        weight: of the type of `x`; its first `lowering.summed` dimensions are summed over.
        lowering: how the products are computed.

    Returns:
        The product, in the type of `x`.
    """
    of_x = range(x.ndim - lowering.summed, x.ndim)
    of_weight = range(lowering.summed)
    return _product(
        _rounded(x, of_x, E4M3, lowering.matmul, lowering.inputs_along),
        _rounded(weight, of_weight, E4M3, lowering.matmul, lowering.inputs_along),
        (of_x, of_weight),
        x.dtype,
    )


def _forward(x: Array, weight: Array, lowering: Lowering) -> tuple[Array, tuple[Array, Array]]:
    return product(x, weight, lowering), (x, weight)


def _backward(
    lowering: Lowering, kept: tuple[Array, Array], cotangent: Float[Array, "*SF"]
) -> tuple[Array, Array]:
    x, weight = kept
    matmul, tokens = lowering.matmul, range(x.ndim - lowering.summed)
    of_cotangent = range(len(tokens), cotangent.ndim)
    of_weight = range(lowering.summed, weight.ndim)
    of_x = _product(
        _rounded(cotangent, of_cotangent, E5M2, matmul, lowering.outputs_along),
        _rounded(weight, of_weight, E4M3, matmul, lowering.outputs_along),
        (of_cotangent, of_weight),
        x.dtype,
    )
    if matmul == "int8":
        contracted = ((tuple(tokens), tuple(tokens)), ((), ()))
        return of_x, lax.dot_general(x, cotangent, contracted)
    return of_x, _product(
        _rounded(x, tokens, E4M3, matmul, ()),
        _rounded(cotangent, tokens, E5M2, matmul, ()),
        (tokens, tokens),
        x.dtype,
    )


product.defvjp(_forward, _backward)


def _rounded(
    x: Array, summed: Sequence[int], float8: Float8, matmul: Matmul, along: tuple[str, ...]
) -> Rounded:
    """An array in 8 bits.

    Args:
        x: the array.
        summed: the dimensions that its product is summed over.
        float8: of fp8 its format.
        matmul: as `Precision` has it.
        along: the axes of the mesh that split these dimensions.
    """
    dims = None if matmul == "fp8" else tuple(summed)
    with jax.named_scope(EIGHT_BITS):
        largest = jnp.max(lax.abs(x), axis=dims, keepdims=True).astype(jnp.float32)
        if matmul == "int8":
            return _int8(x, _of_whole_rows(largest, along))
        unit, inverse = _powers_of_two(largest, float8.exponent)
        # Exact in the type of `x`, whose digits it leaves.
        return Rounded((x * inverse.astype(x.dtype)).astype(float8.dtype), unit)


def _of_whole_rows(largest: Array, along: tuple[str, ...]) -> Array:
    """The largest magnitudes of rows of which this device has a part.

    What is no number is made infinite: not every library's maximum of the two is the former.
    """
    if not along:
        return largest
    is_none = lax.ne(largest, largest)
    return lax.pmax(lax.select(is_none, jnp.full_like(largest, jnp.inf), largest), along)


def _int8(x: Array, largest: Array) -> Rounded:
    """Multiples of 1/127 of the largest magnitudes, halves rounded to the even neighbour."""
    largest = lax.max(largest, jnp.full_like(largest, _LEAST))
    # Compilers may or may not write a division by 127 as a product with its rounded inverse.
    unit = _finite_or_none(largest * np.float32(1 / MOST_INT8), largest)
    steps = lax.round(
        x.astype(jnp.float32) * (MOST_INT8 / largest), lax.RoundingMethod.TO_NEAREST_EVEN
    )
    most = np.float32(MOST_INT8)
    return Rounded(lax.clamp(-most, steps, most).astype(jnp.int8), unit)


def _powers_of_two(largest: Array, exponent: int) -> tuple[Array, Array]:
    """The smallest powers of two whose product with a format's largest number is no less than given
    magnitudes, and their inverses.

    Args:
        largest: the magnitudes, float32.
        exponent: of the format.
    """
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    biased, digits = bits >> 23, bits & 0x7FFFFF
    beyond = (digits > 0x600000).astype(jnp.int32)  # more than 1.75 times a power of two
    # Neither the power nor its inverse leaves the range of float32.
    power = lax.clamp(np.int32(1), biased - exponent + beyond, np.int32(253))
    unit = lax.bitcast_convert_type(power << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((254 - power) << 23, jnp.float32)
    return _finite_or_none(unit, largest), inverse


def _finite_or_none(unit: Array, largest: Array) -> Array:
    """The unit, or NaN where the largest magnitude is not finite."""
    return lax.select(lax.is_finite(largest), unit, jnp.full_like(unit, jnp.nan))


def _product(
    one: Rounded, other: Rounded, summed: tuple[Sequence[int], Sequence[int]], dtype: Any
) -> Array:
    """The product of two arrays in 8 bits.

    Args:
        one: the first, whose dimensions that are left come first.
        other: the second.
        summed: the dimensions of each that are summed over.
        dtype: of the result.
    """
    units: Sequence[Array] = (one.unit, other.unit)
    values, sums, takes_units = _as_multiplied(one, other, dtype)
    contracted = ((tuple(summed[0]), tuple(summed[1])), ((), ()))
    with jax.named_scope(EIGHT_BITS):
        found = lax.dot_general(values[0], values[1], contracted, preferred_element_type=sums)
    if takes_units:
        return found
    # The dimensions of the first come first in the result.
    for unit, own, is_first in zip(units, summed, (True, False), strict=True):
        left = [size for dim, size in enumerate(unit.shape) if dim not in own]
        ones = [1] * (found.ndim - len(left))
        found = found.astype(jnp.float32) * unit.reshape(left + ones if is_first else ones + left)
    return found.astype(dtype)


def _as_multiplied(one: Rounded, other: Rounded, dtype: Any) -> tuple[list[Array], Any, bool]:
    """What the compiler of a platform is given for a product in 8 bits.

    Args:
        one: the first array.
        other: the second.
        dtype: of the result.

    Returns:
        The operands, the type of the sums, and whether the product has the units in it.
    """
    values, units = [one.values, other.values], [one.unit, other.unit]
    planned, (platform, _) = planned_platform(), traced_for()
    of_arrays = all(unit.size == 1 for unit in units)
    sums = jnp.int32 if one.values.dtype == jnp.int8 else dtype
    if planned == "tpu" or (planned == "cuda" and of_arrays):
        # They multiply by the units as they write the product: for the plan the two are one.
        return values, dtype, True
    if planned or platform == "tpu" or sums == jnp.int32:
        return values, sums, False
    values = [x.astype(dtype) for x in values]
    if platform == "cuda" and of_arrays:
        # XLA makes this one product of cuBLASLt in fp8, to which it gives both units.
        values = [x * unit.astype(dtype) for x, unit in zip(values, units, strict=True)]
        return values, dtype, True
    return values, dtype, False
