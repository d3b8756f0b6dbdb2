"""Documents from files of any fsspec file system, streamed, and split into training and held-out text by hash."""

import ast
import hashlib
import io
import json
import lzma
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from braeburn.config import Source
from braeburn.errors import UserError

LONG_FILE_BYTES = 32 * 1024
_PARQUET_ROWS = 256
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_TESTS_AND_TOOLS = ("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data")
_NOT_LIBRARY = frozenset((*_TESTS_AND_TOOLS, "site-packages", "dist-packages", "__pycache__"))


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `name` decides by its hash whether the text is held out."""

    name: str
    text: str


@dataclass(frozen=True)
class File:
    """One file of a source: its path on its file system, its path relative to the source's root, bytes and version."""

    path: str
    name: str
    size: int
    version: str
    filesystem: Any = field(repr=False, compare=False)

    @property
    def suffix(self) -> str:
        """The suffix in lower case that tells the format, without that of a compression."""
        path = PurePosixPath(self.path.lower())
        return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix


def documents(name: str, source: Source, held_out: bool | None = None, fraction: float = 0.0) -> Iterator[Document]:
    """The documents of a source in a fixed order, at most one file or batch of rows in memory at a time.

    Files are named by their path below the source's root, so the split survives a move of the folder; rows by the
    hash of their text, so duplicates land on one side. Documents of white space alone are left out.

    Args:
        name: the source's name in `data.sources`, for errors.
        source: where the files are and how to read them.
        held_out: True for the held-out documents alone, False for the others, None for all.
        fraction: the share of documents, in [0, 1], that is held out.

    Raises:
        UserError: no file matches, a file cannot be read, or nothing is left to train on.
    """
    reader = _Reader(name, source, held_out, fraction)
    found = False
    for file in files(name, source):
        for document in reader.read(file):
            found = True
            yield document
    if not found and held_out is not True:
        if reader.left_out:
            raise UserError(
                f"data.sources.{name}: all its documents ({reader.left_out}) are held out; add files, "
                f"set data.sources.{name}.separator to cut them into documents, or lower data.held_out"
            )
        raise UserError(
            f"data.sources.{name}: empty corpus, its files hold no text; "
            f"name files that do in data.sources.{name}.paths, or mend data.sources.{name}.format={source.format!r}"
        )


def files(name: str, source: Source) -> list[File]:
    """The files of a source, sorted by path.

    Raises:
        UserError: an entry of `paths` matches no file or cannot be listed.
    """
    if source.paths:
        found = {file.path: file for pattern in source.paths for file in _match(name, source, pattern)}
    else:
        found = {file.path: file for file in _standard_library()}
    return [found[path] for path in sorted(found)]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out `fraction`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < fraction


def _match(name: str, source: Source, pattern: str) -> Iterator[File]:
    import fsspec

    where = f"data.sources.{name}.paths: "
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        try:
            info = filesystem.info(path)
        except FileNotFoundError:
            root = re.split(r"/[^/]*[*?[]", path, maxsplit=1)[0]
            matches = filesystem.glob(path, detail=True) if root != path else {}
        else:
            if info["type"] == "directory":
                root, matches = path.rstrip("/"), filesystem.find(path, detail=True)
                # Folders hold .git and .DS_Store; a glob or a plain path that names such a file means it.
                matches = {p: i for p, i in matches.items() if "/." not in p[len(root) :]}
            else:
                root, matches = path.rpartition("/")[0], {path: info}
    except ImportError as error:
        raise UserError(f"{where}{pattern!r} needs a package that is not installed: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}cannot list {pattern!r}: {error}; check the path and its permissions") from None
    is_python = source.format.startswith("python-")
    found = [
        File(p, p[len(root) :].lstrip("/"), int(info.get("size") or 0), _version(info), filesystem)
        for p, info in matches.items()
        if info["type"] == "file" and not (is_python and not p.endswith(".py"))
    ]
    if not found:
        kind = "Python file" if is_python else "file"
        raise UserError(f"{where}no {kind} matches {pattern!r}; name an existing file, folder, glob or fsspec URL")
    yield from found


def _version(info: dict[str, Any]) -> str:
    """What changes when a file is written again, under the names that file systems give it."""
    keys = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "created")
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _standard_library() -> Iterator[File]:
    from fsspec.implementations.local import LocalFileSystem

    root, filesystem = Path(sysconfig.get_path("stdlib")), LocalFileSystem()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _NOT_LIBRARY]
        for path in (Path(folder, n) for n in names if n.endswith(".py")):
            status = path.stat()
            name = path.relative_to(root).as_posix()
            yield File(path.as_posix(), name, status.st_size, str(status.st_mtime), filesystem)


class _Reader:
    """Reads the documents of one side of the split, and counts those of the other in `left_out`."""

    def __init__(self, name: str, source: Source, held_out: bool | None, fraction: float) -> None:
        self.name, self.source, self.held_out, self.fraction = name, source, held_out, fraction
        self.left_out = 0

    def read(self, file: File) -> Iterator[Document]:
        chosen: str = self.source.format
        if chosen == "auto":
            chosen = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(file.suffix, "text")
        reader = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}.get(chosen, self._python)
        try:
            yield from reader(file)
        except UnicodeDecodeError as error:
            raise self._error(
                file, f"is not UTF-8 ({error.reason} at byte {error.start}); convert it or leave it out"
            ) from None
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise self._error(file, f"is truncated or corrupt ({error}); fetch it again or leave it out") from None
        except OSError as error:
            raise self._error(file, f"cannot be read ({error}); check its permissions or fetch it again") from None

    def _error(self, file: File, problem: str) -> UserError:
        return UserError(f"data.sources.{self.name}: {file.path!r} {problem}")

    def _wants(self, name: str) -> bool:
        wanted = self.held_out is None or is_held_out(name, self.fraction) is self.held_out
        self.left_out += not wanted
        return wanted

    def _text(self, file: File) -> Iterator[Document]:
        if self.source.separator is None:
            # Decided before the file is opened: each side reads only its own files.
            if self._wants(file.name) and not _is_blank(text := _read_text(file)):
                yield Document(file.name, text)
            return
        for index, piece in enumerate(_read_text(file).split(self.source.separator)):
            if not _is_blank(piece) and self._wants(name := f"{file.name}#{index}"):
                yield Document(name, piece)

    def _jsonl(self, file: File) -> Iterator[Document]:
        wanted = self.source.field
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except json.JSONDecodeError as error:
                    raise self._error(
                        file,
                        f"line {number} is not JSON ({error.msg}) with a field {wanted!r}; mend or drop the line",
                    ) from None
                if not isinstance(row, dict) or not isinstance(row.get(wanted), str):
                    names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                    raise self._error(
                        file,
                        f"line {number} has no text in the field {wanted!r} (it has: {names}); "
                        f"set data.sources.{self.name}.field to the one that holds the text",
                    )
                yield from self._row(row[wanted])

    def _parquet(self, file: File) -> Iterator[Document]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise _needs_extra(file, "pyarrow") from None
        wanted, number = self.source.field, 0
        try:
            with _open(file) as stream:
                table = pyarrow.parquet.ParquetFile(stream)
                if wanted not in table.schema_arrow.names:
                    raise self._error(
                        file,
                        f"has no column {wanted!r} (it has: {', '.join(table.schema_arrow.names)}); "
                        f"set data.sources.{self.name}.field to the one that holds the text",
                    )
                for batch in table.iter_batches(_PARQUET_ROWS, columns=[wanted]):
                    for value in batch.column(0):
                        if not isinstance(text := value.as_py(), str):
                            raise self._error(
                                file,
                                f"row {number} has no text in the column {wanted!r}; drop the row, or set "
                                f"data.sources.{self.name}.field to the one that holds the text",
                            )
                        yield from self._row(text)
                        number += 1
        except pyarrow.ArrowException as error:
            raise self._error(file, f"is not a sound parquet file ({error}); fetch it again or leave it out") from None

    def _row(self, text: str) -> Iterator[Document]:
        text = _encodable(text)
        if not _is_blank(text) and self._wants(name := hashlib.sha256(text.encode()).hexdigest()):
            yield Document(name, text)

    def _python(self, file: File) -> Iterator[Document]:
        if self.source.format == "python-long" and file.size < LONG_FILE_BYTES:
            return
        if not self._wants(file.name):
            return
        try:
            text = _read_text(file)
        except UnicodeDecodeError:
            return
        if self.source.format == "python-prose":
            text = _encodable(_prose(text))
        if not _is_blank(text):
            yield Document(file.name, text)


def _prose(code: str) -> str:
    """The docstrings of a Python file in their order, blank lines between; empty if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""
    return "\n\n".join(_docstrings([tree]))


def _docstrings(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and not docstring.isspace():
                yield docstring.strip()
        # Only statements hold docstrings; walking the expressions too takes ten times as long.
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _docstrings(getattr(node, block, ()))


def _read_text(file: File) -> str:
    with _open(file) as stream:
        return stream.read().decode("utf-8-sig")


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _encodable(text: str) -> str:
    r"""The text with lone surrogates, which JSON's and Python's \u escapes can make, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _open(file: File) -> IO[bytes]:
    """The bytes of a file, decompressed as its name tells."""
    if file.path.lower().endswith(".zst"):
        try:
            return io.BufferedReader(_Zstandard(file.filesystem.open(file.path, "rb")), 1 << 17)
        except ImportError:
            raise _needs_extra(file, "zstandard") from None
    return file.filesystem.open(file.path, "rb", compression="infer")


def _needs_extra(file: File, package: str) -> UserError:
    return UserError(f"{file.path!r} needs the package {package}; run pip install 'braeburn[data]'")


class _Zstandard(io.RawIOBase):
    """All frames of a zstd stream. fsspec's reader stops after the first, or where the file is cut off, silently."""

    def __init__(self, stream: IO[bytes]) -> None:
        import zstandard

        self._stream, self._library = stream, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._compressed, self._plain, self._started = b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._stream.read(1 << 16)
            if not self._compressed:
                if self._started and not self._frame.eof:
                    raise EOFError("the last frame is incomplete")
                return 0
            if self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            self._started = True
            try:
                self._plain = memoryview(self._frame.decompress(self._compressed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
        count = min(len(self._plain), len(buffer))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
