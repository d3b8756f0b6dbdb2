"""The training loop: all stages of a run as one, from wherever the run directory's last checkpoint
left off.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax

from braeburn import background
from braeburn.background import Background
from braeburn.config import ModelConfig, Run, Stage, validate
from braeburn.data.corpus import files
from braeburn.data.loader import Batches, held_out_batches, prefetch
from braeburn.data.mixture import rounded_shares
from braeburn.data.packing import Batch
from braeburn.data.prepare import Prepared, prepare, used_sources
from braeburn.data.store import TokenStore
from braeburn.data.teacher_store import TeacherStore
from braeburn.data.tokenizer import Tokenizer
from braeburn.disk import check_space, explaining
from braeburn.errors import Interrupted, UserError
from braeburn.layers.spec import Tree
from braeburn.optim.guard import begin_stage
from braeburn.parallel.agreement import (
    AnyProcess,
    main_first,
    meet,
    noticing_loss,
    said_by_main,
    tell_to_stop,
    told_to_stop,
    wait_for_all,
)
from braeburn.parallel.layout import Layout
from braeburn.parallel.processes import ProcessLost
from braeburn.train.checkpoint import Checkpoints, Fault
from braeburn.train.directory import RunDirectory
from braeburn.train.environment import unused_accelerator
from braeburn.train.guard import StopRequest, check_share_of_skips
from braeburn.train.heartbeat import Heartbeat
from braeburn.train.held_out import Evaluate, evaluator, measure
from braeburn.train.initial import initial_weights
from braeburn.train.metrics import History, MetricsWriter, Recorder
from braeburn.train.progress import Display, duration
from braeburn.train.resolved import ResolvedStage, resolve_stages
from braeburn.train.same_text import check_text, require_same_text, saved_text
from braeburn.train.stages import (
    Program,
    abstract_params,
    abstract_state,
    compile_stage,
    initial_state,
    started_state,
)
from braeburn.train.state import TrainState
from braeburn.train.teaching import (
    FindTeacher,
    Teacher,
    check_tokenizers,
    find_in_run,
    teacher_stores,
    teachers_of,
)
from braeburn.train.trained import require_same_model, require_same_tokenizer
from braeburn.train.transitions import enter, leaving

SECONDS_BETWEEN_WARNINGS = 60.0
# For worker processes to end by themselves, and for their reader to see that they are gone; grain
# alone would wait for 25.
SECONDS_FOR_WORKERS = 0.5
SECONDS_FOR_READER = 1.5
# For processes that stop, before they leave each other.
SECONDS_TO_MEET = 2.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: steps made in all.
        finished: whether every stage is done.
        stages: a row for each finished stage: stage, step, tokens, loss (the mean of its last
            steps, in nats) and held_out (results by source).
    """

    step: int
    finished: bool
    stages: list[dict[str, Any]]


def train(
    run: Run,
    out: Path,
    *,
    origins: dict[str, str] | None = None,
    stop_after_steps: int | None = None,
    find_teacher: FindTeacher = find_in_run,
    follow: tuple[Path, int] | None = None,
) -> Outcome:
    """Trains `run` in the folder `out`, or goes on with it there.

    Args:
        run: the complete run.
        out: its run directory; a run begun there goes on from its newest checkpoint, bit for bit.
        origins: where each value of the run came from, for `config.json`.
        stop_after_steps: save and return after this many steps of this call.
        find_teacher: reads the teachers that stages name by a path.
        follow: a finished directory of the same run, with all checkpoints, and a step: its stages
            teach, and from there on each step is made from the state that it had.

    Raises:
        UserError: anything that the user can mend; what is on disk stays whole.
    """
    if not run.stages:
        raise UserError(f"stages of the run {run.name!r} is empty; add a stage to train")
    # Of all stages, so that a mesh that does not fit the last is found out before the first.
    stages = resolve_stages(run)
    teachers = teachers_of(stages, follow[0] if follow else out, find_teacher)
    for name, teacher in teachers.items():
        stages[name] = stages[name].taught_by(teacher.model)
    main, heartbeat = jax.process_index() == 0, Heartbeat()
    heartbeat.phase("preparing")
    stop = StopRequest(tell_to_stop, told_to_stop)
    with ExitStack() as held, Display(run.total_steps, quiet=not main) as display, stop:
        directory = RunDirectory(out, writes=main, say=display.say)
        held.enter_context(explaining(directory.path))
        held.enter_context(noticing_loss())
        resumed: int | None = None

        def begin() -> _Loop:
            nonlocal resumed
            main_first(
                "the run directory was claimed", lambda: held.enter_context(directory.claim())
            )
            resumed, tokenizer, faults = _resume_point(directory, run)
            saved = saved_text(directory, resumed or 0)
            start = initial_weights(run, directory.path, resumed, find_teacher)
            if start and tokenizer is None:
                tokenizer = start.tokenizer
            first = next(iter(stages.values()))
            state_shape = abstract_state(first)
            checkpoint_bytes = sum(
                leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_shape)
            )
            check_space(
                directory.path,
                checkpoint_bytes,
                "a checkpoint takes",
                "free some or choose another --out",
            )
            for name, source in used_sources(run).items():
                files(name, source)  # before work begins that an exit would have to wait for
            wait_for_all("the run was checked")
            stop.check()
            used, present = first.layout.num_devices, len(jax.devices())
            if used < present:
                display.warn(
                    f"warning: using {used} of {present} devices; --set mesh.fsdp=-1 uses all"
                )
            if unused := unused_accelerator(jax.default_backend()):
                display.warn(unused)
            for line in rounded_shares(run.stages):
                display.say(line)
            ahead = _Ahead(stages, resumed, start)

            def prepared() -> _Loop:
                # Other processes go on with the tokenizer of the main one, and its token stores
                # where they share a cache.
                own = tokenizer if main else Tokenizer.load(directory.tokenizer)
                folder = str(directory.path.absolute())
                found = prepare(run, display.say, own, proceed=stop.check, verified_for=folder)
                check_text(run, directory, resumed or 0, saved, found, display.say)
                require_same_text(found)
                check_tokenizers(run, teachers, found.tokenizer)
                loop = _Loop(
                    run, directory, stages, teachers, found, ahead, display, stop, heartbeat, follow
                )
                stop.check()
                if main:
                    _set_aside(directory, faults, resumed, display.say)
                    # Nothing was written until here, where no mistake of the user's is left to be
                    # found.
                    directory.write_config(run, origins or {})
                    found.tokenizer.save_all(directory.path)
                return loop

            return main_first("text was prepared", prepared)

        try:
            loop = background.run(begin, "preparing", stop.check)
        except Interrupted:
            step = resumed or 0
            if directory.begun():
                directory.event("preemption", step=step, signal=stop.signal)
            display.say(f"stopped at step {step} of {run.total_steps}, while text was prepared")
            meet("the run was stopped", SECONDS_TO_MEET)
            return Outcome(step, False, directory.stage_results(step) if main else [])
        return loop.run_from(resumed, stop_after_steps)


class _Ahead:
    """What the first stage to run needs of the compiler, worked on in a thread while text is being
    tokenised.
    """

    def __init__(
        self, stages: dict[str, ResolvedStage], resumed: int | None, start: Teacher | None = None
    ):
        """Begins the work.

        Args:
            stages: all stages of the run by name.
            resumed: the step to go on from; None to begin.
            start: holds the weights to begin with; None for random ones.
        """
        self.programs: dict[str, Background[Program]] = {}
        self.state: Background[TrainState] | None = None
        first = next(iter(stages.values()))
        run = first.run
        if resumed != run.total_steps:
            name = run.stage_at(resumed or 0)[0]
            work = functools.partial(compile_stage, stages[name])
            self.programs[name] = Background(work, "compiling")
        if resumed is None:

            def first_state() -> TrainState:
                for program in self.programs.values():
                    program.ended()  # not both at once, which would take the memory of both
                return started_state(first, start.read) if start else initial_state(first)

            self.state = Background(first_state, "initialising")


def _batches(
    resolved: ResolvedStage,
    stores: Mapping[str, TokenStore],
    labels: Mapping[str, TeacherStore] | None = None,
) -> Batches:
    """The rows of a stage's batches that this process reads, with a teacher's cached labels."""
    rows = resolved.layout.rows(resolved.stage.batch_size)
    return Batches(resolved.stage, resolved.name, resolved.run.seed, stores, rows, labels)


def calibration(stage: Stage, batches: Batches, layout: Layout) -> Iterator[Batch]:
    """The first batches of a stage of pruning, on which it measures activations, placed."""
    tokens = stage.pruning.calibration_tokens if stage.pruning else 0
    for index in range(min(stage.steps, -(-tokens // stage.batch_tokens))):
        yield layout.place(batches[index], batches.rows, stage.batch_size)


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


@dataclass
class _Loop:
    """The parts of a run that its stages share."""

    run: Run
    directory: RunDirectory
    stages: dict[str, ResolvedStage]
    teachers: dict[str, Teacher]
    prepared: Prepared
    ahead: _Ahead
    display: Display
    stop: StopRequest
    heartbeat: Heartbeat
    follow: tuple[Path, int] | None = None
    stopping: bool = False
    evaluates: tuple[Any, Any] = (None, None)
    step: int = 0
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        # Those of all stages, so that text too short for the last is found out before the first.
        stores = self.prepared.train
        self.batches = {name: _batches(stage, stores) for name, stage in self.stages.items()}
        self.any_process = AnyProcess()

    def run_from(self, resumed: int | None, stop_after_steps: int | None) -> Outcome:
        """Runs stages until the run is finished or asked to stop."""
        # Stages that teach a later one do so as they ended.
        lasting = [
            self.run.last_steps[stage.teacher]
            for stage in self.run.stages.values()
            if stage.teacher in self.stages
        ]
        self.step = resumed or 0
        with closing(
            Checkpoints(self.directory.path, self.run.checkpoint, lasting)
        ) as self.checkpoints:
            try:
                self._run_from(resumed, stop_after_steps)
            except Interrupted:
                self.stopping = True
        step, total = self.step, self.run.total_steps
        # Of a run that was stopped after its last step, the end of the last stage is still to be
        # told.
        finished = step == total and not self.stopping
        if self.stopping:
            self.directory.event("preemption", step=step, signal=self.stop.signal)
        else:
            self.directory.event("stop", step=step, finished=finished, skipped=self.history.skipped)
        skipped = f"; {self.history.skipped} steps were skipped" if self.history.skipped else ""
        self.display.say(
            f"{'finished' if finished else 'stopped'} at step {step} of {total}{skipped}"
        )
        if self.stopping:
            meet("the run was stopped", SECONDS_TO_MEET)
        return Outcome(
            step, finished, self.directory.stage_results(step) if self.directory.writes else []
        )

    def _run_from(self, resumed: int | None, stop_after_steps: int | None) -> None:
        """Makes the steps from `resumed` on.

        Raises:
            Interrupted: all steps made are saved, or were made in no call.
        """
        if self.ahead.state:
            facts = self._facts(next(iter(self.run.stages)))
            self.directory.event("start", total_steps=self.run.total_steps, **facts)
            self.heartbeat.phase("compiling")  # the first state is made after the first program
            state = self.ahead.state.result(self.stop.check)
        else:
            state = self._unsaving(lambda: self._restore(self.step), "restoring")
        total = self.run.total_steps
        last = total if stop_after_steps is None else min(self.step + stop_after_steps, total)
        self.history = History(self.directory.rows(self.step))
        self.history.skipped = int(state.optimizer.skipped)
        self.directory.forget_after(self.step)
        with closing(
            MetricsWriter(
                self.directory.path, self.step, self.display.say, quiet=not self.directory.writes
            )
        ) as writer:
            self._end_stage_left(state, writer)
            while self.step < last and not self.stopping:
                state = self._run_stage(state, writer, last)
                if self.step < last and not self.stopping:
                    before = self.run.stage_at(self.step - 1)[0]
                    state = self._hand_over(state, before, self.run.stage_at(self.step)[0])

    def _run_stage(self, state: TrainState, writer: MetricsWriter, last: int) -> TrainState:
        """Makes the steps of one stage up to `last` at most, saves, and ends the stage if it is
        over.
        """
        name, stage, index = self.run.stage_at(self.step)
        until, began = min(stage.steps, index + last - self.step), self.step
        program = self._unsaving(lambda: self._compile(name), "compiling")
        leave = (
            self._unsaving(lambda: self._leaving(name), "compiling")
            if until == stage.steps
            else None
        )
        self.display.begin_stage(name, stage.steps, index)
        recorder = Recorder(self.stages[name], writer, self.display, self.history)
        if index:
            self._evaluate_left(program, state, writer)
        state = self._steps(program, recorder, state, index, until) if not self.stopping else state
        if self.step == began:  # stopped before the first step: what there was is saved
            return state
        ends = self._ends_stage(self.step)
        skipped = stage.steps - int(state.optimizer.stage_steps)
        if leave and ends:
            state = leave(state)
        self._save(state)
        if ends and not self.stopping:
            params = state.params
            self._unsaving(lambda: self._end_stage(name, params, skipped, writer), "evaluating")
        return state

    def _unsaving(self, work: Callable[[], Result], phase: str) -> Result:
        """The result of work that begins when every step is saved, so that a stop need not wait for
        its end.

        Raises:
            Interrupted: a stop was asked for.
        """
        return background.run(work, phase, self.stop.check)

    def _end_stage_left(self, state: TrainState, writer: MetricsWriter) -> None:
        """Ends the stage whose last step was the last saved, where the call that made it was
        stopped before that.
        """
        if self.step == 0 or not self._ends_stage(self.step):
            return
        name, stage, _ = self.run.stage_at(self.step - 1)
        skipped = stage.steps - int(state.optimizer.stage_steps)
        ends = [end["step"] for end in self.directory.stage_results(self.step)]
        if said_by_main("whether the stage was ended", str(self.step in ends)) == str(True):
            check_share_of_skips(self.run, name, skipped)
            return
        resolved = self.stages[name]
        wanted = abstract_params(resolved.layout_of(resolved.models.left))

        def end() -> None:
            self._end_stage(
                name, self.checkpoints.restore_params(self.step, wanted), skipped, writer
            )

        self._unsaving(end, "evaluating")

    def _evaluate_left(self, program: Program, state: TrainState, writer: MetricsWriter) -> None:
        """Evaluates within a stage after the last step saved, where the call that made it was
        stopped before that.
        """
        if not self._evaluates_at(self.step):
            return
        evaluated = [event["step"] for event in self.directory.events("evaluation")]
        if said_by_main("whether the last step was evaluated", str(self.step in evaluated)) != str(
            True
        ):
            self._evaluate_within(program, state, writer)

    def _evaluates_at(self, step: int) -> bool:
        every = self.run.evaluation.every_steps
        return bool(every) and step % (every or 1) == 0

    def _hand_over(self, state: TrainState, before: str, after: str) -> TrainState:
        """The state laid out for the next stage: where its mesh is another, by way of the
        checkpoint just begun.
        """
        if self.stages[before].layout.sizes == self.stages[after].layout.sizes:
            return state

        def laid_out() -> TrainState:
            self.checkpoints.wait()
            return self._read(self.step, after)

        return self._unsaving(laid_out, "restoring")

    def _restore(self, step: int) -> TrainState:
        name = self.run.stage_at(min(step, self.run.total_steps - 1))[0]
        state = self._read(step, name)
        self.directory.event("resume", step=step, **self._facts(name))
        self.display.say(f"resuming from step {step} of {self.run.total_steps}")
        return state

    def _followed(self, state: TrainState, name: str) -> TrainState:
        """The state of the run to be followed after as many steps; without one, the run's own."""
        if not self.follow or int(state.step) < self.follow[1]:
            return state
        with closing(Checkpoints(self.follow[0])) as checkpoints:
            return self._read(int(state.step), name, checkpoints)

    def _read(self, step: int, name: str, checkpoints: Checkpoints | None = None) -> TrainState:
        """The checkpoint of a step, laid out for a stage."""
        self.heartbeat.phase("restoring")
        stage, models = self.stages[name], self.stages[name].models
        layout = stage.layout
        if self._ends_stage(step) or step == 0:
            layout = stage.layout_of(models.left if step == stage.last_step else models.found)
        shape = abstract_state(stage, layout)
        checkpoints = checkpoints or self.checkpoints
        return checkpoints.restore(step, shape, stage.optimizer_of(layout.specs).init)

    def _facts(self, name: str) -> dict[str, Any]:
        return {"processes": jax.process_count(), "mesh": self.stages[name].layout.sizes.sizes}

    def _compile(self, name: str) -> Program:
        """The program of a stage, with what it needs beside the state: its evaluation, and what its
        teacher says.
        """
        self.heartbeat.phase("compiling")
        resolved = self.stages[name]
        stage, model = resolved.stage, resolved.teacher
        begun = self.ahead.programs.get(name)
        program = begun.result() if begun else compile_stage(resolved)
        if stage.teacher in self.stages:
            self.checkpoints.wait()  # for the one that teaches, if that stage has just ended
        self.teaching = (
            [self.teachers[name].read(abstract_params(resolved.layout_of(model)))] if model else []
        )
        if stage.teacher and stage.distillation.cached:
            self._label(name)
        use = resolved.transform.use
        self.use = jax.jit(use) if use else lambda params, step: params
        self.directory.event("compile", stage=name, seconds=round(program.compile_seconds, 3))
        self.display.say(f"stage {name}: compiled in {duration(program.compile_seconds)}")
        return program

    def _leaving(self, name: str) -> Callable[[TrainState], TrainState]:
        return leaving(self.stages[name])

    def _label(self, name: str) -> None:
        """Has the stage's batches hold what its teacher says of them."""

        def proceed() -> None:
            self.heartbeat.phase("labelling")
            self._agree_to_stop()

        resolved, prepared = self.stages[name], self.prepared
        stores = teacher_stores(resolved, self.teachers[name], prepared, self.display.say, proceed)
        self.batches[name] = _batches(resolved, prepared.train, stores)

    def _steps(
        self, program: Program, recorder: Recorder, state: TrainState, index: int, until: int
    ) -> TrainState:
        """Makes the steps index..until of a stage.

        Metrics are read once the next step is on its way.
        """
        stage, layout = program.stage, program.stage.layout
        batches = self.batches[stage.name]
        with recorder.apart():
            if index == 0:
                found = self._followed(state, stage.name)

                def entered() -> TrainState:
                    first = calibration(stage.stage, batches, layout)
                    with layout.compiling():
                        return enter(stage, found, first)

                state = self._unsaving(entered, "entering")
                state = state._replace(optimizer=begin_stage(state.optimizer))
        items = prefetch(batches, index, self.run.data.workers, self.run.data.prefetch)
        stream = background.Feed(items, "reading batches", until - index)
        with ending(stream):
            for at in range(index, until):
                state = self._followed(state, stage.name) if at else state
                state = self._step(program, recorder, state, stream)
                if self.stopping:
                    break
            recorder.flush()
        return state

    def _step(
        self, program: Program, recorder: Recorder, state: TrainState, stream: background.Feed
    ) -> TrainState:
        """Makes a step, and evaluates and saves if it is time."""
        stage = program.stage
        batches = self.batches[stage.name]
        began = time.monotonic()
        try:
            batch = stream.next(self._waiting_for_data())
        except Interrupted:
            self.stopping = True
            return state
        placed = stage.layout.place(batch, batches.rows, stage.stage.batch_size)
        waited = time.monotonic() - began
        state, metrics = program.step(state, placed, *self.teaching)
        self.step += 1
        recorder.observe(self.step, metrics, waited)
        self.heartbeat.step(self.step)
        if self.any_process.wants(self.stop.signal is not None):
            self.stopping = True
        elif not self._ends_stage(self.step):
            if self._evaluates_at(self.step):
                with recorder.apart():
                    self._evaluate_within(program, state, recorder.writer)
            if self.step % self.run.checkpoint.every_steps == 0 and not self.stopping:
                # This writes the step's row first, so that a kill never leaves a checkpoint whose
                # step has no row.
                with recorder.apart():
                    self._save(state)
        return state

    def _waiting_for_data(self) -> Callable[[], None]:
        """What is to be asked while a batch is waited for.

        It raises `Interrupted` where this process alone decides, and `ProcessLost` where others
        wait for it in the middle of a step and cannot save: what was made since the last checkpoint
        is then made again.
        """
        waited, alone, asked = (
            background.Waited(SECONDS_BETWEEN_WARNINGS),
            jax.process_count() == 1,
            0.0,
        )
        workers = self.run.data.workers

        def proceed() -> None:
            nonlocal asked
            if seconds := waited.due():
                self.display.say(
                    f"warning: the batch of step {self.step + 1} has not come for "
                    f"{duration(seconds)}; "
                    + (
                        f"see whether the {workers} processes of data.workers still run"
                        if workers
                        else "see the disk"
                    )
                )
            if self.stop.signal is None:
                return
            if alone:
                raise Interrupted
            asked = asked or time.monotonic()
            if time.monotonic() - asked > background.GRACE_SECONDS:
                raise ProcessLost(
                    f"asked to stop by {self.stop.signal} while no batch came for step "
                    f"{self.step + 1}"
                )

        return proceed

    def _agree_to_stop(self) -> None:
        """To be called equally often in all processes, while they compute together.

        Raises:
            Interrupted: in all of them at once, where one was asked to stop.
        """
        if self.any_process.wants(self.stop.signal is not None):
            raise Interrupted

    def _evaluate_within(self, program: Program, state: TrainState, writer: MetricsWriter) -> None:
        """Evaluates in the middle of a stage, unless a stop comes first."""

        def evaluated() -> dict[str, dict[str, float]]:
            with program.stage.layout.compiling():
                params = self.use(state.params, state.optimizer.stage_steps)
            return self._evaluate(program.stage, params, program.stage.models.trained)

        # Steps are not saved: several processes only stop where they agree to, between batches.
        proceed = self.stop.check if jax.process_count() == 1 else background.nothing_to_ask
        try:
            results = background.run(evaluated, "evaluating", proceed)
        except Interrupted:
            self.stopping = True
            return
        writer.held_out(self.step, results)
        self.directory.event(
            "evaluation", stage=program.stage.name, step=self.step, held_out=results
        )

    def _ends_stage(self, step: int) -> bool:
        return step == self.run.total_steps or self.run.stage_at(step)[2] == 0

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        self.heartbeat.phase("saving")
        self.directory.require_present()
        facts = {"text": self.prepared.fingerprints}
        if self.checkpoints.save(step, state, self.run, self.prepared.tokenizer.to_json(), facts):
            self.directory.event("checkpoint", step=step)

    def _evaluate(
        self, resolved: ResolvedStage, params: Tree, model: ModelConfig
    ) -> dict[str, dict[str, float]]:
        """Results on the held-out text of a stage, by source.

        Raises:
            Interrupted: a stop was asked for, and agreed on.
        """
        self.heartbeat.phase("evaluating")
        stage, layout = resolved.stage, resolved.layout_of(model)
        evaluate = self._evaluator(model, layout)
        sequences = max(1, stage.batch_size // stage.accumulation_steps)
        results = {}
        for source, store in self.prepared.held_out.items():
            if store is not None and stage.mixture.get(source):
                batches = held_out_batches(
                    store, stage.sequence_length, sequences, self.run.evaluation.tokens
                )
                placed = (layout.place(batch, range(sequences), sequences) for batch in batches)
                results[source] = measure(
                    evaluate, params, placed, store.byte_ratio, self._agree_to_stop
                )
        return results

    def _evaluator(self, model: ModelConfig, layout: Layout) -> Evaluate:
        """That of a model on a layout; the last is kept, for a stage to be evaluated often."""
        if self.evaluates[0] != (model, layout.sizes):
            evaluate = evaluator(model, self.prepared.tokenizer.token_bytes, layout)
            self.evaluates = (model, layout.sizes), evaluate
        return self.evaluates[1]

    def _end_stage(self, name: str, params: Tree, skipped: int, writer: MetricsWriter) -> None:
        """Evaluates what a stage has left, and tells of its end; the step that ended it is saved by
        then.

        Raises:
            UserError: too many of its steps were skipped.
        """
        resolved = self.stages[name]
        results = self._evaluate(resolved, params, resolved.models.left)
        stage = resolved.stage
        self.directory.event(
            "stage_end",
            stage=name,
            step=self.step,
            tokens=stage.steps * stage.batch_tokens,
            loss=self.directory.recent_loss(name) if self.directory.writes else None,
            held_out=results,
            skipped=skipped,
        )
        writer.held_out(self.step, results)
        for source, values in results.items():
            self.display.say(
                f"stage {name}: held-out {source} loss {values['loss']:.4f}, "
                f"{values['bits_per_byte']:.4f} bits per byte"
            )
        check_share_of_skips(self.run, name, skipped)


@contextmanager
def ending(stream: background.Feed) -> Iterator[None]:
    """Ends the reading of batches, and worker processes that do not end by themselves."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        if not stream.close(SECONDS_FOR_WORKERS):
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
            stream.close(SECONDS_FOR_READER)  # which sees that they are gone
