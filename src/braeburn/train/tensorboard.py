"""The event files that TensorBoard reads, written without a thread or a queue that could hold
training up.

They hold TFRecords: the length of the data, a checksum of it, the data (an `Event`), and a checksum
of these.
"""

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from braeburn.train.records import Records

LENGTH = struct.Struct("<Q")
CHECKSUM = struct.Struct("<I")


class EventFile:
    """One file of scalars, of the steps after some step."""

    def __init__(self, folder: Path, after: int, say: Callable[[str], None]):
        """Names a new file that sorts after those there; it appears with the first scalars.

        Args:
            folder: the run's; created.
            after: the last step of what the other files hold. A TensorBoard that looks on while a
                run is gone on with is told to forget what it read of later ones.
            say: takes a line when the file cannot be written.
        """
        from tensorboardX.proto import event_pb2

        self._event = event_pb2
        self._after, self._begun = after, False
        # TensorBoard reads files in the order of their names, and knows them by "tfevents".
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        path = next(p for n in itertools.count() if not (p := folder / f"{stem}.{n}").exists())
        with contextlib.suppress(OSError):  # the first record finds out, and says so
            folder.mkdir(exist_ok=True)
        self._records = Records(path, say)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by their names."""
        if not self._begun:
            self._begin()
        event = self._new(step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._records.append(_framed(event.SerializeToString()))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _begin(self) -> None:
        self._begun = True
        version = self._new(0)
        version.file_version = "brain.Event:2"
        self._records.append(_framed(version.SerializeToString()))
        start = self._new(self._after + 1)
        start.session_log.status = self._event.SessionLog.START
        self._records.append(_framed(start.SerializeToString()))

    def _new(self, step: int) -> Any:
        return self._event.Event(wall_time=time.time(), step=step)


def forget_after(folder: Path, step: int) -> None:
    """Cuts the scalars of later steps off the event files in a folder: those steps are about to be
    made again.

    A file's steps ascend, so what is cut is its end; a record that was cut short goes with it.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        keep = 0
        with path.open("rb") as file:
            for last, end in _steps(file):
                if last > step:
                    break
                keep = end
        if keep < path.stat().st_size:
            os.truncate(path, keep)


def _framed(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    length = LENGTH.pack(len(data))
    return length + CHECKSUM.pack(masked_crc32c(length)) + data + CHECKSUM.pack(masked_crc32c(data))


def _steps(file: Any) -> Iterator[tuple[int, int]]:
    """The step of each whole record of a file, 0 of one that has no scalars, and where the record
    ends.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto import event_pb2

    end = 0
    while len(header := file.read(LENGTH.size + CHECKSUM.size)) == LENGTH.size + CHECKSUM.size:
        (length,) = LENGTH.unpack(header[: LENGTH.size])
        if length > 2**26:  # no event of scalars is as long: the file is damaged here
            return
        data = file.read(length)
        if len(file.read(CHECKSUM.size)) < CHECKSUM.size:
            return
        end += len(header) + length + CHECKSUM.size
        event = event_pb2.Event()
        try:
            event.ParseFromString(data)
        except DecodeError:
            return
        yield event.step if event.HasField("summary") else 0, end
