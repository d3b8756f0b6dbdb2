"""Training in 8 bits beside training in the type to compute in: the first stage of the quickstart
with fewer tokens, several seeds.

    python benchmarks/low_precision.py --out FOLDER [--tokens N] [--seeds 0 1 2] [--seconds S]

All runs have the same budget, data, model and learning rate. What counts is the held-out loss at
the end, in nats per token over all sources, which is worked out in the type to compute in whatever
a run was trained in; beside it stands the mean loss of the last quarter of the steps, which has
what 8 bits round away in it. On a CPU the time says nothing: 8 bits are emulated there.

Runs that are finished are found again in --out, so that the same command goes on. No run begins
after --seconds.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, get_args

from braeburn.config import Matmul, Run
from braeburn.jsonfile import json_lines
from braeburn.train.loop import train
from short_runs import first_stage, held_out_loss, stage_end


def run_of(arguments: argparse.Namespace, matmul: str, seed: int) -> Run:
    """One training run of the comparison."""
    return first_stage(arguments, seed, {"precision.matmul": matmul})


def measured(arguments: argparse.Namespace, matmul: str, seed: int) -> dict[str, Any]:
    """The losses of a run, which is made unless it is there."""
    directory = arguments.out / f"{matmul}-{seed}"
    if not train(run_of(arguments, matmul, seed), directory).finished:
        raise SystemExit(f"{directory} is not finished")
    end = stage_end(directory)
    losses = [row["loss"] for row in json_lines(directory / "metrics.jsonl")]
    return {
        "held_out": held_out_loss(end),
        "trained": statistics.mean(losses[-len(losses) // 4 :]),
        "skipped": end["skipped"],
    }


def main() -> None:
    """Compares all kinds of products, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for all runs")
    parser.add_argument("--kinds", nargs="+", choices=get_args(Matmul), default=get_args(Matmul))
    parser.add_argument("--tokens", type=int, default=102_400, help="of each run")
    parser.add_argument("--held-out", type=int, default=16_384, help="tokens of each source")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=600, help="after which no run begins")
    arguments = parser.parse_args()

    end = time.monotonic() + arguments.seconds
    found: dict[str, list[dict[str, Any]]] = {matmul: [] for matmul in arguments.kinds}
    # Seed by seed, so that all kinds have the same ones when time runs out.
    for seed in arguments.seeds:
        for matmul in arguments.kinds:
            if time.monotonic() < end:
                found[matmul].append(measured(arguments, matmul, seed))
    for matmul, rows in found.items():
        held_out = [row["held_out"] for row in rows]
        trained = [row["trained"] for row in rows]
        if rows:
            each = " ".join(f"{loss:.4f}" for loss in held_out)
            print(
                f"{matmul}: held-out {statistics.mean(held_out):.4f} ({each}), "
                f"trained {statistics.mean(trained):.4f}, "
                f"{sum(row['skipped'] for row in rows)} steps skipped"
            )


if __name__ == "__main__":
    main()
