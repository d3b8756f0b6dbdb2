import io
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from braeburn.config import LayerConfig, Run
from braeburn.config.sublayers.experts import Experts
from braeburn.disk import check_space
from braeburn.errors import UserError
from braeburn.models.decoder import param_specs
from braeburn.recipes import load
from braeburn.train.guard import StopRequest
from braeburn.train.metrics import flops_per_token, peak_flops
from braeburn.train.progress import Display, duration, tracked
from support import rows


def test_flops_per_token_by_hand() -> None:
    llama = load("llama2-7b").model
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11_008 + 2 * 4096
    weights = 32 * layer + 4096 + 32_000 * 4096  # the head; the untied embedding is only looked up
    assert flops_per_token(llama, param_specs(llama), 4096) == 6 * weights + 12 * 32 * 4096 * 4096
    tied = load("qwen3-0.6b").model
    assert flops_per_token(tied, param_specs(tied), 1) == 6 * 596_049_920 + 12 * 28 * 2048


def test_a_token_costs_what_its_experts_do() -> None:
    dense = load("afm-tiny").model
    two = Experts(num_experts=8, experts_per_token=2, expert_dim=dense.ffn_dim // 2)
    sparse = dense.model_copy(update={"pattern": (LayerConfig(feed_forward=two),)})
    of_dense, of_sparse = (
        flops_per_token(model, param_specs(model), 128) for model in (dense, sparse)
    )
    assert of_sparse == of_dense + 6 * dense.num_layers * dense.d_model * 8  # those of the router


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("AMD Instinct MI300X", 1307),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),  # one of a chip's two
        ("AMD Instinct MI250X", 191.5),
        ("TPU v4 lite", None),
        ("TPU v5 litepod", None),
        ("NVIDIA H1000", None),
        ("NVIDIA A10", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_of_a_device(kind: str, teraflops: float | None) -> None:
    assert peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3600, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (86_399.9, "1 d 0 h"),
        (100 * 86_400 + 3 * 3600, "100 d 3 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def row(step: int, **changes: Any) -> dict[str, Any]:
    made = {
        "step": step,
        "stage": "core",
        "loss": 2.5,
        "loss_average": 2.625,
        "skipped": 0,
        "step_seconds": 60.0,
        "tokens_per_second": 12_345.6,
        "mfu": None,
    }
    return made | changes


def test_display_in_a_log_is_sparse_lines() -> None:
    out = io.StringIO()
    with Display(100, Console(file=out, width=40)) as display:
        display.begin_stage("core", 100, 0)
        for step in range(1, 101):
            display.step(row(step), step)
        display.begin_stage("later", 10, 4)
        display.say("[bold] is not markup, and a line longer than the console is not broken")
    assert out.getvalue().splitlines() == [
        "stage core: 100 steps",
        "step 1/100  core  loss 2.5000 (average 2.6250)  12,346 tokens/s  1 h 39 min left",
        "step 100/100  core  loss 2.5000 (average 2.6250)  12,346 tokens/s  0 s left",
        "stage later: 6 steps left of 10",
        "[bold] is not markup, and a line longer than the console is not broken",
    ]


def test_display_on_a_terminal_is_a_live_bar() -> None:
    out = io.StringIO()
    with Display(10, Console(file=out, force_terminal=True, highlight=False, width=120)) as display:
        display.begin_stage("core", 5, 0)
        display.step(row(1, mfu=0.5), 1)
        display.begin_stage("context", 5, 2)
        display.step(row(8, stage="context", mfu=0.5), 3)
    text = out.getvalue()
    assert (
        "3/5" in text and "MFU 50.0%" in text and "loss 2.5000" in text and "2 min 0 s left" in text
    )
    assert "\x1b[" in text and "stage context: 3 steps left of 5" in text


def test_first_signal_is_remembered_and_the_second_acts() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        with StopRequest() as stop:
            assert stop.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == "SIGTERM" and not caught
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(caught) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_space_for_one_checkpoint_is_required(tmp_path: Path) -> None:
    words = "a checkpoint takes", "free some or choose another --out"
    check_space(tmp_path, 1000, *words)
    with pytest.raises(
        UserError,
        match=r"a checkpoint takes 1,000,000,000,000,000,000 bytes .* free some or choose another",
    ):
        check_space(tmp_path, 10**18, *words)


def test_rows_of_a_run(finished: Path, tiny: Run) -> None:
    made = rows(finished)
    assert all(
        set(row)
        == {
            "step",
            "stage",
            "tokens",
            "loss",
            "loss_average",
            "grad_norm",
            "learning_rate",
            "tokens_per_second",
            "mfu",
            "step_seconds",
            "data_seconds",
            "skipped",
        }
        for row in made
    )
    assert [row["tokens"] for row in made] == [1024 * step for step in range(1, 15)]
    assert [row["stage"] for row in made] == ["core"] * 6 + ["continued"] * 4 + ["context"] * 4
    for row in made:
        assert row["tokens_per_second"] == pytest.approx(1024 / row["step_seconds"])
        assert row["data_seconds"] >= 0 and row["step_seconds"] > 0
        assert row["skipped"] == 0 and row["mfu"] is None
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    # Warm-up is linear from 0 to the peak, then the decay ends at the floor; each stage begins
    # anew.
    rates = [row["learning_rate"] for row in made]
    core, continued = tiny.stages["core"], tiny.stages["continued"]
    assert rates[:2] == pytest.approx([core.learning_rate / 2, core.learning_rate])
    assert rates[5] == pytest.approx(core.learning_rate * core.schedule.floor)
    assert rates[6] == pytest.approx(continued.learning_rate)
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))


def test_progress_of_other_work_is_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("braeburn.train.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    for item in tracked(range(10), "reading weights", console=Console(file=out, width=40)):
        now[0] += 4 if item else 0
    assert out.getvalue().splitlines() == [
        "reading weights: 4 of 10  18 s left",
        "reading weights: 7 of 10  10 s left",
    ]
    out = io.StringIO()
    assert list(tracked((n for n in range(3)), "tokenising x", console=Console(file=out))) == [
        0,
        1,
        2,
    ]
    assert out.getvalue() == ""  # it was over soon


def test_what_comes_before_the_steps_of_a_stage_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("braeburn.train.progress.time.monotonic", lambda: now[0])
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, highlight=False, width=120)
        with Display(10, console) as display:
            display.begin_stage("pruned", 10, 0)
            for _ in display.tracked(range(4), "measuring activations", 4):
                now[0] += 8
        text = out.getvalue()
        assert "measuring activations: 2 of 4  16 s left" in text


def test_progress_of_other_work_on_a_terminal_is_a_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    assert list(tracked([1, 2, 3], "reading weights", console=console)) == [1, 2, 3]
    assert "reading weights" in out.getvalue() and "3/3" in out.getvalue()


def test_a_display_outlives_its_terminal() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(5, "Input/output error")

    with Display(10, Console(file=Gone(), width=100)) as display:
        display.say("nobody reads this")
        display.step(row(1), 1)


def test_a_warning_of_a_long_run_is_repeated_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braeburn.train.progress.SECONDS_UNTIL_REPEATED", 0.0)
    out = io.StringIO()
    with Display(10, Console(file=out, width=100)) as display:
        display.warn("warning: using 1 of 8 devices")
        display.say("finished")
    assert out.getvalue().splitlines() == [
        "warning: using 1 of 8 devices",
        "finished",
        "warning: using 1 of 8 devices",
    ]
