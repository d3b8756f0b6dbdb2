"""The files of a run directory other than checkpoints, and the check that a run may go on in it."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braeburn import __version__
from braeburn.atomic import write_atomically
from braeburn.config import Run, flatten, read_run
from braeburn.disk import locked
from braeburn.errors import UserError
from braeburn.train import tensorboard
from braeburn.train.records import Records, json_line, json_lines

log = logging.getLogger(__name__)

# What may differ when a run goes on: how it is carried out, not what it computes.
FREE_TO_CHANGE = (
    *("name", "mesh", "checkpoint", "remat", "offload", "evaluation", "model.scan_layers", "precision.reduce"),
    "model.max_position_embeddings",
    *("data.workers", "data.prefetch", "data.cache", "data.accept"),
    *("optimizer.skip_norm", "optimizer.max_skipped"),
)


class RunDirectory:
    """A folder that holds one run."""

    def __init__(self, path: Path, *, writes: bool = True, say: Callable[[str], None] = log.warning):
        """Creates the folder where it is missing.

        Args:
            path: the folder.
            writes: whether this process is the one of its run that writes here; in others, what writes does nothing.
            say: takes a line when events cannot be written, and when they can again; a warning is logged by default.

        Raises:
            UserError: it is not a local folder that can be written to.
        """
        if re.match("[a-z0-9]{2,}:/", str(path)):  # a Path has but one slash after gs:
            raise UserError(f"--out {str(path)!r} is not a local folder; name a folder on a mounted file system")
        self.path, self.writes = path, writes
        self._events = Records(path / "events.jsonl", say, lines=True)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = os.strerror(error.errno).lower() if error.errno else str(error)
            raise UserError(f"--out {str(path)!r} cannot be created ({reason}); choose another folder") from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(
                f"--out {str(path)!r} cannot be written to; choose another folder or change its permissions"
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
                f"--out {str(self.path)!r} holds {strangers[0]!r} but no run; choose an empty or new folder"
            )
        in_use = (
            f"--out {str(self.path)!r} is in use by another process that trains there; "
            f"wait for it to end or stop it, or choose another --out"
        )
        with locked(self.path / ".lock", in_use):
            yield

    def begun(self) -> bool:
        """Whether a run was begun or imported here."""
        return (self.path / "config.json").exists()

    def check_unchanged(self, run: Run, step: int) -> None:
        """Refuses a run that would go on from `step` of the one here, but compute something else.

        A run at step 0 may change in all but its model. Later, stages that have not begun may be changed or added;
        of the rest only how the run is carried out.

        Raises:
            UserError: naming the first field that differs.
        """
        earlier = read_run(self.path)
        begun = _begun_stages(earlier, step)
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
        """`config.json`: the whole run, where its values came from, and the versions that run it."""
        packages = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "tokenizers")
        versions = {"braeburn": __version__, "python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in packages}
        content = {"run": run.model_dump(mode="json"), "provenance": origins, "versions": versions}
        write_atomically(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def event(self, kind: str, **details: Any) -> None:
        """Appends a line to `events.jsonl`."""
        if self.writes:
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
        for row in json_lines(self.path / "metrics.jsonl"):
            if isinstance(row.get("step"), int) and row["step"] <= step:
                yield row

    def events(self, kind: str) -> Iterator[dict[str, Any]]:
        """The events of one kind that tell of a step, in order."""
        for event in json_lines(self.path / "events.jsonl"):
            if event.get("event") == kind and isinstance(event.get("step"), int):
                yield event

    def stage_results(self, step: int) -> list[dict[str, Any]]:
        """The end of each stage finished by `step`, as its event tells: stage, step, tokens, loss and held_out."""
        ends = {}
        for event in self.events("stage_end"):
            if event["step"] <= step:
                ends[event["stage"]] = {name: v for name, v in event.items() if name not in ("event", "time")}
        return list(ends.values())

    def recent_loss(self, stage: str) -> float | None:
        """Mean loss of the last steps of a stage, up to 20, in nats per token; None where no row is left of it."""
        rows = (row for row in json_lines(self.path / "metrics.jsonl") if row.get("stage") == stage)
        losses = deque((row.get("loss") for row in rows), 20)
        return sum(math.nan if loss is None else loss for loss in losses) / len(losses) if losses else None


def _begun_stages(run: Run, step: int) -> list[str]:
    """The names of the stages that have made a step by `step`."""
    first, names = 0, []
    for name, stage in run.stages.items():
        if first < step:
            names.append(name)
        first += stage.steps
    return names


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
    return stage not in begun or field in ("accumulation_steps", "mesh") or path.endswith(".distillation.cached")
