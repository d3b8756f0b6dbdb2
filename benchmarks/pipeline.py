"""What schedules of a pipeline take: memory by the compiler, and idle time on simulated devices.

    python benchmarks/pipeline.py [--devices 4] [--json] [--memory | --time]

**Memory.** The train step of a small model is compiled for simulated devices with ever more
microbatches of the same size, and not run. The temporaries of a device must stay flat within 5% in
1F1B, and grow in GPipe.

**Time.** The step is run on two simulated devices, each with a thread of its own; that needs two
idle cores. A step of M microbatches takes t (M + (P - 1) / v) + c seconds: t for each microbatch, P
devices with v stages each, and c once a step. The line through the times of several M has the slope
t and begins at t (P - 1) / v + c. What v = 1 begins later than v = 2 and v = 4 is the idle time
that interleaving saves, t (P - 1) (1 - 1 / v) by the formula.
"""

import argparse
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from braeburn.config import Run, override
from braeburn.data.packing import Batch
from braeburn.optim.guard import begin_stage
from braeburn.recipes import load
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage, initial_state, lower_stage

SCHEDULES: dict[str, dict[str, Any]] = {
    "GPipe": {"mesh.pipeline_schedule": "gpipe"},
    "1F1B": {},
    "interleaved, 2 stages each": {"mesh.stages_per_device": 2},
}
FLAT = 0.05
LENGTH = 256
SEQUENCES = 2  # of a microbatch


def small(devices: int, microbatches: int, **changes: Any) -> Run:
    """A small model on a pipeline, whose batches have so many microbatches of one size."""
    tokens = SEQUENCES * LENGTH * microbatches
    fields = {
        "model.num_layers": 4 * devices,
        "model.d_model": 256,
        "model.num_heads": 4,
        "model.num_kv_heads": 4,
        "model.head_dim": 64,
        "model.ffn_dim": 768,
        "model.vocab_size": 512,
        "mesh.fsdp": 1,
        "mesh.pipeline": devices,
        "remat.policy": "save_named",
        "stages.core.sequence_length": LENGTH,
        "stages.core.batch_tokens": tokens,
        "stages.core.tokens": 100 * tokens,
        "stages.core.accumulation_steps": microbatches,
    }
    return override(load("afm-tiny"), fields | changes)


def memory(devices: int, microbatches: list[int]) -> list[dict[str, Any]]:
    """MiB of temporaries of a device, of each schedule and number of microbatches."""
    rows = []
    for name, way in SCHEDULES.items():
        sizes = []
        for count in microbatches:
            compiled = lower_stage(resolve_stage(small(devices, count, **way), "core")).compile()
            sizes.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        grown = sizes[-1] / sizes[0] - 1
        kept = grown > 0.5 if name == "GPipe" else grown <= FLAT
        rows.append({"schedule": name, "mib": sizes, "grown": grown, "kept": kept})
    return rows


def seconds(run: Run, steps: int) -> float:
    """The median time of a step."""
    resolved = resolve_stage(run, "core")
    program, state = compile_stage(resolved), initial_state(resolved)
    state = state._replace(optimizer=begin_stage(state.optimizer))
    placed = resolved.layout.of_step.place(
        made_up(resolved.stage.batch_size),
        range(resolved.stage.batch_size),
        resolved.stage.batch_size,
    )
    found = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = program.step(state, placed)
        jax.block_until_ready((state, metrics))
        found.append(time.perf_counter() - began)
    return float(np.median(found[2:]))


def made_up(sequences: int) -> Batch:
    """A batch of random tokens, one document to a sequence."""
    tokens = np.random.default_rng(0).integers(0, 512, (sequences, LENGTH + 1), dtype=np.int32)
    ones = np.ones((sequences, LENGTH), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape),
        "segment_ids": ones,
        "weights": ones.astype(np.float32),
    }


def idle(steps: int) -> list[dict[str, Any]]:
    """The lines through the times of two devices, of one, two and four stages each."""
    counts = [2, 4, 8, 12]
    rows: list[dict[str, Any]] = []
    for each in (1, 2, 4):
        found = [
            seconds(small(2, count, **{"mesh.stages_per_device": each}), steps) for count in counts
        ]
        slope, begins = np.polyfit(counts, found, 1)
        row = {"stages_each": each, "seconds": found, "slope": slope, "begins": begins}
        if rows:
            first = rows[0]
            t = (slope + first["slope"]) / 2
            row["saved"] = (first["begins"] - begins) / t
            row["formula"] = 1 - 1 / each
        rows.append(row)
    return rows


def main() -> int:
    """Prints the tables; returns 1 if memory is not as the schedules say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true", help="memory alone")
    parser.add_argument("--time", action="store_true", help="idle time alone")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(2, arguments.devices))
    counts = [arguments.devices * factor for factor in (2, 4, 8, 16)]
    found = {
        "memory": [] if arguments.time else memory(arguments.devices, counts),
        "idle": [] if arguments.memory else idle(arguments.steps),
    }
    if arguments.json:
        print(json.dumps({**found, "microbatches": counts, "jax": jax.__version__}, indent=2))
    if found["memory"] and not arguments.json:
        print(f"temporaries of one of {arguments.devices} devices, MiB, by the compiler:")
        print(f"  {'microbatches':28}" + "".join(f"{count:>9}" for count in counts) + "    grown")
        for row in found["memory"]:
            sizes = "".join(f"{size:9.2f}" for size in row["mib"])
            print(f"  {row['schedule']:28}{sizes} {row['grown']:+8.1%}")
    if found["idle"] and not arguments.json:
        print("seconds of a step on two devices, of 2, 4, 8 and 12 microbatches:")
        for row in found["idle"]:
            times = " ".join(f"{one:.3f}" for one in row["seconds"])
            saved = (
                f"   saved: {row['saved']:.2f} microbatches (formula {row['formula']:.2f})"
                if "saved" in row
                else ""
            )
            print(f"  {row['stages_each']} stages each: {times}{saved}")
    return 0 if all(row["kept"] for row in found["memory"]) else 1


if __name__ == "__main__":
    sys.exit(main())
