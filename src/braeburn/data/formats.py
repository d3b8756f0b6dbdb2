"""Documents in the bytes of a file: texts or pieces of them, rows of JSON lines or Parquet,
Python's docstrings.
"""

import ast
import codecs
import functools
import hashlib
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from braeburn.config import Source
from braeburn.data.streams import PEEK_BYTES, Member, require, shortened
from braeburn.errors import UserError

CHUNK_BYTES = 2**20  # of text that is decoded at once
PART_CHARACTERS = 2**20  # of a long text that are handed on at once
LONGEST_LINE_BYTES = 256 * 2**20
LONGEST_SPACE_CHARACTERS = 64 * 2**20  # before the first word of a document
LARGEST_PYTHON_BYTES = 64 * 2**20
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# Suffixes of what could be decoded as text, but is none to train on as it is.
_TABLES = (".csv", ".tsv")
_PARQUET_ROWS = 256  # of which no more are read at once, and fewer where they may be long
PARQUET_BATCH_BYTES = 2**30
_NULL_ROWS, _EMPTY_ROWS = "rows whose text is null", "rows without text"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or of a long one a part; the next then holds what follows, under the same name.

    Attributes:
        name: decides by its hash whether the text is held out.
        text: the text, or a part of it.
        is_continued: whether more of it follows.
    """

    name: str
    text: str
    is_continued: bool = False


@dataclass
class Reading:
    """Which documents of a source to read, and what was met on the way.

    Attributes:
        wanted: tells by a document's name whether it is to be read.
        passed_over: what holds no text, by kind, and how often it was met.
        separated: whether the source's separator was found.
    """

    wanted: Callable[[str], bool] = lambda name: True
    passed_over: Counter[str] = field(default_factory=Counter)
    separated: bool = False

    def pass_over(self, kind: str) -> None:
        """Counts one thing without text."""
        self.passed_over[kind] += 1


def format_of(source: Source, member: Member) -> str:
    """How to read a part of a file: the source's format, or where that is "auto" the one that the
    name tells.

    Raises:
        UserError: the content is of another kind than the name tells.
    """
    head = member.stream.peek(PEEK_BYTES)
    form: str = source.format
    if form != "auto":
        require(head, "Parquet" if form == "parquet" else "", member.where)
        return form
    form = ROWS.get(member.suffix, "text")
    require(head, "Parquet" if form == "parquet" else "", member.where)
    is_json_lines = form == "text" and _begins_with_a_json_object(head)
    if member.suffix == ".json":
        if not is_json_lines and head.strip():
            raise UserError(
                f"{member.where} is JSON, but not an object a line, which is what Braeburn reads; "
                f"write its objects a "
                f"line each into a file that ends in .jsonl, as with jq -c '.[]'"
            )
        return "jsonl"
    if is_json_lines:
        raise UserError(
            f"{member.where} holds JSON objects, which its name does not tell; name it .jsonl, or "
            f"set the source's format to 'jsonl', or to 'text' to take the JSON as it stands"
        )
    if member.suffix in _TABLES:
        raise UserError(
            f"{member.where} is a table, which Braeburn does not read; write its rows as JSON "
            f"lines or Parquet, or set the source's format to 'text' to take it as it stands"
        )
    return form


def _begins_with_a_json_object(head: bytes) -> bool:
    """Whether the first line is a JSON object; of a line longer than what is seen, whether it
    begins as one.
    """
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    line, newline, _ = head.partition(b"\n")
    if not line.startswith(b"{"):
        return False
    if not newline and len(head) > PEEK_BYTES // 2:
        return re.match(rb'\{\s*"', line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def rows(
    member: Member, form: str, source: Source, reading: Reading, fix: str
) -> Iterator[Document]:
    """The documents of JSON lines or Parquet, named by the hash of their text.

    Args:
        member: the file.
        form: "jsonl" or "parquet".
        source: names the field that holds the text.
        reading: which are wanted.
        fix: what to do about a missing field.

    Raises:
        UserError: a row cannot be read, or has no such field.
    """
    texts = (
        _jsonl(member, source.field, fix)
        if form == "jsonl"
        else _parquet(member, source.field, fix)
    )
    for text in texts:
        if text is None:
            reading.pass_over(_NULL_ROWS)
        elif not text or text.isspace():
            reading.pass_over(_EMPTY_ROWS)
        else:
            text = _encodable(text)
            name = hashlib.sha256(text.encode()).hexdigest()
            if reading.wanted(name):
                yield Document(name, text)


def _jsonl(member: Member, field_name: str, fix: str) -> Iterator[str | None]:
    """The text of each line in the member's range that is not blank, None for null."""
    first = position = _first_line(member)
    number = 0
    while member.holds(position) and (line := member.stream.readline(LONGEST_LINE_BYTES + 1)):
        position += len(line)
        number += 1
        where = _Line(member, first, number)
        if len(line) > LONGEST_LINE_BYTES:
            raise UserError(
                f"{where} is longer than {LONGEST_LINE_BYTES:,} bytes; cut it, or leave the file "
                f"out"
            )
        if line.isspace():
            continue
        row = _parsed(line, where, field_name)
        if not isinstance(row, dict):
            raise UserError(
                f"{where} is {_called(row)}, not an object with a field {field_name!r}; mend or "
                f"drop it"
            )
        if field_name not in row:
            raise UserError(f"{where} has no field {field_name!r} (it has: {_some(row)}); {fix}")
        text = row[field_name]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{where} holds {_called(text)} in the field {field_name!r}, not text; {fix}"
            )
        yield text


@dataclass(frozen=True, slots=True)
class _Line:
    """What to call a line in errors. Only then are the lines before a range counted."""

    member: Member
    first: int  # byte of the range's first line
    number: int  # of the line, from 1 in the range

    def __str__(self) -> str:
        before = 0
        if self.first:
            self.member.stream.seek(0)
            for start in range(0, self.first, CHUNK_BYTES):
                size = min(CHUNK_BYTES, self.first - start)
                before += self.member.stream.read(size).count(b"\n")
        return f"{self.member.where} line {before + self.number}"


def _first_line(member: Member) -> int:
    """The byte at which the first line of the member's range begins; the stream is there then."""
    if not member.start:
        return 0
    position = member.start - 1
    member.stream.seek(position)
    while line := member.stream.readline(CHUNK_BYTES):
        position += len(line)
        if line.endswith(b"\n"):
            break
    return position


def _parsed(line: bytes, where: _Line, field_name: str) -> Any:
    try:
        text = line.decode("utf-8-sig")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except (
            ValueError
        ):  # an integer of more digits than Python converts; it is not what is wanted of the row
            return json.loads(text, parse_int=float)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert the file or "
            f"drop the line"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg}) with a field {field_name!r}; mend or drop it"
        ) from None
    except RecursionError:
        raise UserError(
            f"{where} is JSON of too many levels, one within the other; mend or drop it"
        ) from None


def _called(value: Any) -> str:
    """What a JSON value is called."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _some(names: Any, most: int = 10) -> str:
    """The first of some names, each cut to a readable length."""
    listed = [str(name)[:60] for _, name in zip(range(most + 1), names, strict=False)]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _parquet(member: Member, field_name: str, fix: str) -> Iterator[str | None]:
    """The text of each row of the one column in the member's range, None for null."""
    import pyarrow
    import pyarrow.parquet

    if not member.stream.seekable():
        raise UserError(
            f"{member.where} is Parquet within another file; unpack it, and name it or its folder"
        )
    try:
        table = pyarrow.parquet.ParquetFile(member.stream)
        schema = table.schema_arrow
        if field_name not in schema.names:
            raise UserError(
                f"{member.where} has no column {field_name!r} (it has: {_some(schema.names)}); "
                f"{fix}"
            )
        held = schema.field(field_name).type
        held = held.value_type if pyarrow.types.is_dictionary(held) else held
        if str(held) not in (
            "string",
            "large_string",
            "string_view",
            "binary",
            "large_binary",
            "binary_view",
            "null",
        ):
            raise UserError(
                f"{member.where} holds {held} in the column {field_name!r}, not text; {fix}"
            )
        groups = _groups(table.metadata, member)
        number = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        rows_at_once = _rows_at_once(table.metadata, field_name)
        for batch in table.iter_batches(rows_at_once, row_groups=groups, columns=[field_name]):
            for value in batch.column(0):
                yield _cell(value, f"{member.where} row {number}")
                number += 1
    except (
        pyarrow.ArrowException,
        UnicodeDecodeError,
    ) as error:  # the second of names, as they are asked for
        raise UserError(
            f"{member.where} is not a sound parquet file ({shortened(error)}); fetch it again or "
            f"leave it out"
        ) from None


def _groups(metadata: Any, member: Member) -> range:
    """The row groups that begin in the member's range."""
    if not metadata.num_columns:
        return range(metadata.num_row_groups)
    begins = []
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(0)
        dictionary = column.dictionary_page_offset
        begins.append(dictionary if dictionary is not None else column.data_page_offset)
    held = [group for group, begin in enumerate(begins) if member.holds(begin)]
    return range(held[0], held[-1] + 1) if held else range(0)


def _rows_at_once(metadata: Any, column: str) -> int:
    """Rows to read at once: a text that is stored once may stand in many rows, each as long as all
    that is stored.
    """
    longest = 1
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for index in range(chunks.num_columns):
            if chunks.column(index).path_in_schema == column:
                longest = max(longest, chunks.column(index).total_uncompressed_size)
    return max(4, min(_PARQUET_ROWS, PARQUET_BATCH_BYTES // longest))


def _cell(value: Any, where: str) -> str | None:
    """A Parquet value as text. Some programs write text as bytes without saying what they are."""
    try:
        held = value.as_py()
        return held.decode() if isinstance(held, bytes) else held
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert the column or "
            f"drop the row"
        ) from None


def python(member: Member, form: str, reading: Reading) -> Iterator[Document]:
    """A Python file's code or its docstrings, if it is UTF-8."""
    if not reading.wanted(member.name):
        return
    data = member.stream.read(LARGEST_PYTHON_BYTES + 1)
    if len(data) > LARGEST_PYTHON_BYTES:
        raise UserError(
            f"{member.where} is larger than {LARGEST_PYTHON_BYTES:,} bytes; leave it out"
        )
    try:
        code = io.IncrementalNewlineDecoder(None, translate=True).decode(
            data.decode("utf-8-sig"), final=True
        )
    except UnicodeDecodeError:
        reading.pass_over("Python files that are not UTF-8")
        return
    text = _encodable(_prose(code)) if form == "python-prose" else code
    if text and not text.isspace():
        yield Document(member.name, text)


@functools.lru_cache(
    maxsize=1024
)  # the tokenizer, training and held-out text each ask for the same files
def _prose(code: str) -> str:
    """The docstrings of a Python file in their order, blank lines between; empty if it does not
    parse.
    """
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
    r"""The text with lone surrogates, which JSON's and Python's \u escapes can make, as question
    marks.
    """
    return text.encode("utf-8", "replace").decode()


def text(member: Member, separator: str | None, reading: Reading) -> Iterator[Document]:
    """A text as one document, or the pieces of it between separators; of long ones a part at a
    time.

    Newlines are as Python reads them: "\\r\\n" and "\\r" become "\\n", in the separator too.

    Raises:
        UserError: it is not UTF-8.
    """
    if separator is None:
        if reading.wanted(member.name):
            pieces = ((chunk, False) for chunk in _decoded(member))
            yield from _documents(pieces, lambda index: member.name, member, reading)
        return
    separator = _newlines(separator)
    yield from _documents(
        _separated(_decoded(member), separator, reading),
        lambda index: f"{member.name}#{index}",
        member,
        reading,
    )


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(member: Member) -> Iterator[str]:
    """The text of a stream, a chunk at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    while True:
        data = member.stream.read(CHUNK_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            chunk = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = position - pending + error.start
            raise UserError(
                f"{member.where} is not UTF-8 ({error.reason} at byte {at}); convert it or leave "
                f"it out"
            ) from None
        position += len(data)
        yield newlines.decode(chunk, final=not data)
        if not data:
            return


def _separated(
    chunks: Iterator[str], separator: str, reading: Reading
) -> Iterator[tuple[str, bool]]:
    """The text between separators in parts, each with whether a separator or the end follows."""
    rest = ""
    # What the next chunk may complete to a separator.
    keep = len(separator) - 1
    for chunk in chunks:
        *pieces, rest = (rest + chunk).split(separator)
        reading.separated = reading.separated or bool(pieces)
        for piece in pieces:
            yield piece, True
        if len(rest) > keep:
            sure = len(rest) - keep
            yield rest[:sure], False
            rest = rest[sure:]
    yield rest, True


def _documents(
    pieces: Iterator[tuple[str, bool]],
    name_of: Callable[[int], str],
    member: Member,
    reading: Reading,
) -> Iterator[Document]:
    """Documents of pieces of text, each with whether it ends one; a long document is handed on in
    parts.
    """
    index = 0
    held: list[str] = []
    size = 0
    begun = False  # whether a part of the document was handed on

    def finished() -> Iterator[Document]:
        joined = "".join(held)
        if begun or (joined and not joined.isspace()):
            if begun or reading.wanted(name_of(index)):
                yield Document(name_of(index), joined)
        elif name_of(index) == member.name:
            reading.pass_over("files without text")

    for piece, ends in pieces:
        held.append(piece)
        size += len(piece)
        if ends:
            yield from finished()
            held, size, begun = [], 0, False
            index += 1
        elif size >= PART_CHARACTERS:
            joined = "".join(held)
            if begun or not joined.isspace():
                if reading.wanted(name_of(index)):
                    yield Document(name_of(index), joined, is_continued=True)
                    begun = True
                held, size = [], 0
            elif size > LONGEST_SPACE_CHARACTERS:
                raise UserError(
                    f"{member.where} holds {size:,} characters of white space in a row; leave it "
                    f"out"
                )
    if held or begun:
        yield from finished()
