"""Arrays of checkpoints that are read and written piece by piece, and never lie in memory whole.

Files are those that orbax writes: zarr arrays in an OCDBT database, through TensorStore.
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

# The most bytes that are read at once, unless a single layer or a chunk on disk has more.
PIECE_BYTES = 2**25
# Arrays beyond this size are cut into chunks of at most this size on disk, each of one layer.
CHUNK_BYTES = 2**26

Index = Any  # whatever NumPy takes as one
# Where a block of an array begins and ends, along each dimension.
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pieces:
    """An array that is made one piece after the other, as it is written.

    Attributes:
        shape: of the whole.
        dtype: of the whole.
        piece: makes the piece of a number, and tells where it belongs; all of them together cover
            the array once.
        count: how many they are.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    piece: Callable[[int], tuple[Index, np.ndarray]]
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

    def pieces(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[Index, np.ndarray]]:
        """Where each piece belongs and its values, made one after the other.

        Args:
            numbers: of the pieces to make; all by default.
        """
        return map(self.piece, range(self.count) if numbers is None else numbers)

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
        return cls(shape, np.dtype(dtype), lambda number: (number, layer(number)), shape[0])

    @classmethod
    def of(cls, stored: "StoredArray") -> "Pieces":
        """What a checkpoint holds, read whole."""
        return cls.whole(stored.shape, stored.dtype, stored.read)

    @classmethod
    def whole(
        cls, shape: tuple[int, ...], dtype: Any, values: Callable[[], np.ndarray]
    ) -> "Pieces":
        """An array from a function that gives all of it."""
        return cls(shape, np.dtype(dtype), lambda _: (..., values()))


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
        dtype, bounds = np.dtype(dtype or self.dtype), _bounds(index, self.shape)
        values = _empty(_lengths(bounds), dtype)
        for piece, block in self.pieces(bounds, dtype):
            values[_within(piece, bounds)] = block
        return values

    def pieces(self, bounds: Bounds, dtype: Any) -> Iterator[tuple[Bounds, np.ndarray]]:
        """Pieces of a block of the array, each of some rows along the first dimension, with where
        they lie in the array. They begin and end at the bounds of chunks, so that none is read
        twice.
        """
        store = ts.cast(self._store, ts.dtype(np.dtype(dtype)))
        if not bounds:
            yield (), np.asarray(store.read().result())
            return
        (first, last), *others = bounds
        row_bytes = math.prod(_lengths(tuple(others))) * self.dtype.itemsize
        chunk = self._chunk_rows
        step = max(1, PIECE_BYTES // max(1, row_bytes) // chunk) * chunk
        start = first
        while start < last:
            stop = min(last, (start // step + 1) * step)
            piece = ((start, stop), *others)
            index = tuple(slice(*each) for each in piece)
            yield piece, np.asarray(store[index].read().result())
            start = stop


def placed(stored: StoredArray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a checkpoint on the devices; each process reads what its own devices hold, once.

    Args:
        stored: the array.
        wanted: the type that it is to have, and its sharding; None is this process's first device.
            16-bit integers are the bits of bfloat16 numbers.
    """
    blocks = _Blocks(wanted)
    is_bits = wanted.dtype == np.uint16
    for bounds, values in stored.pieces(blocks.box, "bfloat16" if is_bits else wanted.dtype):
        blocks.fill(bounds, values.view(np.uint16) if is_bits else values)
    return blocks.placed()


def placed_pieces(pieces: Pieces, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """An array that is made piece by piece, on the devices; each process keeps of a piece what its
    own devices hold.

    Args:
        pieces: the array, in pieces of one layer or whole.
        wanted: the type that it is to have, and its sharding; None is this process's first device.
    """
    blocks = _Blocks(wanted)
    everything = tuple((0, size) for size in wanted.shape)
    for which, values in pieces.pieces():
        if isinstance(which, int):
            blocks.fill(((which, which + 1), *everything[1:]), values[None])
        else:
            blocks.fill(everything, values)
    return blocks.placed()


class _Blocks:
    """The parts of an array that the devices of this process hold, while they are filled.

    Attributes:
        wanted: the array's type.
        sharding: of the array.
        values: of each part, by where it begins and ends along each dimension.
        box: the least block of the array that has all parts in it.
    """

    def __init__(self, wanted: jax.ShapeDtypeStruct):
        """Makes room for the parts, which takes no memory before they are filled."""
        self.wanted = wanted
        self.sharding = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        indices = self.sharding.addressable_devices_indices_map(wanted.shape).values()
        found = dict.fromkeys(_bounds(index or (), wanted.shape) for index in indices)
        self.values = {bounds: _empty(_lengths(bounds), wanted.dtype) for bounds in found}
        self.box = tuple(
            (min(start for start, _ in along), max(stop for _, stop in along))
            for along in zip(*found, strict=True)
        )

    def fill(self, bounds: Bounds, values: np.ndarray) -> None:
        """Copies what lies in a block of the array to the parts that have some of it."""
        for own, part in self.values.items():
            shared = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(own, bounds, strict=True)
            )
            if all(start < stop for start, stop in shared):
                part[_within(shared, own)] = values[_within(shared, bounds)]

    def placed(self) -> jax.Array:
        """The array, once the parts are filled."""
        shape = self.wanted.shape
        return jax.make_array_from_callback(
            shape, self.sharding, lambda index: self.values[_bounds(index or (), shape)]
        )


def _lengths(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _within(inner: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """The index of a block in another that it lies in."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(inner, outer, strict=True)
    )


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array to fill, in pages of its own: JAX takes them over on CPUs, since they are aligned,
    and the system has them back at once when they are given up, unlike what is allocated.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < mmap.PAGESIZE:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Where the block of an index begins and ends."""
    given = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return (*given, *((0, size) for size in shape[len(given) :]))
