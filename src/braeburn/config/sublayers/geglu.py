"""The feed-forward sublayer of Gemma."""

from typing import Literal

from braeburn.config.sublayers.base import FeedForwardConfig


class GeGLU(FeedForwardConfig):
    """gelu(x gate) * (x up), then down (arXiv 2002.05202), with the tanh form of gelu."""

    kind: Literal["geglu"] = "geglu"
