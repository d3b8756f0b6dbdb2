"""Paths and URLs as they are given, and folders on other file systems."""

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from braeburn import remote
from braeburn.errors import UserError
from braeburn.remote import RemoteFolder, place


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteFolder]:
    """An empty folder on a file system that is no disk."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    remote._reached.clear()
    remote._told.clear()
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    yield RemoteFolder("memory://bucket/folder", "--out")
    filesystem.store.clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/first", Path("runs/first")),
        ("/runs/a b", Path("/runs/a b")),
        ("file:///runs/first", Path("/runs/first")),
        ("local:///runs/first", Path("/runs/first")),
        ("~/runs", Path("~/runs").expanduser()),
        ("s3://bucket/run", RemoteFolder("s3://bucket/run", "--out")),
        ("gs://bucket/run/", RemoteFolder("gs://bucket/run", "--out")),
        ("c:/runs", Path("c:/runs")),
    ],
)
def test_what_a_text_names(text: str, expected: Path | RemoteFolder) -> None:
    assert place(text, "--out") == expected


def test_a_url_with_one_slash_is_refused_with_the_right_one() -> None:
    with pytest.raises(UserError) as told:
        place("s3:/bucket/run", "initial_weights")
    advised = str(told.value).rpartition(" as ")[2]
    assert str(told.value).startswith("initial_weights='s3:/bucket/run' is no URL; write two")
    assert str(place(advised, "--out")) == "s3://bucket/run"


def test_files_are_listed_put_fetched_and_deleted(folder: RemoteFolder, tmp_path: Path) -> None:
    assert folder.list() == {} and folder.size("a") is None and folder.read_if_there("a") is None
    for name in ("a", "b/c", "b/d/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert list(folder.put_all(tmp_path, ["a", "b/c", "b/d/e"])) == ["a", "b/c", "b/d/e"]
    RemoteFolder("memory://bucket/folder-2").write("x", b"beside it")
    assert {name: file.size for name, file in folder.list().items()} == {
        "a": 1,
        "b/c": 3,
        "b/d/e": 5,
    }
    assert set(folder.below("b").list()) == {"c", "d/e"}
    list(folder.fetch_all(folder.list(), tmp_path / "fetched"))
    assert (tmp_path / "fetched" / "b" / "d" / "e").read_text() == "b/d/e"
    folder.delete(["a", "never there", "b/c"])
    assert set(folder.list()) == {"b/d/e"}
    with pytest.raises(FileNotFoundError):
        list(folder.fetch_all(["a"], tmp_path / "fetched"))
    assert not [path.name for path in (tmp_path / "fetched").iterdir() if path.name[0] == "."]
    with pytest.raises(UserError, match=r"--out 'memory://bucket/folder/b/d/e' is a file; name"):
        folder.below("b/d/e").list()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError("Forbidden."), "may not be used (Forbidden); see to your credentials"),
        (
            type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"),
            "cannot be reached without credentials (Unable to locate credentials); set them up",
        ),
        (FileNotFoundError("The bucket does not exist"), "cannot be written to (The bucket does"),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    tries = []

    def failing(*arguments: Any, **options: Any) -> None:
        tries.append(1)
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", failing)
    with pytest.raises(UserError) as told:
        folder.write("a", b"a")
    assert str(told.value).startswith(f"--out 'memory://bucket/folder' {sentence}")
    assert len(tries) == 1


def test_a_full_disk_here_is_no_outage_there(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder.write("a", b"a")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", full)
    with pytest.raises(OSError, match="No space left") as told:
        folder.fetch("a", tmp_path / "a")
    assert str(tmp_path) in told.value.filename


def test_an_outage_is_told_of_once(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("a", b"a")

    def away(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", away)
    clock = itertools.count()
    monkeypatch.setattr(remote.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 30.0)
    for _ in range(3):
        with pytest.raises(UserError, match=r"has not answered for \d+ s \(no route\); see to the"):
            folder.read("a")
    assert caplog.text.count("does not answer (ConnectionError); trying again") == 1
