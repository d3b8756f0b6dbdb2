"""The record of a checkpoint: the size and SHA-256 of each of its files, and what the checkpoint is
of.

Array files carry no checksums of their own: a flipped bit in one is another weight. `record.json`
is written with the checkpoint, as the last thing before it counts, and is compared with the files
before they are read.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from braeburn.atomic import write_atomically
from braeburn.errors import UserError
from braeburn.jsonfile import Unreadable, read_json

log = logging.getLogger(__name__)

PARTS = ("params", "optimizer", "run")
RECORD = "record.json"
# In a copy of a checkpoint from elsewhere: which parts were fetched, and what tells its version.
FETCHED = "fetched.json"
FORMAT = 1
# Hashing is done in C without Python's lock. Two threads for each core would only fight over the
# disk.
HASHING_THREADS = min(16, os.cpu_count() or 1)
# A record has a line of 150 bytes for each file; a checkpoint of a thousand processes has tens of
# thousands of files.
MOST_BYTES = 1 << 28
# Files that this process has compared with their records, and old checkpoints that the user was
# told of.
_compared: set[tuple[Any, ...]] = set()
_told: set[Path] = set()


class Damaged(Exception):
    """A checkpoint is not what its record says, or has none though it should; the message is a
    clause that says how.
    """


@dataclass(frozen=True)
class Record:
    """What a checkpoint is of, and the files that it consists of.

    Attributes:
        step: steps made.
        run: the identity of the run that made it, as in its `config.json`; None where that has
            none.
        parts: a fingerprint of the structure of each part: "params", "optimizer" where there is
            one, "run".
        facts: further values that the one who saved wants to find again, as a fingerprint of the
            data.
        files: size in bytes and SHA-256 in hexadecimal by the file's path within the checkpoint,
            with slashes.
    """

    step: int
    run: str | None
    parts: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def checksum(self) -> str:
        """A hash of all that the record says, and so of all that the checkpoint holds."""
        return _checksum({"format": FORMAT, **asdict(self)})


def _checksum(content: Mapping[str, Any]) -> str:
    """That of a record's fields, of whatever format."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_files(folder: Path) -> dict[str, int]:
    """The size of each file of a checkpoint's parts, by its path within the checkpoint, with
    slashes.

    What else lies beside the parts is no matter: nothing of it is restored.

    Raises:
        Damaged: something in a part is neither a file nor a folder.
    """
    found: dict[str, int] = {}
    for part in PARTS:
        if (folder / part).is_dir():
            found |= {f"{part}/{name}": size for name, size in walk(folder / part).items()}
    return found


def walk(folder: Path) -> dict[str, int]:
    """The size of each file below a folder, by its path within it, with slashes.

    Raises:
        Damaged: something there is neither a file nor a folder.
    """
    found: dict[str, int] = {}
    for root, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if not path.is_file():
                raise Damaged(f"{folder.name}/{relative} is not a file")
            found[relative] = path.stat().st_size
    return found


def _raise(error: OSError) -> None:
    raise error


def hash_files(
    folder: Path, names: Iterable[str], *, to_disk: bool = False
) -> dict[str, tuple[int, str]]:
    """The size and SHA-256 of files, read in parallel.

    Args:
        folder: that they lie in.
        names: their paths within it.
        to_disk: whether to return only once the files are on the disk itself.
    """

    def hashed(name: str) -> tuple[int, str]:
        with (folder / name).open("rb") as file:
            if to_disk:
                os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest

    names = list(names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(hashed, names), strict=True))


def write(folder: Path, record: Record) -> None:
    """Writes the record of a checkpoint beside its parts."""
    content = {"format": FORMAT, **asdict(record), "checksum": record.checksum}
    write_atomically(folder / RECORD, json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> Record | None:
    """The record of a checkpoint; None where there is none.

    Raises:
        Damaged: it is not as it was written.
        UserError: a later version wrote it.
        OSError: it cannot be read.
    """
    try:
        content = read_json(folder / RECORD, MOST_BYTES)
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise Damaged(f"its {RECORD} {error}") from None
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise Damaged(f"its {RECORD} is not as it was written")
    version = content.pop("format", None)
    if version != FORMAT:
        # It is as it was written, and so no damage: falling back would throw away what a later
        # version has trained.
        raise UserError(
            f"{str(folder / RECORD)!r} is of format {version}, and this version of Braeburn reads "
            f"{FORMAT}; use the "
            f"version that wrote the checkpoint, which the run's config.json names"
        )
    try:
        return _record_of.validate_python(content)
    except ValidationError:
        raise Damaged(f"its {RECORD} is not as it was written") from None


_record_of = TypeAdapter(Record)


def verify(
    folder: Path,
    step: int,
    identity: str | None,
    parts: Iterable[str],
    share: tuple[int, int] = (0, 1),
) -> Record | None:
    """The record of a checkpoint that agrees with it; None for one of a version that wrote none.

    Args:
        folder: of the checkpoint.
        step: that the folder's name says.
        identity: of the run that it should be of; None where that is not known.
        parts: whose content is compared. Names and sizes are those of all files.
        share: which of how many processes this is; the others compare the content of the rest, the
            first the names.

    Raises:
        Damaged: it does not agree.
        OSError: a file cannot be read, which is no sign of damage.
    """
    record = read(folder)
    if record is None:
        _require_old(folder)
        _require_parts(step, [part for part in PARTS if (folder / part).is_dir()])
        if folder not in _told:
            _told.add(folder)
            log.warning(
                "%r has no checksums, as checkpoints of version 0.1.0, and is read unchecked",
                str(folder),
            )
        return None
    if record.step != step:
        raise Damaged(f"it is the checkpoint of step {record.step} under another name")
    if None not in (identity, record.run) and identity != record.run:
        raise Damaged("it is of another run than the folder's config.json")
    _require_parts(step, record.parts)
    index, count = share
    if index == 0:  # thousands of processes would ask the file system for thousands of files each
        check_names(folder, record)
    compared = tuple(f"{part}/" for part in parts)
    names = sorted(
        (n for n in record.files if n.startswith(compared)), key=lambda name: -record.files[name][0]
    )
    # What this process has compared before, and what has not been written to since, is not read
    # again.
    states = {
        name: (str(folder), name, record.checksum, *_state(folder / name))
        for name in names[index::count]
    }
    check_content(
        folder, record, [name for name, state in states.items() if state not in _compared]
    )
    _compared.update(states.values())
    return record


def _require_parts(step: int, parts: Iterable[str]) -> None:
    """Refuses a checkpoint without one of its parts; the optimizer's state may be missing at step 0
    only.
    """
    for part in PARTS:
        if part not in parts and (part != "optimizer" or step > 0):
            raise Damaged(f"its part {part!r} is missing")


def _require_old(folder: Path) -> None:
    """Refuses a checkpoint without a record whose description says that it was written with one."""
    try:
        description = read_json(folder / "run" / "metadata", MOST_BYTES)
    except FileNotFoundError:
        raise Damaged("its part 'run' is missing") from None
    except Unreadable as error:
        raise Damaged(f"run/metadata {error}") from None
    if not isinstance(description, dict) or "record" in description:
        raise Damaged(f"{RECORD} is missing")


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to: its size, the time of writing and its number."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino
    return -1, -1, -1


def check_names(folder: Path, record: Record) -> None:
    """Compares the names and sizes of a checkpoint's files with its record.

    Raises:
        Damaged: one is missing, is of another size, or is none of the checkpoint's.
        OSError: the folder cannot be read.
    """
    present = list_files(folder)
    left_out = _left_out(folder)
    for name, (size, _) in record.files.items():
        if name.startswith(left_out):
            continue
        if name not in present:
            raise Damaged(f"{name} is missing")
        if present[name] != size:
            raise Damaged(f"{name} has {present[name]:,} bytes instead of {size:,}")
    for name in present:
        if name not in record.files:
            raise Damaged(f"{name} is not of this checkpoint")


def _left_out(folder: Path) -> tuple[str, ...]:
    """What the names of files begin with that a copy of a checkpoint was made without."""
    try:
        fetched = read_json(folder / FETCHED, MOST_BYTES)
    except FileNotFoundError:
        return ()
    except Unreadable as error:
        raise Damaged(f"its {FETCHED} {error}") from None
    parts = fetched.get("parts") if isinstance(fetched, dict) else None
    return tuple(f"{part}/" for part in PARTS if parts is not None and part not in parts)


def check_content(folder: Path, record: Record, names: Iterable[str]) -> None:
    """Compares files with their checksums.

    Raises:
        Damaged: naming the first that differs, or is missing.
        OSError: a file cannot be read.
    """
    try:
        hashed = hash_files(folder, names)
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).relative_to(folder).as_posix()} is missing") from None
    for name, found in hashed.items():
        if found != record.files[name]:
            raise Damaged(f"{name} does not have the checksum in {RECORD}")


def fingerprint(leaves: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    """A hash of shapes and types by path; trees with the same one can swap their values."""
    described = {path: [list(shape), dtype] for path, (shape, dtype) in leaves.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
