"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), rotating halves as transformers
does.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from braeburn.config import RopeScaling


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    `llama3` scaling is that of Llama 3.1: wavelengths longer than the original context shrink by
    `factor`, short ones stay, those between are interpolated.
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rotation(
    positions: Int[Array, "B T"], frequencies: np.ndarray
) -> tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]:
    """Cosines and sines, float32, of every position and pair, ready to broadcast over heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"], cosine: Float[Array, "B T 1 P"], sine: Float[Array, "B T 1 P"]
) -> Float[Array, "B T N H"]:
    """Rotates each pair (i, i + H/2) of every head by its position's angle; the type of `x_BTNH` is
    kept.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return rotated.astype(x_BTNH.dtype)
