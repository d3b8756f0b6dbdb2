"""Matrix products over tokens, with the tokens of all sequences along one dimension.

XLA on CPUs runs a product of a three-dimensional array, and the products of its gradients, at about
110 GFLOP/s where it runs the same product of a matrix at 180 (two Zen 4 cores;
`docs/decisions.md`). Elsewhere the two are equal.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def flat(x: Float[Array, "*S D"]) -> Float[Array, "tokens D"]:
    """All leading dimensions as one."""
    return x.reshape(-1, x.shape[-1])


def linear(
    x: Float[Array, "*S D"], weight: Float[Array, "D F"], dtype: Any = None
) -> Float[Array, "*S F"]:
    """The product of each token's vector and a matrix; `dtype` is that of the sums and the result,
    x's by default.
    """
    product = jnp.matmul(flat(x), weight, preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], weight.shape[1])
