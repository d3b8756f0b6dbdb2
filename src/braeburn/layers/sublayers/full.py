"""Attention to all earlier tokens."""

from braeburn.layers.sublayers import grouped_query
from braeburn.layers.sublayers.definition import Sublayer

DEFINITION = Sublayer(
    specs=grouped_query.specs,
    apply=grouped_query.self_attention,
    prepare=grouped_query.rotation,
    cache=grouped_query.cache,
)
