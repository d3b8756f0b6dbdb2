"""What it takes to cache a teacher's labels of ten million tokens: bytes, seconds, and what a kill
costs.

The text is Python code: the standard library's and that of installed packages. A small teacher is
trained on it for a few steps and then labels all of it for a student, in a process that is killed
in the middle and started again. A second student has the same teacher online instead. Wanted are
the labels of `TOKENS` tokens or more, on at most `BYTES_PER_TOKEN` bytes each, complete parts that
the kill leaves as they are, and students with the same losses. It needs half a gigabyte of disk.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

TOKENS = 10_000_000
BYTES_PER_TOKEN = 60.0
DIFFERENCE = 1e-5
TOP_K = 8

RECIPE = """
from braeburn.config import ONE_DEVICE, AdamW, Data, Distillation, Evaluation
from braeburn.config import ModelConfig, Precision, Run, Schedule, Source
from braeburn.config import Stage


def stage(steps, **fields):
    return Stage(
        tokens=8192 * steps, sequence_length=128, batch_tokens=8192,
        mixture={mixture!r}, learning_rate=3e-3,
        schedule=Schedule(warmup_steps=5), **fields,
    )


def run():
    return Run(
        name="teacher-cache",
        model=ModelConfig(
            vocab_size={vocab_size}, d_model=64, num_layers=2,
            num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=128,
        ),
        stages={{
            "teacher": stage({steps}),
            "student": stage(
                {steps}, teacher="teacher",
                distillation=Distillation(target="top_k", top_k={top_k}, cached=True),
            ),
        }},
        data=Data(
            sources={{name: Source(**fields) for name, fields in {sources!r}.items()}},
            cache={cache!r},
        ),
        optimizer=AdamW(),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=16_384),
    )
"""


def sources(packages: list[str], data: list[Path]) -> dict[str, dict[str, Any]]:
    """The standard library, the Python files of packages, and other files, as the fields of
    sources.
    """
    found: dict[str, dict[str, Any]] = {"library": {"format": "python-code"}}
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                f"error: --packages names {name!r}, which is not installed; leave it out, or "
                f"install it"
            )
        found[name] = {"format": "python-code", "paths": tuple(spec.submodule_search_locations)}
    if data:
        found["data"] = {"paths": tuple(str(path.absolute()) for path in data)}
    return found


def begin(recipe: Path, out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts `braeburn train` in a process of its own, whose log is beside `out`."""
    program = [
        sys.executable,
        "-c",
        "from braeburn.cli import main; main()",
        "train",
        f"{recipe}:run",
    ]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*program, "--out", str(out), *arguments], stdout=subprocess.DEVNULL, stderr=log
        )


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits for training to end well."""
    if process.wait() != 0:
        raise SystemExit(f"error: braeburn train failed:\n{out.with_suffix('.log').read_text()}")


def label_folders(cache: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every folder of a teacher's labels, complete or not, and its manifest."""
    for manifest in cache.glob("stores/*.teacher-*/manifest.json"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            yield manifest.parent, json.loads(manifest.read_text())


def complete_parts(cache: Path) -> dict[tuple[int, int, int], int]:
    """The tokens of each complete part by what tells its file from any that is written again."""
    found = {}
    for folder, manifest in label_folders(cache):
        for index, part in enumerate(manifest["parts"]):
            status = (folder / f"part-{index:05d}.bin").stat()
            found[status.st_ino, status.st_size, status.st_mtime_ns] = part["tokens"]
    return found


def kill_while_labelling(process: subprocess.Popen[bytes], out: Path, cache: Path) -> float:
    """Kills training once half of a source is labelled; returns tokens a second from its first part
    until then.
    """
    first: tuple[float, int] | None = None
    while process.poll() is None:
        time.sleep(0.02)
        for folder, manifest in label_folders(cache):
            done = sum(part["tokens"] for part in manifest["parts"])
            if first is None and done:
                first = time.perf_counter(), done
            if (
                first
                and ".partial-" in folder.name
                and done > first[1]
                and 2 * done >= manifest["tokens"]
            ):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return (done - first[1]) / (time.perf_counter() - first[0])
    finish(process, out)
    raise SystemExit(
        "error: the text was labelled before it could be killed; give more of it with --data"
    )


def losses(out: Path) -> list[tuple[float, float]]:
    """The losses of the student's steps: on the text, and of the distillation."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["distillation_loss"]) for row in rows if row["stage"] == "student"]


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Labels the text with a kill in between, trains both students, and gives the figures."""
    texts, cache, recipe = (
        sources(arguments.packages, arguments.data),
        folder / "cache",
        folder / "recipe.py",
    )
    fields = {
        "mixture": dict.fromkeys(texts, 1.0),
        "sources": texts,
        "cache": str(cache),
        "top_k": TOP_K,
    }
    recipe.write_text(
        RECIPE.format(vocab_size=arguments.vocab_size, steps=arguments.steps, **fields)
    )
    cached, online = folder / "cached", folder / "online"
    began = time.perf_counter()
    speed = kill_while_labelling(begin(recipe, cached, "--json"), cached, cache)
    before, seconds = complete_parts(cache), time.perf_counter() - began
    began = time.perf_counter()
    finish(begin(recipe, cached), cached)
    again, after = time.perf_counter() - began, complete_parts(cache)
    whole = [folder for folder, _ in label_folders(cache)]
    tokens = sum(after.values())
    finish(begin(recipe, online, "--set", "stages.student.distillation.cached=false"), online)
    pairs = list(zip(losses(cached), losses(online), strict=True))
    return {
        "tokens": tokens,
        "parts": len(after),
        "parts_before_kill": len(before),
        "parts_written_again": len(before.keys() - after.keys()),
        "unfinished": sum(".partial-" in folder.name for folder in whole),
        "seconds_to_kill": seconds,
        "seconds_after": again,
        "tokens_per_second": speed,
        # As `du` counts: blocks on disk, the manifests' included.
        "bytes_per_token": sum(
            512 * path.stat().st_blocks for folder in whole for path in folder.iterdir()
        )
        / tokens,
        "steps": len(pairs),
        "last_losses": pairs[-1][0],
        "largest_difference": max(
            abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)
        ),
    }


def main() -> int:
    """Prints the figures; returns 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--packages", nargs="*", default=["jax"], help="whose Python files are read too"
    )
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="more files of text")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40, help="of the teacher, and of each student")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        found = measure(folder, arguments)
    finally:
        shutil.rmtree(folder)
    met = {
        "tokens": found["tokens"] >= TOKENS,
        "bytes_per_token": found["bytes_per_token"] <= BYTES_PER_TOKEN,
        "resumed": not found["parts_written_again"] and not found["unfinished"],
        "largest_difference": found["largest_difference"] <= DIFFERENCE,
    }
    good = all(met.values())
    if arguments.json:
        print(json.dumps({**found, "met": met, "load_average": os.getloadavg()[0]}))
        return 0 if good else 1
    verdict = {name: "met" if value else "missed" for name, value in met.items()}
    print(
        f"tokens labelled     {found['tokens']:>12,}   at least {TOKENS:,} wanted: "
        f"{verdict['tokens']}"
    )
    bytes_per_token = f"{found['bytes_per_token']:>12.2f}   at most {BYTES_PER_TOKEN:g} wanted"
    print(f"bytes a token       {bytes_per_token}: {verdict['bytes_per_token']}")
    print(
        f"complete parts      {found['parts']:>12}   {found['parts_before_kill']} at the kill, of "
        f"which {found['parts_written_again']} were written again: {verdict['resumed']}"
    )
    print(
        f"largest difference  {found['largest_difference']:>12.1e}   of losses in "
        f"{found['steps']} steps with the "
        f"teacher online, at most {DIFFERENCE:g} wanted: {verdict['largest_difference']}"
    )
    print(
        f"tokens a second     {found['tokens_per_second']:>12,.0f}   load average "
        f"{os.getloadavg()[0]:.2f}"
    )
    print(
        f"seconds             {found['seconds_to_kill']:>12.1f}   to the kill, "
        f"{found['seconds_after']:.1f} after it"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
