"""Checkpoints through orbax: written in the background, atomically, and complete in themselves.

`checkpoints/STEP/` holds the parameters, the optimizer's state, and the run with its tokenizer; a folder of that name
exists only once all of it is on disk. This is the only module that knows orbax.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from braeburn.config import Checkpoint, Run
from braeburn.errors import UserError
from braeburn.model.spec import Tree
from braeburn.parallel.processes import ProcessLost
from braeburn.train.guard import writing
from braeburn.train.state import TrainState

# What the errors of JAX's coordinator and of collectives say.
SIGNS_OF_A_LOST_PROCESS = ("coordination service", "Coordination service", "UNAVAILABLE", "Gloo", "NCCL", "heartbeat")


def _quieten_orbax() -> None:
    """Leaves a write that fails to be raised where it is waited for; orbax also prints it from each of its threads."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def print_of_thread(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("orbax."):
            in_thread(failure)

    # Writes that the first failure left behind report to an event loop that is gone.
    def print_unraisable(failure: Any) -> None:
        if str(failure.exc_value) != "Event loop is closed":
            unraisable(failure)

    threading.excepthook, sys.unraisablehook = print_of_thread, print_unraisable


_quieten_orbax()


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, options: Checkpoint | None = None, lasting: Sequence[int] = ()):
        """Opens `directory`/checkpoints; with `options` for writing, without for reading only.

        The checkpoints of the steps in `lasting` stay whatever the options say.
        """
        self._directory = directory.absolute() / "checkpoints"
        self._newest_saved: int | None = None
        if options is None and not self._directory.is_dir():
            raise UserError(f"{str(directory)!r} holds no checkpoint; train for at least one checkpoint first")
        settings: dict[str, Any] = {"read_only": True}
        if options is not None:
            keep = [policies.LatestN(options.keep_last), policies.CustomSteps(list(lasting))]
            if options.keep_every_steps:
                keep.append(policies.EveryNSteps(options.keep_every_steps))
            settings = {"preservation_policy": policies.AnyPreservationPolicy(keep), "cleanup_tmp_directories": True}
        with writing(self._directory.parent):
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(**settings),
                item_names=("params", "optimizer", "run"),
            )

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, run: Run, tokenizer: str, facts: Mapping[str, Any] | None = None
    ) -> bool:
        """Begins to write a checkpoint; it does not change when the state does.

        Args:
            step: steps made.
            state: to be saved.
            run: that made it.
            tokenizer: its JSON.
            facts: further values of JSON for `facts` to give back.

        Returns:
            Whether there was anything to do: a step that is saved already is left alone.

        Raises:
            UserError: an earlier write failed, as for want of space.
        """
        if self._newest_saved == step or step in self._manager.all_steps():
            return False
        self._newest_saved = step
        with writing(self._directory.parent):
            items = {"params": ocp.args.StandardSave(state.params)}
            if state.optimizer is not None:
                items["optimizer"] = ocp.args.StandardSave(state.optimizer)
            description = {"run": run.model_dump(mode="json"), "tokenizer": json.loads(tokenizer)}
            description["facts"] = dict(facts or {})
            self._manager.save(step, args=ocp.args.Composite(run=ocp.args.JsonSave(description), **items), force=True)
        return True

    def wait(self) -> None:
        """Returns once every checkpoint begun is on disk."""
        with writing(self._directory.parent):
            self._manager.wait_until_finished()

    def restore(self, step: int, shape: TrainState, init_optimizer: Callable[[Tree], Any]) -> TrainState:
        """The state saved at `step`, by whatever processes on whatever mesh.

        Args:
            step: of a complete checkpoint.
            shape: the abstract state to restore into, each leaf with the sharding that it is to have.
            init_optimizer: gives the optimizer's state for parameters; used where the checkpoint holds none.

        Raises:
            UserError: the checkpoint is damaged.
        """
        values = self.restore_params(step, shape.params)
        places = jax.tree.map(lambda leaf: leaf.sharding, shape.optimizer)
        if (self._directory / str(step) / "optimizer").is_dir():
            wanted = jax.tree.map(_on_device, shape.optimizer)
            optimizer = self._read(step, optimizer=ocp.args.StandardRestore(wanted))["optimizer"]
            optimizer = jax.device_put(optimizer, places)
        else:
            optimizer = jax.jit(init_optimizer, out_shardings=places)(values)
        count = jax.make_array_from_callback((), shape.step.sharding, lambda _: np.int32(step))
        return TrainState(count, values, optimizer)

    def restore_params(self, step: int, params: Tree) -> Tree:
        """The parameters saved at `step`, in the structure of the abstract `params`.

        They lie as the shardings of `params` say; without these, on this process's first device.
        """
        return self._read(step, params=ocp.args.StandardRestore(jax.tree.map(_on_device, params)))["params"]

    def restore_run(self, step: int) -> tuple[dict[str, Any], str]:
        """The fields of the run that saved `step`, and its tokenizer's JSON."""
        description = self._read(step, run=ocp.args.JsonRestore())["run"]
        return description["run"], json.dumps(description["tokenizer"], ensure_ascii=False)

    def facts(self, step: int) -> dict[str, Any]:
        """The further values that were saved at `step`."""
        return self._read(step, run=ocp.args.JsonRestore())["run"].get("facts", {})

    def close(self) -> None:
        """Finishes what is being written."""
        with writing(self._directory.parent):
            self._manager.close()

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            if jax.process_count() > 1 and any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS):
                raise ProcessLost(f"another process ended while checkpoint {step} was read") from error
            older = [s for s in self._manager.all_steps() if s < step]
            remedy = f"to go on from step {max(older)}" if older else "to begin again"
            folder = self._directory / str(step)
            logging.getLogger(__name__).debug("reading %s", folder, exc_info=error)
            raise UserError(
                f"the checkpoint {str(folder)!r} is damaged or of another model "
                f"({_first_line(error)}); move it away {remedy}"
            ) from error


def _on_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind("device"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".: ")
