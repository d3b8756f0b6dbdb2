"""Arrays of checkpoints that are read and written piece by piece, and never lie in memory whole.

Files are those that orbax writes: zarr arrays in an OCDBT database, through TensorStore.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

# The most bytes that are read at once, unless a single layer or a chunk on disk has more.
PIECE_BYTES = 2**27
# Arrays beyond this size are cut into chunks of at most this size on disk, each of one layer.
CHUNK_BYTES = 2**26

Index = Any  # whatever NumPy takes as one


@dataclass(frozen=True)
class Pieces:
    """An array that is made one piece after the other, as it is written.

    Attributes:
        shape: of the whole.
        dtype: of the whole.
        pieces: makes (index, values) pairs, which together cover the array once.
        count: how many they are.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[tuple[Index, np.ndarray]]]
    count: int = 1

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.dtype.itemsize

    def assembled(self, dtype: Any = None) -> np.ndarray:
        """The whole array, in memory; `dtype` is the array's own by default."""
        values = np.empty(self.shape, dtype or self.dtype)
        for index, piece in self.pieces():
            values[index] = piece
        return values

    @classmethod
    def of_layers(
        cls, shape: tuple[int, ...], dtype: Any, layer: Callable[[int], np.ndarray]
    ) -> "Pieces":
        """An array [L, ...] from a function that gives each of the L layers."""
        return cls(
            shape, np.dtype(dtype), lambda: ((i, layer(i)) for i in range(shape[0])), shape[0]
        )

    @classmethod
    def of(cls, stored: "StoredArray") -> "Pieces":
        """What a checkpoint holds, read whole."""
        return cls.whole(stored.shape, stored.dtype, stored.read)

    @classmethod
    def whole(
        cls, shape: tuple[int, ...], dtype: Any, values: Callable[[], np.ndarray]
    ) -> "Pieces":
        """An array from a function that gives all of it."""
        return cls(shape, np.dtype(dtype), lambda: [(..., values())])


class StoredArray:
    """An array of a checkpoint, of which only what is indexed is read.

    A layer of a stacked parameter is `array[i]`. Where the checkpoint has all layers in one chunk,
    as those of earlier versions, the first index reads all of them, and they are kept.
    """

    def __init__(self, part: Path, name: str):
        """Opens an array.

        Args:
            part: the folder of a checkpoint's part, as `checkpoints/STEP/params`.
            name: of the array: the keys on its path, joined by dots.

        Raises:
            ValueError: there is no such array.
        """
        base = {"driver": "file", "path": f"{part.absolute()}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        self._store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(self._store.shape)

    @property
    def dtype(self) -> np.dtype:
        """The type that the values have on disk."""
        return self._store.dtype.numpy_dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def _chunk_rows(self) -> int:
        """Length along the first dimension of a chunk on disk."""
        chunk: Any = self._store.chunk_layout.read_chunk.shape
        return int(chunk[0]) if chunk else 1

    @cached_property
    def _kept(self) -> np.ndarray:
        return self.read()

    def __getitem__(self, index: Index) -> np.ndarray:
        if self._chunk_rows > 1:
            return self._kept[index]
        return np.asarray(self._store[index].read().result())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(dtype=dtype)

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        """A block of the array, read in pieces: beside the block, memory holds one piece of it.

        Args:
            index: a slice without a step for each of the first dimensions.
            dtype: that the values get as they are read; as on disk by default.
        """
        dtype = np.dtype(dtype or self.dtype)
        bounds = _bounds(index, self.shape)
        shape = tuple(stop - start for start, stop in bounds)
        store = ts.cast(self._store, ts.dtype(dtype))
        if not shape:
            return np.asarray(store.read().result())
        values = np.empty(shape, dtype)
        rest = tuple(slice(*each) for each in bounds[1:])
        first = bounds[0][0]
        for start, stop in self._rows(*bounds[0], math.prod(shape[1:]) * self.dtype.itemsize):
            ts.array(values)[start - first : stop - first].write(
                store[(slice(start, stop), *rest)].translate_to[0]
            ).result()
        return values

    def _rows(self, first: int, last: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Where the pieces of the rows from `first` to before `last` begin and end: at the bounds
        of chunks, so that none is read twice.
        """
        chunk = self._chunk_rows
        step = max(1, PIECE_BYTES // max(1, row_bytes) // chunk) * chunk
        start = first
        while start < last:
            stop = min(last, (start // step + 1) * step)
            yield start, stop
            start = stop


def placed_pieces(pieces: Pieces, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """An array that is made piece by piece, on the devices; each process keeps of a piece what its
    own devices hold.

    Args:
        pieces: the array, in pieces of one layer or whole.
        wanted: the type that it is to have, and its sharding; None is this process's first device.
    """
    sharding = _sharding(wanted)
    indices = sharding.addressable_devices_indices_map(wanted.shape).values()
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    for index in indices:
        bounds = _bounds(index or (), wanted.shape)
        blocks[bounds] = np.empty([stop - start for start, stop in bounds], wanted.dtype)
    for which, values in pieces.pieces():
        for bounds, block in blocks.items():
            if isinstance(which, int):
                (start, stop), *rest = bounds
                if start <= which < stop:
                    block[which - start] = values[tuple(slice(*each) for each in rest)]
            else:
                block[...] = values[tuple(slice(*each) for each in bounds)]
    return jax.make_array_from_callback(
        wanted.shape, sharding, lambda index: blocks[_bounds(index or (), wanted.shape)]
    )


def placed(stored: StoredArray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a checkpoint on the devices; each process reads what its own devices hold.

    Args:
        stored: the array.
        wanted: the type that it is to have, and its sharding; None is this process's first device.
    """
    return jax.make_array_from_callback(
        wanted.shape, _sharding(wanted), lambda index: stored.read(index or (), wanted.dtype)
    )


def _sharding(wanted: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return wanted.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Where a block begins and ends along each dimension."""
    given = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return (*given, *((0, size) for size in shape[len(given) :]))
