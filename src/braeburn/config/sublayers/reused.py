"""Attention to the keys and values of an earlier layer."""

from typing import Literal

from braeburn.config.sublayers.base import AttentionConfig


class ReusedAttention(AttentionConfig):
    """Each token attends to all earlier tokens of its document, by the keys and values of the last
    layer before that made its own. The layer has none to train or to keep.
    """

    kind: Literal["reused"] = "reused"
