"""The child process of `braeburn compile`: one train step, or one program of a job after training,
compiled for devices that are not there.

`python -m braeburn.plan.compiler` reads a request, a JSON object, from standard input and writes
the answer as the last line of standard output.
"""

import hashlib
import json
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from braeburn.atomic import write_atomically
from braeburn.config import MeshConfig, Run, validate
from braeburn.errors import UserError
from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.targets import parse_target
from braeburn.parallel.layout import Layout
from braeburn.plan.cost import online_teacher
from braeburn.plan.job_programs import job_layout, programs_of
from braeburn.plan.jobs import JOBS, model_after
from braeburn.plan.topologies import PACKAGES, topology
from braeburn.train.compiler_flags import flags_for, options
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import lower_stage

GIB = 2**30
# The text that tells programs apart holds no names of scopes, which `hlo` and the report read in
# the compiled one. To be raised when these change, for cached programs to be compiled again.
FORMAT = 2
LANES = 128  # of a TPU's registers


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles, or finds in the cache, the train step that a request is for, or a program of a job
    after training.

    Args:
        request: "run", "stage", "target", "chips" (a catalogue of the user's, or None) and "cache"
            (a folder); of a job after training also "job" (its name), "settings", "mesh" (resolved
            sizes) and "program" (its name).

    Returns:
        "program", the path of the HLO text, with the compiler's "memory" in GiB; or "required_gib"
        and "available_gib" where it does not fit. With both what is known of the layout, and what
        compiling took.

    Raises:
        UserError: the mesh does not fit the target or the stage, or there is no such topology.
    """
    run, cache = validate(request["run"]), Path(request["cache"])
    chips = catalogue(Path(request["chips"])) if request["chips"] else None
    target = parse_target(request["target"], chips)
    described = topology(target)
    lower = _lowered_program if request.get("job") else _lowered_step
    lowered, of_layout = lower(run, request, described.devices)
    precision = run.precision.in_compute if request.get("job") else run.precision
    flags: dict[str, Any] = options(flags_for(target.facts, precision))
    packages = ["jax", "jaxlib", PACKAGES[target.facts.family]]
    if described.has_cost_model:
        flags["xla_gpu_collect_cost_model_stats"] = True
    if target.facts.family == "nvidia":
        # CUB, which sorts for experts, asks a GPU how much memory it needs; without one XLA's own
        # sort is compiled.
        flags["xla_gpu_enable_cub_radix_sort"] = False
    facts = {
        "versions": {name: version(name) for name in packages},
        "flags": flags,
        "stubs": list(described.stubs),
        **of_layout,
    }
    identity = json.dumps([FORMAT, lowered.as_text(), str(target), facts["versions"], flags])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:32]
    answer, cached = cache / f"{fingerprint}.json", True
    if not answer.exists():
        cached = False
        write_atomically(
            answer, json.dumps(_compiled(lowered, flags, cache / f"{fingerprint}.hlo"))
        )
    return {**facts, **json.loads(answer.read_text()), "fingerprint": fingerprint, "cached": cached}


def _lowered_step(
    run: Run, request: dict[str, Any], devices: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """The train step of a request, and what is told of its layout."""
    stage = resolve_stage(run, request["stage"], devices)
    layout = stage.layout
    lowered = lower_stage(stage.with_teacher(online_teacher(run, request["stage"])))
    return lowered, {
        "mesh": layout.sizes.sizes,
        "gradient_bytes": _gradient_bytes(layout, 1),
        "padded_gradient_bytes": _gradient_bytes(layout, LANES),
    }


def _lowered_program(
    run: Run, request: dict[str, Any], devices: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """The program of a job after training that a request names, and the mesh."""
    job = JOBS[request["job"]](**request["settings"])
    model = model_after(run, request["stage"])[0]
    sizes = MeshConfig.model_validate(request["mesh"])
    layout = job_layout(run, model, sizes, devices[: math.prod(sizes.sizes.values())])
    (program,) = [
        program for program in programs_of(job, model, layout) if program.name == request["program"]
    ]
    lowered = jax.jit(program.function, donate_argnums=program.given_up).lower(*program.arguments)
    return lowered, {"mesh": sizes.sizes}


def _gradient_bytes(layout: Layout, lanes: int) -> int:
    """float32 gradients of the parameters that a device holds, those of a vector a row padded to
    whole tiles.
    """
    shapes = [
        sharding.shard_shape(spec.shape)
        for spec, sharding in zip(
            jax.tree.leaves(layout.specs), jax.tree.leaves(layout.parameters()), strict=True
        )
    ]
    padded = [(*s[:-1], -(-s[-1] // lanes) * lanes) if len(s) <= 2 else s for s in shapes]
    return sum(4 * math.prod(shape) for shape in padded)


def _compiled(lowered: Any, flags: dict[str, Any], program: Path) -> dict[str, Any]:
    began, spent = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile(flags or None)
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\b([\d.]+)([KMGT])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        required, available = (
            float(size) * 1024.0 ** ("KMGT".index(unit) - 2) for size, unit in sizes[:2]
        )
        return {"required_gib": required, "available_gib": available, **_effort(began, spent)}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    parts = {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    }
    (module,) = compiled.runtime_executable().hlo_modules()
    # All but those of computations that the text has in the short form of an asynchronous
    # instruction.
    counts = [
        len(part.instructions()) for part in module.computations() if f"%{part.name} (" in text
    ]
    write_atomically(program, text)
    return {
        "program": str(program),
        "instructions": sum(counts),
        "memory": {name: size / GIB for name, size in parts.items()},
        **_effort(began, spent),
    }


def _effort(began: float, spent: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - spent,
        "resident_gib": peak,
    }


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        result = compile_request(json.load(sys.stdin))
    except UserError as error:
        result = {"error": str(error)}
    print("\n" + json.dumps(result), flush=True)
