"""Rows and pieces of text: what is refused, what is passed over and counted, and where texts are
cut.
"""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Source
from braeburn.data.corpus import Report, documents
from braeburn.errors import UserError


def read(path: Path, report: Report | None = None, **fields: object) -> list[str]:
    source = Source(paths=(str(path),), **fields)  # type: ignore[arg-type]
    return [document.text for document in documents("books", source, report=report)]


def lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def table(path: Path, values: list, kind: pyarrow.DataType | None = None) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), path)
    return path


def test_rows_that_are_null_or_empty_are_counted_and_passed_over(tmp_path: Path) -> None:
    report = Report()
    rows = [{"text": text} for text in ("one", None, "", " \n", None, "two")]
    assert read(lines(tmp_path / "a.jsonl", *rows), report) == ["one", "two"]
    assert report.passed_over == {"rows whose text is null": 2, "rows without text": 2}
    report = Report()
    assert read(table(tmp_path / "a.parquet", ["one", None, "", "two"]), report) == ["one", "two"]
    assert report.passed_over == {"rows whose text is null": 1, "rows without text": 1}
    with pytest.raises(UserError, match=r"hold no text \(3 rows whose text is null\)"):
        read(table(tmp_path / "b.parquet", [None] * 3))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"body": "x"}, "has no field 'text' (it has: body); set data.sources.books.field"),
        ({"text": 3}, "holds a number in the field 'text', not text"),
        ({"text": ["x"]}, "holds a list in the field 'text', not text"),
        ({"text": {"a": 1}}, "holds an object in the field 'text', not text"),
        ({"text": True}, "holds a truth value in the field 'text', not text"),
        ('{"text": ' + "1" * 5001 + "}", "holds a number in the field 'text', not text"),
        (["x"], "is a list, not an object with a field 'text'"),
        ("3", "is a number, not an object"),
        ("null", "is null, not an object"),
        ('{"text": ', "is not JSON"),
        (
            '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "is JSON of too many levels, one within the other",
        ),
        ({str(i): i for i in range(1000)}, "(it has: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"),
    ],
    ids=range(12),
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: object, reason: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "one"}, row)
    with pytest.raises(UserError) as error:
        read(path)
    assert f"data.sources.books: '{path}' line 2 " in str(error.value)
    assert reason in str(error.value)


def test_a_long_integer_in_another_field_does_not_matter(tmp_path: Path) -> None:
    assert read(lines(tmp_path / "a.jsonl", '{"id": ' + "1" * 5001 + ', "text": "one"}')) == ["one"]


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl' line 2 is not UTF-8 \(invalid start byte at byte 10\)"
    ):
        read(tmp_path / "a.jsonl")


def test_a_parquet_column_of_bytes_is_read_as_utf_8(tmp_path: Path) -> None:
    assert read(table(tmp_path / "a.parquet", ["eins", "zwölf".encode()], pyarrow.binary())) == [
        "eins",
        "zwölf",
    ]
    with pytest.raises(UserError, match=r"b\.parquet' row 1 is not UTF-8"):
        read(table(tmp_path / "b.parquet", [b"one", b"\xff"], pyarrow.binary()))


def test_a_damaged_name_in_a_parquet_file_is_refused(tmp_path: Path) -> None:
    # pyarrow decodes names when they are asked for, with Python's own error.
    path = table(tmp_path / "a.parquet", ["one", "two"])
    sound, places = path.read_bytes(), []
    while (at := sound.find(b"text", places[-1] + 1 if places else 0)) >= 0:
        places.append(at)
    assert len(places) >= 2  # in the schema and in the column's description
    for at in places:
        path.write_bytes(sound[:at] + b"t\xe5xt" + sound[at + 4 :])
        with pytest.raises(
            UserError, match=r"a\.parquet' (is not a sound parquet file|has no column)"
        ):
            read(path)


def test_other_kinds_of_parquet_columns(tmp_path: Path) -> None:
    assert read(
        table(
            tmp_path / "a.parquet",
            ["a", "b", "a"],
            pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        )
    )
    assert read(table(tmp_path / "b.parquet", ["a"], pyarrow.large_string())) == ["a"]
    with pytest.raises(
        UserError, match=r"c\.parquet' holds int64 in the column 'text', not text; set "
    ):
        read(table(tmp_path / "c.parquet", [1, 2]))
    with pytest.raises(
        UserError, match=r"d\.parquet' holds list<.*> in the column 'text', not text"
    ):
        read(table(tmp_path / "d.parquet", [["a"], ["b"]]))


def test_a_text_stored_once_for_many_rows_does_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braeburn.data.formats.PARQUET_BATCH_BYTES", 2**20)
    path = table(tmp_path / "a.parquet", ["x" * 100_000] * 300)
    assert path.stat().st_size < 20_000
    before = pyarrow.total_allocated_bytes()
    stream = documents("books", Source(paths=(str(path),)))
    assert len(next(stream).text) == 100_000
    assert pyarrow.total_allocated_bytes() - before < 4 * 2**20
    assert sum(1 for _ in stream) == 299


NEWLINES = {"unix": "\n", "dos": "\r\n", "mac": "\r"}


@pytest.mark.parametrize("written", NEWLINES)
@pytest.mark.parametrize("asked", NEWLINES)
def test_a_separator_is_found_whatever_the_newlines(
    tmp_path: Path, written: str, asked: str
) -> None:
    newline = NEWLINES[written]
    (tmp_path / "a.txt").write_bytes(f"one{newline}more{newline}{newline}two{newline}".encode())
    report = Report()
    assert read(tmp_path / "a.txt", report, separator=2 * NEWLINES[asked]) == ["one\nmore", "two\n"]
    assert not report.separator_missing


def test_a_separator_that_is_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    report = Report()
    assert read(tmp_path / "a.txt", report, separator="\n---\n") == ["one\ntwo"]
    assert report.separator_missing


def test_rows_keep_the_newlines_that_they_were_given(tmp_path: Path) -> None:
    assert read(lines(tmp_path / "a.jsonl", {"text": "one\r\ntwo"})) == ["one\r\ntwo"]


@pytest.mark.parametrize("form", ["python-code", "text"])
def test_python_and_text_have_the_same_newlines(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    assert read(tmp_path / "a.py", format=form) == ["x = 1\ny = 2\n"]


TEXT = st.text(st.sampled_from(list("ab-\r\n é🍏")), max_size=60)


@given(
    text=TEXT,
    separator=st.sampled_from([None, "-", "--", "aba", "\n", "\n\n", "\r\n"]),
    chunk=st.integers(1, 9),
    part=st.integers(1, 9),
)
@settings(max_examples=400, deadline=None)
def test_a_text_in_parts_is_the_text_as_a_whole(
    text: str,
    separator: str | None,
    chunk: int,
    part: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "parts.txt").write_bytes(text.encode())
    source = Source(paths=(str(folder / "parts.txt"),), separator=separator, format="text")
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    pieces = [normal] if separator is None else normal.split(separator.replace("\r\n", "\n"))
    expected = [piece for piece in pieces if piece and not piece.isspace()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("braeburn.data.formats.CHUNK_BYTES", chunk)
        patch.setattr("braeburn.data.formats.PART_CHARACTERS", part)
        joined: list[str] = []
        continues = False
        names = []
        try:
            for document in documents("books", source):
                if continues:
                    joined[-1] += document.text
                    assert document.name == names[-1]
                else:
                    joined.append(document.text)
                    names.append(document.name)
                continues = document.is_continued
        except UserError:
            assert not expected
    assert joined == expected
    assert not continues
    assert len(set(names)) == len(names)


def test_a_byte_that_is_not_utf_8_is_told_by_its_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braeburn.data.formats.CHUNK_BYTES", 7)
    (tmp_path / "a.txt").write_bytes("ä".encode() * 50 + b"\xff" + b"x" * 30)
    with pytest.raises(UserError, match=r"a\.txt' is not UTF-8 \(invalid start byte at byte 100\)"):
        read(tmp_path / "a.txt")
