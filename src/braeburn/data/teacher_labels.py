"""The cached labels of a teacher for every position of a source's token shards: its top-k tokens
there, and their log-probabilities.

They are computed once, stored beside the tokens, and read by position like them, so that many
students share one pass. The teacher sees windows that start at multiples of the sequence length,
and its students must see the same.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from braeburn.data.manifest import (
    TeacherManifest,
    TeacherPart,
    corrupt,
    manifest_bytes,
    read_manifest,
    reading,
    verify,
    write,
)
from braeburn.data.packing import Batch, batched, windows
from braeburn.data.token_shards import (
    TokenShards,
    allow_open_files,
    in_shards,
    map_file,
    pieces_of,
    writing,
)
from braeburn.disk import check_space, locked
from braeburn.errors import UserError

PART_TOKENS = 2**19  # what a kill may lose; held in memory until the part is full
LOG_SECONDS = 60.0

Label = Callable[[Batch], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Labelling:
    """What a teacher labels, and how.

    Attributes:
        sequence_length: T, tokens of the windows that the teacher sees.
        k: labels of each position.
        vocab_size: of the teacher; up to 65,536 its ids take two bytes.
        identity: all that the labels depend on, as JSON: the teacher, tokenizer, sequence length,
            k.
        batch_size: B, windows that are labelled at once.
        label: of a batch [B, T], the ids [B, T, k] and log-probabilities [B, T, k] of the top-k
            tokens. The latter are stored as float16.
    """

    sequence_length: int
    k: int
    vocab_size: int
    identity: Mapping[str, Any]
    batch_size: int
    label: Label


@dataclass(frozen=True)
class Writer:
    """One of the processes that label together, of which one writes.

    Attributes:
        log: takes a line now and then that tells how far the labelling is.
        writes: whether this process writes.
        first_part: given what claims the folder and counts the complete parts in it, calls it and
            returns the part to go on from, the same in all processes; the claim may raise.
            `main_first` of `parallel.agreement` is one.
        part_tokens: tokens in a part, but whole windows and at least one.
    """

    log: Callable[[str], None]
    writes: bool = True
    first_part: Callable[[Callable[[], int]], int] = lambda begin: begin()
    part_tokens: int = PART_TOKENS


def build_teacher_labels(
    directory: Path, shards: TokenShards, labelling: Labelling, writer: Writer
) -> None:
    """Lets a teacher label the tokens of token shards, in order, and writes the labels to a folder
    that then appears at `directory`.

    They are written in parts. A killed builder leaves the complete ones in a folder beside
    `directory`, and the next builder goes on after them, whatever its batch size.

    The text is read as `windows` cuts it. The labels of every real token are stored; those of
    padding are dropped.

    Several processes that run `label` together all call this. All but the one that writes label the
    same batches and write nothing; they may return before the labels are complete.

    Args:
        directory: the folder of the labels, which appears once it is complete. Nothing is done if
            something is there.
        shards: the tokens.
        labelling: what is labelled, and by what function.
        writer: whether this process writes, and where it tells of its progress.

    Raises:
        UserError: another process is building the same, a part is corrupt, the disk has no room for
            all labels or must not be written.
    """
    length = labelling.sequence_length
    windows_per_part = max(1, writer.part_tokens // length)
    size = windows_per_part * length
    header = TeacherManifest(
        identity=json.loads(json.dumps(dict(labelling.identity))),
        ids="uint16" if labelling.vocab_size <= 2**16 else "uint32",
        k=labelling.k,
        tokens=shards.tokens,
        part_tokens=size,
        parts=[],
    )
    key = hashlib.sha256(manifest_bytes(header)).hexdigest()[:20]
    partial = directory.with_name(f"{directory.name}.partial-{key}")
    dtype = _entry_dtype(header)
    with contextlib.ExitStack() as claim:
        parts: list[TeacherPart] = []

        def begin() -> int:
            if writer.writes and not directory.exists():
                claim.enter_context(_claim(partial, directory))
            parts[:] = _complete_parts(partial)
            complete = len(parts)
            # Asked last: the folder may have been finished and renamed meanwhile.
            if directory.exists():
                return -(-shards.tokens // size)
            if writer.writes:
                needed = (shards.tokens - complete * size) * dtype.itemsize
                remedy = "free some, or set data.cache to a folder with more"
                check_space(directory.parent, needed, "the teacher's labels take", remedy)
            return complete

        first = writer.first_part(begin)
        cut = windows(shards, length, first * windows_per_part)
        batches = batched(cut, labelling.batch_size)
        if not writer.writes:
            for batch in batches:
                labelling.label(batch)
        elif not directory.exists():
            entries = _entries(batches, labelling.label, dtype)
            told = _tell_progress(entries, first * size, shards.tokens, directory, writer.log)
            _write_parts(partial, header, (parts or _complete_parts(partial))[:first], told)
            with writing(directory.parent):
                partial.rename(directory)
                # A process that opened the lock before this finds the labels complete.
                (directory / ".lock").unlink()


@contextlib.contextmanager
def _claim(partial: Path, directory: Path) -> Iterator[None]:
    """Creates the folder of parts, and keeps other builders out of it.

    Raises:
        UserError: one is in it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        with writing(directory.parent):
            partial.mkdir(parents=True, exist_ok=True)
            in_use = (
                f"another process is writing the teacher's labels to {str(partial)!r}; wait for it "
                f"to end, or stop it, and start again: what is complete is kept"
            )
            held.enter_context(locked(partial / ".lock", in_use))
            if directory.exists():
                with contextlib.suppress(OSError):
                    (partial / ".lock").unlink()
                    partial.rmdir()
        yield


def _complete_parts(partial: Path) -> list[TeacherPart]:
    """What the manifest in the folder tells of its parts, after checking them."""
    if not (partial / "manifest.json").exists():
        return []
    with reading(partial):
        manifest = read_manifest(partial / "manifest.json", TeacherManifest)
        verify(partial, _files(partial, manifest), None)
        return manifest.parts


def _entries(batches: Iterable[Batch], label: Label, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The labels of the real tokens of each batch, in order."""
    for batch in batches:
        ids, log_probs = map(np.asarray, label(batch))
        real = batch["weights"] > 0
        entries = np.empty(np.count_nonzero(real), dtype)
        entries["ids"], entries["log_probs"] = ids[real], log_probs[real]
        yield entries


def _tell_progress(
    entries: Iterable[np.ndarray],
    done: int,
    total: int,
    directory: Path,
    log: Callable[[str], None],
) -> Iterator[np.ndarray]:
    """The entries as they are, with a line to `log` once a minute; `done` of `total` tokens are
    there already.
    """
    if done:
        log(f"{directory.name}: going on after {done} of {total} tokens")
    before, began = done, time.monotonic()
    told = began
    for batch in entries:
        done += len(batch)
        now = time.monotonic()
        if now - told >= LOG_SECONDS:
            told, speed = now, (done - before) / (now - began)
            minutes = (total - done) / speed / 60
            log(
                f"{directory.name}: {done} of {total} tokens, {speed:.0f} tokens/s, {minutes:.0f} "
                f"min left"
            )
        yield batch
    log(
        f"{directory.name}: the teacher labelled {done - before} tokens in "
        f"{time.monotonic() - began:.1f} s"
    )


def _write_parts(
    partial: Path,
    header: TeacherManifest,
    complete: Sequence[TeacherPart],
    entries: Iterable[np.ndarray],
) -> None:
    """Writes the parts after those that are complete.

    One counts as such from when the manifest tells of it.
    """
    parts = list(complete)

    def write_manifest() -> None:
        unfinished = partial / ".manifest.json"
        with writing(partial.parent):
            write(unfinished, manifest_bytes(header.model_copy(update={"parts": parts})))
            unfinished.replace(partial / "manifest.json")

    write_manifest()  # before what it told of is written over, where not all processes have that
    # A batch of entries is cut as a document of tokens is.
    for part, _ in in_shards(entries, _entry_dtype(header), header.part_tokens):
        data = part.view(np.uint8).data
        with writing(partial.parent):
            write(_part_path(partial, len(parts)), data)
        parts.append(TeacherPart(tokens=len(part), sha256=hashlib.sha256(data).hexdigest()))
        write_manifest()


def _part_path(directory: Path, index: int) -> Path:
    return directory / f"part-{index:05d}.bin"


def _entry_dtype(manifest: TeacherManifest) -> np.dtype:
    """One position's ids and log-probabilities, side by side."""
    ids = np.dtype(manifest.ids).newbyteorder("<")
    return np.dtype([("ids", ids, (manifest.k,)), ("log_probs", "<f2", (manifest.k,))])


def _files(directory: Path, manifest: TeacherManifest) -> Iterator[tuple[Path, int, str]]:
    """The path, size in bytes and SHA-256 of every part that the manifest tells of."""
    width = _entry_dtype(manifest).itemsize
    for index, part in enumerate(manifest.parts):
        yield _part_path(directory, index), part.tokens * width, part.sha256


class TeacherLabels:
    """The labels of every token of one source, read from files mapped into memory.

    It can be pickled.

    Attributes:
        tokens: how many positions there are.
        k: labels of each.
        bytes_per_token: of a position's ids and log-probabilities.
    """

    def __init__(self, directory: Path, manifest: TeacherManifest) -> None:
        """Takes the directory as it is; `open` checks it."""
        self.directory = directory
        self.tokens = manifest.tokens
        self.k = manifest.k
        self._dtype = _entry_dtype(manifest)
        self.bytes_per_token = self._dtype.itemsize
        self._part_tokens = manifest.part_tokens
        self._count = len(manifest.parts)

    @classmethod
    def open(
        cls, directory: Path, identity: Mapping[str, Any], verified_for: str | None = None
    ) -> "TeacherLabels":
        """Opens labels after checking their manifest, sizes, and contents.

        Args:
            directory: the folder of the labels.
            identity: what they must have been made for.
            verified_for: the run that they are opened for; see `verify`.

        Raises:
            UserError: a file is missing, truncated or corrupt, or the labels were made for another
                `identity`.
        """
        with reading(directory):
            manifest = read_manifest(directory / "manifest.json", TeacherManifest)
            cached = manifest.identity
            expected = json.loads(json.dumps(dict(identity)))
            for field in sorted(cached | expected):
                if (found := cached.get(field)) != (wanted := expected.get(field)):
                    raise UserError(
                        f"{str(directory)!r} holds labels made with {field}={found!r}, not "
                        f"{wanted!r}; delete that folder and they will be made again"
                    )
            if not manifest.is_complete:
                raise corrupt(directory / "manifest.json", "does not tell of all parts")
            verify(directory, _files(directory, manifest), verified_for)
            opened = cls(directory, manifest)
            # Files that are mapped can be read even when their folder is deleted.
            allow_open_files(opened._count)
            _ = opened._parts
        return opened

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids, int32 [n, k], and log-probabilities, float32 [n, k], at the positions [start,
        stop).

        Raises:
            IndexError: the range is not within [0, tokens).
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"positions {start}:{stop} are not within the {self.tokens} there are")
        pieces = pieces_of(self._parts, self._part_tokens, start, stop)
        entries = np.concatenate([np.empty(0, self._dtype), *pieces])
        return entries["ids"].astype(np.int32), entries["log_probs"].astype(np.float32)

    @cached_property
    def _parts(self) -> list[np.ndarray]:
        return [
            map_file(_part_path(self.directory, index), self._dtype) for index in range(self._count)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the maps, which are opened again on the other side."""
        return {k: v for k, v in self.__dict__.items() if k != "_parts"}
