"""The work of a call of `train` before its first step."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import jax

from braeburn.config import Run, validate
from braeburn.data.listing import list_sources
from braeburn.data.loader import Batches
from braeburn.data.mixture import rounded_shares
from braeburn.data.prepare import Prepared, prepare
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.workers import Work
from braeburn.disk import SECONDS_TO_APPEAR, check_space
from braeburn.errors import UserError
from braeburn.parallel.agreement import first_objection, main_first, said_by_main, wait_for_all
from braeburn.train.ahead import Ahead
from braeburn.train.checkpoint import Checkpoints, Fault
from braeburn.train.directory import RunDirectory
from braeburn.train.environment import unused_accelerator
from braeburn.train.initial import initial_weights
from braeburn.train.remote_run import VARIABLE
from braeburn.train.same_text import check_text, require_same_text, saved_text
from braeburn.train.session import Session
from braeburn.train.stage_run import batches_of
from braeburn.train.stages import abstract_state
from braeburn.train.teaching import FindTeacher, Teacher, check_tokenizers
from braeburn.train.trained import require_same_model, require_same_tokenizer


@dataclass(frozen=True)
class Ready:
    """All that the loop needs.

    Attributes:
        resumed: the step to go on from; None to begin.
        prepared: the text.
        batches: of each stage, without the labels of cached teachers.
        teachers: of the stages that have one.
        ahead: the compiler's work for the first stage to run.
    """

    resumed: int | None
    prepared: Prepared
    batches: dict[str, Batches]
    teachers: dict[str, Teacher]
    ahead: Ahead


@dataclass
class Preparation:
    """What is checked, prepared and begun before the first step; a stop may end it at any time.

    Attributes:
        session: the call.
        teachers: of the stages that have one.
        find_teacher: reads the weights that a run starts from.
        origins: where each value of the run came from.
        resumed: the step to go on from, once it is known; None to begin.
    """

    session: Session
    teachers: dict[str, Teacher]
    find_teacher: FindTeacher
    origins: dict[str, str]
    resumed: int | None = None

    def work(self, held: ExitStack) -> Ready:
        """Does it all.

        Args:
            held: keeps the claim on the run's folder.

        Raises:
            Interrupted: a stop was asked for.
            UserError: anything that the user can mend; nothing is written by then.
        """
        session, run, directory = self.session, self.session.run, self.session.directory
        main_first("the run directory was claimed", lambda: self._claim(held))
        self._check_shared()
        self.resumed, tokenizer, faults = _resume_point(directory, run)
        saved = saved_text(directory, self.resumed or 0)
        start = initial_weights(run, directory.path, self.resumed, self.find_teacher)
        if start and tokenizer is None:
            tokenizer = start.tokenizer
        self._check_places()
        wait_for_all("the run was checked")
        session.stop.check()
        self._warn()
        ahead = Ahead(session.stages, self.resumed, start)

        def prepared() -> Ready:
            # Other processes go on with the tokenizer of the main one, and its token shards where
            # they share a cache.
            own = tokenizer if directory.writes else Tokenizer.load(directory.tokenizer)
            found = self._text(own)
            check_text(run, directory, self.resumed or 0, saved, found, session.display.say)
            ready = self._ready(found, ahead)
            session.stop.check()
            if directory.writes:
                _set_aside(directory, faults, self.resumed, session.display.say)
                # Nothing was written until here, where no mistake of the user's is left to be
                # found.
                directory.write_config(run, self.origins)
                found.tokenizer.save_all(directory.path)
            return ready

        return main_first("text was prepared", prepared)

    def _claim(self, held: ExitStack) -> None:
        """Keeps others from training in the run's folder, which is up to date then."""
        session, remote = self.session, self.session.remote
        held.enter_context(session.directory.claim())
        if remote and session.directory.writes:
            held.callback(remote.release)
            remote.claim(session.run, session.stop.check)

    def _check_shared(self) -> None:
        """Refuses processes whose run directories are different folders of the same name."""
        directory = self.session.directory
        if jax.process_count() == 1:
            return
        own = directory.leave_mark() if directory.writes else ""
        mark = said_by_main("what marks the run directory", own)
        objection = None
        if not directory.has_mark(mark, SECONDS_TO_APPEAR):
            objection = (
                f"--out {str(directory.path)!r} is another folder for process "
                f"{jax.process_index()} than for process 0; name a folder on storage that the "
                f"machines of all processes mount"
            )
        objection = first_objection("the run directory is shared", objection)
        if objection is not None:
            raise UserError(objection)

    def _check_places(self) -> None:
        """Looks for room for a checkpoint, and for the files of all sources."""
        state = jax.tree.leaves(abstract_state(self.session.first))
        check_space(
            self.session.directory.path,
            sum(leaf.size * leaf.dtype.itemsize for leaf in state),
            "a checkpoint takes",
            f"free some or set {VARIABLE} to another folder"
            if self.session.remote
            else "free some or choose another --out",
        )
        list_sources(self.session.run)  # before work begins that an exit would have to wait for

    def _warn(self) -> None:
        """Tells of devices that are not used, and of shares of text that are rounded."""
        display = self.session.display
        used, present = self.session.first.layout.num_devices, len(jax.devices())
        if used < present:
            display.warn(f"warning: using {used} of {present} devices; --set mesh.fsdp=-1 uses all")
        if unused := unused_accelerator(jax.default_backend()):
            display.warn(unused)
        for line in rounded_shares(self.session.run.stages):
            display.say(line)

    def _text(self, tokenizer: Tokenizer | None) -> Prepared:
        session = self.session
        return prepare(
            session.run,
            session.display.say,
            tokenizer,
            work=Work(session.stop.check, session.display.preparing),
            verified_for=str(session.directory.path.absolute()),
        )

    def _ready(self, prepared: Prepared, ahead: Ahead) -> Ready:
        require_same_text(prepared)
        check_tokenizers(self.session.run, self.teachers, prepared.tokenizer)
        # Those of all stages, so that text too short for the last is found out before the first.
        batches = {
            name: batches_of(stage, prepared.train) for name, stage in self.session.stages.items()
        }
        return Ready(self.resumed, prepared, batches, self.teachers, ahead)


def _resume_point(
    directory: RunDirectory, run: Run
) -> tuple[int | None, Tokenizer | None, list[Fault]]:
    """Where `run` may go on here: from which step, with which tokenizer (Nones to begin), past
    which damage.
    """
    if not directory.begun():
        return None, None, []
    checkpoints = Checkpoints(directory.path) if (directory.path / "checkpoints").is_dir() else None
    step, faults = checkpoints.newest_sound() if checkpoints else (None, [])
    if checkpoints and step is None and faults:
        # Beginning again by itself would be the loss of all that was trained.
        raise UserError(checkpoints.sentence(faults[0], []))
    directory.check_unchanged(run, step or 0)
    tokenizer = Tokenizer.load(directory.tokenizer) if directory.tokenizer.exists() else None
    if checkpoints and step is not None:
        fields, saved_json = checkpoints.restore_run(step)
        require_same_model(run, validate(fields), step, directory.path)
        saved = Tokenizer.from_json(saved_json)
        require_same_tokenizer(tokenizer or saved, saved, directory.tokenizer, step)
        tokenizer = saved
    if (
        not step
        and tokenizer
        and run.data.tokenizer
        and Tokenizer.load(run.data.tokenizer).hash != tokenizer.hash
    ):
        raise UserError(
            f"data.tokenizer={run.data.tokenizer!r} is not the tokenizer of the run in "
            f"{str(directory.path)!r}; "
            f"leave data.tokenizer unset to go on with that one, or choose another --out"
        )
    return step, tokenizer, faults


def _set_aside(
    directory: RunDirectory, faults: list[Fault], resumed: int | None, say: Callable[[str], None]
) -> None:
    """Keeps damaged checkpoints under other names, since their steps are about to be made again;
    tells of each.
    """
    for fault in faults:
        kept = Checkpoints(directory.path).set_aside(fault)
        directory.event(
            "damage", step=fault.step, reason=fault.reason, kept=kept.name, resumed=resumed
        )
        say(
            f"warning: checkpoint {fault.step} is damaged ({fault.reason}); it is kept as "
            f"{str(kept)!r}, and training goes on from step {resumed}"
        )
