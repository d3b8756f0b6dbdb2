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
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from braeburn.data.corpus import Document
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError

FORMAT_VERSION = 1
SHARD_TOKENS = 2**26
BATCH_BYTES = 4 * 2**20  # text that is encoded at once
_ABANDONED_SECONDS = 3600
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def build_store(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    source: str = "",
    held_out: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenises the documents into a store at `directory`, unless another process has finished the same meanwhile.

    Args:
        directory: where the store appears once it is complete.
        documents: read once, `BATCH_BYTES` of text at a time.
        tokenizer: turns each document into [begin] + tokens.
        source: fingerprint of what the documents were read from, for the manifest.
        held_out: which side of the split the documents are, for the manifest.
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
            writer = _Writer(partial, np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32), shard_tokens)
            try:
                for texts in _batches(documents):
                    writer.text_bytes += sum(len(text.encode()) for text in texts)
                    for tokens in tokenizer.encode_documents(texts):
                        writer.add(tokens)
            finally:
                writer.close()
            manifest = {
                "format_version": FORMAT_VERSION,
                "dtype": writer.dtype.name,
                "tokenizer": tokenizer.hash,
                "begin": tokenizer.begin,
                "source": source,
                "held_out": held_out,
                "shard_tokens": shard_tokens,
                "tokens": sum(shard["tokens"] for shard in writer.shards),
                "documents": sum(shard["documents"] for shard in writer.shards),
                "text_bytes": writer.text_bytes,
                "shards": writer.shards,
            }
            with (partial / "manifest.json").open("w") as file:
                json.dump(manifest, file, indent=1)
                _sync(file)
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
        if error.errno in _FULL:
            raise UserError(
                f"no space left to write to {str(folder)!r}; free some, or set data.cache to a folder on a larger disk"
            ) from None
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"cannot write to {str(folder)!r} ({error.strerror}); set data.cache to a folder that you may write"
            ) from None
        raise


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
            if max(path.stat().st_mtime for path in [partial, *partial.iterdir()]) < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Writer:
    """Fills shards to exactly `shard_tokens`; a document may go on in the next shard."""

    def __init__(self, directory: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self.dtype, self.text_bytes, self.shards = dtype, 0, list[dict[str, Any]]()
        self._directory, self._shard_tokens = directory, shard_tokens
        self._files: dict[str, IO[bytes]] = {}
        self._hashes: dict[str, Any] = {}

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document, int32 [tokens]."""
        starts_here = True
        while len(tokens):
            if not self.shards or self.shards[-1]["tokens"] == self._shard_tokens:
                self._next_shard()
            shard = self.shards[-1]
            if starts_here:
                position = (len(self.shards) - 1) * self._shard_tokens + shard["tokens"]
                self._write("documents", np.array([position], "<i8"))
                shard["documents"] += 1
                starts_here = False
            room = self._shard_tokens - shard["tokens"]
            piece, tokens = tokens[:room], tokens[room:]
            self._write("tokens", piece.astype(self.dtype.newbyteorder("<")))
            shard["tokens"] += len(piece)

    def close(self) -> None:
        """Makes the last shard durable."""
        for kind, file in self._files.items():
            with file:
                _sync(file)
            self.shards[-1][f"{kind}_sha256"] = self._hashes[kind].hexdigest()
        self._files = {}

    def _next_shard(self) -> None:
        self.close()
        for kind in ("tokens", "documents"):
            self._files[kind] = _shard_path(self._directory, kind, len(self.shards)).open("wb")
            self._hashes[kind] = hashlib.sha256()
        self.shards.append({"tokens": 0, "documents": 0})

    def _write(self, kind: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._files[kind].write(data)
        self._hashes[kind].update(data)


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
        self.begin: int = manifest["begin"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shard_tokens: int = manifest["shard_tokens"]
        self._sizes = [(shard["tokens"], shard["documents"]) for shard in manifest["shards"]]

    @classmethod
    def open(cls, directory: Path, tokenizer_hash: str) -> "TokenStore":
        """Opens a store after checking its sizes, and once the SHA-256 of each file.

        Raises:
            UserError: a file is missing, truncated or corrupt, or the store belongs to another tokenizer.
        """
        path = directory / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
            version = manifest["format_version"]
            if version != FORMAT_VERSION:
                raise _corrupt(path, f"is of format {version}, not {FORMAT_VERSION}")
            if manifest["tokenizer"] != tokenizer_hash:
                raise UserError(
                    f"{str(directory)!r} was made by another tokenizer ({manifest['tokenizer'][:12]}, not "
                    f"{tokenizer_hash[:12]}); delete that folder, or set data.tokenizer to the one that made it"
                )
            store = cls(directory, manifest)
            if store.tokens != sum(shard["tokens"] for shard in manifest["shards"]):
                raise _corrupt(path, "does not add up")
            _verify(directory, manifest)
        except FileNotFoundError:
            raise _corrupt(path, "is missing") from None
        except (ValueError, KeyError, TypeError):
            raise _corrupt(path, "is not a sound manifest") from None
        except OSError as error:
            raise UserError(
                f"cannot read {str(directory)!r} ({error}); check its permissions, or set data.cache to another folder"
            ) from None
        return store

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens in [start, stop), int32. Position `tokens` holds a begin token, the target of the last token.

        Raises:
            IndexError: the range is not within [0, tokens + 1).
        """
        if not 0 <= start <= stop <= self.tokens + 1:
            raise IndexError(f"tokens {start}:{stop} are not within the store's {self.tokens}")
        result = np.empty(stop - start, np.int32)
        result[max(0, self.tokens - start) :] = self.begin
        position, last = start, min(stop, self.tokens)
        while position < last:
            shard, offset = divmod(position, self._shard_tokens)
            count = min(last - position, self._shard_tokens - offset)
            result[position - start : position - start + count] = self._token_shards[shard][offset : offset + count]
            position += count
        return result

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a document starts, int64, ascending."""
        found = []
        for shard in range(
            start // self._shard_tokens, min(-(-stop // self._shard_tokens), len(self._document_shards))
        ):
            starts = self._document_shards[shard]
            found.append(starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)])
        return np.concatenate([np.empty(0, np.int64), *found])

    @cached_property
    def _token_shards(self) -> list[np.ndarray]:
        return self._map("tokens", self._dtype)

    @cached_property
    def _document_shards(self) -> list[np.ndarray]:
        return self._map("documents", np.dtype("<i8"))

    def _map(self, kind: str, dtype: np.dtype) -> list[np.ndarray]:
        return [
            np.memmap(_shard_path(self.directory, kind, index), dtype, "r")
            if sizes[kind == "documents"]
            else np.empty(0, dtype)
            for index, sizes in enumerate(self._sizes)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the maps, which are opened again on the other side; pickling one would copy the shard."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_token_shards", "_document_shards")}


def _verify(directory: Path, manifest: dict[str, Any]) -> None:
    """Checks every file's size, and its hash unless `verified.json` records the file as it is now."""
    record = directory / "verified.json"
    try:
        verified = json.loads(record.read_bytes())
    except (OSError, ValueError):
        verified = {}
    seen = {}
    for index, shard in enumerate(manifest["shards"]):
        for kind, width in (("tokens", np.dtype(manifest["dtype"]).itemsize), ("documents", 8)):
            path = _shard_path(directory, kind, index)
            try:
                status = path.stat()
            except FileNotFoundError:
                raise _corrupt(path, "is missing") from None
            if status.st_size != shard[kind] * width:
                raise _corrupt(path, f"has {status.st_size} bytes instead of {shard[kind] * width}")
            seen[path.name] = [status.st_size, status.st_mtime_ns]
            if verified.get(path.name) != seen[path.name]:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard[f"{kind}_sha256"]:
                        raise _corrupt(path, "does not have the checksum in manifest.json")
    if seen != verified:
        temporary = record.with_name(f".verified.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # a read-only cache is verified at every open
            temporary.write_text(json.dumps(seen))
            temporary.replace(record)


def _corrupt(path: Path, problem: str) -> UserError:
    return UserError(f"{str(path)!r} {problem}; delete the folder {str(path.parent)!r} and it will be built again")
