"""Batches by step.

A batch is a pure function of (seed, stage, step): resuming needs the step and nothing else.
"""

import errno
import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from braeburn.config import Stage
from braeburn.data.mixture import Mixture, derive_key
from braeburn.data.packing import Batch, Sequences, batched, stack, windows
from braeburn.data.teacher_labels import TeacherLabels
from braeburn.data.token_shards import Deleted, TokenShards
from braeburn.data.workers import end_with_parent

READERS = 32  # of token shards over a network, whose answers take long to come


class Batches:
    """The batches of one stage, indexed by the step within it. It can be pickled for workers."""

    def __init__(
        self,
        stage: Stage,
        stage_name: str,
        seed: int,
        shards: Mapping[str, TokenShards],
        rows: Sequence[int] | None = None,
        labels: Mapping[str, TeacherLabels] | None = None,
    ) -> None:
        """Takes a stage's sources. With a teacher their text is cut at the same positions in every
        epoch.

        Args:
            stage: the stage.
            stage_name: its name.
            seed: the run's.
            shards: tokens of each source.
            rows: the sequences to read of each batch of `stage.batch_size`; all by default.
            labels: the teacher's cached labels of each source, where they are read along.

        Raises:
            UserError: a source has fewer tokens than one sequence.
        """
        self._steps, self._batch_size = stage.steps, stage.batch_size
        self.rows = range(stage.batch_size) if rows is None else rows
        self._mixture = Mixture(stage.mixture, derive_key(seed, stage_name, "mixture"))
        self._remote = any(shards[name].is_remote for name in self._mixture.names)
        self._sequences = {
            name: Sequences(
                shards[name],
                stage.sequence_length,
                derive_key(seed, stage_name, name, "sequences"),
                name,
                aligned=stage.teacher is not None,
                labels=labels[name] if labels is not None else None,
            )
            for name in self._mixture.names
        }

    def __len__(self) -> int:
        """Steps in the stage."""
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, every field [B, T] or, of the teacher's, [B, T, k]."""
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} is not within the stage's {self._steps}")
        drawn = [self._mixture.at(step * self._batch_size + row) for row in self.rows]
        if not self._remote:
            return stack([self._sequences[source][index] for source, index in drawn])
        with ThreadPoolExecutor(READERS) as pool:
            return stack(list(pool.map(lambda one: self._sequences[one[0]][one[1]], drawn)))


@dataclass(frozen=True)
class _Parcel:
    """Hides a batch's arrays from grain, which would pass them through /dev/shm, small in
    containers, and leak them.
    """

    batch: Batch


def prefetch(batches: Batches, start: int, workers: int, prefetch: int) -> Iterator[Batch]:
    """The batches from step `start` to the last in order, read ahead by a thread or by `workers`
    processes.

    What a worker raises is raised here. Close the iterator to stop early; a worker imports the
    caller's main module. A thread goes on in the place of the processes where they cannot be had,
    as with a full /dev/shm, or find that files were deleted, which this process still has open.

    Args:
        batches: the stage's.
        start: first step.
        workers: processes; 0 reads in a thread of this one.
        prefetch: batches kept ready, for each worker.
    """
    if workers:
        try:
            for batch in _read_ahead(batches, start, workers, prefetch):
                yield batch
                start += 1
            return
        except (OSError, Deleted) as error:
            what = (
                "/dev/shm has no room for what they share"
                if getattr(error, "errno", 0) == errno.ENOSPC
                else error
            )
            logging.getLogger(__name__).warning(
                "warning: the processes of data.workers=%d cannot read ahead (%s); a thread of the "
                "training process reads in their place, which changes nothing but speed",
                workers,
                what,
            )
    yield from _read_ahead(batches, start, 0, prefetch)


def _read_ahead(batches: Batches, start: int, workers: int, prefetch: int) -> Iterator[Batch]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # grain's processes ask for flags that only absl's own main would parse
        flags.FLAGS.mark_as_parsed()
    dataset = (
        grain.MapDataset.source(batches)[start:]
        .map(_Parcel)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
    )
    if workers:
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
    iterator = iter(dataset)
    try:
        for parcel in iterator:
            yield parcel.batch
    finally:
        iterator.close()  # ends the processes when the reader stops early


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends this worker with the process that started it; grain leaves it waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)


def held_out_batches(
    shards: TokenShards, sequence_length: int, batch_size: int, max_tokens: int
) -> Iterator[Batch]:
    """Batches [B, T] of the first windows of a source's held-out text.

    The last batch is filled up with rows of zero weight, so that all have one shape.

    Args:
        shards: the held-out text.
        sequence_length: T, tokens of a window.
        batch_size: B, windows of a batch.
        max_tokens: the most tokens of all batches together; there is one window at least.

    Returns:
        Batches as `braeburn.data.packing` makes them.
    """
    return batched(
        islice(windows(shards, sequence_length), max(1, max_tokens // sequence_length)), batch_size
    )
