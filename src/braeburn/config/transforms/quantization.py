"""Stages that train with rounded weights."""

from typing import ClassVar, Literal

from braeburn.config.base import Size
from braeburn.config.transforms.base import TransformConfig


class Quantization(TransformConfig):
    """Training with weights rounded as they will be shipped: gradients pass the rounding by (arXiv
    1308.3432).

    Along what a matrix is multiplied over, each `group_size` weights share a scale: `int8` and
    `int4` as llama.cpp's Q8_0 and Q4_0, which have groups of 32; `int2` has four levels and learns
    a factor of the scale for each matrix.
    """

    rounds: ClassVar[bool] = True

    kind: Literal["int8", "int4", "int2"] = "int4"
    group_size: Size = 32

    @property
    def summary(self) -> str:
        """The kind of values, and the size of the groups."""
        return f"rounds to {self.kind} in groups of {self.group_size}"
