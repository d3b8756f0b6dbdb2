"""What a run writes down of each step, and the arithmetic of model FLOPs utilisation."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from braeburn.config import ModelConfig
from braeburn.hardware.catalogue import chip_of
from braeburn.layers.spec import Tree, count_active
from braeburn.models.decoder import param_specs
from braeburn.train.guard import check_skips_in_a_row
from braeburn.train.progress import Display
from braeburn.train.records import Records, json_line
from braeburn.train.resolved import ResolvedStage
from braeburn.train.tensorboard import EventFile

# What every step returns; the row has places of their own for these.
STEP_METRICS = ("loss", "grad_norm", "learning_rate", "skipped")
# Of the moving average of the loss.
STEPS_OF_AVERAGE = 50


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, from the catalogue; None where it is not known, as for
    CPUs.
    """
    chip = chip_of(device_kind)
    return chip.peak_flops if chip else None


def flops_per_token(model: ModelConfig, specs: Tree, sequence_length: int) -> int:
    """Model FLOPs of one training token, 6 N + 12 L d S (PaLM, arXiv 2204.02311, appendix B).

    N counts the weights that a token is multiplied by: not an embedding that is only looked up, and
    of experts those that the token is sent to. d is the width of attention, the mean of those of
    keys and values, and S what a token of each layer can attend to, without regard to causality.
    """
    weights = count_active(specs) - (
        0 if model.tied_embeddings else model.vocab_size * model.d_model
    )
    reached = sum(
        sum(layer.attention.head_dims(model.head_dim)) * layer.attention.reach(sequence_length)
        for layer in model.layer_configs
    )
    return 6 * weights + 6 * model.num_heads * reached


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard.

    Neither ever stops or delays training: see `Records`.
    """

    def __init__(
        self, directory: Path, after: int, say: Callable[[str], None], *, quiet: bool = False
    ):
        """Both are appended to, or neither where `quiet`; rows are written at once.

        Args:
            directory: the run's.
            after: the last step of what both hold.
            say: takes a line when one cannot be written, and when it can again.
            quiet: of processes that are not the main one.
        """
        self._quiet = quiet
        if quiet:
            return
        self._rows = Records(directory / "metrics.jsonl", say, lines=True)
        self._events = EventFile(directory / "tensorboard", after, say)

    def write(self, row: dict[str, Any]) -> None:
        """One step's row; its numbers also go to TensorBoard."""
        if self._quiet:
            return
        self._rows.append(json_line({name: _finite(value) for name, value in row.items()}))
        numbers = {
            name: v for name, v in row.items() if name != "step" and isinstance(v, int | float)
        }
        self._events.scalars(row["step"], numbers)

    def held_out(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Held-out results by source, for TensorBoard; the loop records them as an event too."""
        if self._quiet or not results:
            return
        figures = (
            (source, name, v) for source, values in results.items() for name, v in values.items()
        )
        self._events.scalars(
            step, {f"held_out/{source}/{name}": value for source, name, value in figures}
        )

    def close(self) -> None:
        """Closes both."""
        if self._quiet:
            return
        self._rows.close()
        self._events.close()


def _finite(value: Any) -> Any:
    """A value, or lists of values, with None for what JSON cannot hold."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class History:
    """What is remembered of a run's steps, whichever calls made them.

    Attributes:
        skipped: steps skipped in all.
        skipped_in_a_row: up to the last step.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        """Takes the rows of earlier calls, in order."""
        self.skipped = self.skipped_in_a_row = 0
        self._stage: str | None = None
        self._losses: deque[float] = deque(maxlen=STEPS_OF_AVERAGE)
        for row in rows:
            self.observe(row.get("stage"), row.get("loss"), row.get("skipped") or 0)

    def observe(self, stage: str | None, loss: float | None, skipped: int) -> None:
        """Takes a step: its stage, its loss in nats (None or NaN where it has none), and the steps
        skipped so far.
        """
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped > self.skipped else 0
        self.skipped = skipped

    @property
    def loss_average(self) -> float:
        """The mean loss of the stage's last 50 steps, or of all if fewer; NaN without any."""
        return math.fsum(self._losses) / len(self._losses) if self._losses else math.nan


class Recorder:
    """Turns a stage's metrics on the device into rows, each a step late so that the device never
    waits.
    """

    def __init__(
        self, resolved: ResolvedStage, writer: MetricsWriter, display: Display, history: History
    ):
        """Begins to time the next step.

        Args:
            resolved: the stage.
            writer: takes the rows.
            display: shows them.
            history: of the run's steps so far, which those of this stage are added to.
        """
        self.writer = writer
        self._display = display
        self._history = history
        self._stage = resolved
        self._batch_tokens = resolved.stage.batch_tokens
        model = resolved.models.trained
        self._flops = flops_per_token(model, param_specs(model), resolved.stage.sequence_length)
        self._pending: tuple[int, dict[str, Any], float] | None = None
        self._last = time.monotonic()

    def observe(self, step: int, metrics: dict[str, Any], data_seconds: float) -> None:
        """Takes the metrics of `step`, just dispatched, and writes the row of the one before.

        Args:
            step: steps made, with this one.
            metrics: arrays by name: those of `STEP_METRICS`, and whatever else the step returns.
            data_seconds: that the step waited for its batch.
        """
        self.flush()
        self._pending = (step, metrics, data_seconds)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keeps the time of what is done within, as evaluating and saving, out of that of steps.

        The last step is waited for first: what is done within needs its result anyway.
        """
        self.flush()
        try:
            yield
        finally:
            self._last = time.monotonic()

    def flush(self) -> None:
        """Waits for the last step and writes its row.

        Raises:
            UserError: no step has been valid for long.
        """
        if self._pending is None:
            return
        step, metrics, data_seconds = self._pending
        self._pending = None
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        tokens_per_second = self._batch_tokens / seconds
        peak = peak_flops(jax.devices()[0].device_kind)
        devices, skipped = self._stage.layout.num_devices, int(values["skipped"])
        self._history.observe(self._stage.name, values["loss"], skipped)
        row: dict[str, Any] = {
            "step": step,
            "stage": self._stage.name,
            "tokens": self._stage.tokens_by(step),
            "loss": values["loss"],
            "loss_average": self._history.loss_average,
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._flops / (peak * devices) if peak else None,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "skipped": skipped,
        }
        others = {name: value for name, value in values.items() if name not in STEP_METRICS}
        if taken := row.keys() & others.keys():
            raise ValueError(f"the step returns {sorted(taken)}, which are names of the row's own")
        row |= others
        self.writer.write(row)
        self._display.step(row, step - self._stage.first_step)
        in_a_row = self._history.skipped_in_a_row
        run, name = self._stage.run, self._stage.name
        check_skips_in_a_row(run, name, step, in_a_row, values["grad_norm"])
