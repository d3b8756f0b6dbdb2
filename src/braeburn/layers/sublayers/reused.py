"""Attention to the keys and values of an earlier layer."""

from jaxtyping import Array, Float

from braeburn.layers.sublayers import grouped_query
from braeburn.layers.sublayers.definition import Context, Signals, Sublayer


def _attend(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
) -> tuple[Float[Array, "B T D"], Signals]:
    query = context.product(x_BTD, "query")
    query = grouped_query.positioned({"query": query}, context)["query"]
    return grouped_query.attend_and_project(query, signals, context, None)


DEFINITION = Sublayer(
    specs=grouped_query.query_specs, apply=_attend, prepare=grouped_query.rotation
)
