"""Attention to all earlier tokens."""

from typing import Literal

from braeburn.config.sublayers.base import GroupedQueryConfig


class FullAttention(GroupedQueryConfig):
    """Each token attends to all earlier tokens of its document."""

    kind: Literal["full"] = "full"
