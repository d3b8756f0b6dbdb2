"""Safetensors files, written one tensor after the other."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
import numpy as np

from braeburn.config import WeightType

CODES: dict[WeightType, str] = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: in the file.
        shape: in the file.
        dtype: in the file.
        values: makes its values, of any float type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: WeightType
    values: Callable[[], np.ndarray]

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return np.dtype(self.dtype).itemsize


def write_file(path: Path, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Writes a safetensors file, and gives each tensor once it is written: byte for byte what
    `save_file` of safetensors writes, which wants all of them in memory.

    The format is that of https://huggingface.co/docs/safetensors: the header's length in 8 bytes,
    the header in JSON, padded with spaces to a multiple of 8, and the tensors in its order. The
    wider come first, so that each begins at a multiple of its width.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.width, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        size = entry.width * math.prod(entry.shape)
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (position, position + size),
        }
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            values = np.ascontiguousarray(entry.values().astype(entry.dtype, copy=False))
            file.write(values.reshape(-1).view(np.uint8).data)
            yield entry
