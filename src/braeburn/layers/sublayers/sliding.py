"""Attention to the last tokens."""

from jaxtyping import Array, Float

from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.layers.sublayers import grouped_query
from braeburn.layers.sublayers.definition import Context, Kept, Signals, Sublayer


def _attend(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
) -> tuple[Float[Array, "B T D"], Signals]:
    return grouped_query.self_attention(x_BTD, signals, context, context.config.window)


def _cache(config: SlidingAttention) -> tuple[Kept, ...]:
    return grouped_query.cache(config, config.window)


DEFINITION = Sublayer(
    specs=grouped_query.specs, apply=_attend, prepare=grouped_query.rotation, cache=_cache
)
