"""The kinds of sublayer that a layer can name: every module of this package is one."""

from typing import TYPE_CHECKING

from braeburn.config.base import tagged_union
from braeburn.config.sublayers.base import (
    AttentionConfig,
    FeedForwardConfig,
    GroupedQueryConfig,
    QKNorm,
)
from braeburn.config.sublayers.full import FullAttention
from braeburn.config.sublayers.swiglu import SwiGLU
from braeburn.discovery import modules_of

modules_of(__name__, __path__)

if TYPE_CHECKING:
    Attention = AttentionConfig
    FeedForward = FeedForwardConfig
else:
    Attention = tagged_union(AttentionConfig)
    FeedForward = tagged_union(FeedForwardConfig)

__all__ = [
    "Attention",
    "AttentionConfig",
    "FeedForward",
    "FeedForwardConfig",
    "FullAttention",
    "GroupedQueryConfig",
    "QKNorm",
    "SwiGLU",
]
