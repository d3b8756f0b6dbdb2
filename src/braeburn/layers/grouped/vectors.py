"""The vector of each row's group, as experts have one for a bias."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.layers.platform import Size


def grouped_vectors(
    vectors: Float[Array, "E F"], sizes: Int[Array, " E"], count: Size
) -> Float[Array, "M F"]:
    """For each row the vector of its group, and zeros for rows that belong to none.

    It is a product with a matrix of zeros and ones, so that the gradient is one as well: a lookup
    would be differentiated by adding row after row into few vectors. Beside the product of a row
    and a matrix [D, F] it is E / D of the work.

    Args:
        vectors: of the groups, in the type of the result.
        sizes: rows of each group, as of `grouped_product`.
        count: of all rows.
    """
    ends = jnp.cumsum(sizes)
    places = jnp.arange(count)[:, None]
    is_of = (places >= ends - sizes) & (places < ends)
    return is_of.astype(vectors.dtype) @ vectors
