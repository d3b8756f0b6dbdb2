"""Matrix products, and the one place where a stored weight becomes the matrix that multiplies."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt16

from braeburn.config import Execution
from braeburn.layers import low_precision
from braeburn.layers.spec import ParamSpec
from braeburn.layers.weights import from_bits, gathered, not_before


def flat(x: Float[Array, "*S D"]) -> Float[Array, "tokens D"]:
    """All leading dimensions as one."""
    return x.reshape(-1, x.shape[-1])


def product(
    x: Float[Array, "*S D"], matrix: Float[Array, "D F"], dtype: Any = None
) -> Float[Array, "*S F"]:
    """The product of each token's vector and a matrix, with the tokens of all sequences along one
    dimension.

    XLA on CPUs runs a product of a three-dimensional array, and the products of its gradients, at
    about 110 GFLOP/s where it runs the same product of a matrix at 180 (two Zen 4 cores;
    `docs/decisions.md`). Elsewhere the two are equal.

    Args:
        x: vectors of D numbers.
        matrix: of the same dtype.
        dtype: of the sums and the result; that of `x` by default.

    Returns:
        Vectors of F numbers.
    """
    result = jnp.matmul(flat(x), matrix, preferred_element_type=dtype)
    return result.reshape(*x.shape[:-1], matrix.shape[1])


def used(
    weight: Float[Array, "*stored"] | UInt16[Array, "*stored"],
    x: Array,
    spec: ParamSpec,
    execution: Execution,
) -> Float[Array, "*used"]:
    """A stored weight as what activations are multiplied by.

    This is the only place where one is gathered and cast, and where one that is quantised, or that
    an adapter adds to, would become what is multiplied.

    Args:
        weight: as of `linear`.
        x: the activations, in the type that the weight gets.
        spec: of the whole parameter, stacked over layers or not.
        execution: resolved sizes of the mesh, rules and types.
    """
    return from_bits(gathered(not_before(weight, x), spec, execution)).astype(x.dtype)


def joined(
    weight: Float[Array, "*stored"] | UInt16[Array, "*stored"],
    x: Array,
    spec: ParamSpec,
    execution: Execution,
) -> Float[Array, "*used"] | UInt16[Array, "*used"]:
    """The first half of `used`, for a weight that several products share: the weight gathered, but
    cast only where it travelled. `ready` is the other half, for each product.

    Args:
        weight: as of `linear`.
        x: activations that all of the products come of.
        spec: of the whole parameter, stacked over layers or not.
        execution: resolved sizes of the mesh, rules and types.
    """
    return gathered(not_before(weight, x), spec, execution)


def ready(
    weight: Float[Array, "*used"] | UInt16[Array, "*used"], x: Array
) -> Float[Array, "*used"]:
    """A weight of `joined` as what activations `x` are multiplied by."""
    return from_bits(not_before(weight, x)).astype(x.dtype)


def linear(
    x: Float[Array, "*inputs"],
    weight: Float[Array, "*stored"] | UInt16[Array, "*stored"],
    spec: ParamSpec,
    execution: Execution,
) -> Float[Array, "*outputs"]:
    """Multiplies activations by a weight, over the logical axes of the weight's `fan_in`.

    Args:
        x: activations in the type to compute in; its last dimensions are those of `spec.fan_in`.
        weight: this device's part of one layer's weight, of any float type or as its bits. The
            dimensions of `spec.fan_in` come first.
        spec: of the whole parameter, stacked over layers or not.
        execution: resolved sizes of the mesh, rules and types.

    Returns:
        The product, in the type of `x`, whose last dimensions are the other ones of the weight.
    """
    weight = used(weight, x, spec, execution)
    summed = len(spec.fan_in)
    if (lowering := low_precision.lowering(spec, execution)) is not None:
        inputs = flat(x) if summed == 1 else x
        found = low_precision.product(inputs, weight, lowering)
        return found.reshape(*x.shape[: x.ndim - summed], *weight.shape[summed:])
    if weight.ndim == 2:
        return product(x, weight)
    if not execution.split_tokens:
        # To generate, as one product of matrices: in the order below XLA on CPUs transposes the
        # weight first, which for one new token takes longer than the product.
        inputs = x.reshape(*x.shape[: x.ndim - summed], -1)
        outputs = weight.shape[summed:]
        found = product(inputs, weight.reshape(inputs.shape[-1], -1))
        return found.reshape(*inputs.shape[:-1], *outputs)
    # The last dimension first, as einsum has it: the order tells in the last bit of a sum.
    over_x = tuple(range(x.ndim - 1, x.ndim - summed - 1, -1))
    over_weight = tuple(range(summed - 1, -1, -1))
    return lax.dot_general(x, weight, ((over_x, over_weight), ((), ())))
