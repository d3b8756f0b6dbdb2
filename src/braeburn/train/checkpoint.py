"""Checkpoints through orbax: written in the background, atomically, and complete in themselves.

`checkpoints/STEP/` holds the parameters, the optimizer's state, the run with its tokenizer, and the
record that all of them are checked against before they are read; a folder of that name exists only
once all of it is on disk. This is the only module that knows orbax.
"""

import functools
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from braeburn.config import Checkpoint, Run, read_identity
from braeburn.disk import explaining
from braeburn.errors import UserError
from braeburn.layers.spec import Tree
from braeburn.parallel.agreement import first_objection, tells_of_a_loss, wait_for_all
from braeburn.parallel.processes import ProcessLost
from braeburn.train import record as records
from braeburn.train.piecewise import Writer, write_share
from braeburn.train.progress import tracked
from braeburn.train.record import PARTS, Damaged, Record
from braeburn.train.state import TrainState
from braeburn.train.stored import CHUNK_BYTES, Pieces, StoredArray, placed

log = logging.getLogger(__name__)

# TensorStore puts the system's number into its messages, as "[os_error_code='28']" or "[OS error
# 28: ...]".
SYSTEM_ERROR = re.compile(r"\bos[ _]error(?:_code=')? ?(\d+)", re.IGNORECASE)
_questions = itertools.count()


@dataclass(frozen=True)
class Fault:
    """A checkpoint that must not be read.

    Attributes:
        step: of its folder.
        reason: a clause about what is wrong with it.
    """

    step: int
    reason: str


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(
        self, directory: Path, options: Checkpoint | None = None, lasting: Sequence[int] = ()
    ):
        """Opens `directory`/checkpoints; with `options` for writing, without for reading only.

        The checkpoints of the steps in `lasting` stay whatever the options say.
        """
        self._run_directory = directory.absolute()
        self._directory = self._run_directory / "checkpoints"
        self._newest_saved: int | None = None
        self._record_to_write: Record | None = None
        self._records: dict[int, Record | None] = {}
        if options is None and not self._directory.is_dir():
            raise UserError(
                f"{str(directory)!r} holds no checkpoint; train for at least one checkpoint first"
            )
        # Reading goes past the manager: what orbax notes of the time of writing is in no record,
        # and so not read.
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(*PARTS))
        self._options, self._lasting = options, lasting
        if options is not None and self._directory.is_dir():
            _ = self._manager  # deletes what killed processes have left

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """What writes checkpoints and deletes those that are not to be kept.

        It begins by deleting what killed processes have left, in a thread of its own, and would
        take what `_save_streamed` is writing for that: so it is not made before it is needed.
        """
        options = self._options
        assert options is not None
        keep = [policies.LatestN(options.keep_last), policies.CustomSteps(list(self._lasting))]
        if options.keep_every_steps:
            keep.append(policies.EveryNSteps(options.keep_every_steps))
        in_background = ocp.AsyncOptions(
            barrier_sync_fn=self._barrier(), post_finalization_callback=self._write_record
        )
        with self._explaining():
            return ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    cleanup_tmp_directories=True,
                    lightweight_initialize=True,
                    async_options=in_background,
                ),
                item_names=PARTS,
            )

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, sound or not, in order."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint, sound or not; None without any."""
        return max(self.steps(), default=None)

    def newest_sound(self) -> tuple[int | None, list[Fault]]:
        """The step of the newest checkpoint that is what its record says, and what is wrong with
        each newer one.

        Raises:
            UserError: a file cannot be read, which is no sign of damage.
        """
        faults: list[Fault] = []
        for step in reversed(self.steps()):
            fault = self.fault(step)
            if fault is None:
                return step, faults
            faults.append(fault)
        return None, faults

    def require_sound(self, step: int, parts: Iterable[str] = PARTS) -> None:
        """Refuses a checkpoint that is not what its record says.

        Raises:
            UserError: what is wrong with it, and which checkpoints are sound.
        """
        fault = self.fault(step, parts)
        if fault:
            others = [
                other for other in self.steps() if other != step and not self.fault(other, parts)
            ]
            raise UserError(self.sentence(fault, others))

    def sentence(self, fault: Fault, sound: Sequence[int]) -> str:
        """What to tell of a checkpoint that must not be read, where those of the steps `sound` may
        be.
        """
        remedy = "none of the others is sound: bring back a copy of it"
        if sound:
            named = (
                f"checkpoint {sound[0]} is"
                if len(sound) == 1
                else f"checkpoints {', '.join(map(str, sound))} are"
            )
            remedy = (
                f"{named} sound: move {fault.step} out of the folder to use the newest of "
                f"those left"
            )
        elif len(self.steps()) == 1:
            remedy = (
                "it is the only one: bring back a copy of it, or move it out of the folder to "
                "begin again"
            )
        return (
            f"the checkpoint {str(self._folder(fault.step))!r} is damaged: {fault.reason}; {remedy}"
        )

    def fault(self, step: int, parts: Iterable[str] = PARTS) -> Fault | None:
        """What is wrong with some parts of a checkpoint; None where nothing is.

        Every process of a run must ask, and gets the same answer; each reads its share of the
        files.

        Raises:
            UserError: a file cannot be read, which is no sign of damage.
        """
        reason = None
        with explaining(self._run_directory):
            try:
                share = (jax.process_index(), jax.process_count())
                self._records[step] = records.verify(
                    self._folder(step), step, self._run_identity(), parts, share
                )
            except Damaged as error:
                reason = str(error)
        reason = first_objection(
            f"checkpoint {step} was checked for the {next(_questions)}th time", reason
        )
        return None if reason is None else Fault(step, reason)

    def facts(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state; nothing where a version did that wrote no
        records.

        A single process may ask, since no file but the record is read.

        Raises:
            UserError: the record is damaged.
        """
        with explaining(self._run_directory):
            try:
                saved = records.read(self._folder(step))
            except Damaged as error:
                raise UserError(
                    f"the checkpoint {str(self._folder(step))!r} is damaged: {error}; run the same "
                    f"command again, which goes on from the newest sound one"
                ) from None
        return saved.facts if saved else {}

    def set_aside(self, fault: Fault) -> Path:
        """Renames a damaged checkpoint, so that another of its step can be written; returns where
        it is kept.
        """
        folder = self._folder(fault.step)
        for number in itertools.count(1):
            kept = folder.with_name(f"{fault.step}.damaged" + (f"-{number}" if number > 1 else ""))
            if not kept.exists():
                with explaining(self._run_directory):
                    folder.rename(kept)
                return kept
        raise AssertionError

    def save(
        self,
        step: int,
        state: TrainState,
        run: Run,
        tokenizer: str,
        facts: Mapping[str, Any] | None = None,
    ) -> bool:
        """Begins to write a checkpoint; it does not change when the state does.

        Args:
            step: steps made.
            state: to be saved; without an optimizer's state at step 0 only. Leaves may be `Pieces`
                where all of them are; they are on disk when this returns.
            run: that made it.
            tokenizer: its JSON.
            facts: further values of JSON for `facts` to give back.

        Returns:
            Whether there was anything to do: a step that is saved already is left alone.

        Raises:
            UserError: an earlier write failed, as for want of space.
        """
        assert self._options is not None
        if self._newest_saved == step or step in self.steps():
            return False
        if state.optimizer is None and step:
            raise ValueError(
                f"the state at step {step} has no optimizer; only one at step 0 can go on without"
            )
        self.wait()
        self._newest_saved = step
        items = {"params": state.params}
        if state.optimizer is not None:
            items["optimizer"] = state.optimizer
        fingerprints = {name: _fingerprint(name, item) for name, item in items.items()}
        self._record_to_write = Record(
            step, self._run_identity(), {**fingerprints, "run": ""}, dict(facts or {})
        )
        description = {
            "record": records.FORMAT,
            "run": run.model_dump(mode="json"),
            "tokenizer": json.loads(tokenizer),
        }
        leaves = jax.tree.leaves(items)
        streamed = any(isinstance(leaf, Pieces) for leaf in leaves)
        kind = ocp.args.PyTreeSave if streamed else ocp.args.StandardSave
        arguments = {
            name: kind(item, save_args=jax.tree.map(_chunks, item)) for name, item in items.items()
        }
        composite = ocp.args.Composite(run=ocp.args.JsonSave(description), **arguments)
        with self._explaining():
            if streamed:
                self._save_streamed(step, composite, leaves)
            else:
                self._manager.save(step, args=composite, force=True)
        return True

    def _save_streamed(
        self, step: int, composite: ocp.args.Composite, leaves: Sequence[Pieces]
    ) -> None:
        """Writes a checkpoint of `Pieces`, each process its share of them, shows how far it is, and
        returns once it is on disk.
        """
        name = f"{self._folder(step)} was written"
        if jax.process_index() == 0:
            self._write_streamed(self._folder(step), composite, Writer(name, leaves))
        else:
            write_share(name, leaves)
        wait_for_all(name)
        if jax.process_index() > 0:
            self._hash_own(self._folder(step))
        wait_for_all(f"{self._folder(step)} was hashed")
        if jax.process_index() == 0:
            self._write_record_of(self._folder(step))

    def _write_streamed(self, folder: Path, composite: ocp.args.Composite, writer: Writer) -> None:
        """What the main process does to write a checkpoint of `Pieces`."""
        # Orbax is to wait for no other process.
        alone = ocp.options.MultiprocessingOptions(
            active_processes={0} if jax.process_count() > 1 else None,
            barrier_sync_key_prefix="streamed" if jax.process_count() > 1 else None,
        )
        registry = ocp.type_handlers.create_type_handler_registry((Pieces, writer))
        parts = {
            name: ocp.PyTreeCheckpointHandler(
                type_handler_registry=registry, multiprocessing_options=alone
            )
            for name in composite
            if name != "run"
        }
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
            run=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            **parts,
        )
        # Orbax's thread for writing is waited for: its other class, that writes in this thread,
        # waits for a sign of life of savings in the background that came before. Folders are there
        # before it begins, or the description of the run would at times be written before its own.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        with ocp.AsyncCheckpointer(
            handler, async_options=options, multiprocessing_options=alone
        ) as checkpointer:
            try:
                checkpointer.save(folder, args=composite)
                written = writer.written(checkpointer.check_for_errors)
                for _ in tracked(written, "writing weights", writer.total):
                    pass
                checkpointer.wait_until_finished()
            except BaseException:
                writer.stop()
                raise

    def wait(self) -> None:
        """Returns once every checkpoint begun is on disk."""
        if "_manager" in vars(self):
            with self._explaining():
                self._manager.wait_until_finished()

    def restore(
        self, step: int, shape: TrainState, init_optimizer: Callable[[Tree], Any]
    ) -> TrainState:
        """The state saved at `step`, by whatever processes on whatever mesh.

        Args:
            step: of a complete checkpoint.
            shape: the abstract state to restore into, each leaf with the sharding that it is to
                have.
            init_optimizer: gives the optimizer's state for parameters; used at step 0 where the
                checkpoint holds none.

        Raises:
            UserError: the checkpoint is damaged, or of another model or optimizer.
        """
        self.require_sound(step)
        values = self._restore_part(step, "params", shape.params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shape.optimizer)
        if self._has_optimizer(step):
            optimizer = jax.device_put(
                self._restore_part(step, "optimizer", shape.optimizer), shardings
            )
        else:
            optimizer = jax.jit(init_optimizer, out_shardings=shardings)(values)
        count = jax.make_array_from_callback((), shape.step.sharding, lambda _: np.int32(step))
        return TrainState(count, values, optimizer)

    def restore_params(self, step: int, params: Tree) -> Tree:
        """The parameters saved at `step`, in the structure of the abstract `params`.

        They lie as the shardings of `params` say; without these, on this process's first device.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
        """
        return self.placed(step, self.stored_params(step, params), params)

    def placed(self, step: int, stored: Tree, params: Tree) -> Tree:
        """The parameters of `stored_params`, in the types and places of the abstract `params`.

        Raises:
            UserError: a file cannot be read.
        """
        with self._reading(step):
            return jax.tree.map(placed, stored, params)

    def stored_params(self, step: int, params: Tree) -> Tree:
        """The parameters saved at `step`, which are read from the disk as they are used.

        Args:
            step: of a complete checkpoint.
            params: tree of the parameters' shapes; types do not matter.

        Returns:
            A tree of `StoredArray` with the structure of `params`.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
        """
        self.require_sound(step, ("params", "run"))
        self._require_same(step, "params", params)
        return self._stored(step, "params", params)

    def stored_optimizer(self, step: int, optimizer: Tree) -> Tree | None:
        """The optimizer's state saved at `step`, as `stored_params` gives the parameters; None
        where the checkpoint holds none.

        Args:
            step: of a complete checkpoint.
            optimizer: tree of shapes and types.

        Raises:
            UserError: the checkpoint is damaged, or of another model or optimizer.
        """
        self.require_sound(step)
        if not self._has_optimizer(step):
            return None
        self._require_same(step, "optimizer", optimizer)
        return self._stored(step, "optimizer", optimizer)

    def _has_optimizer(self, step: int) -> bool:
        saved = self._records[step]
        return "optimizer" in saved.parts if saved else (self._folder(step) / "optimizer").is_dir()

    def _stored(self, step: int, part: str, wanted: Tree) -> Tree:
        folder = self._folder(step) / part
        with self._reading(step):
            return jax.tree.map_with_path(
                lambda path, _: StoredArray(
                    folder, jax.tree_util.keystr(path, simple=True, separator=".")
                ),
                wanted,
            )

    def restore_run(self, step: int) -> tuple[dict[str, Any], str]:
        """The fields of the run that saved `step`, and its tokenizer's JSON.

        Raises:
            UserError: the checkpoint is damaged.
        """
        self.require_sound(step, ("params", "run"))
        with self._reading(step):
            restored = self._reader.restore(
                self._folder(step), args=ocp.args.Composite(run=ocp.args.JsonRestore())
            )
            description = restored["run"]
            return description["run"], json.dumps(description["tokenizer"], ensure_ascii=False)

    def close(self) -> None:
        """Finishes what is being written."""
        with self._explaining():
            self._reader.close()
            if "_manager" in vars(self):
                self._manager.close()

    def _run_identity(self) -> str | None:
        """What tells the run here from others; None where its configuration does not say."""
        present = (self._run_directory / "config.json").exists()
        return read_identity(self._run_directory) if present else None

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _restore_part(self, step: int, part: str, wanted: Tree) -> Tree:
        """The arrays of one part of a sound checkpoint, in the device's memory."""
        self._require_same(step, part, wanted)
        abstract = jax.tree.map(_on_device, wanted)
        with self._reading(step):
            restored = self._reader.restore(
                self._folder(step),
                args=ocp.args.Composite(**{part: ocp.args.StandardRestore(abstract)}),
            )
        return restored[part]

    def _require_same(self, step: int, part: str, wanted: Tree) -> None:
        """Refuses a part of a checkpoint that has another structure than what it shall fill."""
        saved = self._records[step]
        if saved and saved.parts[part] != _fingerprint(part, wanted):
            what = "optimizer" if part == "optimizer" else "model"
            raise UserError(
                f"the checkpoint {str(self._folder(step))!r} is of another {what} than the run; "
                f"put the fields of "
                f"{what} back, in the recipe and in {str(self._run_directory / 'config.json')!r}"
            )

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says of a failure to read a checkpoint what is known of it, which is not that it is
        damaged.
        """
        folder = self._folder(step)
        try:
            with self._explaining():
                yield
        except (UserError, ProcessLost):
            raise
        except Exception as error:
            if tells_of_a_loss(error):
                raise ProcessLost(
                    f"another process ended while checkpoint {step} was read"
                ) from error
            log.debug("reading %s", folder, exc_info=error)
            state = "its files have the right checksums, so leave it where it is and see to"
            if self._records.get(step) is None:
                state = "it has no checksums to tell damage by; see to"
            raise UserError(
                f"the checkpoint {str(folder)!r} could not be read ({_first_line(error)}); {state} "
                f"what the message names, then run the same command again"
            ) from error

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turns failures of the file system, orbax's among them, into a sentence."""
        with explaining(self._run_directory):
            try:
                yield
            except OSError as error:
                if error.errno is not None and error.filename is None:
                    error.filename = str(self._directory)
                raise
            except (UserError, ProcessLost):
                raise
            except Exception as error:
                # Arrays are written in C++, whose errors are of no type of their own.
                number = SYSTEM_ERROR.search(str(error))
                if number is None:
                    raise
                code = int(number[1])
                raise OSError(code, os.strerror(code), str(self._directory)) from error

    def _barrier(self) -> Callable[..., None]:
        """What processes wait for each other with, in the thread that writes: each hashes the files
        that it wrote.
        """
        wait = multihost.get_barrier_sync_fn()

        def wait_for_all(*, key: str, timeout_ms: int) -> None:
            if "async_write_complete" in key and jax.process_index() > 0:
                self._hash_own(self._unfinished())
            wait(key=key, timeout_ms=timeout_ms)

        return wait_for_all

    def _hash_own(self, folder: Path) -> None:
        """Hashes what this process has written of a checkpoint, so that the main one need not read
        it from another host's disk.
        """
        index = jax.process_index()
        names = [name for name in records.walk(folder) if _writer(name) == index]
        hashed = records.hash_files(folder, names, to_disk=True)
        # Parts are still under the names that they are written under.
        final = {re.sub(r"^(\w+)\.[^/]*", r"\1", name): entry for name, entry in hashed.items()}
        (folder / f"{records.RECORD}.{index}").write_text(json.dumps(final))

    def _write_record(self) -> None:
        """Writes the record of the checkpoint whose parts are complete, in the main process, before
        it counts.
        """
        self._write_record_of(self._unfinished())

    def _write_record_of(self, folder: Path) -> None:
        hashed: dict[str, tuple[int, str]] = {}
        for index in range(1, jax.process_count()):
            path = folder / f"{records.RECORD}.{index}"
            hashed |= {
                name: (size, digest)
                for name, (size, digest) in json.loads(path.read_text()).items()
            }
            path.unlink()
        names = [name for name in records.list_files(folder) if name not in hashed]
        hashed |= records.hash_files(folder, names, to_disk=True)
        assert self._record_to_write is not None
        records.write(folder, replace(self._record_to_write, files=dict(sorted(hashed.items()))))

    def _unfinished(self) -> Path:
        """The folder of the checkpoint that is being written."""
        assert self._record_to_write is not None
        (folder,) = self._directory.glob(f"{self._record_to_write.step}.orbax-checkpoint-tmp*")
        return folder


def _writer(name: str) -> int | None:
    """The process that wrote a file of arrays or of their description, from its path; None for
    files of all.
    """
    found = re.search(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)", name)
    return int(found[1]) if found else None


def _fingerprint(part: str, tree: Any) -> str:
    """A hash of the paths, shapes and types of the leaves of a checkpoint's part.

    Parameters may lie on disk in another type than they are trained in, which is float32: that of
    an import is the source's.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    described = {
        jax.tree_util.keystr(path): (
            tuple(np.shape(leaf)),
            "float32" if part == "params" else str(leaf.dtype),
        )
        for path, leaf in leaves
    }
    return records.fingerprint(described)


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """How an array is cut into chunks on disk: each of a large stack of layers is of one layer, so
    that layers can be read one by one.
    """
    if leaf.nbytes <= CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())


def _on_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind("device")
    )


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text[:160].rstrip(".: ")
