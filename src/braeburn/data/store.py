"""Tokenised text on disk: shards of tokens to be mapped into memory, where documents start, and a manifest.

A store appears under its name complete or not at all, and what it holds is checked before it is used.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from braeburn.atomic import write_atomically
from braeburn.data.corpus import Document
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError

FORMAT_VERSION = 2
SHARD_TOKENS = 2**25  # held in memory until the shard is full
BATCH_BYTES = 4 * 2**20  # text that is encoded at once


def build_store(
    directory: Path, documents: Iterable[Document], tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS
) -> None:
    """Tokenises the documents into a store at `directory`, unless another process has finished the same meanwhile.

    Args:
        directory: where the store appears once it is complete.
        documents: read once, `BATCH_BYTES` of text at a time.
        tokenizer: turns each document into [begin] + tokens.
        shard_tokens: tokens in each shard but the last.

    Raises:
        UserError: the disk is full or must not be written.
    """
    partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex}")
    with writing(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        try:
            partial.mkdir()
            text_bytes = token_bytes = 0
            shards = list[dict[str, Any]]()

            def encoded() -> Iterator[np.ndarray]:
                nonlocal text_bytes, token_bytes
                for texts in _batches(documents):
                    text_bytes += sum(len(text.encode()) for text in texts)
                    for tokens in tokenizer.encode_documents(texts):
                        token_bytes += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))
                        yield tokens

            dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
            for index, (tokens, starts) in enumerate(in_shards(encoded(), dtype, shard_tokens)):
                shard: dict[str, Any] = {"tokens": len(tokens), "documents": len(starts)}
                for kind, values in (("tokens", tokens), ("documents", starts)):
                    shard[f"{kind}_sha256"] = hashlib.sha256(values.data).hexdigest()
                    write(_shard_path(partial, kind, index), values.data)
                shards.append(shard)
            manifest = {
                "format_version": FORMAT_VERSION,
                "dtype": dtype.name,
                "tokenizer": tokenizer.hash,
                "begin": tokenizer.begin,
                "shard_tokens": shard_tokens,
                "tokens": sum(shard["tokens"] for shard in shards),
                "documents": sum(shard["documents"] for shard in shards),
                "text_bytes": text_bytes,
                "token_bytes": token_bytes,
                "shards": shards,
            }
            write(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
            try:
                partial.rename(directory)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full or forbidden disk into a UserError that names the cache folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {str(folder)!r} ({error.strerror or error}); free space there, or set data.cache to "
            f"another folder that you may write"
        ) from None


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _remove_abandoned(directory: Path) -> None:
    """Removes what killed builders of this store left; a living one has written within the hour."""
    for partial in directory.parent.glob(f"{directory.name}.partial-*"):
        with contextlib.suppress(OSError):
            if max(path.stat().st_mtime for path in [partial, *partial.iterdir()]) < time.time() - 3600:
                shutil.rmtree(partial, ignore_errors=True)


def write(path: Path, data: bytes | memoryview) -> None:
    """Writes a file and returns once the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def in_shards(
    documents: Iterable[np.ndarray], dtype: np.dtype, shard_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of `shard_tokens` at a time, and the positions where documents start; one may go on in the next shard."""
    pieces, starts, size, first = [np.empty(0, dtype)], list[int](), 0, 0
    for tokens in documents:
        starts.append(first + size)
        pieces.append(tokens.astype(dtype))
        size += len(tokens)
        while size >= shard_tokens:
            joined = np.concatenate(pieces)
            yield joined[:shard_tokens], np.array(starts, "<i8")
            pieces, starts, size, first = [joined[shard_tokens:]], [], size - shard_tokens, first + shard_tokens
    if size:
        yield np.concatenate(pieces), np.array(starts, "<i8")


def _shard_path(directory: Path, kind: str, index: int) -> Path:
    return directory / f"{kind}-{index:05d}.bin"


class TokenStore:
    """All tokens of one side of one source, read from files mapped into memory. It can be pickled for workers.

    Attributes:
        tokens: how many there are.
        documents: how many documents.
        text_bytes: UTF-8 bytes of the documents' text.
        begin: id of the token that starts a document, which is also read one past the end.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Takes the directory as it is; `open` checks it."""
        self.directory = directory
        self.tokens: int = manifest["tokens"]
        self.documents: int = manifest["documents"]
        self.text_bytes: int = manifest["text_bytes"]
        self.token_bytes: int = manifest["token_bytes"]
        self.begin: int = manifest["begin"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shard_tokens: int = manifest["shard_tokens"]
        self._count = len(manifest["shards"])

    @classmethod
    def open(cls, directory: Path, tokenizer_hash: str) -> "TokenStore":
        """Opens a store after checking its sizes, and once the SHA-256 of each file.

        Raises:
            UserError: a file is missing, truncated or corrupt, or the store belongs to another tokenizer.
        """
        with opening(directory, FORMAT_VERSION) as manifest:
            if manifest["tokenizer"] != tokenizer_hash:
                raise UserError(
                    f"{str(directory)!r} was made by another tokenizer ({manifest['tokenizer'][:12]}, not "
                    f"{tokenizer_hash[:12]}); delete that folder, or set data.tokenizer to the one that made it"
                )
            store = cls(directory, manifest)
            verify(directory, _files(directory, manifest))
        return store

    @property
    def byte_ratio(self) -> float:
        """Bytes of the text for each byte that its tokens stand for.

        They differ where a tokenizer puts a space before a document, or changes text before it
        splits it, as into NFC.
        """
        return self.text_bytes / self.token_bytes if self.token_bytes else 0.0

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in [start, stop), int32. Position `tokens` holds a begin token, the target of the last token.

        Raises:
            IndexError: the range is not within [0, tokens + 1).
        """
        if not 0 <= start <= stop <= self.tokens + 1:
            raise IndexError(f"tokens {start}:{stop} are not within the store's {self.tokens}")
        pieces: list[Any] = cut(self._tokens, self._shard_tokens, start, stop)
        end = [self.begin] * (stop - max(start, self.tokens))
        return np.concatenate([*pieces, end], dtype=np.int32, casting="unsafe")

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a document starts, int64, ascending."""
        found = [np.empty(0, np.int64)]
        for starts in self._starts[start // self._shard_tokens : -(-stop // self._shard_tokens)]:
            found.append(starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)])
        return np.concatenate(found)

    @cached_property
    def _tokens(self) -> list[np.ndarray]:
        return self._mapped("tokens", self._dtype)

    @cached_property
    def _starts(self) -> list[np.ndarray]:
        return self._mapped("documents", np.dtype("<i8"))

    def _mapped(self, kind: str, dtype: np.dtype) -> list[np.ndarray]:
        return [map_file(_shard_path(self.directory, kind, index), dtype) for index in range(self._count)]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the maps, which are opened again on the other side; pickling one would copy the shard."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokens", "_starts")}


def _files(directory: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, int, str]]:
    """The path, size in bytes and SHA-256 of every file that a token store's manifest names."""
    widths = {"tokens": np.dtype(manifest["dtype"]).itemsize, "documents": 8}
    for index, shard in enumerate(manifest["shards"]):
        for kind, width in widths.items():
            yield _shard_path(directory, kind, index), shard[kind] * width, shard[f"{kind}_sha256"]


@contextlib.contextmanager
def opening(directory: Path, format_version: int) -> Iterator[dict[str, Any]]:
    """The manifest of a store, and a UserError where it or what is read by it is missing, unsound or unreadable."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        if version != format_version:
            raise corrupt(path, f"is of format {version}, not {format_version}")
        yield manifest
    except FileNotFoundError:
        raise corrupt(path, "is missing") from None
    except (ValueError, KeyError, TypeError):
        raise corrupt(path, "is not a sound manifest") from None
    except OSError as error:
        raise UserError(
            f"cannot read {str(directory)!r} ({error}); check its permissions, or set data.cache to another folder"
        ) from None


def verify(directory: Path, files: Iterable[tuple[Path, int, str]]) -> None:
    """Checks every file's size, and its hash unless `verified.json` records the file as it is now.

    Args:
        directory: holds the files, and the record.
        files: path, size in bytes and SHA-256 of each.

    Raises:
        UserError: a file is missing, truncated or corrupt.
    """
    record = directory / "verified.json"
    try:
        verified = json.loads(record.read_bytes())
    except (OSError, ValueError):
        verified = {}
    seen = {}
    for path, size, sha256 in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise corrupt(path, "is missing") from None
        if status.st_size != size:
            raise corrupt(path, f"has {status.st_size} bytes instead of {size}")
        seen[path.name] = [status.st_size, status.st_mtime_ns]
        if verified.get(path.name) != seen[path.name]:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise corrupt(path, "does not have the checksum in manifest.json")
    if seen != verified:
        with contextlib.suppress(OSError):  # a read-only cache is verified at every open
            write_atomically(record, json.dumps(seen))


def cut(shards: Sequence[np.ndarray], size: int, start: int, stop: int) -> list[np.ndarray]:
    """What shards of `size` values each, the last of fewer, hold of the positions [start, stop), in pieces."""
    first = start // size
    return [
        shard[max(0, start - index * size) : stop - index * size]
        for index, shard in enumerate(shards[first : -(-stop // size)], first)
    ]


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file's values, read as they are used; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def corrupt(path: Path, problem: str) -> UserError:
    """The error of a file of a store."""
    return UserError(f"{str(path)!r} {problem}; delete the folder {str(path.parent)!r} and it will be built again")
