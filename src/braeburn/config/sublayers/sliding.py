"""Attention to the last tokens."""

from collections.abc import Callable
from typing import Literal, Self

from braeburn.config.base import Size
from braeburn.config.sublayers.base import GroupedQueryConfig


class SlidingAttention(GroupedQueryConfig):
    """Each token attends to the last `window` tokens of its document, itself among them."""

    kind: Literal["sliding"] = "sliding"
    window: Size = 1024

    def reach(self, sequence_length: int) -> int:
        """The most tokens of a sequence that a token attends to, itself among them."""
        return min(self.window, sequence_length)

    def shrunk(self, sequence_length: int, smaller: Callable[[int], int]) -> Self:
        """The same with a window of at most a quarter of a sequence."""
        return self.model_copy(update={"window": min(self.window, max(1, sequence_length // 4))})
