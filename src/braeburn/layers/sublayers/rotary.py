"""The rotation of queries and keys by their positions, as the kinds of attention have it."""

from jaxtyping import Array, Float, Int

from braeburn.config import AttentionConfig, ModelConfig, RopeScaling
from braeburn.layers import rope

# Cosines and sines of every position.
Rotation = tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]


def scaling_of(config: AttentionConfig, model: ModelConfig) -> RopeScaling | None:
    """How a layer's frequencies are stretched: as the model's, or not at all at its own base."""
    return model.rope_scaling if config.rope_base is None else None


def rotation(
    config: AttentionConfig, model: ModelConfig, head_dim: int, positions: Int[Array, "B T"]
) -> Rotation:
    """The rotation of every position, at the layer's own base or the model's.

    Args:
        config: of the layer.
        model: the base and its scaling, where the layer has none of its own.
        head_dim: the numbers of a head that are rotated.
        positions: of tokens.
    """
    base = model.rope_base if config.rope_base is None else config.rope_base
    scaling = scaling_of(config, model)
    frequencies = rope.inverse_frequencies(head_dim, base, scaling)
    return rope.rotation(positions, frequencies, rope.magnitude(scaling))
