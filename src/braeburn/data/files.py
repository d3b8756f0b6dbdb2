"""The files that a source names: found by path, folder, glob or URL, through links, none left out
in silence.
"""

import os
import re
import stat
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braeburn.config import Source
from braeburn.errors import UserError
from braeburn.remote import version_of

_TESTS_AND_TOOLS = ("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data")
_NOT_LIBRARY = frozenset((*_TESTS_AND_TOOLS, "site-packages", "dist-packages", "__pycache__"))


@dataclass(frozen=True)
class File:
    """One file of a source.

    Attributes:
        path: its path on its file system.
        name: its path relative to the source's root.
        size: in bytes.
        version: a string that changes when the file is written again.
        filesystem: the fsspec file system that opens it.
    """

    path: str
    name: str
    size: int
    version: str
    filesystem: Any = field(repr=False, compare=False)


def files(name: str, source: Source) -> list[File]:
    """The files of a source, sorted by path. A local file that several names reach is listed once.

    Args:
        name: the source's name in `data.sources`, for errors.
        source: where the files are.

    Raises:
        UserError: an entry of `paths` matches no file, cannot be listed, or matches something that
            is no file.
    """
    if not source.paths:
        found = list(_standard_library())
    else:
        found = [file for pattern in source.paths for file in _match(name, source, pattern)]
    once: dict[str, File] = {}
    for file in sorted(found, key=lambda file: file.path):
        once.setdefault(_identity(file), file)
    return list(once.values())


def _identity(file: File) -> str:
    """What two names of one file have in common: of a local file, the path without links."""
    return os.path.realpath(file.path) if _is_local(file.filesystem) else file.path


def _is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _match(name: str, source: Source, pattern: str) -> Iterator[File]:
    """The files that one entry of a source's `paths` names."""
    import fsspec

    where = f"data.sources.{name}.paths: "
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        matches = _local(path) if _is_local(filesystem) else _remote(filesystem, path)
    except ImportError as error:
        raise UserError(
            f"{where}{pattern!r} needs a package that is not installed: {error}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}cannot list {pattern!r}: {error}; check the path and its permissions"
        ) from None
    is_python = source.format.startswith("python-")
    found = []
    for match in matches:
        if is_python and not match.path.endswith(".py"):
            continue
        if match.problem:
            raise UserError(
                f"{where}{match.path!r} {match.problem}; remove it, or name the files beside it "
                f"one by one"
            )
        found.append(_file(match, filesystem))
    if not found:
        kind = "Python file" if is_python else "file"
        raise UserError(
            f"{where}no {kind} matches {pattern!r}; name an existing file, folder, glob or fsspec "
            f"URL"
        )
    yield from found


@dataclass(frozen=True)
class _Match:
    """A path that is no folder, the source's root, what the file system tells of it, and why it
    cannot be read.
    """

    path: str
    root: str
    info: Mapping[str, Any]
    problem: str = ""


def _file(match: _Match, filesystem: Any) -> File:
    relative = match.path[len(match.root) :].lstrip("/")
    return File(
        match.path, relative, int(match.info.get("size") or 0), version_of(match.info), filesystem
    )


def _glob_root(path: str) -> str:
    """The folder above the first part of a path that holds `*`, `?` or `[`; the path itself where
    none does.
    """
    return re.split(r"/[^/]*[*?[]", path, maxsplit=1)[0]


def _local(path: str) -> list[_Match]:
    """What a local path, folder or glob names.

    fsspec calls a link neither file nor folder when it lists a folder, and passes over folders that
    it may not read.
    """
    if os.path.lexists(path):
        if Path(path).is_dir():
            folder = path.rstrip("/")
            return [_local_match(found, folder) for found in _below(folder, None, skip=_is_hidden)]
        return [_local_match(path, path.rpartition("/")[0])]
    root = _glob_root(path)
    if root == path or not Path(root).is_dir():
        return []
    return [_local_match(found, root) for found in _globbed(root, path)]


def _globbed(root: str, pattern: str) -> Iterator[str]:
    """What a glob matches below `root`; a folder that it matches stands for all that is in it, as a
    path does.
    """
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern[len(root) :].count("/")
    for path in _below(root, depth, folders=True):
        if not matches(path):
            continue
        if not Path(path).is_dir():
            yield path
        elif not _is_hidden(Path(path).name):
            yield from _below(path, None, skip=_is_hidden)


def _is_hidden(name: str) -> bool:
    """Whether a name begins with a dot, as those of `.git` and `.DS_Store`."""
    return name.startswith(".")


def _below(
    folder: str,
    depth: int | None,
    *,
    skip: Callable[[str], bool] = lambda name: False,
    folders: bool = False,
    above: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """The paths of what lies below a local folder, through links, sorted.

    Args:
        folder: where to look.
        depth: folders to go down, this one counted; None for all.
        skip: tells which names of files and folders are left out, with all that is in them.
        folders: whether folders are told of, too.
        above: the real paths of the folders that led here. A link to one of them would lead round
            for ever.
    """
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if skip(entry.name):
            continue
        path = f"{folder}/{entry.name}"
        # Of a link that leads to itself, entry.is_dir raises.
        if not (Path(path).is_dir() if entry.is_symlink() else entry.is_dir()):
            yield path
            continue
        if entry.is_symlink() and os.path.realpath(path) in above:
            continue
        if folders:
            yield path
        if depth is None or depth > 1:
            deeper = None if depth is None else depth - 1
            yield from _below(path, deeper, skip=skip, folders=folders, above=above)


def _local_match(path: str, root: str) -> _Match:
    try:
        status = Path(path).stat()
    except OSError as error:
        if not Path(path).is_symlink():
            raise
        target = str(Path(path).readlink())
        return _Match(
            path, root, {}, f"is a link to {target!r}, which cannot be read ({error.strerror})"
        )
    if not stat.S_ISREG(status.st_mode):
        return _Match(path, root, {}, "is no file but a pipe, socket or device")
    return _Match(path, root, {"size": status.st_size, "mtime": status.st_mtime_ns})


def _remote(filesystem: Any, path: str) -> list[_Match]:
    """What a path, folder or glob of another file system names."""
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        root = _glob_root(path)
        listed = filesystem.glob(path, detail=True) if root != path else {}
        matches: dict[str, Any] = {}
        for found, info in listed.items():
            if _is_folder(info) and not _is_hidden(found.rpartition("/")[2]):
                matches |= _folder(filesystem, found)
            else:
                matches[found] = info
    else:
        if _is_folder(info):
            root = path.rstrip("/")
            matches = _folder(filesystem, root)
        else:
            root = path.rpartition("/")[0]
            matches = {path: info}
    return [
        _remote_match(filesystem, found, root, info)
        for found, info in matches.items()
        if not _is_folder(info)
    ]


def _folder(filesystem: Any, folder: str) -> dict[str, Any]:
    """All that lies in a folder, but for hidden names."""
    found = filesystem.find(folder, detail=True)
    return {path: info for path, info in found.items() if "/." not in path[len(folder) :]}


def _is_folder(info: Mapping[str, Any]) -> bool:
    return info["type"] == "directory"


def _remote_match(filesystem: Any, path: str, root: str, info: Mapping[str, Any]) -> _Match:
    if info["type"] != "file":
        # A listing tells of a link itself; asked for by its path, it is what it leads to.
        info = filesystem.info(path)
    return _Match(
        path, root, info, "" if info["type"] == "file" else f"is no file but a {info['type']}"
    )


def _standard_library() -> Iterator[File]:
    from fsspec.implementations.local import LocalFileSystem

    root = Path(sysconfig.get_path("stdlib")).as_posix()
    filesystem = LocalFileSystem()
    for path in _below(root, None, skip=_NOT_LIBRARY.__contains__):
        if path.endswith(".py"):
            yield _file(_local_match(path, root), filesystem)
