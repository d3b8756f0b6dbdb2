"""Attention to the last tokens."""

from jaxtyping import Array, Float

from braeburn.layers.sublayers import grouped_query
from braeburn.layers.sublayers.definition import Context, Signals, Sublayer


def _attend(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
) -> tuple[Float[Array, "B T D"], Signals]:
    return grouped_query.self_attention(x_BTD, signals, context, context.config.window)


DEFINITION = Sublayer(
    specs=grouped_query.specs,
    apply=_attend,
    prepare=grouped_query.rotation,
    cache=grouped_query.cache,
)
