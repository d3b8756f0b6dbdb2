"""Damaged files of every kind give documents or one sentence, and nothing else."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from braeburn.config import Source
from braeburn.data.corpus import documents
from braeburn.errors import UserError

LINES = b"".join(
    json.dumps({"id": i, "text": f"text {i} é " * 5, "more": [{"a": None}]}).encode() + b"\n"
    for i in range(30)
)


def parquet() -> bytes:
    data = io.BytesIO()
    table = pyarrow.table({"text": [f"text {i} " * 5 for i in range(300)], "id": list(range(300))})
    pyarrow.parquet.write_table(table, data, row_group_size=100)
    return data.getvalue()


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "apple " * 50)
        archive.writestr("b.jsonl", LINES)
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {"a.txt": b"apple " * 50, "é" * 120 + ".jsonl": LINES}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.json": lambda: LINES,
    "a.txt": lambda: "one\n\ntwo é 四\r\n".encode() * 20,
    "a.parquet": parquet,
    "a.zip": zipped,
    "a.tar": tarred,
    "a.tar.gz": lambda: gzip.compress(tarred()),
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.jsonl.bz2": lambda: bz2.compress(LINES),
    "a.jsonl.xz": lambda: lzma.compress(LINES),
    "a.jsonl.lzma": lambda: lzma.compress(LINES, lzma.FORMAT_ALONE),
    "a.jsonl.zst": lambda: zstandard.compress(LINES),
}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few changes: flipped, cut, repeated, swapped for odd ones."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[at : at + chance.randint(1, 60)]
        elif kind == 2:
            changed[at:at] = changed[max(0, at - 40) : at]
        elif kind == 3:
            changed[at : at + 4] = chance.choice(
                [b"\xff" * 4, b"\0" * 4, b'{"[', b"\x7f\xff\xff\xff", b"1" * 5000]
            )
        else:
            del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_documents_or_one_sentence(name: str, tmp_path: Path) -> None:
    whole = FILES[name]()
    chance = random.Random(name)
    path = tmp_path / name
    for separator in (None, "\n\n"):
        source = Source(paths=(str(path),), separator=separator)
        for _ in range(40):
            path.write_bytes(mutated(whole, chance))
            try:
                read = list(documents("books", source))
            except UserError as error:
                assert str(error).startswith("data.sources.books")
                assert len(str(error)) < 1000
            else:
                assert all(isinstance(document.text, str) for document in read)
