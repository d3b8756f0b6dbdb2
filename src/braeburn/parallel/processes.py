"""The processes of one run: whether this is one of several, and how they find each other.

What JAX can find out by itself is left to JAX. Deciding needs no JAX, so that mistakes are told
before it starts.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from braeburn.errors import UserError

# Containers pull images before they run, each at its own pace.
JOIN_SECONDS = 300.0


class ProcessLost(Exception):
    """Another process of the run is gone; the message says since when.

    Restarting helps, so it ends with code 1.
    """


@dataclass(frozen=True)
class Membership:
    """One process's place among several.

    Attributes:
        process_id: 0 is the main process.
        num_processes: at least 2.
        coordinator: HOST:PORT where process 0 listens; None where JAX finds that out.
        known_by: who told: "flags", "SLURM", "Open MPI" or "GKE".
    """

    process_id: int
    num_processes: int
    coordinator: str | None
    known_by: str


_joined: Membership | None = None


def find(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Membership | None:
    """This process's place among several, or None where it runs alone.

    Flags count before JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and these
    before what SLURM, Open MPI or GKE tell the processes that they start.

    Args:
        coordinator: HOST:PORT where process 0 listens, if a flag names it.
        num_processes: of the run, if a flag names them.
        process_id: from 0, if a flag names it.
        environ: the environment variables.

    Returns:
        The place, or None for a process without others.

    Raises:
        UserError: what is known is incomplete or contradictory.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None
    if num_processes is None:
        num_processes = _number(environ, "JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _number(environ, "JAX_PROCESS_ID")
    known_by, finds_coordinator = "flags", False
    if None in (coordinator, num_processes, process_id) and (started := _started_by(environ)):
        known_by, ranks, size, finds_coordinator = started
        num_processes = size if num_processes is None else num_processes
        process_id = ranks if process_id is None else process_id
    if num_processes == 1 or (coordinator is None and num_processes is None and process_id is None):
        return None
    if num_processes is None:
        raise UserError("--num-processes is missing; give the number of all processes of the run")
    if num_processes < 1:
        raise UserError(
            f"--num-processes {num_processes} is less than 1; give the number of all processes of "
            f"the run"
        )
    if process_id is None:
        raise UserError(
            f"--process-id is missing; give each process its own, from 0 to {num_processes - 1}"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id {process_id} is not one of the {num_processes} processes; give each its "
            f"own, from 0 to {num_processes - 1}"
        )
    if coordinator is None and not finds_coordinator:
        by_mpi = "Open MPI 5 does not tell where process 0 runs; " if known_by == "Open MPI" else ""
        raise UserError(
            f"{by_mpi}--coordinator is missing; give HOST:PORT, where the host of process 0 can "
            f"be reached"
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(
            f"--coordinator {coordinator!r} has no port; write HOST:PORT, as in 10.0.0.1:8476"
        )
    return Membership(process_id, num_processes, coordinator, known_by)


def on_one_machine(membership: Membership, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the processes of a run are known to be on one machine, and so to share its disk.

    Args:
        membership: this process's place among them.
        environ: the environment variables.
    """
    host = (membership.coordinator or "").rpartition(":")[0].strip("[]")
    if host == "localhost" or host.startswith("127.") or host == "::1":
        return True
    nodes = _number(environ, "SLURM_STEP_NUM_NODES") or _number(environ, "SLURM_NNODES")
    if membership.known_by == "SLURM" and nodes == 1:
        return True
    return _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") == membership.num_processes


def _started_by(environ: Mapping[str, str]) -> tuple[str, int, int, bool] | None:
    """Who started several processes, this one's number, how many, and whether JAX can tell the
    coordinator.
    """
    # Without a step's node list this is the batch script or a login shell, of which there is one.
    if "SLURM_STEP_NODELIST" in environ and (size := _number(environ, "SLURM_NTASKS") or 1) > 1:
        return "SLURM", _number(environ, "SLURM_PROCID") or 0, size, True
    if (size := _number(environ, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return (
            "Open MPI",
            _number(environ, "OMPI_COMM_WORLD_RANK") or 0,
            size,
            "OMPI_MCA_orte_hnp_uri" in environ,
        )
    hosts = len(
        (environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(
            ","
        )
    )
    if (size := hosts * (_number(environ, "MEGASCALE_NUM_SLICES") or 1)) > 1:
        within = _number(environ, "TPU_WORKER_ID") or 0
        return "GKE", within + hosts * (_number(environ, "MEGASCALE_SLICE_ID") or 0), size, True
    return None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"the environment variable {name}={text!r} is not a number; correct or unset it"
        ) from None


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_seconds: float = JOIN_SECONDS,
) -> Membership | None:
    """Joins the other processes of the run, if `find` tells that there are any. To be called before
    JAX has devices.

    Where they do not all meet within `join_seconds`, the process ends with one sentence and code 1:
    no mistake of the user's need be behind it, so whoever restarts processes should.

    Args:
        coordinator: HOST:PORT where process 0 listens, if a flag names it.
        num_processes: of the run, if a flag names them.
        process_id: from 0, if a flag names it.
        join_seconds: the longest time until all processes have met.

    Returns:
        This process's place among them, or None where it runs alone.

    Raises:
        UserError: what is known of the processes is incomplete or contradictory.
    """
    global _joined
    membership = find(coordinator, num_processes, process_id)
    if membership is None:
        return None
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself until the training loop does, and with it every stop in that
    # time.
    jax.config.update("jax_enable_preemption_service", False)
    _joined = membership
    # JAX's own time limit aborts the process with a stack trace.
    limit = threading.Timer(join_seconds, _give_up, (membership, join_seconds))
    limit.daemon = True
    limit.start()
    jax.distributed.initialize(
        membership.coordinator,
        membership.num_processes,
        membership.process_id,
        # JAX would ask the cluster for what flags have told, and take one GPU a process where they
        # are meant to share.
        cluster_detection_method="deactivate" if membership.known_by == "flags" else None,
        initialization_timeout=int(join_seconds) + 60,
    )
    limit.cancel()
    # Libraries below JAX print to standard output, which is for results.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return membership


def _give_up(membership: Membership, seconds: float) -> None:
    where = f" at {membership.coordinator}" if membership.coordinator else ""
    report(
        f"the {membership.num_processes} processes of the run did not all meet{where} within "
        f"{seconds:.0f} s; check "
        f"that each was started and that each can reach the coordinator's host and port"
    )
    leave(1)


def is_main() -> bool:
    """Whether this process is the one that writes logs, metrics and results: the only one, or
    number 0.
    """
    return _joined is None or _joined.process_id == 0


def joined() -> bool:
    """Whether this process is one of several."""
    return _joined is not None


def report(message: str) -> None:
    """Prints the sentence of an error, with the number of the process unless it is the main one."""
    who = "" if _joined is None or is_main() else f"[process {_joined.process_id}] "
    print(f"{who}error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def wait_for_others() -> None:
    """Has the main process of several stay a while: through it the others learn what it told them.

    Without it JAX aborts them.
    """
    if joined() and is_main():
        time.sleep(1.0)


def leave(code: int) -> NoReturn:
    """Ends this process; one of several at once, as JAX would wait at exit for the others, which
    wait for this one.
    """
    if _joined is None:
        sys.exit(code)
    wait_for_others()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
