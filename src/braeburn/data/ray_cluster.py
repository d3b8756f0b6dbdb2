"""The work of preparing text on the nodes of a Ray cluster.

Ray starts a task again where a node dies. What the task had done is in the folder of its part,
which all nodes share, and is gone on with there.
"""

import logging
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from braeburn import __version__
from braeburn.data.workers import SECONDS_BETWEEN_LOOKS, Function, Result, Task
from braeburn.errors import UserError
from braeburn.extras import how_to_install

RETRIES = 20  # of a task whose node or process died
SECONDS_TO_CONNECT = 10.0


def on_ray(
    function: Function[Task, Result],
    tasks: Sequence[Task],
    address: str,
    proceed: Callable[[], None],
    done: Callable[[Task, Result], None],
) -> None:
    """Does tasks on a Ray cluster, as many at once as it has processors.

    Args:
        function: does one; it can be pickled, and is sent to each node once.
        tasks: all of them, which can be pickled, too.
        address: of the cluster, as `ray.init` takes it: "auto", "host:6379" or "ray://host:10001".
        proceed: called about every half second, from this thread. What it raises ends the work.
        done: told of each that is done, from this thread.

    Raises:
        UserError: Ray is not installed, there is no cluster, or its nodes cannot do the work.
        Exception: what a task or `proceed` raised.
    """
    ray = _ray()
    with _Connected(ray, address):
        shared = ray.put(function)
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_do)
        waiting = list(reversed(tasks))
        running: dict[Any, Task] = {}
        try:
            while waiting or running:
                room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < room:
                    task = waiting.pop()
                    running[remote.remote(shared, task)] = task
                ended, _ = ray.wait(list(running), timeout=SECONDS_BETWEEN_LOOKS)
                proceed()
                for reference in ended:
                    done(running.pop(reference), _result(ray, reference))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def check_nodes(address: str, folder: Path) -> None:
    """Refuses a cluster whose nodes have another Braeburn, or do not share a folder.

    Args:
        address: of the cluster.
        folder: where all work is done; it exists.

    Raises:
        UserError: naming a node and what it lacks.
    """
    ray = _ray()
    marker = folder / f".{uuid.uuid4().hex}"
    with _Connected(ray, address):
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        marker.touch()
        try:
            for node in ray.nodes():
                if not node["Alive"] or not node["Resources"].get("CPU"):
                    continue
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
                ask = ray.remote(num_cpus=1, scheduling_strategy=where)(_version_and_marker)
                version, seen = _result(ray, ask.remote(marker))
                name = node["NodeManagerAddress"]
                if version != __version__:
                    raise UserError(
                        f"the node {name} of the Ray cluster has braeburn {version}, this machine "
                        f"{__version__}; install the same version on all nodes"
                    )
                if not seen:
                    raise UserError(
                        f"the node {name} of the Ray cluster does not see {str(folder)!r} of this "
                        f"machine; set data.cache to a folder that all nodes share"
                    )
        finally:
            marker.unlink(missing_ok=True)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(f"--ray needs the package ray; {how_to_install('data')}") from None
    return ray


class _Connected:
    """A connection to a cluster, which ends with the block unless it was there before."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray, self._address = ray, address
        self._own = not ray.is_initialized()

    def __enter__(self) -> None:
        if not self._own:
            return
        try:
            _reach(self._address)
            self._ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"--ray {self._address!r} leads to no Ray cluster ({_first(error)}); start one, as "
                f"with `ray start --head`, or name the address that it prints"
            ) from None

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._ray.shutdown()


def _reach(address: str) -> None:
    """Finds out whether something listens at a host and port; Ray itself waits for minutes.

    Raises:
        OSError: nothing does.
        ValueError: it is no port.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()


def _first(error: BaseException) -> str:
    """The first line of what a library says, in a length that a sentence can have."""
    return str(error).partition("\n")[0][:200]


def _result(ray: Any, reference: Any) -> Any:
    """What a task returned.

    Raises:
        UserError: a node has no Braeburn, or died too often.
        Exception: what the task raised.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ModuleNotFoundError):
            raise UserError(
                f"a node of the Ray cluster lacks a package ({error.cause}); install the same "
                f"version of braeburn on all nodes"
            ) from None
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise UserError(
            f"the Ray cluster gave a task up ({_first(error)}); see to its nodes, and run the same "
            f"command again, which goes on from there"
        ) from None


def _do(function: Any, task: Any) -> Any:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # as many tasks run as there are processors
    return function(task, lambda: None)


def _version_and_marker(marker: Path) -> tuple[str, bool]:
    return __version__, marker.exists()
