"""What a run writes down of each step, and the arithmetic of model FLOPs utilisation."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax

from braeburn.catalogue import chip_of
from braeburn.config import Model, Run
from braeburn.model.spec import Tree, count
from braeburn.model.transformer import param_specs
from braeburn.train.guard import SkipCounter
from braeburn.train.progress import Display


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, from the catalogue; None where it is not known, as for CPUs."""
    chip = chip_of(device_kind)
    return chip.peak_flops if chip else None


def flops_per_token(model: Model, specs: Tree, sequence_length: int) -> int:
    """Model FLOPs of one training token, 6 N + 12 L d S (PaLM, arXiv 2204.02311, appendix B).

    N counts the weights that multiply: all but an embedding that is only looked up. d is the width of attention.
    """
    weights = count(specs) - (0 if model.tied_embeddings else model.vocab_size * model.d_model)
    return 6 * weights + 12 * model.num_layers * model.num_heads * model.head_dim * sequence_length


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard."""

    def __init__(self, directory: Path, *, quiet: bool = False):
        """Opens both for appending, or neither where `quiet`; rows are flushed as they are written."""
        self._quiet = quiet
        if quiet:
            return
        from tensorboardX import SummaryWriter

        self._file = (directory / "metrics.jsonl").open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        """One step's row; its numbers also go to TensorBoard."""
        if self._quiet:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")  # JSON has no NaN
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, row["step"])

    def held_out(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Held-out results by source, for TensorBoard; the loop records them as an event too."""
        for source, values in results.items() if not self._quiet else ():
            for name, value in values.items():
                self._tensorboard.add_scalar(f"held_out/{source}/{name}", value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._quiet:
            return
        self._file.close()
        self._tensorboard.close()


class Recorder:
    """Turns a stage's metrics on the device into rows, each a step late so that the device never waits."""

    def __init__(self, run: Run, stage: str, writer: MetricsWriter, display: Display, num_devices: int):
        """Begins to time the next step."""
        self._num_devices = num_devices
        self.writer = writer
        self._display = display
        self._name = stage
        self._stage = run.stages[stage]
        earlier = [run.stages[name] for name in list(run.stages)[: list(run.stages).index(stage)]]
        self._first_step = sum(other.steps for other in earlier)
        self._first_token = sum(other.steps * other.batch_tokens for other in earlier)
        model = run.models()[stage].trained
        self._flops = flops_per_token(model, param_specs(model), self._stage.sequence_length)
        self._skips = SkipCounter()
        self._pending: tuple[int, dict[str, Any], float] | None = None
        self._last = time.monotonic()

    def observe(self, step: int, metrics: dict[str, Any], data_seconds: float) -> None:
        """Takes the metrics of `step`, just dispatched, and writes the row of the one before."""
        self.flush()
        self._pending = (step, metrics, data_seconds)

    def flush(self) -> None:
        """Waits for the last step and writes its row.

        Raises:
            UserError: no step has been valid for long.
        """
        if self._pending is None:
            return
        step, metrics, data_seconds = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        tokens_per_second = self._stage.batch_tokens / seconds
        peak = peak_flops(jax.devices()[0].device_kind)
        row: dict[str, Any] = {
            "step": step,
            "stage": self._name,
            "tokens": self._first_token + (step - self._first_step) * self._stage.batch_tokens,
            "loss": values["loss"],
            **{name: values[name] for name in ("distillation_loss",) if name in values},
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._flops / (peak * self._num_devices) if peak else None,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "skipped": int(values["skipped"]),
        }
        self.writer.write(row)
        self._display.step(row, step - self._first_step)
        self._skips.observe(step, row["skipped"])
