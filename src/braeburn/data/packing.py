"""Fixed-length sequences cut from a token store: shuffled windows to train on, consecutive ones to evaluate on."""

from collections.abc import Iterator

import numpy as np

from braeburn.data.mixture import derive_key, permute
from braeburn.data.store import TokenStore
from braeburn.errors import UserError

# inputs, targets, positions, segment_ids: int32; weights: float32. [T] in a row, [B, T] in a batch.
Row = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


class Sequences:
    """Training sequences 0, 1, 2, ... of one source, without end.

    An epoch cuts the store into windows that start at a random shift and visits each once in a random order, so that
    texts meet other window borders in every epoch. All epochs have the same number of windows.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int, name: str) -> None:
        """Args are the store, T, the 64-bit key of the order, and the source's name.

        Raises:
            UserError: a sequence is longer than the data.
        """
        if store.tokens < sequence_length:
            raise UserError(
                f"sequence longer than the data: source {name!r} has {store.tokens} training tokens and "
                f"sequence_length={sequence_length}; set it to at most {max(1, store.tokens)}, or add files"
            )
        self._store, self._length, self._seed = store, sequence_length, seed
        self.windows = max(1, (store.tokens - (sequence_length - 1)) // sequence_length)
        # A store of less than two windows has less room to shift.
        self._shifts = min(sequence_length, store.tokens - self.windows * sequence_length + 1)

    def __getitem__(self, index: int) -> Row:
        """The sequence of that index, of every field [T]."""
        epoch, place = divmod(index, self.windows)
        shift = derive_key(self._seed, "shift", epoch) % self._shifts
        window = permute(place, self.windows, derive_key(self._seed, "order", epoch))
        return _row(self._store, shift + window * self._length, self._length)


def windows(store: TokenStore, sequence_length: int) -> Iterator[Row]:
    """Consecutive windows that make every token an input once; the last is padded with zero weight and segment 0."""
    for start in range(0, store.tokens, sequence_length):
        yield _row(store, start, sequence_length)


def _row(store: TokenStore, start: int, length: int) -> Row:
    count = min(length, store.tokens - start)
    tokens = np.full(length + 1, store.begin, np.int32)
    tokens[: count + 1] = store.read(start, start + count + 1)
    place = np.arange(length, dtype=np.int32)
    is_start = np.zeros(length, bool)
    is_start[store.document_starts(start, start + count) - start] = True
    is_start[0] = True
    real = place < count
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:],
        "positions": np.where(real, place - np.maximum.accumulate(np.where(is_start, place, 0)), 0).astype(np.int32),
        "segment_ids": np.where(real, np.cumsum(is_start), 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }


def stack(rows: list[Row]) -> Batch:
    """Rows as one batch of contiguous arrays."""
    return {field: np.stack([row[field] for row in rows]) for field in rows[0]}
