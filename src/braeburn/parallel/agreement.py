"""What the processes of one run tell each other outside the step, through the coordinator that JAX
keeps.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the coordinator's key-value store has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from braeburn.errors import Interrupted, UserError
from braeburn.parallel.processes import ProcessLost

log = logging.getLogger(__name__)

# What the errors of JAX's coordinator and of collectives say.
SIGNS_OF_A_LOST_PROCESS = (
    "coordination service",
    "Coordination service",
    "UNAVAILABLE",
    "Gloo",
    "NCCL",
    "heartbeat",
)
DONE, FAILED, STOPPED = "done", "failed", "stopped"
_NONE, _SAID = "none", "said: "
POLL_MILLISECONDS = 10_000
BARRIER_MILLISECONDS = 3_600_000
STOP = "braeburn/stop"

Result = TypeVar("Result")


def main_first(name: str, function: Callable[[], Result]) -> Result:
    """`function()` in every process, called in the main one before any other calls it.

    Others wait as long as it takes.

    Args:
        name: what is then done, in words that no other exchange of the run has.
        function: called once in each process.

    Raises:
        UserError: in every process, what the main one raises.
        Interrupted: in every process, where the main one was asked to stop.
        ProcessLost: the main process failed otherwise.
    """
    if jax.process_count() == 1:
        return function()
    client, key = _coordinator(), f"braeburn/{name}"
    if jax.process_index() == 0:
        try:
            result = function()
        except BaseException as error:
            end = STOPPED if isinstance(error, Interrupted) else FAILED
            client.key_value_set(key, str(error) if isinstance(error, UserError) else end)
            raise
        client.key_value_set(key, DONE)
        return result
    answer = None
    while answer is None:
        try:
            answer = client.blocking_key_value_get(key, POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                answer = FAILED
    if answer == STOPPED:
        raise Interrupted
    if answer == FAILED:
        raise ProcessLost(f"the main process ended before {name}; its own message tells why")
    if answer != DONE:
        raise UserError(answer)
    return function()


def tell_to_stop(signal: str) -> None:
    """Lets `told_to_stop` say in every process by which signal one of them was asked to stop."""
    if jax.process_count() > 1:
        with contextlib.suppress(
            jax.errors.JaxRuntimeError
        ):  # the process that keeps the messages is gone
            _coordinator().key_value_set(STOP, signal, allow_overwrite=True)


def told_to_stop() -> str | None:
    """The signal that some process was asked to stop by; None where none was."""
    if jax.process_count() == 1:
        return None
    try:
        return _coordinator().key_value_try_get(STOP)
    except jax.errors.JaxRuntimeError:  # nothing was told
        return None


def wait_for_all(name: str) -> None:
    """Returns once every process has come here.

    Raises:
        ProcessLost: one of them ended before.
    """
    if jax.process_count() > 1:
        try:
            _coordinator().wait_at_barrier(f"braeburn/{name}", BARRIER_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            raise ProcessLost(
                f"another process ended before {name}; its own message tells why"
            ) from error


def meet(name: str, seconds: float) -> None:
    """Waits for every process to come here, but no longer than so many seconds; to be called before
    leaving.
    """
    if jax.process_count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _coordinator().wait_at_barrier(f"braeburn/{name}", int(1000 * seconds))


def first_objection(name: str, objection: str | None) -> str | None:
    """What the first process that objects says, the same answer in all of them; None where none
    does.

    Args:
        name: what is asked, in words that no other exchange of the run has.
        objection: of this process; None where it has none.

    Raises:
        ProcessLost: another process ended before it answered.
    """
    if jax.process_count() == 1:
        return objection
    client, key = _coordinator(), f"braeburn/{name}"
    # The main process collects, so that messages are as many as processes, not their square.
    client.key_value_set(
        f"{key}/{jax.process_index()}", _NONE if objection is None else f"{_SAID}{objection}"
    )
    if jax.process_index() == 0:
        answers = (_wait_for(f"{key}/{index}", name) for index in range(jax.process_count()))
        client.key_value_set(key, next((answer for answer in answers if answer != _NONE), _NONE))
    answer = _wait_for(key, name)
    return None if answer == _NONE else answer.removeprefix(_SAID)


def _wait_for(key: str, name: str) -> str:
    """The value of a key, however long another process takes to set it."""
    while True:
        try:
            return _coordinator().blocking_key_value_get(key, POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ProcessLost(
                    f"another process ended before {name}; its own message tells why"
                ) from error


def tells_of_a_loss(error: Exception) -> bool:
    """Whether an error of a collective or of the coordinator is one that follows when another
    process is gone.
    """
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError | TimeoutError):
        return False
    return any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS)


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns what collectives and the coordinator raise where another process is gone into one
    sentence.

    Raises:
        ProcessLost: another process of the run ended.
    """
    try:
        yield
    except Exception as error:
        if tells_of_a_loss(error):
            log.debug("another process ended", exc_info=error)
            raise ProcessLost(
                "another process of the run ended; its own message tells why"
            ) from error
        raise


def _coordinator() -> Any:
    return distributed.global_state.client


class Told:
    """Values that processes tell each other, by name, while they do something together."""

    def __init__(self, name: str):
        """Takes what they do, in words that no other exchange of the run has."""
        self._name = name

    def tell(self, key: str, value: str) -> None:
        """Gives the other processes a value, unless one of this name was given before, or the
        process that keeps them is gone.
        """
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _coordinator().key_value_set(f"braeburn/{self._name}/{key}", value)

    def value(self, key: str) -> str:
        """A value that another process tells, however long it takes to.

        Raises:
            ProcessLost: the process that keeps the values ended.
        """
        return _wait_for(f"braeburn/{self._name}/{key}", self._name)

    def heard(self, key: str, seconds: float = 0.0) -> str | None:
        """A value that another process has told; None where it has not.

        Args:
            key: the value's name.
            seconds: to wait for it.

        Raises:
            ProcessLost: the process that keeps the values ended.
        """
        try:
            return _coordinator().blocking_key_value_get(
                f"braeburn/{self._name}/{key}", max(1, int(1000 * seconds))
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise ProcessLost(
                f"another process ended before {self._name}; its own message tells why"
            ) from error

    def failed(self, error: Exception | None = None) -> NoReturn:
        """Ends what was begun where another process told that it failed.

        Args:
            error: what this process met because of that.

        Raises:
            ProcessLost: always.
        """
        raise ProcessLost(
            f"another process failed before {self._name}; its own message tells why"
        ) from error


class AnyProcess:
    """Whether any process wants something, the same answer in all of them and never waited for.

    The answer to each call is about the call before: the question travels while a step runs.
    """

    def __init__(self) -> None:
        """Every process must make one, and ask it equally often."""
        devices = np.array(jax.devices())
        self._sharding = NamedSharding(Mesh(devices, ("device",)), PartitionSpec("device"))
        everywhere = NamedSharding(self._sharding.mesh, PartitionSpec())
        self._any = jax.jit(jnp.any, out_shardings=everywhere)
        self._asked: Any = None

    def wants(self, wanted: bool) -> bool:
        """Whether any process wanted it at the call before; with a single process, whether it wants
        it now.
        """
        if jax.process_count() == 1:
            return wanted
        before = self._asked
        flags = jax.make_array_from_callback(
            (len(jax.devices()),), self._sharding, lambda _: np.array([wanted])
        )
        self._asked = self._any(flags)
        return before is not None and bool(before)


def said_by_main(name: str, value: str) -> str:
    """The value that the main process gave, in every process.

    Args:
        name: of the value, in words that no other exchange of the run has.
        value: this process's own.

    Raises:
        ProcessLost: the main process failed.
    """
    if jax.process_count() == 1:
        return value
    key = f"braeburn/{name}"
    if jax.process_index() == 0:
        _coordinator().key_value_set(key, value)
        return value
    try:
        return _coordinator().blocking_key_value_get(key, BARRIER_MILLISECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(
            f"the main process ended before it told {name}; its own message tells why"
        ) from error
