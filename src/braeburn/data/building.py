"""Token shards while they are written: files that are appended to, so that a builder that is killed
leaves what the next goes on from.

The folder is `NAME.partial-*` beside the one that it becomes. Its owner holds a lock in it.
`progress.json` tells which text has been tokenised and how much of the files belongs to it; what
was written later is cut off.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from braeburn.data.manifest import Count, TokenShard, is_file, sha256_of, write
from braeburn.disk import matching

RECORD_SECONDS = 5.0
# A builder that is alive has recorded something within this time.
AT_WORK_SECONDS = 60.0
# Of folders that no lock tells about, those written to more recently may have a living owner.
UNLOCKED_SECONDS = 3600.0
# What a killed builder left of text that nobody asked for again.
ABANDONED_SECONDS = 7 * 86400.0
_MADE = re.compile(r"\.lock|\.?progress\.json|manifest\.json|(tokens|documents)-\d+\.bin")
_LABELS = ".teacher-"  # in the names of a teacher's labels, which have a builder of their own


class Progress(BaseModel):
    """What of the text is in the files.

    Attributes:
        key: what the tokens depend on beside the text.
        documents: documents that are complete.
        characters: of the next document, which has begun if this is not 0.
        text_bytes: UTF-8 bytes of all this.
        token_bytes: bytes that its tokens stand for.
        shards: the shards that are full.
        last: the one being written.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: Literal[2] = 2
    key: str
    documents: Count = 0
    characters: Count = 0
    text_bytes: Count = 0
    token_bytes: Count = 0
    shards: list[TokenShard] = []
    last: TokenShard | None = None


def shard_path(directory: Path, kind: str, index: int) -> Path:
    """The file of a shard's tokens ("tokens") or the positions where its documents start
    ("documents").
    """
    return directory / f"{kind}-{index:05d}.bin"


@dataclass
class GrowingFile:
    """A file that is appended to, and the hash of what it holds."""

    file: IO[bytes]
    digest: Any = field(default_factory=hashlib.sha256)
    count: int = 0

    def append(self, values: np.ndarray) -> None:
        """Writes contiguous values."""
        self.file.write(values.data)
        self.digest.update(values.data)
        self.count += len(values)

    def save(self) -> None:
        """Returns once the disk has it."""
        self.file.flush()
        os.fsync(self.file.fileno())


def shard_of(tokens: GrowingFile, documents: GrowingFile) -> TokenShard:
    """What the two files of a shard hold."""
    return TokenShard(
        tokens=tokens.count,
        documents=documents.count,
        tokens_sha256=tokens.digest.hexdigest(),
        documents_sha256=documents.digest.hexdigest(),
    )


def put_in_place(folder: Path, directory: Path) -> None:
    """Gives a complete folder its name, unless another process has put the same there."""
    try:
        folder.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(folder, ignore_errors=True)


class Building:
    """A folder of token shards that this process writes. Make one by `claim`."""

    def __init__(
        self, folder: Path, progress: Progress, dtype: np.dtype, shard_tokens: int
    ) -> None:
        """Takes the folder, whose lock is held, and opens the last shard that it holds."""
        self.folder = folder
        self.progress = progress
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._recorded = time.monotonic()
        self._in_full_shards = sum(shard.tokens for shard in progress.shards)
        self._open: tuple[GrowingFile, GrowingFile] | None = None
        if progress.last is not None:
            self._reopen(progress.last)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._in_full_shards + (self._open[0].count if self._open else 0)

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Writes tokens into as many shards as they need.

        Args:
            tokens: of any number of documents, one behind the other.
            starts: the positions among them at which documents start, ascending.
        """
        tokens = np.ascontiguousarray(tokens, self._dtype)
        starts = np.asarray(starts, "<i8") + self.tokens
        while len(tokens):
            if self._open is None:
                self._open = self._opened("tokens", "wb"), self._opened("documents", "wb")
            of_tokens, of_documents = self._open
            taken = tokens[: self._shard_tokens - of_tokens.count]
            own = np.searchsorted(starts, self.tokens + len(taken))
            of_documents.append(starts[:own])
            of_tokens.append(taken)
            tokens, starts = tokens[len(taken) :], starts[own:]
            if of_tokens.count == self._shard_tokens:
                self._end_shard()

    def record(self, *, now: bool = False) -> None:
        """Has the disk keep what was written, if the last time is some seconds ago."""
        if not now and time.monotonic() - self._recorded < RECORD_SECONDS:
            return
        if self._open is not None:
            for growing in self._open:
                growing.save()
            self.progress.last = shard_of(*self._open)
        unfinished = self.folder / ".progress.json"
        write(unfinished, self.progress.model_dump_json().encode())
        unfinished.replace(self.folder / "progress.json")
        self.progress.last = None
        self._recorded = time.monotonic()

    def finish(self) -> list[TokenShard]:
        """Ends the last shard, removes what only a builder needs, and returns the shards."""
        if self._open is not None:
            self._end_shard()
        for name in ("progress.json", ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        return self.progress.shards

    def close(self) -> None:
        """Closes the files."""
        for growing in self._open or ():
            growing.file.close()
        self._open = None

    def _opened(self, kind: str, mode: str) -> GrowingFile:
        return GrowingFile(shard_path(self.folder, kind, len(self.progress.shards)).open(mode))

    def _end_shard(self) -> None:
        assert self._open is not None
        for growing in self._open:
            growing.save()
        shard = shard_of(*self._open)
        self.close()
        self.progress.shards.append(shard)
        self._in_full_shards += shard.tokens

    def _reopen(self, last: TokenShard) -> None:
        """Goes on with the files of a shard after what is known of them."""
        found = []
        for kind, count, width in (
            ("tokens", last.tokens, self._dtype.itemsize),
            ("documents", last.documents, 8),
        ):
            growing = self._opened(kind, "r+b")
            for _ in range(0, count * width, 2**24):
                growing.digest.update(
                    growing.file.read(min(2**24, count * width - growing.file.tell()))
                )
            growing.file.truncate(count * width)
            growing.file.seek(0, os.SEEK_END)
            growing.count = count
            found.append(growing)
        self._open = found[0], found[1]
        self.progress.last = None


@contextlib.contextmanager
def claim(directory: Path, key: str, dtype: np.dtype, shard_tokens: int) -> Iterator[Building]:
    """The folder in which the token shards of `directory` are to be built, with what an earlier
    builder left in it.

    It is removed where its builder fails, and stays where that is stopped.

    Args:
        directory: where the complete folder is to appear. Its parent exists.
        key: what the tokens depend on beside the text.
        dtype: of tokens.
        shard_tokens: tokens in each shard but the last.

    Raises:
        OSError: the folder cannot be written.
    """
    _sweep(directory.parent)
    with contextlib.ExitStack() as held:
        building = None
        for folder in matching(directory.parent, f"{directory.name}.partial-*"):
            lock = _try_lock(folder) if _is_builders(folder) else None
            if lock is None:
                continue
            progress = _progress(folder, key, dtype)
            if building is None and progress is not None:
                held.enter_context(lock)
                building = Building(folder, progress, dtype, shard_tokens)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()
        while building is None:
            folder = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex}")
            folder.mkdir()
            lock = _lock(folder)
            if lock is not None:  # else another builder took the folder for one that was left
                held.enter_context(lock)
                building = Building(folder, Progress(key=key), dtype, shard_tokens)
        held.callback(building.close)
        yield building


def is_at_work(directory: Path) -> bool:
    """Whether another process, which has written lately, is building the token shards of
    `directory`.
    """
    for folder in matching(directory.parent, f"{directory.name}.partial-*"):
        lock = _try_lock(folder) if _is_builders(folder) else None
        if lock is not None:
            lock.close()
        elif age(folder) < AT_WORK_SECONDS:
            return True
    return False


def _lock(folder: Path) -> IO[bytes] | None:
    """The lock of a folder, held until it is closed; None where another process holds it or removed
    the folder.
    """
    with contextlib.suppress(FileNotFoundError):
        file = (folder / ".lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass  # a file system without locks
        if (folder / ".lock").exists():  # else it went with its folder between the two
            return file
        file.close()
    return None


def _try_lock(folder: Path) -> IO[bytes] | None:
    """The lock of a folder that its builder left; None where it may have a living one."""
    try:
        file = (folder / ".lock").open("r+b")
    except FileNotFoundError:  # of an earlier version, or just being made
        return (folder / ".lock").open("ab") if age(folder) > UNLOCKED_SECONDS else None
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or age(folder) < UNLOCKED_SECONDS:
            file.close()
            return None
    return file


def _is_builders(folder: Path) -> bool:
    """Whether all that is in a folder is what builders make; anything else is someone's own."""
    try:
        return all(_MADE.fullmatch(path.name) for path in folder.iterdir())
    except OSError:
        return False


def age(folder: Path) -> float:
    """Seconds since something in a folder was written."""
    try:
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:
        return 0.0


def _sweep(parent: Path) -> None:
    """Removes what killed builders of other token shards left long ago; a teacher's labels are not
    touched.
    """
    for folder in matching(parent, "*.partial-*"):
        if _LABELS not in folder.name and _is_builders(folder) and age(folder) > ABANDONED_SECONDS:
            with contextlib.suppress(OSError):
                lock = _try_lock(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.close()


def _progress(folder: Path, key: str, dtype: np.dtype) -> Progress | None:
    """What a folder holds, if all of it is there and as it was written."""
    path = folder / "progress.json"
    try:
        if not is_file(path):
            return None
        progress = Progress.model_validate(json.loads(path.read_bytes()))
        for index, shard in enumerate(
            [*progress.shards, *([progress.last] if progress.last else [])]
        ):
            sizes = {"tokens": shard.tokens * dtype.itemsize, "documents": shard.documents * 8}
            for kind, size in sizes.items():
                found = shard_path(folder, kind, index)
                if not is_file(found) or found.stat().st_size < size:
                    return None
                # Full shards are read when all are complete.
                if shard is progress.last and sha256_of(found, size) != getattr(
                    shard, f"{kind}_sha256"
                ):
                    return None
    except (OSError, ValueError, ValidationError, RecursionError):
        return None
    return progress if progress.key == key else None
