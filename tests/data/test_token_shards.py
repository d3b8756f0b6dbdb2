import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.data.corpus import Document
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import Tokenizer, train
from braeburn.errors import UserError
from support import damage

TOKENIZER = train(["some words to merge " * 20], 280)
TEXTS = [f"some words {i} " * (i % 7 + 1) for i in range(60)]
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
TOKENS = np.concatenate(TOKENIZER.encode_documents(TEXTS))
STARTS = np.flatnonzero(TOKENIZER.begin == TOKENS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build_token_shards(tmp_path / "shards", DOCUMENTS, TOKENIZER, shard_tokens=500)
    return tmp_path / "shards"


@pytest.mark.parametrize("shard_tokens", [7, 500, 10**6])
def test_holds_what_was_written(tmp_path: Path, shard_tokens: int) -> None:
    build_token_shards(tmp_path / "s", DOCUMENTS, TOKENIZER, shard_tokens=shard_tokens)
    shards = TokenShards.open(tmp_path / "s", TOKENIZER.hash)
    assert (shards.tokens, shards.documents) == (len(TOKENS), len(TEXTS))
    assert shards.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert np.array_equal(shards.read(0, shards.tokens + 1), [*TOKENS, TOKENIZER.begin])
    assert np.array_equal(shards.document_starts(0, shards.tokens), STARTS)
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    assert all(shard["tokens"] == shard_tokens for shard in manifest["shards"][:-1])


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_range_across_shards(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "ranges"
    if not directory.exists():
        build_token_shards(directory, DOCUMENTS, TOKENIZER, shard_tokens=97)
    shards = TokenShards.open(directory, TOKENIZER.hash)
    start = data.draw(st.integers(0, shards.tokens + 1))
    stop = data.draw(st.integers(start, shards.tokens + 1))
    read = shards.read(start, stop)
    assert read.dtype == np.int32
    assert np.array_equal(read, [*TOKENS, TOKENIZER.begin][start:stop])
    assert np.array_equal(
        shards.document_starts(start, stop), [s for s in STARTS if start <= s < stop]
    )


def test_ranges_outside_are_refused(directory: Path) -> None:
    shards = TokenShards.open(directory, TOKENIZER.hash)
    for start, stop in ((-1, 3), (0, shards.tokens + 2), (5, 4)):
        with pytest.raises(IndexError):
            shards.read(start, stop)


def test_large_vocabularies_take_uint32(tmp_path: Path) -> None:
    tokenizer = train(["ab"], 300)
    tokenizer.vocab_size = 2**16 + 1
    build_token_shards(tmp_path / "s", DOCUMENTS, tokenizer)
    shards = TokenShards.open(tmp_path / "s", tokenizer.hash)
    assert (tmp_path / "s/tokens-00000.bin").stat().st_size == 4 * shards.tokens
    assert np.array_equal(
        shards.read(0, shards.tokens), np.concatenate(tokenizer.encode_documents(TEXTS))
    )


def test_no_documents(tmp_path: Path) -> None:
    build_token_shards(tmp_path / "s", [], TOKENIZER)
    shards = TokenShards.open(tmp_path / "s", TOKENIZER.hash)
    assert (shards.tokens, shards.documents) == (0, 0)
    assert shards.read(0, 1).tolist() == [TOKENIZER.begin]


def test_pickles_without_its_maps(directory: Path) -> None:
    shards = TokenShards.open(directory, TOKENIZER.hash)
    expected = shards.read(0, shards.tokens)
    data = pickle.dumps(shards)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data).read(0, shards.tokens), expected)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_corruption_is_found(directory: Path, name: str, harm: str) -> None:
    TokenShards.open(directory, TOKENIZER.hash)  # records the sound files
    damage(directory / name, harm)
    with pytest.raises(
        UserError, match=rf"{name}.*delete the folder '{directory}' and it will be built again"
    ):
        TokenShards.open(directory, TOKENIZER.hash)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"format_version": 0}'])
def test_corrupt_manifest(directory: Path, content: str | None) -> None:
    path = directory / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json.*delete the folder"):
        TokenShards.open(directory, TOKENIZER.hash)


def test_another_tokenizer(directory: Path) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        TokenShards.open(directory, train(["x"], 300).hash)


def flip(path: Path, at: int = 0) -> None:
    """Changes a bit and leaves the size and the time of modification alone, as a disk does that
    loses one.
    """
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("run", [None, "runs/one"])
def test_a_flip_that_leaves_the_time_alone_is_found(directory: Path, run: str | None) -> None:
    TokenShards.open(directory, TOKENIZER.hash, run)
    flip(directory / "tokens-00000.bin")
    with pytest.raises(UserError, match=r"tokens-00000\.bin' does not have the checksum"):
        TokenShards.open(directory, TOKENIZER.hash, run)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose contents are read to check them."""
    names: list[str] = []

    def sha256_of(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("braeburn.data.manifest.sha256_of", sha256_of)
    return names


def test_contents_are_read_once_on_each_machine_for_each_run(
    directory: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(run: str | None) -> int:
        hashed.clear()
        TokenShards.open(directory, TOKENIZER.hash, run)
        return len(hashed)

    every = len(list(directory.glob("*.bin")))
    assert count("runs/one") == every
    assert count("runs/one") == 0  # the run goes on
    assert count("runs/two") == every
    assert count("runs/one") == 0
    assert count(None) == every
    monkeypatch.setattr("braeburn.data.manifest._machine", lambda: "another")
    assert count("runs/one") == every
    assert count("runs/one") == 0


@pytest.mark.parametrize("content", ["", "[", "[]", "3", '{"a": 3}', '{"a": [' * 3000, "9" * 5001])
def test_a_record_that_makes_no_sense_is_not_believed(directory: Path, content: str) -> None:
    (directory / "verified.json").write_text(content)
    flip(directory / "tokens-00000.bin")
    with pytest.raises(UserError, match="checksum"):
        TokenShards.open(directory, TOKENIZER.hash, "run")


def test_the_record_does_not_grow_without_end(directory: Path) -> None:
    for index in range(100):
        TokenShards.open(directory, TOKENIZER.hash, f"run {index}")
    records = json.loads((directory / "verified.json").read_text())
    assert len(records) == 64
    assert next(reversed(records)).endswith("run 99")


def edits(value: object) -> Iterator[object]:
    """Each JSON value that differs from this one in one place."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield {k: v for k, v in value.items() if k != key}
            for edited in edits(child):
                yield {**value, key: edited}
        yield {**value, "more": 1}
    elif isinstance(value, list):
        yield value[:-1]
        for index, child in enumerate(value):
            for edited in edits(child):
                yield [*value[:index], edited, *value[index + 1 :]]
    elif isinstance(value, str):
        yield value[1:]
        yield value.replace("0", "1") if "0" in value else value + "0"
    elif isinstance(value, int):
        yield value + 1
        yield -value - 1
        yield str(value)
        yield float(value) + 0.5


def test_every_edit_of_the_manifest_is_found(tmp_path: Path) -> None:
    build_token_shards(tmp_path / "s", DOCUMENTS[:9], TOKENIZER, shard_tokens=200)
    path = tmp_path / "s/manifest.json"
    whole = json.loads(path.read_text())
    count = 0
    for edited in edits(whole):
        path.write_text(json.dumps(edited))
        with pytest.raises(UserError, match=r"manifest\.json' .*; delete the folder"):
            TokenShards.open(tmp_path / "s", TOKENIZER.hash)
        count += 1
    assert count > 50


@pytest.mark.parametrize("name", ["manifest.json", "tokens-00000.bin", "verified.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_never_waited_for(directory: Path, name: str, kind: str) -> None:
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name) if kind == "pipe" else (directory / name).mkdir()
    if name == "verified.json":
        TokenShards.open(directory, TOKENIZER.hash, "run")
        return
    with pytest.raises(UserError, match=rf"{name}' is no file"):
        TokenShards.open(directory, TOKENIZER.hash)


def test_what_is_open_can_be_read_when_its_folder_is_gone(directory: Path) -> None:
    shards = TokenShards.open(directory, TOKENIZER.hash)
    data = pickle.dumps(shards)
    shutil.rmtree(directory)
    assert np.array_equal(shards.read(0, shards.tokens), TOKENS)
    assert np.array_equal(shards.document_starts(0, shards.tokens), STARTS)
    with pytest.raises(
        UserError, match=r"was deleted while it was in use; run the same command again"
    ):
        pickle.loads(data).read(0, 3)


def test_token_shards_may_have_more_files_than_a_process_opens_as_a_rule(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    build_token_shards(tmp_path / "s", DOCUMENTS, TOKENIZER, shard_tokens=8)
    assert len(list((tmp_path / "s").glob("*.bin"))) > 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        shards = TokenShards.open(tmp_path / "s", TOKENIZER.hash)
        assert np.array_equal(shards.read(0, shards.tokens), TOKENS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


KILLED = """
import sys, time
from pathlib import Path
from braeburn.data import building, token_shards
from braeburn.data.corpus import Document
from braeburn.data.tokenizer import Tokenizer
token_shards.BATCH_CHARACTERS, building.RECORD_SECONDS = 10, 0
def documents():
    for i in range(60):
        yield Document(str(i), f"some words {i} " * (i % 7 + 1))
        if i == 40:
            print("midway", flush=True)
            time.sleep(60)
tokenizer = Tokenizer.load(sys.argv[2])
token_shards.build_token_shards(Path(sys.argv[1]), documents(), tokenizer, shard_tokens=100)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != "verified.json"
    }


class Counting:
    """The documents, and how many were encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        encode = Tokenizer.encode_pieces

        def counted(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
            self.texts += texts
            return encode(tokenizer, texts)

        monkeypatch.setattr(Tokenizer, "encode_pieces", counted)


def test_a_killed_build_leaves_nothing_that_looks_complete_and_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    build_token_shards(tmp_path / "undisturbed", DOCUMENTS, TOKENIZER, shard_tokens=100)
    directory = tmp_path / "cache/shards"
    arguments = [sys.executable, "-c", KILLED, str(directory), str(tmp_path / "tokenizer.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"midway\n"
        process.send_signal(signal.SIGKILL)
    assert not directory.exists()
    encoded = Counting(monkeypatch)
    build_token_shards(directory, DOCUMENTS, TOKENIZER, shard_tokens=100)
    assert len(encoded.texts) <= 21
    assert contents(directory) == contents(tmp_path / "undisturbed")
    assert list(directory.parent.iterdir()) == [directory]


class Stop(Exception):
    pass


@pytest.mark.parametrize("long", [False, True])
def test_a_build_may_be_stopped_after_any_batch_and_goes_on(
    long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braeburn.data.token_shards.BATCH_CHARACTERS", 40)
    texts = TEXTS[:20]
    found = [Document(str(i), text) for i, text in enumerate(texts)]
    if long:  # one document that comes in parts
        monkeypatch.setattr("braeburn.data.cutting.PIECE_CHARACTERS", 20)
        monkeypatch.setattr("braeburn.data.cutting.CONTEXT_CHARACTERS", 20)
        text = "".join(texts)
        found = [
            Document("x", text[at : at + 70], is_continued=at + 70 < len(text))
            for at in range(0, len(text), 70)
        ]
    build_token_shards(tmp_path / "undisturbed", found, TOKENIZER, shard_tokens=50)

    def stop_after(calls: int) -> Callable[[], None]:
        left = itertools.count(calls, -1)

        def proceed() -> None:
            if next(left) == 0:
                raise Stop

        return proceed

    encoded = Counting(monkeypatch)
    stops = 0
    while not (tmp_path / "stopped").exists():
        with contextlib.suppress(Stop):
            build_token_shards(
                tmp_path / "stopped", found, TOKENIZER, shard_tokens=50, proceed=stop_after(2)
            )
        stops += 1
    assert stops > 4
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    if not long:
        assert encoded.texts == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "undisturbed"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "progress", "pipe"])
def test_what_a_builder_left_is_not_believed_when_it_is_damaged(tmp_path: Path, harm: str) -> None:
    def stop() -> None:
        if list(tmp_path.glob("s.partial-*/tokens-*")):
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("braeburn.data.token_shards.BATCH_CHARACTERS", 40)
        build_token_shards(tmp_path / "s", DOCUMENTS, TOKENIZER, proceed=stop)
    (left,) = tmp_path.glob("s.partial-*")
    path = left / "tokens-00000.bin"
    if harm == "flip":
        flip(path)
    elif harm == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "progress":
        (left / "progress.json").write_text("[" * 3000)
    else:
        path.unlink()
        if harm == "pipe":
            os.mkfifo(path)
    build_token_shards(tmp_path / "s", DOCUMENTS, TOKENIZER)
    assert np.array_equal(
        TokenShards.open(tmp_path / "s", TOKENIZER.hash).read(0, len(TOKENS)), TOKENS
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]


def test_leftovers_are_removed_but_not_those_of_the_living_or_of_teachers(tmp_path: Path) -> None:
    names = [
        "old.partial-1",
        "new.partial-1",
        "locked.partial-1",
        "old.teacher-abc.partial-1",
        "s.partial-1",
        "my.partial-1",
    ]
    old = time.time() - 8 * 86400
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens-00000.bin").touch()
        (tmp_path / name / ".lock").touch()
        if name == "my.partial-1":
            (tmp_path / name / "notes.txt").touch()
        if name != "new.partial-1":
            for path in (*(tmp_path / name).iterdir(), tmp_path / name):
                os.utime(path, (old, old))
    with (tmp_path / "locked.partial-1/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_token_shards(tmp_path / "s", DOCUMENTS, TOKENIZER)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "locked.partial-1",
        "my.partial-1",
        "new.partial-1",
        "old.teacher-abc.partial-1",
        "s",
    ]


def test_long_documents_have_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braeburn.data.cutting.PIECE_CHARACTERS", 100)
    text = " ".join(TEXTS) * 20
    parts = [
        Document("x", text[at : at + 999], is_continued=at + 999 < len(text))
        for at in range(0, len(text), 999)
    ]
    encoded = Counting(monkeypatch)
    build_token_shards(tmp_path / "s", [*parts, Document("y", "end")], TOKENIZER)
    assert max(map(len, encoded.texts)) < 2000
    shards = TokenShards.open(tmp_path / "s", TOKENIZER.hash)
    expected = np.concatenate(TOKENIZER.encode_documents([text, "end"]))
    assert np.array_equal(shards.read(0, shards.tokens), expected)
    assert shards.documents == 2
    assert shards.text_bytes == len(text.encode()) + 3


def test_concurrent_builders_agree(tmp_path: Path) -> None:
    threads = [
        threading.Thread(
            target=build_token_shards,
            args=(tmp_path / "s", DOCUMENTS, TOKENIZER),
            kwargs={"shard_tokens": 100},
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards = TokenShards.open(tmp_path / "s", TOKENIZER.hash)
    assert np.array_equal(shards.read(0, shards.tokens), TOKENS)
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]


def test_errors_of_the_documents_pass_and_leave_nothing(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        yield from DOCUMENTS
        raise UserError("a bad file")

    with pytest.raises(UserError, match="a bad file"):
        build_token_shards(tmp_path / "cache/s", documents(), TOKENIZER)
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full answers every write as a full disk does.
    monkeypatch.setattr(
        "braeburn.data.building.shard_path", lambda directory, kind, index: Path("/dev/full")
    )
    with pytest.raises(UserError, match=r"cannot write .*No space left .*data\.cache"):
        build_token_shards(tmp_path / "cache/s", DOCUMENTS, TOKENIZER)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*data\.cache"):
        build_token_shards(tmp_path / "cache/s", DOCUMENTS, TOKENIZER)
