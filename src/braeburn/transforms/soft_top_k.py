"""Soft-Top-K: a differentiable choice of k out of n units (Lei et al. 2023, "Conditional Adapters",
arXiv 2304.04947).

The mask maximises scores . mask + temperature * entropy(mask) over masks in [0, 1] that sum to k.
Its solution is mask_i = min(1, exp((scores_i + a) / temperature)), with the one `a` for which the
sum is k. The paper iterates; here it is found exactly. Sort the scores from the largest. If the
first m are at 1, the rest share out k - m in proportion to exp(score / temperature), so that m is
right where the largest of the rest gets at most 1: the smallest such m.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def soft_top_k(
    scores: Float[Array, "*S n"], k: int, temperature: Float[Array, ""] | float
) -> Float[Array, "*S n"]:
    """Masks in [0, 1] that sum to k along the last dimension, float32; higher scores have higher
    masks.

    At temperature 0 they are zeros and k ones, ties going to the lower index, and their gradient is
    zero. Above it, the gradient is that of the equations which the mask solves. The temperature, a
    schedule's, has none.

    Raises:
        ValueError: k is not from 1 to n.
    """
    return _solve(scores, k, temperature)[0]


def top_k_indices(scores: Float[Array | np.ndarray, "*S n"], k: int) -> Int[Array, "*S k"]:
    """The indices of the k largest scores, ascending, int32: those that `soft_top_k` keeps at
    temperature 0.

    Raises:
        ValueError: k is not from 1 to n.
    """
    return jnp.sort(_order(scores, k)[..., :k], axis=-1).astype(jnp.int32)


def _order(scores: Array | np.ndarray, k: int) -> Array:
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k={k} is not from 1 to {scores.shape[-1]}")
    return jnp.argsort(-jnp.asarray(scores, jnp.float32), axis=-1, stable=True)


def _solve(
    scores: Array, k: int, temperature: Array | float
) -> tuple[Array, Bool[Array, "*S n"], Array]:
    """The masks, which of them are not held to 1, and the index of the largest of those."""
    order, scores = _order(scores, k), scores.astype(jnp.float32)
    rank = jnp.argsort(order, axis=-1)
    soft = jnp.asarray(temperature, jnp.float32) > 0
    # Whatever is divided by it is not used at temperature 0.
    temperature = jnp.where(soft, temperature, 1.0).astype(jnp.float32)

    ordered = jnp.take_along_axis(scores, order, axis=-1)
    totals = _totals(ordered, temperature)
    saturated = jnp.argmax(k - jnp.arange(scores.shape[-1]) <= totals, axis=-1, keepdims=True)

    # Differences before quotients, and the largest of the rest as origin: no precision is lost at
    # low temperatures.
    largest = jnp.take_along_axis(order, saturated, axis=-1)
    free = rank >= saturated
    shares = jnp.exp((scores - jnp.take_along_axis(scores, largest, axis=-1)) / temperature)
    shares = jnp.where(free, jnp.minimum(shares, 1.0), 0.0)
    shares = (k - saturated) * shares / jnp.sum(shares, axis=-1, keepdims=True)
    masks = jnp.where(free, jnp.minimum(shares, 1.0), 1.0)
    return jnp.where(soft, masks, (rank < k).astype(jnp.float32)), free & soft, largest


def _totals(ordered: Array, temperature: Array) -> Array:
    """For each m, the sum of exp((s_j - s_m) / temperature) over j >= m, of descending scores s.

    Each total is one plus the next times exp of a difference: a recurrence whose terms are all
    between 0 and n.
    """
    differences = jnp.diff(ordered, axis=-1, append=ordered[..., -1:])
    factors = jnp.exp(differences / temperature).at[..., -1].set(0.0)

    def joined(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(
        joined, (factors, jnp.ones_like(factors)), reverse=True, axis=ordered.ndim - 1
    )[1]


def _forward(scores: Array, k: int, temperature: Array | float) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.asarray(scores)
    masks, free, largest = _solve(scores, k, temperature)
    # Of the scores their type alone is needed.
    return masks, (masks, free, largest, jnp.asarray(temperature), scores[..., :0])


def _backward(k: int, residuals: tuple[Any, ...], cotangent: Array) -> tuple[Array, Array]:
    # A residual that was constant comes back as a number of JAX's own type.
    masks, free, largest, temperature, like = residuals
    weights = jnp.where(free, masks, 0.0)
    # Measured from the largest mask's: where that is all but 1, its small gradient is no difference
    # of large numbers.
    cotangent = cotangent - jnp.take_along_axis(cotangent, largest, axis=-1)
    mean = jnp.sum(weights * cotangent, axis=-1, keepdims=True) / jnp.maximum(
        jnp.sum(weights, axis=-1, keepdims=True), 1.0
    )
    gradient = weights * (cotangent - mean) / jnp.where(temperature > 0, temperature, 1.0)
    return gradient.astype(like.dtype), jnp.zeros_like(temperature)


soft_top_k.defvjp(_forward, _backward)
