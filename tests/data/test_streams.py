"""A file is what its name tells, all of it, or it is refused by name."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import warnings
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from braeburn.config import Source
from braeburn.data import formats, streams
from braeburn.data.corpus import Report, documents
from braeburn.errors import UserError

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}
JSON_LINES = b'{"text": "one"}\n{"text": "two"}\n'


def read(path: Path, **fields: object) -> list[str]:
    source = Source(paths=(str(path),), **fields)  # type: ignore[arg-type]
    return [document.text for document in documents("books", source)]


def refusal(path: Path, **fields: object) -> str:
    with pytest.raises(UserError) as error:
        read(path, **fields)
    assert str(error.value).startswith(f"data.sources.books: '{path}'")
    return str(error.value)


def zipped(path: Path, members: dict[str, bytes], folders: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in folders:
            archive.mkdir(folder)
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        folder = tarfile.TarInfo("corpus")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


MEMBERS = {
    "corpus/a.txt": b"apple\n",
    "corpus/b.jsonl": JSON_LINES,
    "corpus/c.jsonl.gz": gzip.compress(b'{"text": "three"}\n'),
    "corpus/.DS_Store": b"\0\1\2",
    "__MACOSX/._a.txt": b"\0\5",
}
TEXTS = ["apple\n", "one", "two", "three"]


def test_all_members_of_a_zip_are_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "corpus.zip", MEMBERS, folders=("corpus/",))
    assert read(path) == TEXTS
    found = documents("books", Source(paths=(str(path),)))
    assert next(iter(found)).name == "corpus.zip/corpus/a.txt"


def test_the_split_is_by_member(tmp_path: Path) -> None:
    path = zipped(tmp_path / "corpus.zip", {f"{i}.txt": f"text {i}".encode() for i in range(200)})
    source = Source(paths=(str(path),))
    train = [d.name for d in documents("books", source, held_out=False, fraction=0.2)]
    held_out = [d.name for d in documents("books", source, held_out=True, fraction=0.2)]
    assert len(train) + len(held_out) == 200
    assert 15 < len(held_out) < 70


@pytest.mark.parametrize(
    "name", ["c.tar", "c.tar.gz", "c.tgz", "c.tar.bz2", "c.tbz2", "c.tar.xz", "c.tar.zst"]
)
def test_all_members_of_a_tar_are_read(tmp_path: Path, name: str) -> None:
    data = tarred(MEMBERS)
    compress = {"c.tgz": gzip.compress, "c.tbz2": bz2.compress, "c.tar": bytes}.get(name)
    path = tmp_path / name
    path.write_bytes((compress or COMPRESS[name.rpartition(".")[2]])(data))
    assert read(path) == TEXTS


def test_links_in_a_tar_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("apple")
    (tmp_path / "b.txt").symlink_to("a.txt")
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
        archive.add(tmp_path / "b.txt", "b.txt")
    report = Report()
    source = Source(paths=(str(tmp_path / "c.tar"),))
    assert [d.text for d in documents("books", source, report=report)] == ["apple"]
    assert report.passed_over == {"links in archives": 1}


@pytest.mark.parametrize("at", [300, 512 * 3 + 20, 512 * 5])
def test_a_damaged_header_of_a_tar_is_not_taken_for_its_end(tmp_path: Path, at: int) -> None:
    data = bytearray(tarred({f"{i}.txt": f"text {i}".encode() for i in range(4)}))
    data[at : at + 8] = b"\xff" * 8
    (tmp_path / "c.tar").write_bytes(data)
    assert "truncated or corrupt" in refusal(tmp_path / "c.tar") or "rename it" in refusal(
        tmp_path / "c.tar"
    )


@pytest.mark.parametrize("size", [100, 512 * 3, 512 * 3 + 100, 512 * 4 + 3, 512 * 5])
def test_a_tar_that_is_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "c.tar").write_bytes(
        tarred({f"{i}.txt": f"text {i}".encode() for i in range(4)})[:size]
    )
    assert "c.tar" in refusal(tmp_path / "c.tar")


def test_empty_broken_and_locked_archives_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {})
    assert "holds no file" in refusal(path)
    path = zipped(tmp_path / "a.zip", {}, folders=("only/",))
    assert "holds no file" in refusal(path)
    path.write_bytes(b"")
    assert "is empty, though its name says zip" in refusal(path)
    path.write_bytes(b"no archive")
    assert "is something else, though its name says zip" in refusal(path)
    whole = zipped(path, MEMBERS).read_bytes()
    path.write_bytes(whole[:-30])
    assert "truncated or corrupt" in refusal(path)
    damaged = bytearray(whole)
    damaged[45:48] = b"\xff\xff\xff"
    path.write_bytes(damaged)
    assert "truncated or corrupt" in refusal(path)
    locked = bytearray(whole)
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(header) + flags] |= 1
    path.write_bytes(locked)
    assert "encrypted" in refusal(path)
    path = tmp_path / "a.tar"
    path.write_bytes(tarred({}))
    assert "holds no file" in refusal(path)


def test_an_archive_in_an_archive_is_refused(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", MEMBERS).read_bytes()
    outer = zipped(tmp_path / "outer.zip", {"a/inner.zip": inner})
    assert "member 'a/inner.zip' is an archive within an archive; unpack" in refusal(outer)
    (tmp_path / "inner.zip.gz").write_bytes(gzip.compress(inner))
    assert "compressed zip archive" in refusal(tmp_path / "inner.zip.gz")


def test_parquet_in_an_archive(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    assert read(zipped(tmp_path / "a.zip", {"a.parquet": data})) == ["one", "two"]
    (tmp_path / "a.tar").write_bytes(tarred({"a.parquet": data}))
    assert "Parquet within another file; unpack it" in refusal(tmp_path / "a.tar")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(data))
    assert "Parquet within another file; unpack it" in refusal(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_streams_one_behind_the_other_are_all_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
    assert read(path) == ["one two"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("rest", [b"garbage", b"\x1f\x8b\x08garbage", b"BZh9garbage"])
def test_what_follows_a_stream_is_not_passed_over(tmp_path: Path, suffix: str, rest: bytes) -> None:
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one ") + rest)
    assert "truncated or corrupt" in refusal(path)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("cut", [0, 3, 12, -1])
def test_a_stream_that_is_cut_short_is_refused(tmp_path: Path, suffix: str, cut: int) -> None:
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(range(32, 127)) * 20)[:cut])
    assert f"a.txt.{suffix}" in refusal(path)


def test_zeros_behind_a_stream_are_padding(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + bytes(700))
    assert read(tmp_path / "a.txt.gz") == ["one "]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", gzip.compress(b"one"), "is a gzip file, which its name does not tell; rename it"),
        ("a.jsonl", zstandard.compress(JSON_LINES), "is a zstd file, which its name does not tell"),
        ("a", tarred({"a.txt": b"one"}), "is a tar file, which its name does not tell"),
        ("a.gz", tarred({"a.txt": b"one"}), "is a tar file, though its name says gzip"),
        (
            "a.gz",
            gzip.compress(tarred({"a.txt": b"one"})),
            "is a tar file, which its name does not tell",
        ),
        ("a.txt.gz", b"one", "is something else, though its name says gzip"),
        ("a.txt.bz2", gzip.compress(b"one"), "is a gzip file, though its name says bzip2"),
        ("a.tar.gz", gzip.compress(b"one"), "is something else, though its name says tar"),
        ("a.parquet", JSON_LINES, "is something else, though its name says Parquet"),
        ("a.txt", b"PAR1....PAR1", "is a Parquet file, which its name does not tell"),
        ("a.txt", b"%PDF-1.7", "is a PDF file, which its name does not tell"),
        (
            "a.txt",
            JSON_LINES,
            "holds JSON objects, which its name does not tell; name it .jsonl, or set",
        ),
        (
            "c4.json.txt.gz",
            gzip.compress(JSON_LINES),
            "holds JSON objects, which its name does not tell",
        ),
        ("a.json", b'[\n{"text": "one"}]', "is JSON, but not an object a line"),
        ("a.json", b'{\n "text": "one"\n}', "is JSON, but not an object a line"),
        ("a.csv", b"id,text\n1,one\n", "is a table, which Braeburn does not read"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else ""
    ),  # not the compressed bytes, which hold the time
)
def test_where_name_and_content_disagree_both_are_said(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert sentence in refusal(tmp_path / name)


def test_json_lines_named_json_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000.json.gz"
    path.write_bytes(gzip.compress(JSON_LINES))
    assert read(path) == ["one", "two"]


def test_json_as_text_is_there_for_who_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(JSON_LINES)
    assert read(tmp_path / "a.txt", format="text") == [JSON_LINES.decode()]
    (tmp_path / "b.txt").write_text("{braces} that are no JSON\n")
    assert read(tmp_path / "b.txt") == ["{braces} that are no JSON\n"]
    (tmp_path / "c.txt").write_text("BZh is how a bzip2 file begins")
    assert read(tmp_path / "c.txt") == ["BZh is how a bzip2 file begins"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "EXPANSION_FREE_BYTES", 2**18)
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(COMPRESS[suffix](b"a" * 2**24))
    assert "decompresses to more than 200 times its size" in refusal(path)
    path.write_bytes(COMPRESS[suffix](b"a" * 2**17))
    assert read(path) == ["a" * 2**17]


def test_a_bomb_in_a_zip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "EXPANSION_FREE_BYTES", 2**18)
    path = zipped(tmp_path / "a.zip", {"a.txt": b"a" * 2**22})
    assert "member 'a.txt' decompresses to more than 200 times its size" in refusal(path)


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSON_LINES + json.dumps({"text": "x" * 1000}).encode())
    assert "line 3 is longer than 1,000 bytes" in refusal(path)


def test_long_white_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PART_CHARACTERS", 100)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 100)
    monkeypatch.setattr(formats, "LONGEST_SPACE_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text(" " * 5000 + "x")
    assert "white space in a row" in refusal(tmp_path / "a.txt")


def test_reading_an_archive_leaves_no_file_open(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", MEMBERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        found = documents("books", Source(paths=(str(path),)))
        next(iter(found))
        found.close()  # type: ignore[attr-defined]
