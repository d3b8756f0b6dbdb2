"""`launch local`: several processes of one run on this machine, under supervision."""

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from braeburn.errors import UserError
from braeburn.launch.supervisor import Ending, Restart, Supervisor
from braeburn.remote import RemoteFolder
from braeburn.train.directory import RunDirectory
from braeburn.train.remote_run import working_folder


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
    shares = share_gpus(processes)
    folder = working_folder(out) if isinstance(out, RemoteFolder) else out
    program = [
        sys.executable,
        "-P",
        "-c",
        "from braeburn.cli import console; console()",
        "train",
        *arguments,
    ]

    def commands() -> list[tuple[list[str], dict[str, str]]]:
        if processes == 1:
            return [(program, {})]
        port = _free_port()  # that of the last attempt may be in use for a while
        own = {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
        meet = [
            "--coordinator",
            f"127.0.0.1:{port}",
            "--num-processes",
            f"{processes}",
            "--process-id",
        ]
        return [([*program, *meet, f"{index}"], own | share) for index, share in enumerate(shares)]

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

    def say(text: str) -> None:
        with suppress(OSError):  # the terminal is gone, or the disk that holds the log is full
            print(text, file=sys.stderr, flush=True)

    return Supervisor(commands, max_restarts, say, newest_checkpoint, restarting).run()


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
