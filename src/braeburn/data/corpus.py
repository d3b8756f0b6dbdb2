"""Documents from files of any fsspec file system, streamed, and split into training and held-out text by hash."""

import ast
import contextlib
import functools
import hashlib
import io
import json
import lzma
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from braeburn.config import Source
from braeburn.errors import UserError
from braeburn.extras import how_to_install

LONG_FILE_BYTES = 32 * 1024
_PARQUET_ROWS = 256
_ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
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
    found, left_out = False, 0
    form = source.format
    by_file = form.startswith("python-") or (form in ("auto", "text") and source.separator is None)
    for file in files(name, source):
        if form == "python-long" and file.size < LONG_FILE_BYTES:
            continue
        whole = by_file and not (form == "auto" and file.suffix in _ROWS)
        # Where it can be, the side is decided before the file is opened.
        if whole and held_out not in (None, is_held_out(file.name, fraction)):
            left_out += 1
            continue
        for document in _read(name, source, file):
            if not document.text or document.text.isspace():
                continue
            if not whole and held_out not in (None, is_held_out(document.name, fraction)):
                left_out += 1
                continue
            found = True
            yield document
    if not found and held_out is not True:
        if left_out:
            raise UserError(
                f"data.sources.{name}: all its documents ({left_out}) are held out; add files, "
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
        _file(p, root, info, filesystem)
        for p, info in matches.items()
        if info["type"] == "file" and (p.endswith(".py") or not is_python)
    ]
    if not found:
        kind = "Python file" if is_python else "file"
        raise UserError(f"{where}no {kind} matches {pattern!r}; name an existing file, folder, glob or fsspec URL")
    yield from found


def _file(path: str, root: str, info: Mapping[str, Any], filesystem: Any) -> File:
    # What changes when a file is written again, under the names that file systems give it.
    keys = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "created")
    version = next((str(info[key]) for key in keys if info.get(key)), "")
    return File(path, path[len(root) :].lstrip("/"), int(info.get("size") or 0), version, filesystem)


def _standard_library() -> Iterator[File]:
    from fsspec.implementations.local import LocalFileSystem

    root, filesystem = Path(sysconfig.get_path("stdlib")).as_posix(), LocalFileSystem()
    for _, folders, found in filesystem.walk(root, detail=True):
        for name in _NOT_LIBRARY & folders.keys():
            del folders[name]
        yield from (_file(i["name"], root, i, filesystem) for i in found.values() if i["name"].endswith(".py"))


def _read(name: str, source: Source, file: File) -> Iterator[Document]:
    """All documents of a file, blank ones too."""
    form = _ROWS.get(file.suffix, "text") if source.format == "auto" else source.format
    where = f"data.sources.{name}: {file.path!r}"
    try:
        if form in ("jsonl", "parquet"):
            rows = (_jsonl if form == "jsonl" else _parquet)(file, source.field, where)
            fix = f"set data.sources.{name}.field to the one that holds the text"
            for lack, row in rows:
                if not isinstance(row, dict) or not isinstance(text := row.get(source.field), str):
                    names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                    raise UserError(f"{where} {lack} {source.field!r} (it has: {names}); {fix}")
                text = _encodable(text)
                yield Document(hashlib.sha256(text.encode()).hexdigest(), text)
            return
        with _open(file) as stream:
            data = stream.read()
        if form.startswith("python-"):
            with contextlib.suppress(UnicodeDecodeError):
                text = data.decode("utf-8-sig")
                yield Document(file.name, _encodable(_prose(text)) if form == "python-prose" else text)
        elif source.separator is None:
            yield Document(file.name, data.decode("utf-8-sig"))
        else:
            for index, piece in enumerate(data.decode("utf-8-sig").split(source.separator)):
                yield Document(f"{file.name}#{index}", piece)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it or leave it out"
        ) from None
    except ImportError as error:
        raise UserError(f"{where} needs a package ({error}); {how_to_install('data')}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{where} is unreadable, truncated or corrupt ({error}); fetch it again or leave it out"
        ) from None


def _jsonl(file: File, field: str, where: str) -> Iterator[tuple[str, Any]]:
    """What to say where the field is missing, and the contents, of each line that is not blank."""
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"line {number} has no text in the field", json.loads(line.decode("utf-8-sig"))
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{where} line {number} is not JSON ({error.msg}) with a field {field!r}; mend or drop it"
                    ) from None


def _parquet(file: File, field: str, where: str) -> Iterator[tuple[str, Any]]:
    """The same of each row, with the one column alone."""
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(file) as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            if field not in (names := table.schema_arrow.names):
                yield "has no column", dict.fromkeys(names)
            rows = (row for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]) for row in batch.to_pylist())
            yield from ((f"row {number} has no text in the column", row) for number, row in enumerate(rows))
    except pyarrow.ArrowException as error:
        raise UserError(f"{where} is not a sound parquet file ({error}); fetch it again or leave it out") from None


@functools.lru_cache(maxsize=1024)  # the tokenizer, training and held-out text each ask for the same files
def _prose(code: str) -> str:
    """The docstrings of a Python file in their order, blank lines between; empty if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            texts = list(_docstrings(ast.parse(code)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""
    return "\n\n".join(text.strip() for text in texts if text and not text.isspace())


def _docstrings(node: ast.AST) -> Iterator[str | None]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node)
    for block in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            yield from _docstrings(statement)


def _encodable(text: str) -> str:
    r"""The text with lone surrogates, which JSON's and Python's \u escapes can make, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _open(file: File) -> IO[bytes]:
    """The bytes of a file, decompressed as its name tells."""
    if not file.path.lower().endswith(".zst"):
        return file.filesystem.open(file.path, "rb", compression="infer")
    import pyarrow

    # fsspec's reader stops after the first frame, or where the file is cut off, without a word.
    return io.BufferedReader(pyarrow.CompressedInputStream(file.filesystem.open(file.path, "rb"), "zstd"))
