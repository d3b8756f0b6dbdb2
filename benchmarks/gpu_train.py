"""A whole run of three stages on a GPU beside the same run on the CPU, killed and resumed,
evaluated and sampled.

    python benchmarks/gpu_train.py OUT [--toy]

Prints the largest relative difference of the losses of all steps: of float32 and bfloat16 on the
GPU against float32 on the CPU, and of a run that was killed, resumed, asked to stop and resumed
again against the undisturbed one, with XLA's deterministic operations. Reads no data but Python's
standard library. Exits with 1 where a command fails, where float32 differs by more than 0.002 on
average over the last ten steps, or where the disturbed run differs at all. `--toy` takes steps so
few and small that it ends soon on a CPU.
"""

import argparse
import atexit
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = {
    "stages.core.tokens": 30 * 16_384,
    "stages.core.batch_tokens": 16_384,
    "stages.core.sequence_length": 1024,
    "stages.core.schedule.warmup_steps": 5,
    "stages.continued.tokens": 15 * 16_384,
    "stages.continued.batch_tokens": 16_384,
    "stages.continued.sequence_length": 1024,
    "stages.context.tokens": 15 * 16_384,
    "stages.context.batch_tokens": 16_384,
    "stages.context.sequence_length": 2048,
    "model.head_dim": 64,
    "checkpoint.every_steps": 10,
    "evaluation.tokens": 65_536,
}


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        recipe: what is trained.
        settings: of the recipe.
        steps: of all stages.
        kill_after: steps before SIGKILL, in the first stage.
        stop_after: steps before SIGTERM, in the second.
        deterministic: flags of XLA with which a run gives the same bits again.
    """

    recipe: str
    settings: dict[str, Any]
    steps: int
    kill_after: int
    stop_after: int
    deterministic: str = "--xla_gpu_deterministic_ops=true"


# 60 steps of 16 sequences of 1024 tokens with several documents each.
WHOLE = Size("quickstart", SETTINGS, steps=60, kill_after=25, stop_after=38)
TOY_RECIPE = f"{Path(__file__).with_name('gpu_recipes.py')}:train_toy"
# A CPU needs no flag for that.
TOY = Size(TOY_RECIPE, {}, steps=20, kill_after=7, stop_after=14, deterministic="")


def braeburn(*arguments: str, platform: str = "", flags: str = "") -> subprocess.Popen[str]:
    """Starts a command of Braeburn."""
    environment = dict(os.environ)
    if platform:
        environment["JAX_PLATFORMS"] = platform
    if flags:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    command = [sys.executable, "-c", "from braeburn.cli import console; console()", *arguments]
    process: subprocess.Popen[str] = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    atexit.register(process.kill)  # so that none goes on where another fails
    return process


def finish(process: subprocess.Popen[str], what: str) -> str:
    """The output of a command that must succeed."""
    out, err = process.communicate(timeout=400)
    if process.returncode:
        print(f"error: {what} failed with {process.returncode}:\n{err[-3000:]}", flush=True)
        sys.exit(1)
    return out


def losses(directory: Path) -> list[float]:
    """The loss of each step of a run."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def difference(a: list[float], b: list[float], last: int = 0) -> float:
    """The largest relative difference, or of the mean of the last steps."""
    if last:
        a, b = [sum(a[-last:])], [sum(b[-last:])]
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def main() -> int:
    """Runs it all; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for the runs")
    parser.add_argument("--toy", action="store_true", help="few and small steps")
    arguments = parser.parse_args()
    out, size = arguments.out, TOY if arguments.toy else WHOLE
    out.mkdir(parents=True, exist_ok=True)
    settings = [
        part for path, value in size.settings.items() for part in ("--set", f"{path}={value}")
    ]

    def begin(
        name: str, compute: str, *, platform: str = "", flags: str = ""
    ) -> subprocess.Popen[str]:
        precision = ("--set", f"precision.compute={compute}")
        arguments = ("train", size.recipe, "--out", str(out / name), *settings, *precision)
        return braeburn(*arguments, platform=platform, flags=flags)

    def ended(name: str, process: subprocess.Popen[str]) -> list[float]:
        finish(process, name)
        found = losses(out / name)
        print(
            json.dumps({"run": name, "steps": len(found), "first": found[0], "last": found[-1]}),
            flush=True,
        )
        return found

    def train(name: str, compute: str, *, flags: str = "") -> list[float]:
        began = time.monotonic()
        found = ended(name, begin(name, compute, flags=flags))
        print(json.dumps({"run": name, "seconds": round(time.monotonic() - began, 1)}), flush=True)
        return found

    def disturb(name: str, compute: str, after: int, by: signal.Signals, flags: str) -> None:
        process = begin(name, compute, flags=flags)
        metrics, deadline = out / name / "metrics.jsonl", time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= after:
                break
            time.sleep(0.005)
        began = time.monotonic()
        process.send_signal(by)
        process.communicate(timeout=100)
        row = {
            "run": name,
            "signal": by.name,
            "steps": len(losses(out / name)),
            "exit code": process.returncode,
        }
        print(
            json.dumps(row | {"seconds to the exit": round(time.monotonic() - began, 2)}),
            flush=True,
        )

    # One after the other they would mostly wait for a compiler.
    together = {
        "cpu-float32": begin("cpu-float32", "float32", platform="cpu"),
        "gpu-bfloat16": begin("gpu-bfloat16", "bfloat16"),
        "gpu-bfloat16-again": begin("gpu-bfloat16-again", "bfloat16"),
        "gpu-float32": begin("gpu-float32", "float32"),
    }
    exact = train("gpu-deterministic", "bfloat16", flags=size.deterministic)
    disturb("gpu-disturbed", "bfloat16", size.kill_after, signal.SIGKILL, size.deterministic)
    disturb("gpu-disturbed", "bfloat16", size.stop_after, signal.SIGTERM, size.deterministic)
    resumed = train("gpu-disturbed", "bfloat16", flags=size.deterministic)
    found = {name: ended(name, process) for name, process in together.items()}
    reference, narrow, again, wide = found.values()
    result = {
        "float32 against the CPU, any step": difference(wide, reference),
        "float32 against the CPU, last ten": difference(wide, reference, 10),
        "bfloat16 against float32 on the CPU, last ten": difference(narrow, reference, 10),
        "bfloat16 twice, any step": difference(again, narrow),
        "killed, stopped and resumed, deterministic, any step": difference(resumed, exact),
    }
    print(json.dumps(result), flush=True)
    evaluated = finish(
        braeburn("evaluate", str(out / "gpu-bfloat16"), "--data", __file__, "--json"), "evaluate"
    )
    print(evaluated.strip(), flush=True)
    generated = finish(
        braeburn("generate", str(out / "gpu-bfloat16"), "--prompt", "def "), "generate"
    )
    print(json.dumps(generated[:200]), flush=True)
    (out / "result.json").write_text(json.dumps(result))
    return (
        0
        if difference(wide, reference, 10) < 0.002
        and len(narrow) == size.steps
        and resumed == exact
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
