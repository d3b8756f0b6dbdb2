"""One folder of token shards out of those of a source's parts.

Shards of the whole are full but for the last, whatever the parts hold, so that the same text gives
the same files however it was divided. Each is copied by itself, in any order and by any process,
and is known by a small file beside it that is written last.
"""

import errno
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from braeburn.atomic import write_atomically
from braeburn.data.building import GrowingFile, put_in_place, shard_of, shard_path
from braeburn.data.corpus import Report, merge
from braeburn.data.manifest import (
    TokenManifest,
    TokenShard,
    corrupt,
    manifest_bytes,
    reading,
    write,
)
from braeburn.data.token_shards import manifest_of, writing
from braeburn.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A shard of a part, within the whole.

    Attributes:
        directory: the part's folder.
        index: of the shard within the part.
        shard: what it holds.
        part_start: the position within the whole at which the part's first token stands.
        start: the position within the whole at which the shard's first token stands.
    """

    directory: Path
    index: int
    shard: TokenShard
    part_start: int
    start: int

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.start + self.shard.tokens


@dataclass(frozen=True)
class Copy:
    """One shard of the whole that is to be made.

    Attributes:
        folder: where the whole is being made.
        index: of the shard within the whole.
        start: the position of its first token.
        stop: the position behind its last.
        dtype: of the tokens.
        pieces: the shards of parts that hold these positions, in order.
    """

    folder: Path
    index: int
    start: int
    stop: int
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass
class Joining:
    """The parts of one folder of token shards, and what is to be copied.

    Attributes:
        directory: the folder that is to appear.
        folder: where it is being made.
        manifests: of the parts, in order.
        copies: a shard each.
    """

    directory: Path
    folder: Path
    manifests: list[TokenManifest]
    copies: list[Copy]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text of all parts."""
        return sum(manifest.text_bytes for manifest in self.manifests)

    @property
    def token_bytes(self) -> int:
        """Bytes that their tokens stand for."""
        return sum(manifest.token_bytes for manifest in self.manifests)

    def finish(self, tokenizer: Tokenizer, shard_tokens: int) -> None:
        """Puts the folder in its place, once all shards have been copied.

        Raises:
            UserError: the disk is full or must not be written.
        """
        # Under another name, since other processes may be at work in the folder of the copies.
        whole = self.directory.with_name(f"{self.directory.name}.partial-{uuid.uuid4().hex}")
        shards = []
        with writing(self.directory.parent):
            whole.mkdir()
            try:
                for copy in self.copies:
                    shard = _made(copy)
                    if shard is None:
                        raise FileNotFoundError(errno.ENOENT, "a shard is gone", str(_record(copy)))
                    shards.append(shard)
                    for kind in ("tokens", "documents"):
                        _link(
                            shard_path(self.folder, kind, copy.index),
                            shard_path(whole, kind, copy.index),
                        )
                manifest = manifest_of(
                    tokenizer, shard_tokens, shards, report_of(self.manifests), self
                )
                write(whole / "manifest.json", manifest_bytes(manifest))
                put_in_place(whole, self.directory)
            except BaseException:
                shutil.rmtree(whole, ignore_errors=True)
                raise


def report_of(manifests: Sequence[TokenManifest]) -> Report:
    """The report of reading all parts of a side."""
    return merge([Report(dict(found.passed_over), found.separator_missing) for found in manifests])


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name; a copy, where the file system has one name for each."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def plan_joining(
    directory: Path,
    folder: Path,
    parts: Sequence[Path],
    manifests: list[TokenManifest],
    shard_tokens: int,
) -> Joining:
    """What is to be copied to make a whole of the folders of some parts.

    Args:
        directory: the folder that is to appear.
        folder: where it is to be made, on the same file system; it may hold some of it already.
        parts: folders of token shards, in order.
        manifests: of each.
        shard_tokens: tokens in each shard of the whole but the last.

    Raises:
        UserError: the folder cannot be written.
    """
    pieces = list(_pieces(parts, manifests))
    total = pieces[-1].stop if pieces else 0
    copies = []
    first = 0
    for index, start in enumerate(range(0, total, shard_tokens)):
        stop = min(start + shard_tokens, total)
        while pieces[first].stop <= start:
            first += 1
        last = first
        while pieces[last].stop < stop:
            last += 1
        held = tuple(pieces[first : last + 1])
        copies.append(Copy(folder, index, start, stop, manifests[0].dtype, held))
    with writing(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return Joining(directory, folder, manifests, copies)


def copy_shard(copy: Copy, proceed: Callable[[], None] = lambda: None) -> int:
    """Makes one shard of the whole, unless it is there; returns the bytes of its tokens.

    What is read of the parts is checked against their manifests.

    Args:
        copy: which.
        proceed: called between the shards of parts; what it raises stops the work.

    Raises:
        UserError: a part is corrupt, or the disk is full or must not be written.
    """
    size = (copy.stop - copy.start) * np.dtype(copy.dtype).itemsize
    if _made(copy) is not None:
        return size
    dtype = np.dtype(copy.dtype).newbyteorder("<")
    tokens, documents = _Output(copy, "tokens"), _Output(copy, "documents")
    with writing(copy.folder):
        try:
            for piece in copy.pieces:
                proceed()
                first, last = (
                    min(max(edge, piece.start), piece.stop) - piece.start
                    for edge in (copy.start, copy.stop)
                )
                content = np.frombuffer(_content(piece, "tokens"), dtype)
                tokens.growing.append(content[first:last])
                starts = np.frombuffer(_content(piece, "documents"), "<i8") + piece.part_start
                held = (starts >= copy.start) & (starts < copy.stop)
                documents.growing.append(starts[held].astype("<i8"))
            for output in (tokens, documents):
                output.finish()
            shard = shard_of(tokens.growing, documents.growing)
            write_atomically(_record(copy), shard.model_dump_json())
        finally:
            tokens.close()
            documents.close()
    return size


class _Output:
    """A file of a shard, under another name until it is complete."""

    def __init__(self, copy: Copy, kind: str) -> None:
        self._path = shard_path(copy.folder, kind, copy.index)
        # Other processes may be at work on the same.
        self._temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        self.growing = GrowingFile(self._temporary.open("wb"))

    def finish(self) -> None:
        """Gives the file its name once the disk has it."""
        self.growing.save()
        self._temporary.replace(self._path)

    def close(self) -> None:
        self.growing.file.close()
        self._temporary.unlink(missing_ok=True)


def _pieces(parts: Sequence[Path], manifests: Sequence[TokenManifest]) -> Iterator[Piece]:
    """The shards of all parts, in order."""
    part_start = 0
    for part, manifest in zip(parts, manifests, strict=True):
        start = part_start
        for index, shard in enumerate(manifest.shards):
            yield Piece(part, index, shard, part_start, start)
            start += shard.tokens
        part_start = start


def _content(piece: Piece, kind: str) -> bytes:
    """A file of a shard of a part, which is as its manifest says."""
    path = shard_path(piece.directory, kind, piece.index)
    with reading(piece.directory):
        content = path.read_bytes()
    if sha256(content).hexdigest() != getattr(piece.shard, f"{kind}_sha256"):
        raise corrupt(path, "does not have the checksum in manifest.json")
    return content


def _record(copy: Copy) -> Path:
    return copy.folder / f"shard-{copy.index:05d}.json"


def _made(copy: Copy) -> TokenShard | None:
    """What a shard holds, if it has been made whole."""
    try:
        shard = TokenShard.model_validate(json.loads(_record(copy).read_bytes()))
        sizes = {
            "tokens": shard.tokens * np.dtype(copy.dtype).itemsize,
            "documents": shard.documents * 8,
        }
        whole = shard.tokens == copy.stop - copy.start and all(
            shard_path(copy.folder, kind, copy.index).stat().st_size == size
            for kind, size in sizes.items()
        )
    except (OSError, ValueError, ValidationError):
        return None
    return shard if whole else None
