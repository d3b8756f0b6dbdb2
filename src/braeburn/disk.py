"""What processes that write the same disk owe one another and their user: locks, room, and words
for failures.
"""

import errno
import fcntl
import glob
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from braeburn.errors import UserError

_LOCK = ".lock"
# A process that writes a model of any size has written to it within this time.
STALE_SECONDS = 3600.0
# For what another machine has made, in a folder that both mount.
SECONDS_TO_APPEAR = 90.0


def matching(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern below a folder that other processes may be deleting from meanwhile.

    `Path.glob` of Python 3.11 fails where a folder is gone by the time that it looks into it.
    """
    names = glob.glob(pattern, root_dir=folder, include_hidden=True)  # noqa: PTH207
    return [folder / name for name in sorted(names)]


@contextmanager
def locked(path: Path, in_use: str) -> Iterator[None]:
    """Holds the lock that a file is, until the end of this process at the latest; on file systems
    without, nothing.

    Raises:
        UserError: another process holds it; `in_use` is the sentence.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(in_use) from None
        except OSError:
            pass  # a file system without locks
        yield


def check_new(out: Path) -> None:
    """Refuses a folder that a command is to make where something is in it already.

    Args:
        out: the folder of `--out`.

    Raises:
        UserError: it is a file, or not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {str(out)!r} is in use; choose a new or empty folder")


def check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuses to begin what has no room.

    Args:
        folder: to be written to.
        needed: bytes.
        what: takes them, with its verb.
        remedy: besides freeing some.

    Raises:
        UserError: naming what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"no space left: {what} {needed:,} bytes and {str(folder)!r} has {free:,} free; "
            f"{remedy}"
        )


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in which something is made before it gets its name; gone afterwards, with
    what is left in it.

    What processes that were killed have left of the same name is removed, too. That these folders
    are of this program, and of no process that still runs, is known by a lock that each holds;
    others are left alone.

    Args:
        parent: an existing folder.
        name: of what is made.

    Raises:
        OSError: it cannot be made.
    """
    prefix = f".{name}.partial-"
    for abandoned in parent.glob(f"{glob.escape(prefix)}*"):
        _remove_abandoned(abandoned)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with locked(
            folder / _LOCK,
            f"{str(folder)!r} is in use by another process; run the same command again",
        ):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what `scratch` made in a process that is gone; nothing without file locks."""
    with suppress(OSError), (folder / _LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def appears(path: Path, seconds: float) -> bool:
    """Whether there is a file or folder, which another process may have made just now.

    Args:
        path: of it.
        seconds: to wait for it, since network file systems may show what is new late.
    """
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def remove_stale(parent: Path, name: str) -> None:
    """Removes what killed processes left beside a file or folder that they were making.

    Theirs is named `.NAME.partial-` and a number, and nothing was written to it for an hour; all
    else is left alone.
    """
    for path in parent.glob(glob.escape(f".{name}.partial-") + "*"):
        if not re.fullmatch("[0-9]+|[0-9a-f]{32}", path.name.rpartition("-")[2]):
            continue
        with suppress(OSError):
            written = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
            if time.time() - written < STALE_SECONDS:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has failures to read or write an open file tell of which file they are; the system tells only
    when one opens.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def explaining(directory: Path | None = None) -> Iterator[None]:
    """Turns failures of the file system that name a file into a sentence about that file.

    Args:
        directory: a run directory; advice about what lies in it is that of a run.

    Raises:
        UserError: what happened, to which file.
    """
    try:
        yield
    except OSError as error:
        sentence = explained(error, directory)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def explained(error: OSError, directory: Path | None = None) -> str | None:
    """One sentence about a failure of the file system; None where it names no file, or is of
    another kind.

    Args:
        error: as the system raised it; only its number and its file count, not its words.
        directory: a run directory; advice about what lies in it is that of a run.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"too many open files (limit {limit}); raise the limit, as with `ulimit -n 65536`, "
            f"then run the same command again"
        )
    if error.filename is None or error.errno is None:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    of_run = directory is not None and Path(name).absolute().is_relative_to(directory.absolute())
    again = "then run the same command" + (" to resume" if of_run else " again")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"in {str(directory)!r}" if of_run else f"for {name!r}"
        full = error.errno == errno.ENOSPC
        room = f"{_free(Path(name)):,} bytes free" if full else "the quota is used up"
        remedy = "free some space there"
        if of_run:
            remedy = "earlier checkpoints are whole: free some space or lower checkpoint.keep_last"
        return f"no space left {place} ({room}); {remedy}, {again}"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        why = (
            "the file system holds no larger files"
            if limit < 0
            else f"files are limited to {limit:,} bytes"
        )
        return (
            f"{name!r} cannot grow ({why}); raise the limit, as with `ulimit -f unlimited`, {again}"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(error.errno).lower()
        remedy = (
            "change its permissions"
            if error.errno != errno.EROFS
            else "make the file system writable"
        )
        other = ", or choose another folder with --out" if of_run else ""
        return f"{name!r} cannot be used ({reason}); {remedy}{other}, {again}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and of_run:
        return (
            f"{name!r} is gone: the run directory was moved, or a part of it deleted, while it was "
            f"in use; put it back, {again}"
        )
    if error.errno in (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EEXIST,
    ):
        return (
            f"{name!r} cannot be used ({os.strerror(error.errno).lower()}); put right what is "
            f"there, {again}"
        )
    if error.errno == errno.ENOTEMPTY:
        # Of a rename, the second is the folder that it should have become.
        place = str(error.filename2 or name)
        return (
            f"{place!r} is in use: files were put there while this command worked; they are left "
            f"as they are, so name a new or empty folder"
        )
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO):
        reason = os.strerror(error.errno).lower()
        return f"the storage of {name!r} failed ({reason}); see to the disk or the network, {again}"
    return None


def _free(path: Path) -> int:
    """Bytes free where a file is or would be."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0
