"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), rotating halves as transformers
does, or neighbours as DeepSeek does.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from braeburn.config import RopeScaling


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    `llama3` scaling is that of Llama 3.1: wavelengths longer than the original context shrink by
    `factor`, short ones stay, those between are interpolated. `yarn` (arXiv 2309.00071, equations
    17 to 20) does the same along a ramp over the numbers of the pairs.
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind == "yarn":
        keep = _kept_by_yarn(head_dim, base, scaling)
        return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def _kept_by_yarn(head_dim: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """How much of each pair's frequency stays as it is, from 0 to 1, [head_dim / 2]."""

    def pair_of(turns: float) -> float:
        """The pair, not rounded, that turns so often within the original length."""
        length = scaling.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # As transformers has it, so that a ramp of no length divides by no zero.
    length = last - first or 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - first) / length, 0.0, 1.0)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """1 + 0.1 * weight * log(factor), which YaRN multiplies by where sequences are longer than the
    trained ones (arXiv 2309.00071, equation 22).
    """
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def magnitude(scaling: RopeScaling | None) -> float:
    """What rotated queries and keys are multiplied by."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_magnitude(scaling.factor)


def rotation(
    positions: Int[Array, "B T"], frequencies: np.ndarray, magnitude: float = 1.0
) -> tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]:
    """Cosines and sines, float32, of every position and pair, ready to broadcast over heads.

    Args:
        positions: of tokens.
        frequencies: radians per position, [P].
        magnitude: what the rotation multiplies by.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    if magnitude == 1.0:
        return cosine, sine
    return cosine * magnitude, sine * magnitude


def rotate(
    x_BTNH: Float[Array, "B T N H"], cosine: Float[Array, "B T 1 P"], sine: Float[Array, "B T 1 P"]
) -> Float[Array, "B T N H"]:
    """Rotates each pair (i, i + H/2) of every head by its position's angle; the type of `x_BTNH` is
    kept.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return _rotated(first, second, (cosine, sine), x_BTNH)


def rotate_neighbours(
    x_BTNH: Float[Array, "B T N H"], cosine: Float[Array, "B T 1 P"], sine: Float[Array, "B T 1 P"]
) -> Float[Array, "B T N H"]:
    """Rotates each pair (2i, 2i + 1) of every head by its position's angle; the type of `x_BTNH` is
    kept. The first of all pairs come first in the result, the second ones last: it may only be
    multiplied by what was rotated in this way, too.
    """
    pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], -1, 2)
    return _rotated(pairs[..., 0], pairs[..., 1], (cosine, sine), x_BTNH)


def _rotated(
    first: Array, second: Array, rotation: tuple[Array, Array], x_BTNH: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    cosine, sine = rotation
    rotated = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return rotated.astype(x_BTNH.dtype)
