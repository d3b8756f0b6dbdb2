"""Prepared text in a remote folder: fetched, read by range, published, and waited for."""

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from braeburn import remote
from braeburn.config import Run, override
from braeburn.data import mirror
from braeburn.data.corpus import Document
from braeburn.data.listing import cache_folder, mirror_of
from braeburn.data.loader import Batches
from braeburn.data.mirror import BlockCache, Mirror, RangeFile
from braeburn.data.prepare import prepare
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import train as train_tokenizer
from braeburn.errors import UserError
from braeburn.remote import RemoteFolder, is_remote
from support import braeburn, on_json_lines

TOKENIZER = train_tokenizer(["one two three four five six"] * 9, 280)


@pytest.fixture
def url() -> Iterator[str]:
    """An empty remote folder."""
    filesystem = fsspec.filesystem("memory")
    filesystem.rm("/bucket", recursive=True) if filesystem.exists("/bucket") else None
    remote._reached.clear()
    yield "memory://bucket/tokens"


@pytest.fixture
def run(tiny: Run, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose cache is remote, on a machine of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 1"))
    (tmp_path / "text").mkdir()
    rows = (json.dumps({"text": f"line {i} of a text " * (5 + i % 7)}) + "\n" for i in range(900))
    (tmp_path / "text" / "a.jsonl").write_text("".join(rows))
    return on_json_lines(tiny, tmp_path / "text", url)


def batches(run: Run, prepared: Any) -> list[dict[str, np.ndarray]]:
    (name,) = run.stages
    all_of_them = Batches(run.stages[name], name, run.seed, prepared.train)
    return [all_of_them[step] for step in range(len(all_of_them))]


def test_another_machine_reads_what_one_has_prepared(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    here = prepare(run, lines.append)
    assert not here.train["web"].is_remote
    local = prepare(override(run, {"data.cache": str(tmp_path / "local")}), print)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 2"))
    shutil.rmtree(tmp_path / "text")  # which has neither the files
    lines.clear()
    there = prepare(run, lines.append)
    assert "the text is ready: it was prepared before, in 'memory://bucket/tokens'" in lines
    assert there.train["web"].is_remote
    assert there.fingerprints == here.fingerprints == local.fingerprints
    assert there.tokenizer.hash == local.tokenizer.hash
    for ours, theirs in zip(batches(run, there), batches(run, local), strict=True):
        assert all(np.array_equal(ours[field], theirs[field]) for field in theirs)
    ours, theirs = there.held_out["web"], local.held_out["web"]
    assert ours is not None and theirs is not None
    assert np.array_equal(ours.read(0, ours.tokens + 1), theirs.read(0, theirs.tokens + 1))
    kept = [path for path in cache_folder(run.data).rglob("*") if path.is_file()]
    assert not [path for path in kept if path.name.startswith("tokens-")]
    assert [path for path in kept if path.parent.parent.name == "blocks"]
    copied = pickle.loads(pickle.dumps(there.train["web"]))
    assert np.array_equal(copied.read(3, 99), theirs_train(local).read(3, 99))


def theirs_train(prepared: Any) -> TokenShards:
    return prepared.train["web"]


def test_what_is_published_is_complete_or_gone_on_with(run: Run, tmp_path: Path) -> None:
    prepared = prepare(run, print)
    filesystem = fsspec.filesystem("memory")
    directory = prepared.train["web"].directory
    (manifest,) = filesystem.glob(f"/bucket/tokens/stores/{directory.name}/manifest.json")
    filesystem.rm(manifest)
    own = mirror_of(run.data)
    assert own is not None
    elsewhere = Mirror(tmp_path / "another machine", own.remote, own.block_bytes)
    elsewhere.fetch_shards(elsewhere.local / "stores" / directory.name)
    assert not (elsewhere.local / "stores" / directory.name).exists()  # it is not complete
    prepare(run, print)
    assert filesystem.exists(manifest)
    elsewhere.fetch_shards(elsewhere.local / "stores" / directory.name)
    assert (elsewhere.local / "stores" / directory.name / "manifest.json").exists()


@pytest.mark.parametrize("block", [2, 10, 64, 10**6])
def test_ranges_are_those_of_the_file(
    url: str, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "BLOCK_BYTES", block)
    values = np.arange(100, dtype="<u2") * 7
    fsspec.filesystem("memory").pipe_file("/bucket/tokens/a.bin", values.tobytes())
    file = RangeFile(
        RemoteFolder(url),
        tmp_path / "a.bin",
        values.dtype,
        100,
        BlockCache(tmp_path / "blocks", 10**6),
    )
    assert len(file) == 100
    for start, stop in itertools.product((0, 1, 5, 50, 99, 100, 200), (0, 1, 6, 99, 100, 300)):
        assert np.array_equal(file[start:stop], values[start:stop])


def test_blocks_take_no_more_room_than_they_may(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 1000)
    for index in range(60):
        cache.put(f"key {index}", bytes(100))
        cache.get("key 5")  # is used, and so stays
    kept = [path for path in (tmp_path / "blocks").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 1010
    assert cache.get("key 59") is not None
    assert cache.get("key 5") is not None
    assert cache.get("key 0") is None
    assert cache.get("another") is None


def test_a_damaged_block_is_fetched_again(url: str, tmp_path: Path) -> None:
    values = np.arange(50, dtype="<u4")
    fsspec.filesystem("memory").pipe_file("/bucket/tokens/a.bin", values.tobytes())
    blocks = BlockCache(tmp_path / "blocks", 10**6)
    file = RangeFile(RemoteFolder(url), tmp_path / "a.bin", values.dtype, 50, blocks)
    assert np.array_equal(file[:10], values[:10])
    (path,) = (path for path in (tmp_path / "blocks").rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(file[:10], values[:10])


def test_tokens_that_are_cut_short_are_told_of(url: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/tokens/a.bin", bytes(10))
    file = RangeFile(
        RemoteFolder(url), tmp_path / "a.bin", np.dtype("<u2"), 50, BlockCache(tmp_path / "b", 1000)
    )
    with pytest.raises(UserError, match=r"tokens/a\.bin' is shorter than its manifest says"):
        file[0:50]


def test_tokens_that_are_gone_are_told_of(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(run, print)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 2"))
    shards = prepare(run, print).train["web"]
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    with pytest.raises(UserError, match=r"tokens-00000\.bin' is gone; delete '.*web-train-"):
        shards.read(0, 10)
    assert shards.document_starts(0, 10).size  # what was fetched is here
    # The advice works: the files of the source are still here.
    shutil.rmtree(shards.directory)
    assert prepare(run, print).fingerprints


def test_an_outage_is_waited_for(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/bucket/tokens/a", b"abc")
    folder = RemoteFolder(url)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    failures = iter([TimeoutError("no answer")] * 4)
    real = type(filesystem).cat_file

    def failing(self: Any, *arguments: Any, **options: Any) -> bytes:
        if error := next(failures, None):
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(filesystem), "cat_file", failing)
    assert folder.read("a") == b"abc"
    assert folder.read("a", 1, 2) == b"b"
    failures = itertools.repeat(TimeoutError("no answer"))
    clock = itertools.count(0, 100)
    monkeypatch.setattr(remote.time, "monotonic", lambda: next(clock))
    with pytest.raises(
        UserError, match=r"data\.cache='memory://bucket/tokens' has not answered for \d+ s \(no an"
    ):
        folder.read("a")
    with pytest.raises(FileNotFoundError):
        folder.fetch("nothing", tmp_path / "nothing")


def test_which_paths_are_remote() -> None:
    assert is_remote("s3://bucket/a") and is_remote("memory://a")
    assert not is_remote("/a/b") and not is_remote("a://"[:1]) and not is_remote("file:///a")


def test_a_file_system_that_is_not_installed_is_named(tiny_arguments: list[str]) -> None:
    answer = braeburn("prepare", *tiny_arguments, "--set", "data.cache=nosuch://bucket")
    assert "data.cache='nosuch://bucket' cannot be used" in answer.error


def test_a_mirror_of_nothing_makes_nothing(url: str, tmp_path: Path) -> None:
    empty = Mirror(tmp_path / "local", RemoteFolder(url), 1000)
    empty.fetch_shards(tmp_path / "local" / "stores" / "x")
    empty.fetch(tmp_path / "local" / "listings" / "x.json")
    assert not [path for path in (tmp_path / "local").rglob("*") if path.is_file()]
    build_token_shards(tmp_path / "local/stores/x", [Document("1", "one two")], TOKENIZER)
    empty.publish_shards(tmp_path / "local/stores/x")
    assert len(fsspec.filesystem("memory").find("/bucket/tokens/stores/x")) == 3
