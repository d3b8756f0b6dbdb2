"""What schedules of a pipeline take: memory by the compiler, and idle time on simulated devices.

    python benchmarks/pipeline.py [--devices 4] [--json] [--memory | --time]

**Memory.** The train step of a small model is compiled for simulated devices with ever more
microbatches of the same size, and not run. The temporaries of a device must stay flat within 5% in
1F1B, and grow in GPipe.

**Time.** The train step is carried out by as many processes as the pipeline has devices, which wait
for nobody but whom they exchange with. In place of the layers stand calls that sleep: 1 s forward
and 2 s backward for all stages of a device together. So the time of a step is that of the schedule
as the program carries it out, with what else a step does, whatever this machine computes with. An
exchange between processes takes up to 80 ms here, which no formula counts. It does not grow with
the tasks, so each step is measured with tasks of a third of the length, too: what the longer tasks
add is of the schedule alone, and the rest is of the exchanges. The idle part of the former is set
beside the formula (P - 1) / (v M + P - 1). It all takes less than five minutes.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from braeburn.config import Run, override
from braeburn.data.packing import Batch
from braeburn.models.staged import StagedModel
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
# Seconds of a microbatch on a device, where time is measured, and the part of them that shorter
# tasks take.
FORWARD, BACKWARD = 1.0, 2.0
SHORTER = 1 / 3
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


def sleeping(x: jax.Array, forward: float, backward: float, part: Callable[[], float]) -> jax.Array:
    """The same numbers after a while, and the same gradient after another.

    Args:
        x: the numbers.
        forward: seconds.
        backward: seconds.
        part: of them that is slept at the time.
    """

    def after(duration: float, x: jax.Array) -> jax.Array:
        def sleep(x: Any) -> Any:
            time.sleep(duration * part())
            return x

        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    @jax.custom_vjp
    def identity(x: jax.Array) -> jax.Array:
        return after(forward, x)

    identity.defvjp(lambda x: (after(forward, x), None), lambda _, g: (after(backward, g),))
    return identity(x)


def measured(
    index: int, devices: int, microbatches: int, way: dict[str, Any], port: int
) -> list[float]:
    """Seconds of a step of one process of the pipeline, with shorter tasks and with long ones."""
    jax.distributed.initialize(f"127.0.0.1:{port}", devices, index)
    each = way.get("mesh.stages_per_device", 1)
    changes = {"model.d_model": 64, "model.head_dim": 16, "model.ffn_dim": 64, **way}

    now = SimpleNamespace(part=0.0)

    def sleep(staged: Any, layers: Any, carry: Any, microbatch: Any, counts: Any) -> Any:
        x_BTD = sleeping(carry.x_BTD, FORWARD / each, BACKWARD / each, lambda: now.part)
        return carry._replace(x_BTD=x_BTD), None

    StagedModel.run = sleep  # type: ignore[method-assign]
    resolved = resolve_stage(small(devices, microbatches, **changes), "core")
    program, state = compile_stage(resolved), initial_state(resolved)
    state = state._replace(optimizer=begin_stage(state.optimizer))
    size = resolved.stage.batch_size
    placed = resolved.layout.of_step.place(made_up(size), range(size), size)
    found = []
    for part in (0.0, SHORTER, 1.0):  # the first step makes connections
        now.part = part
        began = time.perf_counter()
        state, metrics = program.step(state, placed)
        jax.block_until_ready((state, metrics))
        found.append(time.perf_counter() - began)
    return found[1:]


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


def idle(devices: int, microbatches: list[int]) -> list[dict[str, Any]]:
    """The idle part of a step, of each schedule and number of microbatches."""
    rows = []
    for name, way in SCHEDULES.items():
        each = way.get("mesh.stages_per_device", 1)
        for count in microbatches:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            print(f"{name}, {count} microbatches ...", file=sys.stderr)
            asked = json.dumps([devices, count, way, port])
            children = [
                subprocess.Popen(
                    [sys.executable, __file__, "--process", str(index), "--asked", asked],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for index in range(devices)
            ]
            answers = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
            shorter, seconds = np.max(answers, axis=0)
            busy = count * (FORWARD + BACKWARD)
            scheduled = (seconds - shorter) / (1 - SHORTER)
            formula = (devices - 1) / (each * count + devices - 1)
            rows.append(
                {
                    "schedule": name,
                    "microbatches": count,
                    "seconds": seconds,
                    "exchanges": seconds - scheduled,
                    "idle_with_exchanges": 1 - busy / seconds,
                    "idle": 1 - busy / scheduled,
                    "formula": formula,
                }
            )
    return rows


def main() -> int:
    """Prints the tables; returns 1 if memory is not as the schedules say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true", help="memory alone")
    parser.add_argument("--time", action="store_true", help="idle time alone")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if arguments.process is not None:
        print(json.dumps(measured(arguments.process, *json.loads(arguments.asked))))
        return 0
    jax.config.update("jax_num_cpu_devices", max(2, arguments.devices))
    counts = [arguments.devices * factor for factor in (2, 4, 8, 16)]
    few = [2 * arguments.devices]
    found = {
        "memory": [] if arguments.time else memory(arguments.devices, counts),
        "idle": [] if arguments.memory else idle(arguments.devices, few),
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
        print(f"a step of {arguments.devices} processes, and the part of it that a device is idle:")
        print(f"  {'':28}microbatches    step  exchanges  idle  without exchanges  formula")
        for row in found["idle"]:
            print(
                f"  {row['schedule']:28}{row['microbatches']:12}{row['seconds']:6.1f} s"
                f"{row['exchanges']:9.1f} s{row['idle_with_exchanges']:6.1%}{row['idle']:19.1%}"
                f"{row['formula']:9.1%}"
            )
    return 0 if all(row["kept"] for row in found["memory"]) else 1


if __name__ == "__main__":
    sys.exit(main())
