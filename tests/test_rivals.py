"""The comparison with other trainers, as far as it needs none of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "rivals"
sys.path.insert(0, str(FOLDER))

import protocol  # noqa: E402
import runner  # noqa: E402
import scaling  # noqa: E402

RUNNER = (sys.executable, FOLDER / "runner.py", "--only")
TINY = {
    "vocab": 64,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "ffn": 48,
    "sequences": 2,
    "length": 16,
}


def test_all_programs_get_the_same_turns() -> None:
    names = ["a", "b", "c"]
    orders = [tuple(runner.rotated(names, turn)) for turn in range(6)]
    assert len(set(orders)) == 6
    assert {order[0] for order in orders[:3]} == set(names)
    assert {order[0] for order in orders[3:]} == set(names)


def test_the_quietest_block_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.5, 0.2, 0.9])

    def block(program: object, count: int) -> runner.Block:
        return runner.Block([1.0] * count, 1.0, next(found), 0, [])

    monkeypatch.setattr(runner, "block", block)
    assert runner.quiet_block(None, 3, 0.1, 3).other == 0.2  # type: ignore[arg-type]


def test_ratios_are_taken_within_a_round() -> None:
    def block(seconds: float) -> runner.Block:
        return runner.Block([9.0, seconds, seconds], 3.0, 0.0, 10, [1.0, 1.0, 1.0])

    class Started:
        def __init__(self, name: str) -> None:
            self.name = name
            self.first = {"loss": 2.0, "versions": {}}

    programs = {name: Started(name) for name in ("braeburn", "torch")}
    # The machine slows down by half; the ratio stays.
    rounds = [
        {"braeburn": block(1.0), "torch": block(1.5)},
        {"braeburn": block(2.0), "torch": block(3.0)},
        {"braeburn": block(1.5), "torch": block(2.25)},
    ]
    starts = {name: [{"first_step_seconds": 4.0}] for name in programs}
    work = protocol.Work(**TINY)
    found = runner.summary(programs, (rounds, [], [1e9]), work, starts)  # type: ignore[arg-type]
    assert found["programs"]["torch"]["braeburn_is_faster_by"] == (1.5, 1.5, 1.5)
    assert found["programs"]["torch"]["tokens_per_second"] == work.tokens / 2.25
    assert "| torch |" in runner.table(found)


def test_a_comparison_with_itself(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    sizes = [part for name, value in TINY.items() for part in ("--work", f"{name}={value}")]
    counts = ["--rounds", "2", "--alternating", "2", "--tries", "1"]
    subprocess.run([*RUNNER, "braeburn", *counts, "--json", out, *sizes], check=True)
    facts = json.loads(out.read_text())["programs"]["braeburn"]
    assert facts["parameters"] == protocol.Work(**TINY).parameters
    assert facts["braeburn_is_faster_by"] == [1.0, 1.0, 1.0]
    # Eighteen steps on four batches of random tokens: it learns them by heart.
    assert facts["last_loss"] < facts["first_loss"]


def test_a_program_that_ends_is_reported() -> None:
    done = subprocess.run(
        [*RUNNER, "torch", "--python", f"torch={sys.executable}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: torch ended" in done.stderr
    assert "No module named 'torch'" in done.stderr


def test_an_unknown_program_is_named() -> None:
    done = subprocess.run([*RUNNER, "tensorflow"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only tensorflow is none of braeburn, " in done.stderr


def test_one_size_is_changed_at_a_time() -> None:
    work = protocol.Work()
    longer = scaling.changed(work, "length", 1024)
    assert (longer.length, longer.tokens) == (1024, work.tokens)
    wider = scaling.changed(work, "width", 768)
    assert (wider.heads, wider.kv_heads, wider.ffn) == (12, 4, 2048)
    assert wider.head_dim == work.head_dim
    deeper = scaling.changed(work, "layers", 16)
    # All but the head's products double.
    head = 6 * work.vocab * work.width * work.tokens
    assert deeper.flops - head == 2 * (work.flops - head)
