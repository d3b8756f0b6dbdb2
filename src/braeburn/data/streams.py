"""The bytes of a file as its name tells to read them: decompressed, and of an archive each member
by itself.

Name and content must agree. Where they do not, the file is refused by name instead of being read as
something else.
"""

import bz2
import contextlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from braeburn.data.files import File
from braeburn.errors import UserError

PEEK_BYTES = 2**20  # what can be looked at before it is read
# Text shrinks to a twentieth, logs to a hundredth. Far more is a mistake, or an attack by a "bomb".
MOST_EXPANSION = 200
EXPANSION_FREE_BYTES = 64 * 2**20  # of which nothing is asked

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "lzma", ".zst": "zstd"}
_TARS = {".tgz": "gzip", ".tbz2": "bzip2", ".tbz": "bzip2", ".txz": "xz", ".tzst": "zstd"}
# The first bytes of what is no text, and its name.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"PAR1": "Parquet",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
    b"\x04\x22\x4d\x18": "LZ4",
    b"%PDF-": "PDF",
    b"\x89HDF\r\n": "HDF5",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
    b"SQLite format 3\x00": "SQLite",
}
_TAR_MAGIC_AT = 257
# A zstd file may begin with a frame that is to be skipped, of sixteen kinds.
_ZSTD_SKIPPED = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
# What fails where bytes are not what they should be, or not all there.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Kind:
    """What a name tells of a file: how it is compressed ("" for not at all), which archive it is,
    and its suffix.
    """

    compression: str
    archive: str
    suffix: str


@dataclass(frozen=True)
class Member:
    """One readable part of a file: all of it, or a member of an archive.

    Attributes:
        name: the file's name, with the member's behind it.
        suffix: in lower case, without that of a compression.
        stream: its bytes, decompressed; `peek` shows up to `PEEK_BYTES` of them.
        where: what to call it in errors.
        start: rows that begin before this byte are left out.
        stop: rows that begin at this byte or behind it are left out, too; None for none.
    """

    name: str
    suffix: str
    stream: io.BufferedReader
    where: str
    start: int = 0
    stop: int | None = None

    def holds(self, position: int) -> bool:
        """Whether a row that begins at this byte is in the range."""
        return self.start <= position and (self.stop is None or position < self.stop)


def shortened(message: object) -> str:
    """What a library says, or a name, in a length that a sentence can have."""
    line = " ".join(str(message).split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def kind_of(name: str) -> Kind:
    """What the name of a file tells of its bytes."""
    path = PurePosixPath(name.lower())
    suffix = path.suffix
    if suffix in _TARS:
        return Kind(_TARS[suffix], "tar", "")
    compression = _COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = path.with_suffix("").suffix
    if suffix in (".zip", ".tar"):
        return Kind(compression, suffix[1:], "")
    return Kind(compression, "", suffix)


def members(file: File, where: str, passed_over: Callable[[str], None]) -> Iterator[Member]:
    """The readable parts of a file, each of which is to be read before the next is asked for.

    Of an archive they are its members that are files. Names that begin with a dot are left out, as
    in folders.

    Args:
        file: the file.
        where: what to call it in errors.
        passed_over: told of each member that is a link, whose target is a member too.

    Raises:
        UserError: the content is not what the name tells, or an archive holds no file or one that
            cannot be read.
    """
    kind = kind_of(file.path)
    with contextlib.closing(file.filesystem.open(file.path, "rb")) as raw:
        if kind.archive == "zip" and not kind.compression:
            require(_peekable(raw).peek(PEEK_BYTES), "zip", where)
            raw.seek(0)
            yield from _zipped(raw, file, where)
            return
        stream = _decompressed(_peekable(raw), kind.compression, where)
        if kind.archive == "zip":
            raise UserError(
                f"{where} is a compressed zip archive; decompress it, so that its name ends in .zip"
            )
        if kind.archive == "tar":
            require(stream.peek(PEEK_BYTES), "tar", where)
            yield from _tarred(stream, file, where, passed_over)
        else:
            yield Member(file.name, kind.suffix, stream, where)


def content_kind(head: bytes) -> str:
    """The kind of file that begins with these bytes, such as "gzip"; "" for text and all that is
    not known.
    """
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return "tar"
    if head.startswith(_ZSTD_SKIPPED):
        return "zstd"
    if head.startswith(b"BZh") and head[4:10] not in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return ""  # a text that begins with these letters
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def require(head: bytes, expected: str, where: str) -> None:
    """Refuses bytes of another kind than expected; `expected` is "" for text.

    Raises:
        UserError: naming both kinds.
    """
    found = content_kind(head)
    if found == expected:
        return
    if not expected:
        raise UserError(
            f"{where} is a {found} file, which its name does not tell; rename it, convert it or "
            f"leave it out"
        )
    what = f"a {found} file" if found else "something else" if head else "empty"
    raise UserError(
        f"{where} is {what}, though its name says {expected}; rename it, fetch it again or leave "
        f"it out"
    )


def _decompressed(stream: io.BufferedReader, compression: str, where: str) -> io.BufferedReader:
    """The bytes within a compressed stream."""
    if not compression:
        return stream
    if compression != "lzma":  # which begins with nothing that would tell it from others
        require(stream.peek(PEEK_BYTES), compression, where)
    counted = _Counted(stream)
    if compression == "zstd":
        import pyarrow

        # fsspec's reader stops after the first frame, or where the file is cut off, without a word.
        inner: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(counted, "r"), "zstd")
    else:
        inner = _Inflated(counted, compression)
    return _peekable(_Bounded(inner, counted, where))


def _zipped(raw: IO[bytes], file: File, where: str) -> Iterator[Member]:
    try:
        archive = zipfile.ZipFile(raw)
        found = [
            info
            for info in archive.infolist()
            if not info.is_dir() and not _is_hidden(info.filename)
        ]
        for info in found:
            inside = f"{where} member {shortened(repr(info.filename))}"
            if (
                info.file_size > EXPANSION_FREE_BYTES
                and info.file_size > MOST_EXPANSION * info.compress_size
            ):
                raise _bomb(inside)
            with archive.open(info) as opened:
                yield _member(opened, file, info.filename, inside)
    except (RuntimeError, NotImplementedError) as error:  # a password, a way of compressing
        raise UserError(
            f"{where} cannot be read ({shortened(error)}); unpack it, and name the folder"
        ) from None
    if not found:
        raise UserError(f"{where} holds no file; fetch it again or leave it out")


def _tarred(
    stream: IO[bytes], file: File, where: str, passed_over: Callable[[str], None]
) -> Iterator[Member]:
    empty = True
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_WholeTarInfo) as archive:
        while (info := archive.next()) is not None:
            # It would otherwise gather them to the end.
            archive.members = []  # type: ignore[attr-defined]
            if _is_hidden(info.name) or info.isdir():
                continue
            if info.issym() or info.islnk():
                passed_over("links in archives")
                continue
            opened = archive.extractfile(info)
            inside = f"{where} member {shortened(repr(info.name))}"
            if opened is None:
                raise UserError(f"{inside} is no file but a pipe or device; unpack what is wanted")
            empty = False
            # Counted, since it would let itself be sought in, and fail.
            yield _member(_Counted(opened), file, info.name, inside)
    if empty:
        raise UserError(f"{where} holds no file; fetch it again or leave it out")


class _WholeTarInfo(tarfile.TarInfo):
    """A header of a tar archive. tarfile takes a damaged one, or none where the end should be, for
    the end.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_WholeTarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


def _member(opened: Any, file: File, name: str, where: str) -> Member:
    """A member of an archive, decompressed."""
    kind = kind_of(name)
    if kind.archive:
        raise UserError(
            f"{where} is an archive within an archive; unpack the outer one, and name the folder"
        )
    return Member(
        f"{file.name}/{name}",
        kind.suffix,
        _decompressed(_peekable(opened), kind.compression, where),
        where,
    )


def _is_hidden(name: str) -> bool:
    """Whether a part of a member's name begins with a dot, as .DS_Store does; . and .. tell of
    folders.
    """
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _bomb(where: str) -> UserError:
    return UserError(
        f"{where} decompresses to more than {MOST_EXPANSION} times its size, as no text does; "
        f"decompress it, if it is meant, or leave it out"
    )


def _peekable(stream: Any) -> io.BufferedReader:
    return io.BufferedReader(_Raw(stream), PEEK_BYTES)


class _Raw(io.RawIOBase):
    """The bytes of anything with `read`, in pieces as long as asked for, so that a buffer on it
    fills at once.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return hasattr(self._stream, "seekable") and self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        size = 0
        while size < len(buffer):
            data = self._stream.read(len(buffer) - size)
            if not data:
                break
            buffer[size : size + len(data)] = data
            size += len(data)
        return size


class _Counted:
    """A stream that counts the bytes read from it. Whoever opened the stream closes it."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        return data

    def close(self) -> None:
        pass


class _Bounded:
    """Decompressed bytes, as long as they are not far more than the compressed ones."""

    def __init__(self, stream: Any, compressed: _Counted, where: str) -> None:
        self._stream = stream
        self._compressed = compressed
        self._where = where
        self._count = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._count += len(data)
        if self._count > max(EXPANSION_FREE_BYTES, MOST_EXPANSION * self._compressed.count):
            raise _bomb(self._where)
        return data


class _Inflated:
    """Decompressed bytes of all the streams in a gzip, bzip2 or xz file, one after the other.

    Python's readers of bzip2 and xz take what they do not understand behind a stream for the end of
    the file.
    """

    _CHUNK = 2**16

    def __init__(self, compressed: _Counted, compression: str) -> None:
        self._compressed = compressed
        self._new: Callable[[], Any] = {
            "gzip": lambda: zlib.decompressobj(wbits=31),
            "bzip2": bz2.BZ2Decompressor,
            "xz": lzma.LZMADecompressor,
            "lzma": lzma.LZMADecompressor,
        }[compression]
        # Between streams and behind the last there may be zeros, as on tapes.
        self._padded = compression in ("gzip", "xz")
        self._decompressor: Any = self._new()
        self._input = b""

    def read(self, size: int) -> bytes:
        while True:
            if self._decompressor.eof and not self._begin_next():
                return b""
            data = self._decompressor.decompress(self._input, size)
            self._input = getattr(self._decompressor, "unconsumed_tail", b"")
            if data:
                return data
            if self._decompressor.eof:
                continue
            if not self._input:
                self._input = self._compressed.read(self._CHUNK)
                if not self._input:
                    raise EOFError("it ends in the middle")

    def _begin_next(self) -> bool:
        """Begins the stream behind the one that has ended, if there is one."""
        rest = self._decompressor.unused_data
        while True:
            if self._padded:
                rest = rest.lstrip(b"\0")
            if rest:
                break
            rest = self._compressed.read(self._CHUNK)
            if not rest:
                return False
        self._input = rest
        self._decompressor = self._new()
        return True
