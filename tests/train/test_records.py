"""Rows, events and TensorBoard's files on a disk that fills, and after a resume."""

import errno
import os
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braeburn.config import Run, override
from braeburn.jsonfile import json_lines
from braeburn.train import records
from braeburn.train.loop import train
from braeburn.train.records import Records, json_line
from braeburn.train.tensorboard import EventFile, forget_after
from support import events, rows, scalars


class Disk:
    """What `records` writes to in place of the system: it has room for so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.room: float = float("inf")
        own = types.SimpleNamespace(**vars(os))
        own.write = self.write
        monkeypatch.setattr(records, "os", own)

    def write(self, descriptor: int, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(descriptor, data[: int(min(len(data), self.room))])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_records_wait_for_room_and_are_written_then(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    file = Records(tmp_path / "rows", said.append, lines=True)
    file.append(b"first\n")
    disk.room = 3  # the next record is cut short, and must not stay so
    for number in range(100):
        file.append(b"record %d\n" % number)
        assert (tmp_path / "rows").read_bytes() == b"first\n"
    assert len(said) == 1
    assert "cannot be written (No space left on device); training goes on" in said[0]
    disk.room = float("inf")
    file.append(b"last\n")
    expected = ["first", *(f"record {number}" for number in range(100)), "last"]
    assert (tmp_path / "rows").read_text().splitlines() == expected
    assert said[1:] == [f"{str(tmp_path / 'rows')!r} can be written again; nothing was lost"]


def test_what_waits_is_bounded(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    file = Records(tmp_path / "rows", said.append, pending=40)
    disk.room = 0
    for number in range(1000, 1100):
        file.append(b"%d......" % number)
    assert file._bytes <= 40
    disk.room = float("inf")
    file.append(b"1100......")
    assert (tmp_path / "rows").read_bytes() == b"1096......1097......1098......1099......1100......"
    assert said[1].endswith("can be written again; 96 records were dropped")


def test_what_still_waits_at_the_end_is_told(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    file = Records(tmp_path / "rows", said.append)
    disk.room = 0
    file.append(b"1")
    file.append(b"2")
    file.close()
    assert said[1:] == [f"warning: 2 records could not be written to {str(tmp_path / 'rows')!r}"]


def test_a_file_that_is_removed_is_begun_again(tmp_path: Path) -> None:
    said: list[str] = []
    file = Records(tmp_path / "folder" / "rows", said.append)
    file.append(b"1")
    assert len(said) == 1 and "No such file or directory" in said[0]
    (tmp_path / "folder").mkdir()
    file.append(b"2")
    assert file.path.read_bytes() == b"12"
    file.path.unlink()
    file.append(b"3")
    assert file.path.read_bytes() == b"3"
    file.path.rename(tmp_path / "moved")
    file.append(b"4")
    assert file.path.read_bytes() == b"4"


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start"}\n{"event": "chec')
    file = Records(path, print, lines=True)
    file.append(json_line({"event": "stop"}))
    assert [event["event"] for event in json_lines(path)] == ["start", "stop"]


def test_event_files_show_one_history(tmp_path: Path) -> None:
    first = EventFile(tmp_path, 0, print)
    for step in range(1, 6):
        first.scalars(step, {"loss": step, "rate": 0.5})
    first.close()
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b"\x40\0\0")  # as a kill leaves it
    forget_after(tmp_path, 3)
    second = EventFile(tmp_path, 3, print)
    second.scalars(4, {"loss": 40})
    second.close()
    assert scalars(tmp_path) == [
        *(
            entry
            for step in (1, 2, 3)
            for entry in (("loss", step, float(step)), ("rate", step, 0.5))
        ),
        ("loss", 4, 40.0),
    ]
    assert len(list(tmp_path.iterdir())) == 2
    forget_after(tmp_path, 0)
    assert scalars(tmp_path) == []


def test_an_event_file_waits_for_room(tmp_path: Path, disk: Disk) -> None:
    said: list[str] = []
    file = EventFile(tmp_path, 0, said.append)
    disk.room = 10
    for step in range(1, 50):
        file.scalars(step, {"loss": step})
    disk.room = float("inf")
    file.scalars(50, {"loss": 50})
    assert scalars(tmp_path) == [("loss", step, float(step)) for step in range(1, 51)]
    assert len(said) == 2


def failing_at(disk: Disk, steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the disk be full while the rows of some steps are written."""
    from braeburn.train.metrics import MetricsWriter

    write: Callable[..., None] = MetricsWriter.write

    def watched(self: MetricsWriter, row: dict[str, Any]) -> None:
        disk.room = 0 if row["step"] in steps else float("inf")
        write(self, row)

    monkeypatch.setattr(MetricsWriter, "write", watched)


def test_training_goes_on_while_the_disk_is_full(
    tiny: Run,
    finished: Path,
    tmp_path: Path,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    failing_at(disk, range(2, 5), monkeypatch)
    run = override(tiny, {"evaluation.every_steps": 2})
    assert train(run, tmp_path, stop_after_steps=5).step == 5
    assert train(run, tmp_path, stop_after_steps=3).step == 8
    log = capfd.readouterr().err
    warnings = [
        line for line in log.splitlines() if "cannot be written (No space left on device)" in line
    ]
    assert sorted(line.split("'")[1].rpartition("/")[2][:8] for line in warnings) == [
        "events.j",
        "events.o",
        "metrics.",
    ]
    assert log.count("can be written again; nothing was lost") == 3
    expected = [(row["step"], row["loss"]) for row in rows(finished)[:8]]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == expected
    assert [event["step"] for event in events(tmp_path, "evaluation")] == [2, 4, 8]
    shown = Counter((tag, step) for tag, step, _ in scalars(tmp_path / "tensorboard"))
    assert set(shown.values()) == {1}
    assert {step for tag, step in shown if tag == "loss"} == set(range(1, 9))
