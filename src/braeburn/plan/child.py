"""The process that compiles for hardware that is not there: started, watched, and its answer taken.

Without JAX.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from braeburn.config import Run
from braeburn.errors import UserError
from braeburn.extras import how_to_install
from braeburn.hardware.targets import Target
from braeburn.train.environment import gpu_environment

# What libtpu needs to believe where there is no TPU, and to share the machine with others of its
# kind.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COMPILERS = {"tpu": "libtpu", "nvidia": "jax_plugins.xla_cuda13", "amd": "jax_plugins.xla_rocm7"}


def check_compiler(target: Target) -> None:
    """Raises a UserError where there is no compiler for a target's chip, or it is not installed."""
    chip = target.facts
    if chip.refused:
        raise UserError(f"--on {str(target)!r}: {chip.refused}")
    if chip.family not in COMPILERS:
        raise UserError(
            f"--on {str(target)!r}: no compiler for {chip.title} works without one; "
            f"see what `braeburn plan` says of it, or compile for TPUs, or for GPUs of NVIDIA "
            f"or AMD"
        )
    if chip.family == "tpu" and chip.devices_per_chip > 1:
        raise UserError(
            f"--on {str(target)!r}: each {chip.title} is {chip.devices_per_chip} devices to its "
            f"compiler, which links "
            f"and times do not account for yet; see what `braeburn plan` says of it"
        )
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise UserError(
            f"--on {str(target)!r}: its compiler is for Linux on x86-64 alone; run `braeburn "
            f"compile` there"
        )
    if chip.family != "tpu" and sys.version_info < (3, 12):
        raise UserError(
            f"--on {str(target)!r}: compiling for {chip.title} needs Python 3.12 or later, with "
            f"JAX 0.12; this is Python {platform.python_version()}"
        )
    try:
        found = find_spec(COMPILERS[chip.family])
    except ModuleNotFoundError:
        found = None
    if not found:
        raise UserError(
            f"--on {str(target)!r}: the compiler for {chip.title} is not installed; "
            f"{how_to_install('compile')}"
        )


def compile_in_child(
    run: Run,
    stage: str,
    target: Target,
    chips: Path | None,
    memory_gb: float,
    of_job: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The answer of `compiler.compile_request` for a stage of a run on a target.

    Args:
        run: the run.
        stage: which of its stages.
        target: of TPUs or GPUs; none of them needs to be there.
        chips: a catalogue of the user's.
        memory_gb: what the compiler may take of this machine's memory.
        of_job: "job", "settings", "mesh" and "program" of a job after training; None for the train
            step.

    Raises:
        UserError: there is no compiler for the chip or it is not installed, the mesh does not fit,
            or the compiler failed.
    """
    check_compiler(target)
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braeburn" / "compile"
    )
    cache.mkdir(parents=True, exist_ok=True)
    paths = {"chips": str(chips.resolve()) if chips else None, "cache": str(cache)}
    request = {"run": run.model_dump(mode="json"), "stage": stage, "target": str(target), **paths}
    request |= of_job or {}
    what = "-".join([stage, *([of_job["job"], of_job["program"]] if of_job else [])])
    log = cache / f"{run.name}-{what}-{target}.log".replace(":", "-").replace("/", "-")
    return _ask([sys.executable, "-m", "braeburn.plan.compiler"], request, log, memory_gb)


def _ask(
    command: list[str], request: dict[str, Any], log: Path, memory_gb: float
) -> dict[str, Any]:
    """What a child process answers to a request, its other output being kept in a log."""
    with log.open("w", encoding="utf-8") as stderr:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | gpu_environment() | ENVIRONMENT,
        )
        assert child.stdin and child.stdout
        try:
            child.stdin.write(json.dumps(request))
            child.stdin.close()
            while child.poll() is None:
                if _resident_bytes(child.pid) > memory_gb * 1e9:
                    raise UserError(
                        f"compiling takes more than {memory_gb:g} GB of this machine's memory; "
                        f"allow more with --memory-limit {2 * memory_gb:g}"
                    )
                time.sleep(0.1)
        except BrokenPipeError:
            child.wait()
        finally:
            child.kill()
            child.wait()
    said = child.stdout.read().strip().splitlines()
    if child.returncode or not said:
        words = [
            line.strip()
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        last = re.sub(r"\s+", " ", words[-1])[:300] if words else "it said nothing"
        raise UserError(
            f"the compiler ended with code {child.returncode} ({last}); its output is in "
            f"{str(log)!r}; for versions that are known to work, {how_to_install('compile')}"
        )
    answer = json.loads(said[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _resident_bytes(process: int) -> int:
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
