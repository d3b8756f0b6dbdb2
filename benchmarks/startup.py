"""How long a newcomer waits: for `braeburn --help`, and for the first training step of the
quickstart.

A first step is made when the first row of `metrics.jsonl` is there. "Cold" has empty caches, so it
includes training the tokenizer, tokenising and compiling; "cached" runs again, in a new folder, on
what the cold run left.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Seconds that each should stay below.
TARGETS = {"help": 0.5, "first_step_cold": 20.0, "first_step_cached": 10.0}
NAMES = {
    "help": "braeburn --help",
    "first_step_cold": "first step, nothing cached",
    "first_step_cached": "first step, all cached",
}


def command() -> str:
    """The `braeburn` of the Python that runs this program."""
    beside = Path(sys.executable).with_name("braeburn")
    found = str(beside) if beside.exists() else shutil.which("braeburn")
    if found is None:
        raise SystemExit("error: braeburn is not installed; run `make setup`")
    return found


def seconds_of_help(repetitions: int) -> float:
    """Median time of `braeburn --help`."""
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        subprocess.run([command(), "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def seconds_to_first_step(recipe: str, out: Path, environment: dict[str, str]) -> float:
    """Time from the start of `braeburn train` to its first row of metrics; it is let finish."""
    metrics, log = out / "metrics.jsonl", out.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [command(), "train", recipe, "--out", str(out), "--stop-after-steps", "1"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        if process.wait() != 0:
            raise SystemExit(f"error: braeburn train failed:\n{log.read_text()}")
    return seconds


def main() -> int:
    """Measures the three times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--repetitions", type=int, default=5, help="of braeburn --help")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        }
        seconds = {"help": seconds_of_help(arguments.repetitions)}
        for key in ("first_step_cold", "first_step_cached"):
            seconds[key] = seconds_to_first_step(
                arguments.recipe, folder / key, os.environ | caches
            )

    if arguments.json:
        print(
            json.dumps({"seconds": seconds, "targets": TARGETS, "load_average": os.getloadavg()[0]})
        )
        return 0
    for key, value in seconds.items():
        verdict = "met" if value <= TARGETS[key] else "missed"
        print(f"{NAMES[key]:<27} {value:>6.2f} s   target {TARGETS[key]:>4g} s   {verdict}")
    print(f"load average {os.getloadavg()[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
