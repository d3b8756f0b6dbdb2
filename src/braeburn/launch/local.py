"""`launch local`: several processes of one run on this machine, under supervision."""

import math
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from braeburn.errors import UserError
from braeburn.launch.supervisor import Ending, Patience, Restart, Supervisor
from braeburn.remote import RemoteFolder
from braeburn.train.directory import RunDirectory
from braeburn.train.remote_run import working_folder

PROGRAM = (sys.executable, "-P", "-c", "from braeburn.cli import console; console()")
# The commands on a trained model that several processes can run together.
JOBS = ("evaluate", "generate", "import", "prune", "export")


def launch(
    arguments: Sequence[str], out: Path | RemoteFolder, processes: int, max_restarts: int
) -> Ending:
    """Trains with several processes until the run is finished or stopped.

    Args:
        arguments: those of `braeburn train`.
        out: the run directory that they name.
        processes: how many.
        max_restarts: how often all are started anew, from the last checkpoint, after one died or
            hung.

    Raises:
        UserError: the GPUs cannot be shared, or training met a mistake of the user's.
        GaveUp: too many failures.
    """
    folder = working_folder(out) if isinstance(out, RemoteFolder) else out

    def meet(address: str, index: int) -> tuple[list[str], dict[str, str]]:
        flags = ["--coordinator", address, "--num-processes", f"{processes}"]
        return [*flags, "--process-id", f"{index}"], {}

    commands = _commands([*PROGRAM, "train", *arguments], processes, meet)

    def newest_checkpoint() -> int | None:
        # A folder whose name is a number is a whole checkpoint. Orbax would bring JAX, and with it
        # the GPUs.
        steps = [
            int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()
        ]
        return max(steps, default=None)

    def restarting(restart: Restart) -> None:
        if (folder / "events.jsonl").exists():
            RunDirectory(folder).event("restart", reason=restart.reason, step=restart.resumed_step)

    return Supervisor(commands, max_restarts, _say, newest_checkpoint, restarting).run()


def launch_job(arguments: Sequence[str], processes: int, max_restarts: int) -> Ending:
    """Runs a job on a trained model with several processes until it is done.

    Args:
        arguments: the command, one of `JOBS`, and its own arguments.
        processes: how many.
        max_restarts: how often all are started anew, from the beginning, after one died.

    Raises:
        UserError: the GPUs cannot be shared, or the job met a mistake of the user's.
        GaveUp: too many failures.
    """

    def meet(address: str, index: int) -> tuple[list[str], dict[str, str]]:
        return [], {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }

    commands = _commands([*PROGRAM, *arguments], processes, meet)
    # Jobs give no sign of life as they go: how long one takes is not known here.
    patience = Patience(phases={"starting": math.inf})
    nothing = (lambda: None), (lambda restart: None)
    return Supervisor(commands, max_restarts, _say, *nothing, patience).run()


def _commands(
    program: Sequence[str],
    processes: int,
    meet: Callable[[str, int], tuple[list[str], dict[str, str]]],
) -> Callable[[], list[tuple[list[str], dict[str, str]]]]:
    """What the supervisor starts: for each attempt the command of each process, and what its
    environment has besides this one's.

    Args:
        program: with its arguments.
        processes: how many.
        meet: (where process 0 listens, the number of a process) -> the arguments and the
            environment that tell the process of the others.

    Raises:
        UserError: the GPUs cannot be shared.
    """
    shares = share_gpus(processes)

    def commands() -> list[tuple[list[str], dict[str, str]]]:
        if processes == 1:
            return [([*program], {})]
        address = f"127.0.0.1:{_free_port()}"  # that of the last attempt may be in use for a while
        found = []
        for index, share in enumerate(shares):
            arguments, told = meet(address, index)
            own = {"JAX_COORDINATOR_BIND_ADDRESS": address, **told, **share}
            found.append(([*program, *arguments], own))
        return found

    return commands


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal is gone, or the disk that holds the log is full
        print(text, file=sys.stderr, flush=True)


def share_gpus(
    processes: int, environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[dict[str, str]]:
    """What each process's environment needs so that it takes its part of the NVIDIA GPUs here,
    which are all visible.

    Raises:
        UserError: they cannot be shared evenly.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        count = 0
    elif visible is not None:
        count = len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    else:
        count = len(
            [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
        )
    if count % processes:
        fits = [n for n in range(1, count + 1) if count % n == 0]
        raise UserError(
            f"--processes {processes} cannot share {count} GPU{'s' * (count > 1)} evenly; use "
            f"{' or '.join(map(str, fits))}, or set JAX_PLATFORMS=cpu to train on the CPU"
        )
    each = count // processes
    # JAX's own variable, not CUDA's: NCCL reaches GPUs directly that the process can see.
    return [
        {
            "JAX_LOCAL_DEVICE_IDS": ",".join(
                str(gpu) for gpu in range(index * each, (index + 1) * each)
            )
        }
        if each
        else {}
        for index in range(processes)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
