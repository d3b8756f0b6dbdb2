"""Folders on other file systems than the local one, as in object stores, and where this machine
keeps what it needs of them.

Everything goes through fsspec. What does not answer is asked again for some minutes, so that an
outage of the network or of the server costs time and nothing else.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from braeburn.disk import naming
from braeburn.errors import UserError
from braeburn.extras import how_to_install

log = logging.getLogger(__name__)

# How long an outage may last before the work is given up, and how long a server that has never
# answered is asked, where a mistake is likelier.
PATIENCE_SECONDS = 600.0
PATIENCE_AT_FIRST = 15.0
LONGEST_PAUSE = 15.0
SECONDS_UNTIL_TOLD = 5.0
SECONDS_BETWEEN_WARNINGS = 120.0
# Files that are copied at the same time.
TRANSFERS = 8
# What waiting does not mend.
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, ImportError, UserError)
# Of the local disk.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE)
# The same of packages that may not be installed, by the names of their exceptions.
_NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
)
# File systems that have no folders, only names with slashes. Asked to make a folder they would make
# a bucket, for whose name a slip is likelier.
_OBJECT_STORES = frozenset(
    ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "ocilake", "tos")
)
# Extras of pyproject.toml that install a file system.
_EXTRAS = {"s3": "s3", "s3a": "s3"}
# What tells one version of a file from another, under the names that file systems give it.
_VERSIONS = (
    "mtime",
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)

Result = TypeVar("Result")
_reached: set[str] = set()  # servers and buckets that have answered this process
_told: dict[str, float] = {}  # when it was last told that one of them does not answer
_copies: dict[str, str] = {}  # the URL of each local folder that stands for a remote one


def is_remote(path: str) -> bool:
    """Whether a path is a URL of another file system than the local one."""
    protocol, separator, _ = path.partition("://")
    return bool(separator) and protocol not in ("file", "local")


def place(text: str, named_by: str) -> "Path | RemoteFolder":
    """What a path or URL names.

    Args:
        text: as the user gave it.
        named_by: the option or field that it was given with, for messages: `--out`,
            `initial_weights`.

    Raises:
        UserError: it looks like a URL and is none.
    """
    if is_remote(text):
        return RemoteFolder(text.rstrip("/"), named_by)
    if found := re.match(r"([a-z][a-z0-9]+):/(?!/)", text):
        raise UserError(
            f"{_label(named_by, text)} is no URL; write two slashes, as "
            f"{found[1]}://{text[found.end() :]}"
        )
    for local in ("file://", "local://"):
        text = text.removeprefix(local)
    return Path(text).expanduser()


def version_of(info: Mapping[str, Any]) -> str:
    """A string that changes when a file is written again, from what a file system tells of it;
    empty where it tells nothing of the kind.
    """
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def user_cache() -> Path:
    """The folder for what Braeburn can fetch or make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "braeburn"


def folder_for(url: str, parent: Path) -> Path:
    """The local folder that stands for a URL in `parent`; messages that name it tell of the URL.

    Its name ends like the URL, for people who look there.
    """
    url = url.rstrip("/")
    end = re.sub(r"[^\w.-]+", "-", url.rpartition("/")[2]).lstrip(".-")[:40]
    folder = parent / f"{end or 'run'}-{hashlib.sha256(url.encode()).hexdigest()[:20]}"
    _copies[str(folder)] = url
    return folder


def explained(message: str) -> str:
    """A message, and of which URL the local folder that it names is a copy."""
    for folder, url in _copies.items():
        if folder in message and url not in message:
            return f"{message} ({folder!r} is this machine's copy of {url!r})"
    return message


def _label(named_by: str, text: str) -> str:
    return f"{named_by} {text!r}" if named_by.startswith("-") else f"{named_by}={text!r}"


@dataclass(frozen=True)
class RemoteFile:
    """What a listing tells of a file.

    Attributes:
        size: in bytes.
        version: a string that changes when the file is written again; empty where none is known.
    """

    size: int
    version: str


@dataclass(frozen=True)
class RemoteFolder:
    """A folder on any fsspec file system; what does not answer is asked again for some minutes.

    Every method that reaches the file system raises `UserError` where that does not answer for
    long, or refuses.

    Attributes:
        url: of the folder.
        named_by: the option or field that names it, for messages.
    """

    url: str
    named_by: str = "data.cache"

    def __str__(self) -> str:
        """The URL."""
        return self.url

    @property
    def label(self) -> str:
        """How messages call it: the option or field, and the URL."""
        return _label(self.named_by, self.url)

    def below(self, name: str) -> "RemoteFolder":
        """A folder in this one."""
        return RemoteFolder(f"{self.url.rstrip('/')}/{name}", self.named_by)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(self._protocol)
            how = (
                how_to_install(extra)
                if extra and isinstance(error, ImportError)
                else "install the package of that file system"
            )
            raise UserError(
                f"{self.label} cannot be used ({error}); {how}, or name a local folder"
            ) from None
        return filesystem, path.rstrip("/")

    @property
    def _protocol(self) -> str:
        return self.url.partition("://")[0]

    @property
    def _server(self) -> str:
        """What answers for the folder: the protocol, and the server or bucket."""
        protocol, _, path = self.url.partition("://")
        return f"{protocol}://{path.partition('/')[0]}"

    def __getstate__(self) -> dict[str, Any]:
        """The state without the file system, which every process opens for itself."""
        return {"url": self.url, "named_by": self.named_by}

    def has_answered(self) -> None:
        """Notes that the folder was reached before, so that an outage is likelier than a
        mistake.
        """
        _reached.add(self._server)

    def list(self) -> dict[str, RemoteFile]:
        """All files below the folder by their path within it, with slashes; empty where there is no
        such folder.
        """

        def ask(filesystem: Any, path: str) -> dict[str, RemoteFile]:
            filesystem.invalidate_cache()  # others write there, too
            root = path.removesuffix("/")
            try:
                found = filesystem.find(root, detail=True)
            except FileNotFoundError:
                return {}
            if found.get(root, {}).get("type") == "file":
                raise UserError(f"{self.label} is a file; name a folder")
            # Object stores may hold an empty object in the place of a folder.
            return {
                name[len(root) + 1 :]: RemoteFile(int(info.get("size") or 0), version_of(info))
                for name, info in found.items()
                if name.startswith(f"{root}/") and not name.endswith("/")
                if info.get("type", "file") == "file"
            }

        return self._patiently("", ask)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

        def ask(filesystem: Any, path: str) -> int | None:
            filesystem.invalidate_cache()  # others write there, too
            try:
                return int(filesystem.info(path).get("size") or 0)
            except FileNotFoundError:
                return None

        return self._patiently(name, ask)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Some bytes of a file, or all of them.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._patiently(
            name, lambda filesystem, path: bytes(filesystem.cat_file(path, start=start, end=stop))
        )

    def read_if_there(self, name: str) -> bytes | None:
        """All bytes of a file; None where there is none."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to the local disk, where it appears whole.

        Raises:
            FileNotFoundError: there is none.
        """
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with naming(temporary):
                self._patiently(
                    name, lambda filesystem, path: filesystem.get_file(path, str(temporary))
                )
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def fetch_all(self, names: Iterable[str], target: Path) -> Iterator[str]:
        """Copies files to a local folder, several at a time, each under its path within this one.

        Yields:
            The names, as their files are there.

        Raises:
            FileNotFoundError: there is none of a name.
        """

        def copy(name: str) -> str:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fetch(name, path)
            return name

        with ThreadPoolExecutor(TRANSFERS) as pool:
            yield from pool.map(copy, list(names))

    def put(self, source: Path, name: str) -> None:
        """Copies a local file to the folder."""

        def copy(filesystem: Any, path: str) -> None:
            self._make_folder(filesystem, path)
            filesystem.put_file(str(source), path)

        self._writing(name, copy)

    def put_all(self, source: Path, names: Iterable[str]) -> Iterator[str]:
        """Copies files of a local folder, several at a time, each under its path within that.

        Yields:
            The names, as their files are there.
        """

        def copy(name: str) -> str:
            self.put(source / name, name)
            return name

        with ThreadPoolExecutor(TRANSFERS) as pool:
            yield from pool.map(copy, list(names))

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file at once."""

        def pipe(filesystem: Any, path: str) -> None:
            self._make_folder(filesystem, path)
            filesystem.pipe_file(path, data)

        self._writing(name, pipe)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files, of which some may be gone already: the first, then the others, several at
        a time.
        """

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._patiently(name, lambda filesystem, path: filesystem.rm_file(path))

        names = list(names)
        for name in names[:1]:
            remove(name)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(remove, names[1:]))

    def _make_folder(self, filesystem: Any, path: str) -> None:
        if self._protocol not in _OBJECT_STORES:
            with contextlib.suppress(NotImplementedError, PermissionError):
                filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _writing(self, name: str, work: Callable[[Any, str], None]) -> None:
        """Does what writes a file; what is missing then is the bucket, or a local file."""
        try:
            self._patiently(name, work)
        except FileNotFoundError as error:
            if error.filename is not None and Path(error.filename).is_absolute():
                raise
            raise UserError(
                f"{self.label} cannot be written to ({_first_line(error)}); make the bucket or "
                f"folder, or name another one"
            ) from None

    def _patiently(self, name: str, work: Callable[[Any, str], Result]) -> Result:
        filesystem, root = self._opened
        patience = PATIENCE_SECONDS if self._server in _reached else PATIENCE_AT_FIRST
        path = f"{root}/{name}" if name else root
        began, pause = time.monotonic(), 0.5
        while True:
            try:
                result = work(filesystem, path)
                _reached.add(self._server)
                return result
            except _FINAL as error:
                if isinstance(error, PermissionError):
                    raise UserError(
                        f"{self.label} may not be used ({_first_line(error)}); see to your "
                        f"credentials and permissions there, or name another folder"
                    ) from None
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _LOCAL:
                    raise
                first = _first_line(error)
                if _NO_CREDENTIALS & {kind.__name__ for kind in type(error).__mro__}:
                    raise UserError(
                        f"{self.label} cannot be reached without credentials ({first}); set them "
                        f"up as the tools of that store expect them, or name a local folder"
                    ) from None
                waited = time.monotonic() - began
                if waited + pause > patience:
                    raise UserError(
                        f"{self.label} has not answered for {waited:.0f} s ({first}); "
                        f"see to the network and your credentials, then run the same command again"
                    ) from None
                if waited > SECONDS_UNTIL_TOLD:
                    self._tell(error, patience)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _tell(self, error: Exception, patience: float) -> None:
        """Warns that the server does not answer, once for all that wait for it."""
        now = time.monotonic()
        if now - _told.get(self._server, -math.inf) > SECONDS_BETWEEN_WARNINGS:
            _told[self._server] = now
            log.warning(
                "warning: %s does not answer (%s); trying again for %.0f s",
                self.url,
                type(error).__name__,
                patience,
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200].rstrip(".") or type(error).__name__
