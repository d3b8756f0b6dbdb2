"""Files of a run directory that vanish, fill up or were damaged while nobody looked."""

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from braeburn.atomic import write_atomically
from braeburn.config import Run, read_identity, read_run
from braeburn.disk import explained, explaining, naming, remove_stale, scratch
from braeburn.errors import UserError
from braeburn.jsonfile import Unreadable, json_lines, parse_json, read_json
from braeburn.train import feed, loop
from braeburn.train.directory import RunDirectory
from braeburn.train.records import Records
from support import events, rows


def test_an_event_after_a_line_that_was_cut_short_is_a_line_of_its_own(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.event("start", step=0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "chec')
    directory.event("stop", step=1)
    directory.event("stop", step=2)
    kinds = [(event["event"], event["step"]) for event in json_lines(tmp_path / "events.jsonl")]
    assert kinds == [("start", 0), ("stop", 1), ("stop", 2)]


def test_events_for_which_there_is_no_room_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Records) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    directory = RunDirectory(tmp_path)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "braeburn"):
        patch.setattr(Records, "_write", full)
        directory.event("checkpoint", step=1)
        directory.event("checkpoint", step=2)
    (message,) = caplog.messages
    assert "events.jsonl' cannot be written (No space left on device)" in message
    directory.event("checkpoint", step=3)
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [1, 2, 3]


DAMAGED = (
    """not JSON
[1, 2]
{"step": "x", "stage": "core", "loss": 1}
{"stage": "core", "loss": "y"}
{"step": 1, "stage": "core", "loss": 3.0}
{"step": 2, "stage": "core", "loss": 5.0}
"""
    + '{"step": '
    + "1" * 5000
    + "}\n"
    + "[" * 5000
    + "]" * 5000
    + '\n{"step": 9, "stage": "core", "lo'
)


def test_rows_that_are_none_are_passed_over(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert math.isnan(directory.recent_loss("core")) and directory.stage_results(9) == []
    (tmp_path / "metrics.jsonl").write_text(DAMAGED)
    assert math.isnan(directory.recent_loss("core"))
    directory.forget_after(1)
    assert rows(tmp_path) == [{"step": 1, "stage": "core", "loss": 3.0}]
    assert directory.recent_loss("core") == 3.0
    (tmp_path / "events.jsonl").write_text(
        DAMAGED + '\n{"event": "stage_end"}\n{"event": "stage_end", "stage": [], "step": '
        '{}}\n{"event": 7}\n'
    )
    assert directory.stage_results(9) == []
    directory.event(
        "stage_end",
        stage="core",
        step=6,
        tokens=7,
        loss=None,
        held_out={"code": {"loss": 1.5, "tokens": 3}},
    )
    assert directory.stage_results(9) == [
        {
            "stage": "core",
            "step": 6,
            "tokens": 7,
            "loss": None,
            "held_out": {"code": {"loss": 1.5, "tokens": 3}},
        }
        | {"skipped": 0}
    ]


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"{", "is not JSON (line 1, column 2)"),
        (b"[" * 200 + b"]" * 200, "is nested more than 100 deep"),
        (b"[" * 200_000 + b"]" * 200_000, "is nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has a number of thousands of digits"),
    ],
)
def test_json_that_nobody_meant(content: bytes, clause: str, tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as refusal:
        parse_json(content)
    assert str(refusal.value) == clause
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json' does not hold a run: it "):
        read_run(tmp_path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.mkdir()
    with pytest.raises(
        UserError, match=r"does not hold a run: it is a folder where a file belongs; restore it"
    ):
        read_run(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is not an ordinary file"):
        read_identity(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        UserError,
        match="it has 1,099,511,627,776 bytes, more than the 67,108,864 that such a file can",
    ):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(path / "below")
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(
        UserError, match=r"config\.json' cannot be used \(too many levels of symbolic links\)"
    ):
        read_run(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=r"metrics\.jsonl' cannot be used \(too many levels"):
        RunDirectory(tmp_path).recent_loss("core")
    with pytest.raises(UserError, match=r"events\.jsonl' cannot be used \(too many levels"):
        RunDirectory(tmp_path).stage_results(1)


@pytest.mark.parametrize(
    ("number", "within", "sentence"),
    [
        (
            errno.ENOSPC,
            True,
            r"no space left in '{run}' \([\d,]+ bytes free\); earlier checkpoints are whole",
        ),
        (
            errno.ENOSPC,
            False,
            r"no space left for '/dev/shm/x' \([\d,]+ bytes free\); free some space there",
        ),
        (
            errno.EACCES,
            True,
            r"'{run}/x' cannot be used \(permission denied\); change its permissions, or",
        ),
        (
            errno.EACCES,
            False,
            r"'/dev/shm/x' cannot be used \(permission denied\); change its permissions, then",
        ),
        (
            errno.EROFS,
            True,
            r"'{run}/x' cannot be used \(read-only file system\); make the file system writable, "
            r"or",
        ),
        (
            errno.ENOENT,
            True,
            r"'{run}/x' is gone: the run directory was moved, or a part of it deleted",
        ),
        (
            errno.EMFILE,
            False,
            r"too many open files \(limit \d+\); raise the limit, as with `ulimit -n 65536`",
        ),
        (
            errno.EFBIG,
            True,
            r"'{run}/x' cannot grow \(.*\); raise the limit, as with `ulimit -f unlimited`",
        ),
        (
            errno.EIO,
            False,
            r"the storage of '/dev/shm/x' failed \(input/output error\); see to the disk",
        ),
    ],
)
def test_a_failure_is_blamed_on_the_file_that_it_is_of(
    number: int, within: bool, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "x" if within else Path("/dev/shm/x")
    with (
        pytest.raises(UserError, match=sentence.format(run=tmp_path)),
        explaining(tmp_path),
        naming(path),
    ):
        raise OSError(number, os.strerror(number))


def test_words_of_a_message_blame_nobody(tmp_path: Path) -> None:
    """A bucket that may not be read says "Permission denied" too, and is no reason to choose
    another folder.
    """
    for error in (
        RuntimeError("Permission denied: gs://bucket"),
        OSError("Permission denied"),
        ValueError("No space left on device"),
    ):
        with pytest.raises(type(error)) as raised, explaining(tmp_path):
            raise error
        assert raised.value is error
    away = PermissionError(errno.EACCES, "Permission denied", "gs://bucket/file")
    assert "--out" not in str(explained(away, tmp_path))


def at_batch(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has something happen while a run trains."""
    prefetch = feed.prefetch

    def hooked(*arguments: Any) -> Iterator[Any]:
        for index, batch in enumerate(prefetch(*arguments)):
            if index == number:
                action()
            yield batch

    monkeypatch.setattr(feed, "prefetch", hooked)


@pytest.mark.deep
def test_metrics_that_are_deleted_while_a_run_trains(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    at_batch(2, lambda: (out / "metrics.jsonl").unlink(missing_ok=True), monkeypatch)
    outcome = loop.train(tiny, out)
    assert outcome.finished and [stage["stage"] for stage in outcome.stages] == list(tiny.stages)


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced"])
def test_a_run_directory_that_goes_while_a_run_trains(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"

    def act() -> None:
        if what == "deleted":
            shutil.rmtree(out)
        else:
            out.rename(elsewhere)
        if what == "replaced":
            out.mkdir()

    at_batch(3, act, monkeypatch)
    with pytest.raises(UserError) as refusal:
        loop.train(tiny, out, stop_after_steps=5)
    assert f"the run directory {str(out)!r} was moved or deleted while it was trained in" in str(
        refusal.value
    )
    # Nothing is begun in its place that would look like a run.
    assert not out.exists() or list(out.iterdir()) == []
    if what == "moved":
        elsewhere.rename(out)
        monkeypatch.undo()
        assert loop.train(tiny, out, stop_after_steps=1).step == 1


def test_a_text_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between the two would leave an empty file of the right name."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("sync"), sync(number))[1])
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (done.append("name"), replace(path, to))[1]
    )
    write_atomically(tmp_path / "file", "text")
    assert done[:2] == ["sync", "name"] and (tmp_path / "file").read_text() == "text"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_others_put_beside_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / ".out.partial-mine"
    mine.mkdir()
    (tmp_path / ".out.partial").mkdir()
    with scratch(tmp_path, "out") as folder:
        assert folder.parent == tmp_path and mine.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", ".out.partial-mine"]


def test_what_killed_exports_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = (
        ".model.partial-123",
        ".model.partial-" + "0a" * 16,
        ".model.partial-notes",
        ".other.partial-123",
    )
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    old = time.time() - 7200
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))
    (tmp_path / ".model.gguf.partial-9").touch()
    os.utime(tmp_path / names[0] / "weights")  # still being written
    remove_stale(tmp_path, "model")
    remove_stale(tmp_path, "model.gguf")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([names[0], names[2], names[3], ".model.gguf.partial-9"])
    os.utime(tmp_path / ".model.gguf.partial-9", (old, old))
    remove_stale(tmp_path, "model.gguf")
    assert not (tmp_path / ".model.gguf.partial-9").exists()


def test_a_run_keeps_its_identity(finished: Path, tmp_path: Path, tiny: Run) -> None:
    identity = read_identity(finished)
    assert identity
    copy = RunDirectory(shutil.copytree(finished, tmp_path / "copy"))
    copy.write_config(tiny, {})
    assert read_identity(copy.path) == identity
    other = RunDirectory(tmp_path / "other")
    other.write_config(tiny, {})
    assert read_identity(other.path) not in (None, identity)
    assert json.loads((other.path / "config.json").read_text())["run"] == tiny.model_dump(
        mode="json"
    )


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
def test_a_pipe_in_place_of_a_record_is_refused_and_not_waited_for(
    tmp_path: Path, name: str
) -> None:
    # Found by `make fuzz`: it was opened, and no one ever wrote to it.
    os.mkfifo(tmp_path / name)
    directory = RunDirectory(tmp_path, writes=False)
    with pytest.raises(
        UserError, match=rf"{name}' is not an ordinary file; move it away and run again"
    ):
        directory.stage_results(1) if name == "events.jsonl" else directory.recent_loss("core")
