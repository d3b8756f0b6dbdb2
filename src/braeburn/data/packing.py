"""Fixed-length sequences cut from token shards: shuffled windows to train on, consecutive ones to
evaluate on.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from braeburn.data.mixture import derive_key, permute
from braeburn.data.token_shards import TokenShards
from braeburn.errors import UserError

if TYPE_CHECKING:
    from braeburn.data.teacher_labels import TeacherLabels

# inputs, targets, positions, segment_ids: int32; weights: float32. [T] in a row, [B, T] in a batch.
# Where a teacher's labels are read too, teacher_ids: int32 and teacher_log_probs: float32, [T, k]
# in a row, [B, T, k] in a batch.
Row = dict[str, np.ndarray]
# Batches are of NumPy, on devices, or abstract.
Batch = dict[str, Any]


class Sequences:
    """Training sequences 0, 1, 2, ... of one source, without end.

    An epoch cuts the source's text into windows that start at a random shift and visits each once
    in a random order, so that texts meet other window borders in every epoch. All epochs have the
    same number of windows.

    Aligned windows start at multiples of T in every epoch, and only their order differs: a
    teacher's labels of a position depend on the window that it sees.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        seed: int,
        name: str,
        *,
        aligned: bool = False,
        labels: "TeacherLabels | None" = None,
    ) -> None:
        """Takes a source's text.

        Args:
            shards: its tokens.
            sequence_length: T.
            seed: 64-bit key of the order.
            name: the source's.
            aligned: whether all epochs cut the text at the same positions.
            labels: a teacher's labels of each position of aligned windows, read along with them.

        Raises:
            UserError: a sequence is longer than the data.
        """
        if shards.tokens < sequence_length:
            raise UserError(
                f"sequence longer than the data: source {name!r} has {shards.tokens} training "
                f"tokens and sequence_length={sequence_length}; set it to at most "
                f"{max(1, shards.tokens)}, or add files"
            )
        self._shards, self._length, self._seed, self._labels = shards, sequence_length, seed, labels
        # All but one of the positions in a window are kept free to shift; a text of less than two
        # windows has less room.
        room = 0 if aligned else sequence_length - 1
        self.windows = max(1, (shards.tokens - room) // sequence_length)
        self._shifts = min(room, shards.tokens - self.windows * sequence_length) + 1

    def __getitem__(self, index: int) -> Row:
        """The sequence of that index, every field [T]."""
        epoch, ordinal = divmod(index, self.windows)
        shift = derive_key(self._seed, "shift", epoch) % self._shifts
        number = permute(ordinal, self.windows, derive_key(self._seed, "order", epoch))
        start = shift + number * self._length
        row = window(self._shards, start, self._length)
        if self._labels is not None:
            row["teacher_ids"], row["teacher_log_probs"] = self._labels.read(
                start, start + self._length
            )
        return row


def windows(shards: TokenShards, sequence_length: int, first: int = 0) -> Iterator[Row]:
    """Consecutive windows from the one numbered `first` on; from 0 they make every token an input
    once.

    The last is padded with zero weight and segment 0.
    """
    for start in range(first * sequence_length, shards.tokens, sequence_length):
        yield window(shards, start, sequence_length)


def window(shards: TokenShards, start: int, length: int) -> Row:
    """The tokens [start, start + length) of token shards as a row, every field [length].

    Whatever lies beyond the last token is padding, of zero weight and segment 0.
    """
    count = min(length, shards.tokens - start)
    tokens = np.full(length + 1, shards.begin, np.int32)
    tokens[: count + 1] = shards.read(start, start + count + 1)
    index = np.arange(length, dtype=np.int32)
    is_start = np.zeros(length, bool)
    is_start[shards.document_starts(start, start + count) - start] = True
    is_start[0] = True
    real = index < count
    return {
        "inputs": tokens[:-1],
        "targets": tokens[1:],
        "positions": np.where(
            real, index - np.maximum.accumulate(np.where(is_start, index, 0)), 0
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
