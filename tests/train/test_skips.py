"""Steps that are skipped are told of, and a run that learned from too few does not count as
finished.
"""

import io
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from braeburn.config import Run, override
from braeburn.errors import UserError
from braeburn.train import guard
from braeburn.train.guard import check_share_of_skips, check_skips_in_a_row
from braeburn.train.loop import train
from braeburn.train.metrics import History, MetricsWriter, Recorder
from braeburn.train.progress import Display
from braeburn.train.resolved import resolve_stage
from support import Answer, braeburn, events, rows, scalars


def advised(sentence: str) -> list[list[str]]:
    """What a sentence advises to add to the command, each as a list of arguments."""
    return [
        ["--set", assignment] for assignment in re.findall(r"--set (\S+?)(?=[;,.]? |$)", sentence)
    ]


def test_skips_in_a_row_are_counted_over_calls_and_stages() -> None:
    made = [{"stage": "core", "loss": None, "skipped": total} for total in (1, 1, 2, 3)]
    history = History(made)
    assert (history.skipped, history.skipped_in_a_row) == (3, 2)
    history.observe("later", 1.0, 4)
    assert (history.skipped, history.skipped_in_a_row) == (4, 3)
    history.observe("later", 1.0, 4)
    assert (history.skipped, history.skipped_in_a_row) == (4, 0)


def test_the_average_is_of_the_last_50_losses_of_the_stage() -> None:
    history = History()
    assert math.isnan(history.loss_average)
    for loss in (1.0, None, math.nan, 3.0):
        history.observe("core", loss, 0)
    assert history.loss_average == 2.0
    for loss in range(100):
        history.observe("core", float(loss), 0)
    assert history.loss_average == sum(range(50, 100)) / 50
    history.observe("later", 7.0, 0)
    assert history.loss_average == 7.0


def test_too_many_in_a_row(tiny: Run) -> None:
    check_skips_in_a_row(tiny, "core", 200, guard.MAX_SKIPPED_IN_A_ROW - 1, math.nan)
    with pytest.raises(UserError) as refused:
        check_skips_in_a_row(tiny, "core", 200, guard.MAX_SKIPPED_IN_A_ROW, math.nan)
    assert str(refused.value) == (
        "the last 100 steps up to step 200 were skipped: their gradients are not finite; begin "
        "again in another folder "
        "with a lower learning rate, as --set stages.core.learning_rate=0.001"
    )
    with pytest.raises(UserError) as refused:
        check_skips_in_a_row(tiny, "core", 200, guard.MAX_SKIPPED_IN_A_ROW, 321.0)
    assert (
        "the norm of the last gradient, 321, is not below optimizer.skip_norm=100; add --set "
        in str(refused.value)
    )
    assert advised(str(refused.value))[0] == ["--set", "optimizer.skip_norm=6.4e+02"]


def test_the_share_that_is_allowed(tiny: Run) -> None:
    run = override(tiny, {"stages.core.tokens": 40 * 1024})
    check_share_of_skips(run, "core", 4)
    with pytest.raises(UserError, match=r"5 of the 40 steps of stage 'core' were skipped"):
        check_share_of_skips(run, "core", 5)
    check_share_of_skips(tiny, "core", 1)  # of six: one step says nothing
    with pytest.raises(UserError, match=r"2 of the 6 steps"):
        check_share_of_skips(tiny, "core", 2)
    check_share_of_skips(override(tiny, {"optimizer.max_skipped": 1}), "core", 6)


def test_a_run_that_diverges_does_not_end_well_and_its_advice_works(
    tiny_arguments: list[str], tmp_path: Path
) -> None:
    def call(out: str, *more: str) -> Answer:
        return braeburn("train", *tiny_arguments, "--out", tmp_path / out, *more)

    diverging = ["--set", "stages.core.learning_rate=1e30"]
    for _ in range(2):  # again, it does not become a success either
        sentence = call("run", *diverging).error
        assert "5 of the 6 steps of stage 'core' were skipped" in sentence
    lower, accepted = advised(sentence)
    assert lower == ["--set", "stages.core.learning_rate=1e+29"]
    assert accepted == ["--set", "optimizer.max_skipped=0.84"]
    assert [event["skipped"] for event in events(tmp_path / "run", "stage_end")] == [5]

    answer = call("other", *diverging, *lower, "--stop-after-steps", "1")
    assert answer.code == 0, answer.err
    answer = call("run", *diverging, *accepted, "--stop-after-steps", "1")
    assert answer.code == 0, answer.err
    assert "5 skipped" in answer.err or "6 skipped" in answer.err
    assert "stopped at step 7 of 14; 6 steps were skipped" in answer.err


@pytest.mark.deep
def test_a_norm_above_the_limit_is_gone_on_with_as_advised(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_SKIPPED_IN_A_ROW", 4)
    run = override(tiny, {"optimizer.skip_norm": 1e-3, "checkpoint.every_steps": 1})
    assert train(run, tmp_path, stop_after_steps=2).step == 2
    with pytest.raises(UserError, match=r"the last 4 steps up to step 4 were skipped") as refused:
        train(run, tmp_path)
    (path, value), *_ = (argument[1].split("=") for argument in advised(str(refused.value)))
    assert path == "optimizer.skip_norm"
    assert train(override(run, {path: value}), tmp_path, stop_after_steps=1).step >= 4
    assert rows(tmp_path)[-1]["skipped"] == rows(tmp_path)[-2]["skipped"]


class Rows(list[dict[str, Any]]):
    """In place of a writer of metrics."""

    def write(self, row: dict[str, Any]) -> None:
        self.append(row)


def arrays(**metrics: Any) -> dict[str, jax.Array]:
    """Metrics as a step returns them."""
    return {name: jnp.asarray(value) for name, value in metrics.items()}


def test_whatever_a_step_returns_is_written(tiny: Run, tmp_path: Path) -> None:
    display = Display(14, Console(file=io.StringIO()))
    writer = MetricsWriter(tmp_path, 0, print)
    stage = resolve_stage(tiny, "core", jax.devices()[:1])
    recorder = Recorder(stage, writer, display, History())
    usual = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.5, "skipped": 0}
    recorder.observe(1, arrays(**usual, z_loss=0.25, load=[0.5, float("nan"), 1.0]), 0.0)
    recorder.flush()
    writer.close()
    (row,) = rows(tmp_path)
    assert {name: row[name] for name in usual} == usual
    assert row["z_loss"] == 0.25 and row["load"] == [0.5, None, 1.0]
    assert ("z_loss", 1, 0.25) in scalars(tmp_path / "tensorboard")
    recorder.observe(2, arrays(**usual, mfu=0.5), 0.0)
    with pytest.raises(ValueError, match=r"\['mfu'\], which are names of the row's own"):
        recorder.flush()


def test_the_time_of_a_step_is_that_of_steps_alone(tiny: Run) -> None:
    written = Rows()
    display = Display(14, Console(file=io.StringIO()))
    stage = resolve_stage(tiny, "core", jax.devices()[:1])
    recorder = Recorder(stage, written, display, History())  # type: ignore[arg-type]
    figures = arrays(loss=1.0, grad_norm=1.0, learning_rate=0.1, skipped=0)
    time.sleep(0.3)  # the stage is entered
    with recorder.apart():
        pass
    for step in range(1, 5):
        time.sleep(0.01)
        recorder.observe(step, figures, 0.0)
        if step == 2:
            with recorder.apart():
                assert [row["step"] for row in written] == [
                    1,
                    2,
                ]  # before anything else that takes time
                time.sleep(0.3)
    recorder.flush()
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    for row in written:
        assert row["step_seconds"] < 0.2
        assert row["tokens_per_second"] > 1024 / 0.2


def test_skipped_steps_are_in_the_progress_line() -> None:
    out = io.StringIO()
    row = {
        "step": 1,
        "stage": "core",
        "loss": 2.5,
        "loss_average": 2.25,
        "step_seconds": 1.0,
        "tokens_per_second": 10.0,
        "mfu": None,
        "skipped": 3,
    }
    with Display(1, Console(file=out, width=200)) as display:
        display.step(row, 1)
    assert "loss 2.5000 (average 2.2500)  10 tokens/s  3 skipped" in out.getvalue()
