"""The feed-forward sublayer of most models."""

from typing import Literal

from braeburn.config.sublayers.base import FeedForwardConfig


class SwiGLU(FeedForwardConfig):
    """silu(x gate) * (x up), then down (arXiv 2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"
