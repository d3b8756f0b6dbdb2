"""Tokenised text on disk, called token shards: files of tokens to be mapped into memory, the
positions where documents start, and a manifest.

The token shards of a text lie in one folder, which appears under its name complete or not at all.
Its files are checked before they are used. A shard is one part of the tokens, in two files.
"""

import contextlib
import errno
import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from braeburn.data.building import Building, claim, put_in_place, shard_path
from braeburn.data.corpus import Document, Report
from braeburn.data.cutting import pieces
from braeburn.data.manifest import (
    TokenManifest,
    TokenShard,
    manifest_bytes,
    read_manifest,
    reading,
    verify,
    write,
)
from braeburn.data.mirror import RangeFile, is_mirror, range_files
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError

FORMAT_VERSION = 2
SHARD_TOKENS = 2**25
BATCH_CHARACTERS = 2**20  # of text that is encoded at once: a second at most of two cores


def build_token_shards(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    proceed: Callable[[], None] = lambda: None,
    report: Report | None = None,
) -> None:
    """Tokenises the documents into token shards at `directory`, unless another process has finished
    the same meanwhile.

    A builder that was stopped or killed has left what it tokenised, and the next goes on from
    there.

    Args:
        directory: the folder, which appears once it is complete.
        documents: read once. The same `directory` must mean the same documents.
        tokenizer: turns each document into [begin] + tokens, and [end] where it has a separate one.
        shard_tokens: tokens in each shard but the last.
        proceed: called about once a second. What it raises stops the building; what is done by then
            stays.
        report: of reading the documents, filled in by the time of the last; kept in the manifest.

    Raises:
        UserError: the disk is full or must not be written.
    """
    plan = Plan({"": directory}, lambda name: "", shard_tokens)
    build_several(plan, documents, tokenizer, proceed=proceed, report=report)


@dataclass(frozen=True)
class Plan:
    """What to build of documents that are read once.

    Attributes:
        directories: the folder of each kind of document, as of those held out; folders that are
            there already are left as they are.
        kind_of: tells by a document's name which of them it belongs to.
        shard_tokens: tokens in each shard but the last.
    """

    directories: Mapping[str, Path]
    kind_of: Callable[[str], str]
    shard_tokens: int = SHARD_TOKENS


def build_several(
    plan: Plan,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    proceed: Callable[[], None] = lambda: None,
    report: Report | None = None,
) -> None:
    """Tokenises documents into several folders of token shards in one pass; see
    `build_token_shards`.

    Args:
        plan: which folders, and which documents go into each.
        documents: read once, of those folders that are still to be built.
        tokenizer: turns each document into tokens.
        proceed: called about once a second; what it raises stops the building.
        report: of reading the documents, filled in by the time of the last.

    Raises:
        UserError: the disk is full or must not be written.
    """
    dtype = token_dtype(tokenizer)
    key = hashlib.sha256(
        json.dumps([FORMAT_VERSION, tokenizer.hash, dtype.name, plan.shard_tokens]).encode()
    ).hexdigest()
    missing = {kind: path for kind, path in plan.directories.items() if not path.exists()}
    with contextlib.ExitStack() as held:
        for path in missing.values():
            held.enter_context(writing(path.parent))
            path.parent.mkdir(parents=True, exist_ok=True)
        buildings = {
            kind: held.enter_context(claim(path, key, dtype, plan.shard_tokens))
            for kind, path in missing.items()
        }
        try:
            _tokenise(buildings, plan.kind_of, documents, tokenizer, proceed)
            for kind, building in buildings.items():
                shards = building.finish()
                manifest = manifest_of(
                    tokenizer, plan.shard_tokens, shards, report or Report(), building.progress
                )
                write(building.folder / "manifest.json", manifest_bytes(manifest))
                put_in_place(building.folder, missing[kind])
        except _Stopped as stopped:
            raise stopped.reason from None
        except Exception:
            for building in buildings.values():
                shutil.rmtree(building.folder, ignore_errors=True)
            raise


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type that a tokenizer's ids are stored in."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


class TextBytes(Protocol):
    """Something that counts the bytes of a text, and those that its tokens stand for."""

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text."""

    @property
    def token_bytes(self) -> int:
        """Bytes that its tokens stand for."""


def manifest_of(
    tokenizer: Tokenizer,
    shard_tokens: int,
    shards: list[TokenShard],
    report: Report,
    counted: TextBytes,
) -> TokenManifest:
    """The manifest of a folder of token shards.

    Args:
        tokenizer: made the tokens.
        shard_tokens: tokens in each shard but the last.
        shards: all of them.
        report: of reading the text.
        counted: the bytes of the text and of its tokens.
    """
    return TokenManifest(
        dtype="uint16" if token_dtype(tokenizer).itemsize == 2 else "uint32",
        tokenizer=tokenizer.hash,
        begin=tokenizer.begin,
        shard_tokens=shard_tokens,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=counted.text_bytes,
        token_bytes=counted.token_bytes,
        passed_over=report.passed_over,
        separator_missing=report.separator_missing,
        shards=shards,
    )


class _Stopped(Exception):
    """What a builder's `proceed` raised."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _tokenise(
    buildings: Mapping[str, Building],
    kind_of: Callable[[str], str],
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    proceed: Callable[[], None],
) -> None:
    """Appends the tokens of all documents but those that are there already, and records how far it
    is.
    """
    for batch in _batches(_pieces_of(documents, buildings, kind_of, tokenizer)):
        try:
            proceed()
        except Exception as reason:
            for building in buildings.values():
                building.record(now=True)
            raise _Stopped(reason) from None
        ids = tokenizer.encode_pieces([piece.text for piece in batch])
        for kind, building in buildings.items():
            own = [pair for pair in zip(batch, ids, strict=True) if pair[0].kind == kind]
            if own:
                _append(building, own, tokenizer)
            building.record()


def _append(
    building: Building, found: Sequence[tuple["_Piece", np.ndarray]], tokenizer: Tokenizer
) -> None:
    """Appends pieces of text and their ids, all at once: short documents are many."""
    begin, ends = np.array([tokenizer.begin], np.int32), tokenizer.ends
    parts, starts, size = list[np.ndarray](), list[int](), 0
    for piece, ids in found:
        if piece.begins:
            starts.append(size)
            parts.append(begin)
        parts.append(ids)
        size += piece.begins + len(ids)
        if piece.ends:
            parts.append(ends)
            size += len(ends)
    tokens = np.concatenate(parts)
    building.append(tokens, np.array(starts, np.int64))
    progress = building.progress
    ended = [index for index, (piece, _) in enumerate(found) if piece.ends]
    progress.documents += len(ended)
    progress.text_bytes += sum(len(piece.text.encode()) for piece, _ in found)
    progress.token_bytes += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))
    # Of the document that goes on behind these pieces.
    continued = found[ended[-1] + 1 :] if ended else found
    before = 0 if ended else progress.characters
    progress.characters = before + sum(len(piece.text) for piece, _ in continued)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text that is encoded at once: a document, or a piece that may begin or end one."""

    kind: str
    text: str
    begins: bool
    ends: bool


def _pieces_of(
    documents: Iterable[Document],
    buildings: Mapping[str, Building],
    kind_of: Callable[[str], str],
    tokenizer: Tokenizer,
) -> Iterator[_Piece]:
    """What is to be encoded after all that the buildings hold, in order."""
    done = {kind: building.progress.documents for kind, building in buildings.items()}
    skipped = {kind: building.progress.characters for kind, building in buildings.items()}
    stream = iter(documents)
    for document in stream:
        parts = _parts(document, stream)
        kind = kind_of(document.name)
        if done.get(kind, 1):  # it is there, or is not wanted
            if kind in done:
                done[kind] -= 1
            for _ in parts:
                pass
            continue
        begins = not skipped[kind]
        previous: str | None = None
        for text in pieces(
            _without_start(parts, skipped[kind]),
            tokenizer.encodes_alike,
            f"document {document.name!r}",
        ):
            if previous is not None:
                yield _Piece(kind, previous, begins, ends=False)
                begins = False
            previous = text
        yield _Piece(kind, previous or "", begins, ends=True)
        skipped[kind] = 0


def _parts(document: Document, stream: Iterator[Document]) -> Iterator[str]:
    """The text of a document, of which the rest follows in the stream."""
    yield document.text
    while document.is_continued:
        document = next(stream)
        yield document.text


def _without_start(parts: Iterator[str], characters: int) -> Iterator[str]:
    for part in parts:
        if len(part) > characters:
            yield part[characters:]
        characters = max(0, characters - len(part))


def _batches(stream: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full or forbidden disk into a UserError that names the cache folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {str(folder)!r} ({error.strerror or error}); free space there, or "
            f"set data.cache to another folder that you may write"
        ) from None


def in_shards(
    documents: Iterable[np.ndarray], dtype: np.dtype, shard_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of `shard_tokens` at a time, and the positions where documents start; one may go on in
    the next shard.
    """
    pieces, starts, size, first = [np.empty(0, dtype)], list[int](), 0, 0
    for tokens in documents:
        starts.append(first + size)
        pieces.append(tokens.astype(dtype))
        size += len(tokens)
        while size >= shard_tokens:
            joined = np.concatenate(pieces)
            yield joined[:shard_tokens], np.array(starts, "<i8")
            pieces, starts, size, first = (
                [joined[shard_tokens:]],
                [],
                size - shard_tokens,
                first + shard_tokens,
            )
    if size:
        yield np.concatenate(pieces), np.array(starts, "<i8")


class TokenShards:
    """All tokens of one side of one source, read from files mapped into memory. It can be pickled
    for workers.

    Attributes:
        tokens: how many there are.
        documents: how many documents.
        text_bytes: UTF-8 bytes of the documents' text.
        token_bytes: bytes that the tokens stand for.
        begin: id of the token that starts a document, which is also read one past the end.
        fingerprint: a hash of the tokens and of where documents start.
        passed_over: what of the source held no text, by kind, and how often it was met.
        separator_missing: whether the source's separator was in none of its files.
    """

    def __init__(self, directory: Path, manifest: TokenManifest) -> None:
        """Takes the directory as it is; `open` checks it."""
        self.directory = directory
        self.tokens = manifest.tokens
        self.documents = manifest.documents
        self.text_bytes = manifest.text_bytes
        self.token_bytes = manifest.token_bytes
        self.begin = manifest.begin
        self.passed_over = manifest.passed_over
        self.separator_missing = manifest.separator_missing
        hashes = [[shard.tokens_sha256, shard.documents_sha256] for shard in manifest.shards]
        self.fingerprint = hashlib.sha256(json.dumps([manifest.dtype, hashes]).encode()).hexdigest()
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._shard_tokens = manifest.shard_tokens
        self._count = len(manifest.shards)

    @classmethod
    def open(
        cls, directory: Path, tokenizer_hash: str, verified_for: str | None = None
    ) -> "TokenShards":
        """Opens token shards after checking their manifest, sizes, and contents.

        Args:
            directory: the folder of the token shards.
            tokenizer_hash: of the tokenizer that must have made them.
            verified_for: the run that they are opened for; see `verify`.

        Raises:
            UserError: a file is missing, truncated or corrupt, or the token shards belong to
                another tokenizer.
        """
        with reading(directory):
            manifest = read_manifest(directory / "manifest.json", TokenManifest)
            if manifest.tokenizer != tokenizer_hash:
                raise UserError(
                    f"{str(directory)!r} was made by another tokenizer ({manifest.tokenizer[:12]}, "
                    f"not {tokenizer_hash[:12]}); delete that folder, or set data.tokenizer to the "
                    f"one that made it"
                )
            wanted = _files(directory, manifest)
            if is_mirror(directory):  # tokens are read by range, and stay where they are
                wanted = (file for file in wanted if file[0].name.startswith("documents-"))
            verify(directory, wanted, verified_for)
            opened = cls(directory, manifest)
            opened.map_all()
        return opened

    @property
    def byte_ratio(self) -> float:
        """Bytes of the text for each byte that its tokens stand for.

        They differ where a tokenizer puts a space before a document, or changes text before it
        splits it, as into NFC.
        """
        return self.text_bytes / self.token_bytes if self.token_bytes else 0.0

    def map_all(self) -> None:
        """Maps all files, which can then be read even when the folder is deleted."""
        allow_open_files(2 * self._count)
        _ = self._tokens, self._starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in [start, stop), int32. Position `tokens` holds a begin token, the target of
        the last token.

        Raises:
            IndexError: the range is not within [0, tokens + 1).
        """
        if not 0 <= start <= stop <= self.tokens + 1:
            raise IndexError(f"tokens {start}:{stop} are not within the {self.tokens} there are")
        pieces: list[Any] = pieces_of(self._tokens, self._shard_tokens, start, stop)
        end = [self.begin] * (stop - max(start, self.tokens))
        return np.concatenate([*pieces, end], dtype=np.int32, casting="unsafe")

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a document starts, int64, ascending."""
        found = [np.empty(0, np.int64)]
        for starts in self._starts[start // self._shard_tokens : -(-stop // self._shard_tokens)]:
            first, last = starts.searchsorted((start, stop))
            found.append(starts[first:last])
        return np.concatenate(found)

    @property
    def is_remote(self) -> bool:
        """Whether tokens come over the network."""
        return is_mirror(self.directory)

    @cached_property
    def _tokens(self) -> Sequence[np.ndarray | RangeFile]:
        if not self.is_remote:
            return self._mapped("tokens", self._dtype)
        sizes = [self._shard_tokens] * (self._count - 1)
        sizes.append(self.tokens - sum(sizes))
        names = [
            (shard_path(self.directory, "tokens", index).name, size)
            for index, size in enumerate(sizes[: self._count])
        ]
        return range_files(self.directory, names, self._dtype)

    @cached_property
    def _starts(self) -> list[np.ndarray]:
        return self._mapped("documents", np.dtype("<i8"))

    def _mapped(self, kind: str, dtype: np.dtype) -> list[np.ndarray]:
        return [
            map_file(shard_path(self.directory, kind, index), dtype) for index in range(self._count)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the maps, which are opened again on the other side; pickling one would
        copy the shard.
        """
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokens", "_starts")}


def _files(directory: Path, manifest: TokenManifest) -> Iterator[tuple[Path, int, str]]:
    """The path, size in bytes and SHA-256 of every file that the manifest names."""
    width = np.dtype(manifest.dtype).itemsize
    for index, shard in enumerate(manifest.shards):
        yield shard_path(directory, "tokens", index), shard.tokens * width, shard.tokens_sha256
        yield shard_path(directory, "documents", index), shard.documents * 8, shard.documents_sha256


def allow_open_files(count: int) -> None:
    """Lets this process open as many files more than usual as the system permits; each file mapped
    counts as one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def pieces_of(shards: Sequence[Any], size: int, start: int, stop: int) -> list[np.ndarray]:
    """The values of a range of positions, in pieces, a piece of each shard that it touches.

    Args:
        shards: arrays with `size` entries each along their first dimension, the last with as many
            or fewer.
        size: entries of a shard.
        start: the first position, counted over all shards.
        stop: the position behind the last.

    Returns:
        Views of the shards, which joined along their first dimension are the range.
    """
    first = start // size
    return [
        shard[max(0, start - index * size) : stop - index * size]
        for index, shard in enumerate(shards[first : -(-stop // size)], first)
    ]


class Deleted(UserError):
    """A file of token shards or labels was deleted before this process opened it."""


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file's values, read as they are used; an empty file cannot be mapped.

    Raises:
        Deleted: it is not there any more.
        UserError: this process may open no more files.
    """
    try:
        if not path.stat().st_size:
            return np.empty(0, dtype)
        # Slices of a plain array take a fifth of the time.
        return np.memmap(path, dtype, "r").view(np.ndarray)
    except FileNotFoundError:
        raise Deleted(
            f"{str(path)!r} was deleted while it was in use; run the same command again, which "
            f"builds it anew"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError(
            f"{str(path)!r} cannot be opened beside all other files of its folder "
            f"({error.strerror}); raise the limit of open files, as with ulimit -n 65536"
        ) from None
