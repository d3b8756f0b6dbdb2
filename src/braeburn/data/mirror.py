"""Prepared text in a remote folder, as of an object store: a local folder mirrors what a machine
needs of it.

Small files are fetched whole and checked: tokenizers, manifests, the positions where documents
start. Tokens are read by range, as sequences need them, and a bounded number of bytes of them is
kept on the local disk.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from braeburn.data.building import put_in_place, shard_path
from braeburn.data.manifest import TokenManifest, read_manifest
from braeburn.errors import UserError
from braeburn.remote import RemoteFolder

BLOCK_BYTES = 2**16  # of tokens that are fetched at once
REMOTE = "remote.json"  # in a local folder whose tokens are elsewhere: where


class BlockCache:
    """Blocks of remote files on the local disk, those used last, of a bounded number of bytes.

    Several processes may use one folder; each looks at all of it now and then.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Takes a folder, which is made when it is first written to.

        Args:
            folder: of the blocks.
            limit: bytes that all of them together may have; a hundredth more for each process.
        """
        self._folder = folder
        self._limit = limit
        self._unseen = limit  # bytes that may have been written since the folder was looked at
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """A block, if it is there."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps a block; a disk that is full or read-only keeps none."""
        path = self._path(key)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        with self._lock:
            self._unseen += len(data)
            if self._unseen > self._limit // 100:
                self._trim()
                self._unseen = 0

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return self._folder / name[:2] / name

    def _trim(self) -> None:
        """Removes the blocks that were used longest ago, where there are too many."""
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda each: each[0]):
            if total <= self._limit:
                break
            total -= size
            path.unlink(missing_ok=True)


class RangeFile:
    """A remote file of numbers, of which ranges are read as they are asked for."""

    def __init__(
        self, folder: RemoteFolder, local: Path, dtype: np.dtype, count: int, blocks: BlockCache
    ) -> None:
        """Reads nothing yet.

        Args:
            folder: that holds the file.
            local: where the file would be on this machine, which has all but it.
            dtype: of its numbers.
            count: of them.
            blocks: keeps what was read.
        """
        self._folder, self._name, self._local = folder, local.name, local.parent
        self._dtype, self._count = dtype, count
        self._blocks = blocks

    def __len__(self) -> int:
        """How many numbers it holds."""
        return self._count

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """The numbers in a range, of step 1."""
        first, last, _ = wanted.indices(self._count)
        width = self._dtype.itemsize
        start, stop = first * width, max(first, last) * width
        if start == stop:
            return np.empty(0, self._dtype)
        blocks = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        data = b"".join(self._block(index) for index in blocks)
        offset = blocks.start * BLOCK_BYTES
        return np.frombuffer(data[start - offset : stop - offset], self._dtype)

    def _block(self, index: int) -> bytes:
        key = f"{self._folder.url}/{self._name}:{BLOCK_BYTES}:{index}"
        start = index * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self._count * self._dtype.itemsize)
        data = self._blocks.get(key)
        if data is None or len(data) != stop - start:
            try:
                data = self._folder.read(self._name, start, stop)
            except FileNotFoundError:
                raise UserError(
                    f"'{self._folder.url}/{self._name}' is gone; delete {str(self._local)!r}, so "
                    f"that the text is fetched or prepared again"
                ) from None
            if len(data) != stop - start:
                raise UserError(
                    f"'{self._folder.url}/{self._name}' is shorter than its manifest says; delete "
                    f"'{self._folder.url}' and prepare the text again"
                )
            self._blocks.put(key, data)
        return data


@dataclass(frozen=True)
class Mirror:
    """A local folder that holds what was needed so far of a remote one.

    Attributes:
        local: the local folder.
        remote: the other.
        block_bytes: bytes of tokens that the local folder keeps.
    """

    local: Path
    remote: RemoteFolder
    block_bytes: int

    def fetch(self, path: Path) -> None:
        """Fetches a file that is not here, if it is there."""
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.remote.fetch(self._name(path), path)

    def publish(self, path: Path) -> None:
        """Copies a small file that is here, unless the same is there."""
        if not path.exists():
            return
        name = self._name(path)
        with contextlib.suppress(FileNotFoundError):
            if self.remote.read(name) == path.read_bytes():
                return
        self.remote.put(path, name)

    def fetch_shards(self, directory: Path) -> None:
        """Makes a local folder of token shards that are complete there and not here, without the
        tokens.
        """
        name = self._name(directory)
        if directory.exists() or self.remote.size(f"{name}/manifest.json") is None:
            return
        partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex}")
        partial.mkdir(parents=True)
        try:
            self.remote.fetch(f"{name}/manifest.json", partial / "manifest.json")
            manifest = read_manifest(partial / "manifest.json", TokenManifest)
            for index in range(len(manifest.shards)):
                file = shard_path(partial, "documents", index)
                self.remote.fetch(f"{name}/{file.name}", file)
            where = {"url": f"{self.remote.url.rstrip('/')}/{name}", "blocks": str(self.local)}
            (partial / REMOTE).write_text(json.dumps(where | {"block_bytes": self.block_bytes}))
            put_in_place(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def publish_shards(self, directory: Path) -> None:
        """Copies complete token shards, the manifest last, unless they are there."""
        name = self._name(directory)
        if self.remote.size(f"{name}/manifest.json") is not None:
            return
        for path in sorted(directory.glob("*.bin")):
            # What an earlier call has copied is there whole, and of the same content.
            if self.remote.size(f"{name}/{path.name}") != path.stat().st_size:
                self.remote.put(path, f"{name}/{path.name}")
        self.remote.put(directory / "manifest.json", f"{name}/manifest.json")

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.local.absolute()).as_posix()


def is_mirror(directory: Path) -> bool:
    """Whether `Mirror.fetch_shards` made a folder of token shards, whose tokens are elsewhere."""
    return (directory / REMOTE).exists()


def range_files(
    directory: Path, names: Sequence[tuple[str, int]], dtype: np.dtype
) -> list[RangeFile]:
    """The tokens of a local folder that `Mirror.fetch_shards` made.

    Args:
        directory: the folder.
        names: of its files of tokens, each with the number of tokens.
        dtype: of tokens.
    """
    where = json.loads((directory / REMOTE).read_bytes())
    folder = RemoteFolder(where["url"])
    folder.has_answered()  # when the local folder was made
    blocks = BlockCache(Path(where["blocks"]) / "blocks", int(where["block_bytes"]))
    return [RangeFile(folder, directory / name, dtype, count, blocks) for name, count in names]
