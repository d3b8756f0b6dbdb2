"""Attention to the keys and values of an earlier layer."""

from typing import ClassVar, Literal

from braeburn.config.sublayers.base import GroupedQueryConfig


class ReusedAttention(GroupedQueryConfig):
    """Each token attends to all earlier tokens of its document, by the keys and values of the last
    layer before that made its own. The layer has none to train or to keep.
    """

    makes_keys: ClassVar[bool] = False
    reuses_keys: ClassVar[bool] = True
    kind: Literal["reused"] = "reused"
