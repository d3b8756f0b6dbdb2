"""What a grouped product is asked for."""

from dataclasses import dataclass
from typing import Any

from braeburn.layers.platform import Size


@dataclass(frozen=True)
class Request:
    """What is known about a grouped product when it is traced.

    Attributes:
        platform: "cpu", "tpu", "cuda" or "rocm"; or `platform.PORTABLE`.
        dtype: of rows and matrices.
        rows: M, of all groups and behind them.
        groups: E, how many there are.
        inputs: D, columns of a row.
        outputs: F, columns of a result.
        compute_capability: of an NVIDIA GPU, as (9, 0); None where it is unknown.
    """

    platform: str
    dtype: Any
    rows: Size
    groups: int
    inputs: int
    outputs: int
    compute_capability: tuple[int, int] | None = None
