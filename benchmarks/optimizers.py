"""The registered optimizers on the quickstart: a search of learning rates, then several seeds.

Each run is the first stage of the quickstart with fewer tokens; all runs have the same budget, data
and model. For each optimizer three rates are tried with the first seed, and further ones, a factor
of two apart, while the best of them is the lowest or the highest. The best rate is then trained
with the other seeds too. What counts is the held-out loss at the end, in nats per token over all
sources.

Runs that are finished are found again in --out, so that the same command goes on.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from braeburn.config import Run
from braeburn.config.optimizers import KINDS
from braeburn.jsonfile import json_lines
from braeburn.train.loop import train
from short_runs import first_stage, held_out_loss, stage_end

# The middle of the search, and weight decay: AFM's is what a weight loses in a step, that of others
# is multiplied by the learning rate.
MIDDLE = {"afm": 5e-3, "muon": 8e-3}
MIDDLE_OF_OTHERS = 4e-3
WEIGHT_DECAY = {"afm": 3.16e-4}
WEIGHT_DECAY_OF_OTHERS = 0.1
MOST_RATES = 6


def run_of(arguments: argparse.Namespace, kind: str, rate: float, seed: int) -> Run:
    """One training run of the comparison."""
    return first_stage(
        arguments,
        seed,
        {
            "optimizer.kind": kind,
            "stages.core.learning_rate": rate,
            "stages.core.weight_decay": WEIGHT_DECAY.get(kind, WEIGHT_DECAY_OF_OTHERS),
        },
    )


def measured(arguments: argparse.Namespace, kind: str, rate: float, seed: int) -> dict[str, Any]:
    """The held-out loss of a run, which is made unless it is there, and its seconds a step."""
    directory = arguments.out / f"{kind}-{rate:g}-{seed}"
    began = time.monotonic()
    if not train(run_of(arguments, kind, rate, seed), directory).finished:
        raise SystemExit(f"{directory} is not finished")
    end = stage_end(directory)
    rows = list(json_lines(directory / "metrics.jsonl"))
    result = {
        "kind": kind,
        "learning_rate": rate,
        "seed": seed,
        "held_out": held_out_loss(end),
        "step_seconds": statistics.median(row["step_seconds"] for row in rows[10:]),
        "skipped": end["skipped"],
    }
    print(json.dumps(result), f"{time.monotonic() - began:.0f} s", flush=True)
    return result


def search(arguments: argparse.Namespace, kind: str) -> dict[float, float]:
    """Held-out losses of the first seed by learning rate."""
    middle = MIDDLE.get(kind, MIDDLE_OF_OTHERS)
    wanted = [middle / 2, middle, middle * 2]
    found: dict[float, float] = {}
    while wanted:
        for rate in wanted:
            found[rate] = measured(arguments, kind, rate, arguments.seeds[0])["held_out"]
        best = min(found, key=lambda rate: found[rate])
        edges = {min(found): best / 2, max(found): best * 2}
        wanted = [edges[best]] if best in edges and len(found) < MOST_RATES else []
    return found


def main() -> None:
    """Compares all optimizers, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for all runs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=102_400, help="of each run")
    parser.add_argument("--held-out", type=int, default=16_384, help="tokens of each source")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()

    lines = []
    for kind in arguments.kinds:
        found = search(arguments, kind)
        best = min(found, key=lambda rate: found[rate])
        rows = [measured(arguments, kind, best, seed) for seed in arguments.seeds]
        losses = [row["held_out"] for row in rows]
        seconds = statistics.median(row["step_seconds"] for row in rows)
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(found.items()))
        each = " ".join(f"{loss:.4f}" for loss in losses)
        lines.append(
            f"{kind}: best rate {best:g}, held-out {statistics.mean(losses):.4f} ({each}), "
            f"{1000 * seconds:.0f} ms a step; searched {tried}"
        )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
