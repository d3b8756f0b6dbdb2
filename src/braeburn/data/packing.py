"""Fixed-length sequences cut from a token store: shuffled windows to train on, consecutive ones to
evaluate on.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from braeburn.data.mixture import derive_key, permute
from braeburn.data.store import TokenStore
from braeburn.errors import UserError

if TYPE_CHECKING:
    from braeburn.data.teacher_store import TeacherStore

# inputs, targets, positions, segment_ids: int32; weights: float32. [T] in a row, [B, T] in a batch.
# Where a teacher's words are read too, teacher_ids: int32 and teacher_log_probs: float32, [T, k] in
# a row, [B, T, k] in a batch.
Row = dict[str, np.ndarray]
# Batches are of NumPy, on devices, or abstract.
Batch = dict[str, Any]


class Sequences:
    """Training sequences 0, 1, 2, ... of one source, without end.

    An epoch cuts the store into windows that start at a random shift and visits each once in a
    random order, so that texts meet other window borders in every epoch. All epochs have the same
    number of windows.

    Aligned windows start at multiples of T in every epoch, and only their order differs: what a
    teacher says of a position depends on the window that it sees.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        seed: int,
        name: str,
        *,
        aligned: bool = False,
        teacher: "TeacherStore | None" = None,
    ) -> None:
        """Takes a source's text.

        Args:
            store: its tokens.
            sequence_length: T.
            seed: 64-bit key of the order.
            name: the source's.
            aligned: whether all epochs cut the text at the same places.
            teacher: what a teacher said of each position of aligned windows, read along with them.

        Raises:
            UserError: a sequence is longer than the data.
        """
        if store.tokens < sequence_length:
            raise UserError(
                f"sequence longer than the data: source {name!r} has {store.tokens} training "
                f"tokens and sequence_length={sequence_length}; set it to at most "
                f"{max(1, store.tokens)}, or add files"
            )
        self._store, self._length, self._seed, self._teacher = store, sequence_length, seed, teacher
        # All but one of the positions in a window are kept free to shift; a store of less than two
        # has less room.
        room = 0 if aligned else sequence_length - 1
        self.windows = max(1, (store.tokens - room) // sequence_length)
        self._shifts = min(room, store.tokens - self.windows * sequence_length) + 1

    def __getitem__(self, index: int) -> Row:
        """The sequence of that index, of every field [T]."""
        epoch, place = divmod(index, self.windows)
        shift = derive_key(self._seed, "shift", epoch) % self._shifts
        place = permute(place, self.windows, derive_key(self._seed, "order", epoch))
        start = shift + place * self._length
        row = window(self._store, start, self._length)
        if self._teacher is not None:
            row["teacher_ids"], row["teacher_log_probs"] = self._teacher.read(
                start, start + self._length
            )
        return row


def windows(store: TokenStore, sequence_length: int, first: int = 0) -> Iterator[Row]:
    """Consecutive windows from the one numbered `first` on; from 0 they make every token an input
    once.

    The last is padded with zero weight and segment 0.
    """
    for start in range(first * sequence_length, store.tokens, sequence_length):
        yield window(store, start, sequence_length)


def window(store: TokenStore, start: int, length: int) -> Row:
    """The tokens [start, start + length) of a store as a row, every field [length].

    What lies beyond the store's last token is padding, of zero weight and segment 0.
    """
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
        "positions": np.where(
            real, place - np.maximum.accumulate(np.where(is_start, place, 0)), 0
        ).astype(np.int32),
        "segment_ids": np.where(real, np.cumsum(is_start), 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }


def stack(rows: list[Row]) -> Batch:
    """Rows as one batch of contiguous arrays."""
    return {field: np.stack([row[field] for row in rows]) for field in rows[0]}


def batched(rows: Iterable[Row], batch_size: int) -> Iterator[Batch]:
    """Batches of one shape: the last is filled up with rows of zero weight."""
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        padding = {field: values * 0 for field, values in batch[0].items()}
        yield stack(batch + [padding] * (batch_size - len(batch)))
