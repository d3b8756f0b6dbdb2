"""The files of a run directory other than checkpoints, and the check that a run may go on in it."""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from braeburn import __version__
from braeburn.config import Run, flatten, read_run
from braeburn.errors import UserError

# What may differ when a run goes on: how it is carried out, not what it computes.
FREE_TO_CHANGE = ("name", "mesh", "checkpoint", "remat", "evaluation", "data.workers", "data.prefetch", "data.cache")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


class RunDirectory:
    """A folder that holds one run."""

    def __init__(self, path: Path):
        """Creates the folder where it is missing.

        Raises:
            UserError: it is not a local folder that can be written to.
        """
        if "://" in str(path) or str(path).startswith("gs:/"):
            raise UserError(f"--out {str(path)!r} is not a local folder; name a folder on a mounted file system")
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (PermissionError, NotADirectoryError, FileExistsError, OSError) as error:
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
        before, after = (dict(flatten(r.model_dump(mode="json"))) for r in (read_run(self.path), run))
        for path in [*before, *(path for path in after if path not in before)]:
            if before.get(path) == after.get(path) or self._may_change(path, run, step):
                continue
            raise UserError(
                f"{path} is {after.get(path)!r} but the run in {str(self.path)!r} was begun with "
                f"{before.get(path)!r}; put it back to resume, or choose another --out"
            )

    def _may_change(self, path: str, run: Run, step: int) -> bool:
        if path.startswith("model."):
            return False
        if step == 0 or any(path == free or path.startswith(free + ".") for free in FREE_TO_CHANGE):
            return True
        if path.startswith("stages."):
            begun = []
            first = 0
            for name, stage in run.stages.items():
                if first < step:
                    begun.append(name)
                first += stage.steps
            return path.split(".")[1] not in begun
        return False

    def write_config(self, run: Run, origins: dict[str, str]) -> None:
        """`config.json`: the whole run, where its values came from, and the versions that run it."""
        packages = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "tokenizers")
        versions = {"braeburn": __version__, "python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in packages}
        content = {"run": run.model_dump(mode="json"), "provenance": origins, "versions": versions}
        write_atomically(self.path / "config.json", json.dumps(content, indent=2) + "\n")

    def event(self, kind: str, **details: Any) -> None:
        """Appends a line to `events.jsonl`."""
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": kind, "time": round(time.time(), 3), **details}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the rows of `metrics.jsonl` beyond `step`: those steps are about to be made again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break  # a line cut short when the process was killed
        write_atomically(path, "".join(line + "\n" for line in kept))

    def stage_results(self, step: int) -> list[dict[str, Any]]:
        """The end of each stage finished by `step`, as its event tells: stage, step, tokens, loss and held_out."""
        ends = {}
        for line in (self.path / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event.pop("event") == "stage_end" and event["step"] <= step:
                event.pop("time")
                ends[event["stage"]] = event
        return list(ends.values())
