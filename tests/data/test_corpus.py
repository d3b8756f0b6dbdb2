import bz2
import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from braeburn.config import Source
from braeburn.data.corpus import documents, files, is_held_out
from braeburn.errors import UserError

TEXTS = ["one\nline", "zwei  — drei", "四 🍏\r\n", "one\nline"]


def read(source: Source, **split: object) -> list[str]:
    return [document.text for document in documents("books", source, **split)]


def jsonl(field: str = "text") -> bytes:
    return (
        b"\n".join(json.dumps({"id": i, field: text}).encode() for i, text in enumerate(TEXTS))
        + b"\n"
    )


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_jsonl_compressed_or_not(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](jsonl()))
    assert read(Source(paths=(str(path),))) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("a.txt" + suffix)
    path.write_bytes(COMPRESS[suffix](TEXTS[2].encode()))
    assert read(Source(paths=(str(path),))) == [TEXTS[2].replace("\r\n", "\n")]


def test_zstd_of_many_frames_is_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(line + b"\n") for line in jsonl().splitlines()))
    assert read(Source(paths=(str(path),))) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compression_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("a.jsonl" + suffix)
    path.write_bytes(COMPRESS[suffix](jsonl() * 1000)[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl.*truncated or corrupt"):
        read(Source(paths=(str(path),)))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS * 200, "n": range(800)}), path)
    assert read(Source(paths=(str(path),), field="body")) == TEXTS * 200
    with pytest.raises(
        UserError, match=r"no column 'text' \(it has: body, n\); set data\.sources\.books\.field"
    ):
        read(Source(paths=(str(path),)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a sound parquet file"):
        read(Source(paths=(str(path),), field="body"))


def test_separator_cuts_a_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n---\n\n---\nthree")
    found = list(documents("books", Source(paths=(str(tmp_path),), separator="\n---\n")))
    assert [(d.name, d.text) for d in found] == [
        ("a.txt#0", "one"),
        ("a.txt#1", "two"),
        ("a.txt#3", "three"),
    ]


def test_fsspec_url() -> None:
    with fsspec.open("memory://corpus/b.jsonl.gz", "wb", compression="gzip") as file:
        file.write(jsonl())
    with fsspec.open("memory://corpus/a.txt", "wb") as file:
        file.write(b"apple")
    assert read(Source(paths=("memory://corpus",))) == ["apple", *TEXTS]
    assert read(Source(paths=("memory://corpus/*.txt",))) == ["apple"]


def test_globs_folders_and_duplicates(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", ".git/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    found = files("books", Source(paths=(str(tmp_path), f"{tmp_path}/*.txt", f"{tmp_path}/a.txt")))
    assert [file.name for file in found] == ["a.txt", "b.txt", "deep/c.txt"]
    found = files("books", Source(paths=(f"{tmp_path}/**/*.txt",)))
    assert [file.name for file in found] == [".git/d.txt", "a.txt", "b.txt", "deep/c.txt"]


def test_errors_name_the_source_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data\.sources\.books\.paths: no file matches '.*nothing\*'; name "
    ):
        read(Source(paths=(f"{tmp_path}/nothing*",)))
    with pytest.raises(UserError, match=r"^data\.sources\.books\.paths: "):
        read(Source(paths=("nosuchprotocol://x",)))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"body": "y"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl' line 3 has no field 'text' \(it has: body\)"):
        read(Source(paths=(str(path),)))
    path.write_text('{"text": "x"}\n{"text": ')
    with pytest.raises(UserError, match=r"a\.jsonl' line 2 is not JSON .*'text'"):
        read(Source(paths=(str(path),)))
    path.write_text(" \n")
    with pytest.raises(UserError, match="empty corpus"):
        read(Source(paths=(str(path),)))
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt' is not UTF-8"):
        read(Source(paths=(f"{tmp_path}/*.txt",)))


def test_split_covers_all_and_keeps_duplicates_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i % 500}"}) + "\n" for i in range(1000)))
    source = Source(paths=(str(path),))
    train = read(source, held_out=False, fraction=0.2)
    held_out = read(source, held_out=True, fraction=0.2)
    assert sorted(train + held_out) == sorted(read(source))
    assert not set(train) & set(held_out)
    assert 120 < len(held_out) < 280
    with pytest.raises(UserError, match=r"held out; .*lower data\.held_out"):
        read(source, held_out=False, fraction=1.0)


def test_lone_surrogates_become_encodable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}')
    assert read(Source(paths=(str(path),))) == ["a?b"]


def test_python_formats_name_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Module.\n\n  Indented."""\ndef f():\n    "Does \\ud800 f."\n    return "\\d"\n'
    )
    (tmp_path / "b.py").write_text("x = 1\n" * 6000)
    (tmp_path / "c.py").write_bytes(b"# \xff\n")
    (tmp_path / "d.txt").write_text("not Python")
    (tmp_path / "e.py").write_text("print 'Python 2'")
    paths = (str(tmp_path),)
    prose = list(documents("code", Source(paths=paths, format="python-prose")))
    assert [(d.name, d.text) for d in prose] == [("a.py", "Module.\n\nIndented.\n\nDoes ? f.")]
    assert [d.name for d in documents("code", Source(paths=paths, format="python-code"))] == [
        "a.py",
        "b.py",
        "e.py",
    ]
    assert [d.name for d in documents("code", Source(paths=paths, format="python-long"))] == [
        "b.py"
    ]


def test_standard_library_holds_out_the_same_files() -> None:
    source = Source(format="python-code")
    names = [file.name for file in files("code", source)]
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "site-packages"} & set(name.split("/"))]
    held_out = {d.name for d in documents("code", source, held_out=True, fraction=0.02)}
    assert held_out == {name for name in names if is_held_out(name, 0.02)} & held_out
    long = {
        d.name
        for d in documents("long", Source(format="python-long"), held_out=True, fraction=0.02)
    }
    assert long <= held_out
