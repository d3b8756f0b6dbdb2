"""The files of a run directory other than checkpoints, and the check that a run may go on in it."""

import errno
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from braeburn import __version__
from braeburn.atomic import write_atomically
from braeburn.config import Run, flatten, read_identity, read_run
from braeburn.disk import explaining, locked
from braeburn.errors import UserError
from braeburn.jsonfile import Unreadable, json_lines
from braeburn.train import tensorboard
from braeburn.train.records import Records, json_line

log = logging.getLogger(__name__)

_LOCK = ".lock"
# What may differ when a run goes on: how it is carried out, not what it computes.
FREE_TO_CHANGE = (
    *(
        "name",
        "mesh",
        "rules",
        "checkpoint",
        "remat",
        "offload",
        "evaluation",
        "model.scan_layers",
        "precision.reduce",
        "precision.matmul",
    ),
    "model.max_position_embeddings",
    *("data.workers", "data.prefetch", "data.cache", "data.local_cache_bytes", "data.accept"),
    *("optimizer.skip_norm", "optimizer.max_skipped"),
)


class RunDirectory:
    """A folder that holds one run."""

    def __init__(
        self, path: Path, *, writes: bool = True, say: Callable[[str], None] = log.warning
    ):
        """Creates the folder where it is missing.

        Args:
            path: the folder.
            writes: whether this process is the one of its run that writes here; in others, what
                writes does nothing.
            say: takes a line when events cannot be written, and when they can again; a warning is
                logged by default.

        Raises:
            UserError: it is not a local folder that can be written to.
        """
        if re.match("[a-z0-9]{2,}:/", str(path)):  # a Path has but one slash after gs:
            raise UserError(
                f"--out {str(path)!r} is not a local folder; name a folder on a mounted file system"
            )
        self.path, self.writes = path, writes
        self._events = Records(path / "events.jsonl", say, lines=True)
        self._number: tuple[int, int] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
            reason = os.strerror(number).lower() if number else str(error)
            raise UserError(
                f"--out {str(path)!r} cannot be created ({reason}); choose another folder"
            ) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(
                f"--out {str(path)!r} cannot be written to; choose another folder or change its "
                f"permissions"
            )

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run's tokens were made with."""
        return self.path / "tokenizer.json"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keeps other processes from training here, until the end of this one at the latest.

        Raises:
            UserError: one does, or the folder holds other things than a run.
        """
        if not self.writes:
            yield
            return
        strangers = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        if strangers and not self.begun():
            raise UserError(
                f"--out {str(self.path)!r} holds {strangers[0]!r} but no run; choose an empty or "
                f"new folder"
            )
        in_use = (
            f"--out {str(self.path)!r} is in use by another process that trains there; "
            f"wait for it to end or stop it, or choose another --out"
        )
        with locked(self.path / _LOCK, in_use):
            self._number = _number(self.path)
            yield

    def leave_mark(self) -> str:
        """Leaves something in the folder, which this process has claimed, that tells it from all
        others; returns that, or nothing where it could not be left.
        """
        mark = uuid.uuid4().hex
        try:
            (self.path / _LOCK).write_text(mark)
        except OSError:  # as of a full disk, of which others tell better
            return ""
        return mark

    def has_mark(self, mark: str, seconds: float) -> bool:
        """Whether the folder here is the one that another process left its mark in.

        Args:
            mark: as that process tells; empty where it left none.
            seconds: to wait for it, since network file systems may show a new file late.
        """
        until = time.monotonic() + seconds
        while mark:
            with suppress(OSError):
                if (self.path / _LOCK).read_text() == mark:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True

    def begun(self) -> bool:
        """Whether a run was begun or imported here."""
        return (self.path / "config.json").exists()

    def check_unchanged(self, run: Run, step: int) -> None:
        """Refuses a run that would go on from `step` of the one here, but compute something else.

        A run at step 0 may change in all but its model. Later, stages that have not begun may be
        changed or added; of the rest only how the run is carried out.

        Raises:
            UserError: naming the first field that differs.
        """
        earlier = read_run(self.path)
        begun = earlier.begun_by(step)
        before, after = (dict(flatten(r.model_dump(mode="json"))) for r in (earlier, run))
        # The order of the stages that have begun counts too.
        before = {"stages": begun, **before}
        after["stages"] = list(run.stages)[: len(begun)]
        for path in [*before, *(path for path in after if path not in before)]:
            if before.get(path) == after.get(path) or _may_change(path, begun, step):
                continue
            raise UserError(
                f"{path} is {after.get(path)!r} but the run in {str(self.path)!r} was begun with "
                f"{before.get(path)!r}; put it back to resume, or choose another --out"
            )

    def write_config(self, run: Run, origins: dict[str, str]) -> None:
        """`config.json`: the whole run, where its values came from, and the versions that run it.

        A run keeps the identity that it was begun with.
        """
        packages = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "tokenizers")
        versions = {"braeburn": __version__, "python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in packages}
        identity = (read_identity(self.path) if self.begun() else None) or uuid.uuid4().hex
        content = {
            "identity": identity,
            "run": run.model_dump(mode="json"),
            "provenance": origins,
            "versions": versions,
        }
        write_atomically(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def require_present(self) -> None:
        """Refuses to write into a folder that was put in the place of the run's, or to make it
        anew.

        Raises:
            UserError: the run directory was moved or deleted since it was claimed.
        """
        if self._number is not None and self._number != _number(self.path):
            raise UserError(
                f"the run directory {str(self.path)!r} was moved or deleted while it was trained "
                f"in; "
                f"put it back and run the same command to resume, or name its new place with --out"
            )

    def event(self, kind: str, **details: Any) -> None:
        """Appends a line to `events.jsonl`; where there is no room for it, training goes on with a
        warning.

        Raises:
            UserError: the run directory is gone.
        """
        if not self.writes:
            return
        self.require_present()
        self._events.append(json_line({"event": kind, "time": round(time.time(), 3), **details}))

    def forget_after(self, step: int) -> None:
        """Drops what was written of the steps beyond `step`, which are about to be made again."""
        if not self.writes:
            return
        tensorboard.forget_after(self.path / "tensorboard", step)
        path = self.path / "metrics.jsonl"
        if path.exists():
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows(step)))

    def rows(self, step: int) -> Iterator[dict[str, Any]]:
        """The rows of `metrics.jsonl` up to `step`."""
        for row in _lines(self.path / "metrics.jsonl"):
            if isinstance(row.get("step"), int) and row["step"] <= step:
                yield row

    def events(self, kind: str) -> Iterator[dict[str, Any]]:
        """The events of one kind that tell of a step, in order."""
        for event in _lines(self.path / "events.jsonl"):
            if event.get("event") == kind and isinstance(event.get("step"), int):
                yield event

    def stage_results(self, step: int) -> list[dict[str, Any]]:
        """The end of each stage finished by `step`, as its event tells: stage, step, tokens, loss
        and held_out.
        """
        ends = {}
        for event in _lines(self.path / "events.jsonl"):
            if event.get("event") == "stage_end":
                with suppress(ValidationError):
                    end = _StageEnd.model_validate(event)
                    if end.step <= step:
                        ends[end.stage] = end.model_dump()
        return list(ends.values())

    def recent_loss(self, stage: str) -> float:
        """Mean loss of the last steps of a stage, up to 20, in nats per token; NaN where their rows
        are gone.
        """
        rows = _lines(self.path / "metrics.jsonl")
        losses = deque((row.get("loss") for row in rows if row.get("stage") == stage), 20)
        numbers = [loss if isinstance(loss, int | float) else math.nan for loss in losses]
        return sum(numbers) / len(numbers) if numbers else math.nan


class _StageEnd(BaseModel):
    """What the event of a stage's end tells."""

    stage: str
    step: int
    tokens: int
    loss: float | None
    held_out: dict[str, dict[str, int | float | None]]
    skipped: int = 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, none where someone has deleted it.

    Raises:
        UserError: it cannot be read, or something else lies in its place.
    """
    try:
        with explaining(path.parent), suppress(FileNotFoundError):
            yield from json_lines(path)
    except Unreadable as error:
        raise UserError(f"{str(path)!r} {error}; move it away and run again") from None


def _number(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another that is put in its place; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _may_change(path: str, begun: list[str], step: int) -> bool:
    """Whether a leaf may differ from `step` on, once the stages `begun` have made steps."""
    if path.startswith("model.") and path not in FREE_TO_CHANGE:
        return step == 0 and path == "model.z_loss"
    if step == 0 or any(path == free or path.startswith(free + ".") for free in FREE_TO_CHANGE):
        return True
    if not path.startswith("stages."):
        return False
    _, stage, field = path.split(".")[:3]
    # How a batch is divided changes nothing but rounding, nor does where labels come from.
    return (
        stage not in begun
        or field in ("accumulation_steps", "mesh")
        or path.endswith(".distillation.cached")
    )
