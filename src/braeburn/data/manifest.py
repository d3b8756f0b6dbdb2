"""Manifests of token shards and of teachers' labels: JSON that is checked against its own hash and
types before it is believed.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from braeburn.atomic import write_atomically
from braeburn.errors import UserError

# Of a million shards; more is no manifest.
LARGEST_MANIFEST_BYTES = 512 * 2**20
MOST_RUNS_REMEMBERED = 64
_CHUNK_BYTES = 2**24

Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenShard(_Checked):
    """Two files: tokens, and the positions where documents start."""

    tokens: Count
    documents: Count
    tokens_sha256: Sha256
    documents_sha256: Sha256


class TokenManifest(_Checked):
    """What the token shards in a folder hold. `passed_over` counts what had no text, by kind.

    `text_bytes` are those of the documents' text, `token_bytes` those that the tokens stand for.
    """

    format_version: Literal[2] = 2
    dtype: Literal["uint16", "uint32"]
    tokenizer: Sha256
    begin: Count
    shard_tokens: Annotated[int, Field(gt=0, lt=2**62)]
    tokens: Count
    documents: Count
    text_bytes: Count
    token_bytes: Count
    passed_over: dict[str, Count] = {}
    separator_missing: bool = False
    shards: list[TokenShard]

    @model_validator(mode="after")
    def _check(self) -> "TokenManifest":
        _check_sizes([shard.tokens for shard in self.shards], self.shard_tokens, self.tokens)
        if sum(shard.documents for shard in self.shards) != self.documents:
            raise ValueError("the shards do not hold as many documents as they should")
        return self


class TeacherPart(_Checked):
    """One file of entries."""

    tokens: Count
    sha256: Sha256


class TeacherManifest(_Checked):
    """What a folder of a teacher's labels holds; while it is being built, the complete parts."""

    format_version: Literal[2] = 2
    identity: dict[str, Any]
    ids: Literal["uint16", "uint32"]
    k: Annotated[int, Field(gt=0, lt=2**31)]
    tokens: Count
    part_tokens: Annotated[int, Field(gt=0, lt=2**62)]
    parts: list[TeacherPart]

    @property
    def is_complete(self) -> bool:
        """Whether the parts hold all tokens."""
        return sum(part.tokens for part in self.parts) == self.tokens


def _check_sizes(sizes: list[int], each: int, total: int) -> None:
    """Refuses files of which one but the last is not full, or that do not hold as much as they
    should.
    """
    if (
        any(size != each for size in sizes[:-1])
        or sum(sizes) != total
        or any(size > each for size in sizes)
    ):
        raise ValueError("the sizes of the files do not fit the whole")


Manifest = TypeVar("Manifest", bound=BaseModel)


def manifest_bytes(manifest: BaseModel) -> bytes:
    """What the file of a manifest holds: the manifest, with its own hash in front."""
    content = manifest.model_dump(mode="json")
    return json.dumps({"manifest_sha256": _hash(content), **content}, indent=1).encode()


def read_manifest(path: Path, kind: type[Manifest]) -> Manifest:
    """The manifest in a file, as it was written.

    Raises:
        UserError: it is missing, was changed, or is of another kind or version.
    """
    try:
        if not is_file(path):
            raise corrupt(path, "is no file")
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise corrupt(path, f"has more than {LARGEST_MANIFEST_BYTES:,} bytes")
        fields = json.loads(path.read_bytes())
        version = fields["format_version"]
        expected = kind.model_fields["format_version"].default
        if version != expected:
            raise corrupt(path, f"is of format {str(version)[:20]}, not {expected}")
        if fields.pop("manifest_sha256") != _hash(fields):
            raise corrupt(path, "was changed or damaged since it was written")
        return kind.model_validate(fields)
    except FileNotFoundError:
        raise corrupt(path, "is missing") from None
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise corrupt(path, "is not a sound manifest") from None
    except OSError as error:
        raise UserError(
            f"cannot read {str(path.parent)!r} ({error}); check its permissions, or set "
            f"data.cache to another folder"
        ) from None


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file, which can be opened without waiting for anyone.

    Raises:
        FileNotFoundError: nothing is there.
    """
    return stat.S_ISREG(path.stat().st_mode)


def write(path: Path, data: bytes | memoryview) -> None:
    """Writes a file and returns once the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def verify(
    directory: Path, files: Iterable[tuple[Path, int, str]], verified_for: str | None
) -> None:
    """Checks the size of every file, and its content once on each machine for each run.

    A time of modification says little: disks lose bits, and copies keep times. So a content is
    believed only while this machine has read it for this run before, and the file is the same one
    since.

    Args:
        directory: holds the files, and the record of what was read.
        files: path, size in bytes and SHA-256 of each.
        verified_for: the run that the files are read for; None reads them all, and writes no
            record.

    Raises:
        UserError: a file is missing, truncated or corrupt, or is no file.
    """
    record = directory / "verified.json"
    key = None if verified_for is None else f"{_machine()}:{verified_for}"
    records = {} if key is None else _records(record)
    known = records.get(key, {}) if key is not None else {}
    seen: dict[str, list[int]] = {}
    unread: list[tuple[Path, str]] = []
    for path, size, sha256 in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise corrupt(path, "is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise corrupt(path, "is no file")
        if status.st_size != size:
            raise corrupt(path, f"has {status.st_size} bytes instead of {size}")
        seen[path.name] = [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        if known.get(path.name) != seen[path.name]:
            unread.append((path, sha256))
    # Hashing leaves Python's lock to others.
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        hashes = pool.map(sha256_of, [path for path, _ in unread])
        for (path, expected), found in zip(unread, hashes, strict=True):
            if found != expected:
                raise corrupt(path, "does not have the checksum in manifest.json")
    if key is not None and unread:
        records.pop(key, None)
        records = {**dict(list(records.items())[1 - MOST_RUNS_REMEMBERED :]), key: seen}
        with contextlib.suppress(OSError):  # what is in a read-only cache is read at every start
            write_atomically(record, json.dumps(records))


def _machine() -> str:
    """What tells this machine from others that share its disks."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError):
            return hashlib.sha256(
                (Path(path).read_text() + os.uname().nodename).encode()
            ).hexdigest()[:16]
    return os.uname().nodename


def _records(path: Path) -> dict[str, Any]:
    """What was read by which machine for which run; nothing where the record cannot be believed."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if is_file(path) and path.stat().st_size <= LARGEST_MANIFEST_BYTES:
            records = json.loads(path.read_bytes())
            if isinstance(records, dict):
                return {key: value for key, value in records.items() if isinstance(value, dict)}
    return {}


def sha256_of(path: Path, size: int | None = None) -> str:
    """The SHA-256 of a file, or of its first `size` bytes."""
    digest = hashlib.sha256()
    for data in _chunks(path, size):
        digest.update(data)
    return digest.hexdigest()


def _chunks(path: Path, size: int | None) -> Iterator[bytes]:
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, _CHUNK_BYTES))):
            left -= len(data)
            yield data


def corrupt(path: Path, problem: str) -> UserError:
    """The error about a file of token shards or labels that is not as it should be."""
    return UserError(
        f"{str(path)!r} {problem}; delete the folder {str(path.parent)!r} and it will be built "
        f"again"
    )


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Turns a failure to read token shards or labels into a sentence.

    Raises:
        UserError: naming the folder.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {str(directory)!r} ({error}); check its permissions, or set data.cache "
            f"to another folder"
        ) from None
