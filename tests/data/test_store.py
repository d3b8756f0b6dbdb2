import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.data.corpus import Document
from braeburn.data.store import TokenStore, build_store
from braeburn.data.tokenizer import train
from braeburn.errors import UserError

TOKENIZER = train(["some words to merge " * 20], 280)
TEXTS = [f"some words {i} " * (i % 7 + 1) for i in range(60)]
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
TOKENS = np.concatenate(TOKENIZER.encode_documents(TEXTS))
STARTS = np.flatnonzero(TOKENIZER.begin == TOKENS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build_store(tmp_path / "store", DOCUMENTS, TOKENIZER, shard_tokens=500)
    return tmp_path / "store"


@pytest.mark.parametrize("shard_tokens", [7, 500, 10**6])
def test_holds_what_was_written(tmp_path: Path, shard_tokens: int) -> None:
    build_store(tmp_path / "s", DOCUMENTS, TOKENIZER, shard_tokens=shard_tokens)
    store = TokenStore.open(tmp_path / "s", TOKENIZER.hash)
    assert (store.tokens, store.documents) == (len(TOKENS), len(TEXTS))
    assert store.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert np.array_equal(store.read(0, store.tokens + 1), [*TOKENS, TOKENIZER.begin])
    assert np.array_equal(store.document_starts(0, store.tokens), STARTS)
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    assert all(shard["tokens"] == shard_tokens for shard in manifest["shards"][:-1])


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_range_across_shards(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "ranges"
    if not directory.exists():
        build_store(directory, DOCUMENTS, TOKENIZER, shard_tokens=97)
    store = TokenStore.open(directory, TOKENIZER.hash)
    start = data.draw(st.integers(0, store.tokens + 1))
    stop = data.draw(st.integers(start, store.tokens + 1))
    read = store.read(start, stop)
    assert read.dtype == np.int32
    assert np.array_equal(read, [*TOKENS, TOKENIZER.begin][start:stop])
    assert np.array_equal(store.document_starts(start, stop), [s for s in STARTS if start <= s < stop])


def test_ranges_outside_are_refused(directory: Path) -> None:
    store = TokenStore.open(directory, TOKENIZER.hash)
    for start, stop in ((-1, 3), (0, store.tokens + 2), (5, 4)):
        with pytest.raises(IndexError):
            store.read(start, stop)


def test_large_vocabularies_take_uint32(tmp_path: Path) -> None:
    tokenizer = train(["ab"], 300)
    tokenizer.vocab_size = 2**16 + 1
    build_store(tmp_path / "s", DOCUMENTS, tokenizer)
    store = TokenStore.open(tmp_path / "s", tokenizer.hash)
    assert (tmp_path / "s/tokens-00000.bin").stat().st_size == 4 * store.tokens
    assert np.array_equal(store.read(0, store.tokens), np.concatenate(tokenizer.encode_documents(TEXTS)))


def test_empty_store(tmp_path: Path) -> None:
    build_store(tmp_path / "s", [], TOKENIZER)
    store = TokenStore.open(tmp_path / "s", TOKENIZER.hash)
    assert (store.tokens, store.documents) == (0, 0)
    assert store.read(0, 1).tolist() == [TOKENIZER.begin]


def test_pickles_without_its_maps(directory: Path) -> None:
    store = TokenStore.open(directory, TOKENIZER.hash)
    expected = store.read(0, store.tokens)
    data = pickle.dumps(store)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data).read(0, store.tokens), expected)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_corruption_is_found(directory: Path, name: str, harm: str) -> None:
    TokenStore.open(directory, TOKENIZER.hash)  # records the sound files
    path = directory / name
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(UserError, match=rf"{name}.*delete the folder '{directory}' and it will be built again"):
        TokenStore.open(directory, TOKENIZER.hash)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"format_version": 0}'])
def test_corrupt_manifest(directory: Path, content: str | None) -> None:
    path = directory / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json.*delete the folder"):
        TokenStore.open(directory, TOKENIZER.hash)


def test_another_tokenizer(directory: Path) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        TokenStore.open(directory, train(["x"], 300).hash)


def test_files_are_hashed_once(directory: Path) -> None:
    TokenStore.open(directory, TOKENIZER.hash)
    path = directory / "tokens-00000.bin"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    TokenStore.open(directory, TOKENIZER.hash)  # same size and time: trusted
    path.touch()
    with pytest.raises(UserError, match="checksum"):
        TokenStore.open(directory, TOKENIZER.hash)


KILLED = """
import sys, time
from pathlib import Path
from braeburn.data import store
from braeburn.data.corpus import Document
from braeburn.data.tokenizer import Tokenizer
store.BATCH_BYTES = 10
def documents():
    for i in range(1000):
        yield Document(str(i), "some words to merge " * 2000)
        if i == 5:
            print("midway", flush=True)
            time.sleep(60)
store.build_store(Path(sys.argv[1]), documents(), Tokenizer.load(sys.argv[2]))
"""


def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    directory = tmp_path / "cache/store"
    arguments = [sys.executable, "-c", KILLED, str(directory), str(tmp_path / "tokenizer.json")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"midway\n"
        process.send_signal(signal.SIGKILL)
    assert not directory.exists()
    (left,) = directory.parent.iterdir()
    build_store(directory, DOCUMENTS, TOKENIZER)
    assert TokenStore.open(directory, TOKENIZER.hash).tokens == len(TOKENS)
    assert left.exists()  # it may belong to a living process
    old = time.time() - 7200
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    build_store(directory, DOCUMENTS, TOKENIZER)
    assert list(directory.parent.iterdir()) == [directory]


def test_concurrent_builders_agree(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=build_store, args=(tmp_path / "s", DOCUMENTS, TOKENIZER), kwargs={"shard_tokens": 100})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = TokenStore.open(tmp_path / "s", TOKENIZER.hash)
    assert np.array_equal(store.read(0, store.tokens), TOKENS)
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]


def test_errors_of_the_documents_pass_and_leave_nothing(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        yield from DOCUMENTS
        raise UserError("a bad file")

    with pytest.raises(UserError, match="a bad file"):
        build_store(tmp_path / "cache/s", documents(), TOKENIZER)
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full answers every write as a full disk does.
    monkeypatch.setattr("braeburn.data.store._shard_path", lambda directory, kind, index: Path("/dev/full"))
    with pytest.raises(UserError, match=r"cannot write .*No space left .*data\.cache"):
        build_store(tmp_path / "cache/s", DOCUMENTS, TOKENIZER)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*data\.cache"):
        build_store(tmp_path / "cache/s", DOCUMENTS, TOKENIZER)
