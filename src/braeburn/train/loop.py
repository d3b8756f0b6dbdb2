"""The training loop: all stages of a run as one, from wherever the run directory's last checkpoint
left off.

A call of `train` prepares (`preparation.py`), and then, for each stage that is left:

    equip     compile the stage's step, read the weights of its teacher        `_equip`
    enter     change the state as the stage's transform says                   `StageRun.enter`
    for each step n of the stage:                                              `_make_step`
        fetch     take the batch that a thread has read, and place it          `feed.py`
        dispatch  step n, which the devices begin when step n - 1 is done
        read      the metrics of step n - 1, while step n runs                 `metrics.Recorder`
        evaluate  on held-out text, where it is time                           `evaluations.py`
        save      the state, where it is time                                  `saving.py`
    leave     change the state into that of an ordinary model, save it, evaluate it
    hand over to the next stage, over the checkpoint where its mesh is another `_hand_over`

The loop never waits for a step but where it evaluates or saves. A request to stop ends the step
that is dispatched, and what it has made is saved.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from braeburn import background
from braeburn.config import Run
from braeburn.disk import explaining
from braeburn.errors import Interrupted, UserError
from braeburn.parallel.agreement import main_first, meet, noticing_loss, tell_to_stop, told_to_stop
from braeburn.remote import RemoteFolder
from braeburn.train.directory import RunDirectory
from braeburn.train.evaluations import Evaluations
from braeburn.train.feed import BatchFeed
from braeburn.train.guard import StopRequest
from braeburn.train.heartbeat import Heartbeat
from braeburn.train.metrics import History, MetricsWriter, Recorder
from braeburn.train.preparation import Preparation, Ready
from braeburn.train.profiling import Profile
from braeburn.train.progress import Display, duration
from braeburn.train.remote_run import RemoteRun, working_folder
from braeburn.train.resolved import ResolvedStage, resolve_stages
from braeburn.train.saving import Saver, facts_of
from braeburn.train.session import Agreement, Session
from braeburn.train.stage_run import StageRun, batches_of, equip
from braeburn.train.state import TrainState
from braeburn.train.teaching import (
    FindTeacher,
    cached_labels,
    find_in_run,
    teachers_of,
    with_teachers,
)
from braeburn.train.transitions import leaving

# For processes that stop, before they leave each other.
SECONDS_TO_MEET = 2.0


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
    out: Path | RemoteFolder,
    *,
    origins: dict[str, str] | None = None,
    stop_after_steps: int | None = None,
    profile_steps: range = range(0),
    find_teacher: FindTeacher = find_in_run,
) -> Outcome:
    """Trains `run` in the folder `out`, or goes on with it there.

    Args:
        run: the complete run.
        out: its run directory; a run begun there goes on from its newest checkpoint, bit for bit.
            One at a URL is worked on in a folder of this machine, and copied from there.
        origins: where each value of the run came from, for `config.json`.
        stop_after_steps: save and return after this many steps of this call.
        profile_steps: numbers of steps to be profiled, from 1 over all stages.
        find_teacher: reads the teachers that stages name by a path.

    Raises:
        UserError: anything that the user can mend; what is on disk stays whole.
    """
    if not run.stages:
        raise UserError(f"stages of the run {run.name!r} is empty; add a stage to train")
    # Of all stages, so that a mesh that does not fit the last is found out before the first.
    stages = resolve_stages(run)
    path = working_folder(out) if isinstance(out, RemoteFolder) else out
    teachers = teachers_of(stages, path, find_teacher)
    stages = with_teachers(stages, teachers)
    main, heartbeat = jax.process_index() == 0, Heartbeat()
    heartbeat.phase("preparing")
    stop = StopRequest(tell_to_stop, told_to_stop)
    with ExitStack() as held, Display(run.total_steps, quiet=not main) as display, stop:
        directory = RunDirectory(path, writes=main, say=display.say)
        remote = RemoteRun(out, display.say) if isinstance(out, RemoteFolder) else None
        held.enter_context(explaining(directory.path))
        held.enter_context(noticing_loss())
        session = Session(stages, directory, display, stop, Agreement(stop), heartbeat, remote)
        preparation = Preparation(session, teachers, find_teacher, origins or {})
        try:
            ready = background.run(lambda: preparation.work(held), "preparing", stop.check)
        except Interrupted:
            return _stopped_before(session, preparation.resumed or 0)
        with ExitStack() as copied:
            if remote and main:
                copied.enter_context(remote.copying(run))
            outcome = _Loop(session, ready, profile_steps).run(stop_after_steps)
            if remote:
                heartbeat.phase("copying")
                main_first("the run was copied", copied.close)
        return outcome


def _stopped_before(session: Session, step: int) -> Outcome:
    """The outcome of a call that was stopped before its first step, after `step` of others."""
    directory, total = session.directory, session.run.total_steps
    if directory.begun():
        directory.event("preemption", step=step, signal=session.stop.signal)
    session.display.say(f"stopped at step {step} of {total}, while text was prepared")
    meet("the run was stopped", SECONDS_TO_MEET)
    return Outcome(step, False, directory.stage_results(step) if directory.writes else [])


class _Loop:
    """Makes steps, from the newest checkpoint to the end of the run, or until it is to stop."""

    def __init__(self, session: Session, ready: Ready, profile_steps: range):
        """Opens the run's checkpoints for writing.

        Args:
            session: the call.
            ready: what was prepared for it.
            profile_steps: numbers of steps to be profiled.
        """
        self._session = session
        self._ready = ready
        self._saver = Saver(session, ready.prepared)
        self._history = History()
        self._profile = Profile(session.directory.path, profile_steps, session.display.say)
        self._step = ready.resumed or 0  # steps made in all
        self._stopping = False

    def run(self, stop_after_steps: int | None) -> Outcome:
        """Runs stages until the run is finished, asked to stop, or has made that many steps."""
        session, directory, total = self._session, self._session.directory, self._total
        last = total if stop_after_steps is None else min(self._step + stop_after_steps, total)
        with closing(self._saver):
            try:
                self._make_steps(last)
            except Interrupted:
                self._stopping = True
            finally:
                self._profile.close(self._step)
        step, skipped = self._step, self._history.skipped
        # Of a run that was stopped after its last step, the end of the last stage is still to be
        # told.
        finished = step == total and not self._stopping
        if self._stopping:
            directory.event("preemption", step=step, signal=session.stop.signal)
        else:
            directory.event("stop", step=step, finished=finished, skipped=skipped)
        told = f"; {skipped} steps were skipped" if skipped else ""
        session.display.say(
            f"{'finished' if finished else 'stopped'} at step {step} of {total}{told}"
        )
        if self._stopping:
            meet("the run was stopped", SECONDS_TO_MEET)
        return Outcome(step, finished, directory.stage_results(step) if directory.writes else [])

    @property
    def _total(self) -> int:
        return self._session.run.total_steps

    def _make_steps(self, last: int) -> None:
        """Makes the steps up to `last` of all stages.

        Raises:
            Interrupted: all steps made are saved, or were made in no call.
        """
        session, directory, step = self._session, self._session.directory, self._step
        state = self._first_state()
        self._history = History(directory.rows(step))
        self._history.skipped = int(state.optimizer.skipped)
        directory.forget_after(step)
        say, quiet = session.display.say, not directory.writes
        with closing(MetricsWriter(directory.path, step, say, quiet=quiet)) as writer:
            evaluations = Evaluations(session, self._ready.prepared, self._saver, writer)
            evaluations.make_up_end(state)
            while self._step < last and not self._stopping:
                stage = self._session.stage_at(self._step)
                state = self._run_stage(stage, state, evaluations, last)
                if self._step < last and not self._stopping:
                    state = self._hand_over(state, stage, session.stage_at(self._step))

    def _first_state(self) -> TrainState:
        """The state to make the first step of this call from."""
        session = self._session
        if self._ready.resumed is not None:
            return session.unsaving(lambda: self._saver.resume(self._step), "restoring")
        session.directory.event("start", total_steps=self._total, **facts_of(session.first))
        session.heartbeat.phase("compiling")  # the first state is made after the first program
        return self._ready.ahead.state(session.stop.check)

    def _run_stage(
        self, resolved: ResolvedStage, state: TrainState, evaluations: Evaluations, last: int
    ) -> TrainState:
        """Makes the steps of one stage up to `last` at most, saves, and ends the stage if it is
        over.
        """
        session, began = self._session, self._step
        until = min(resolved.last_step, last)
        stage = session.unsaving(lambda: self._equip(resolved), "compiling")
        leave = (
            session.unsaving(lambda: leaving(resolved), "compiling")
            if until == resolved.last_step
            else None
        )
        index = began - resolved.first_step
        session.display.begin_stage(resolved.name, resolved.stage.steps, index)
        recorder = Recorder(resolved, evaluations.writer, session.display, self._history)
        if index:
            self._unless_stopped(lambda: evaluations.make_up_within(stage, state))
        if not self._stopping:
            state = self._steps(stage, state, recorder, evaluations, until)
        if self._step == began:  # stopped before the first step: what there was is saved
            return state
        skipped = resolved.stage.steps - int(state.optimizer.stage_steps)
        ends = self._step == resolved.last_step
        if leave and ends:
            state = leave(state)
        self._saver.save(state)
        if ends and not self._stopping:
            evaluations.end(resolved, state.params, skipped)
        return state

    def _equip(self, resolved: ResolvedStage) -> StageRun:
        """A stage's program, with all that its steps need beside the state."""
        session, name, ready = self._session, resolved.name, self._ready
        session.heartbeat.phase("compiling")
        program = ready.ahead.program(resolved)
        if resolved.stage.teacher in session.stages:
            self._saver.wait()  # for the teacher's weights, if its stage has just ended
        teacher, batches = ready.teachers.get(name), ready.batches[name]
        if teacher and resolved.stage.distillation.cached:
            labels = cached_labels(
                resolved, teacher, ready.prepared, session.display.say, self._proceed_labelling
            )
            batches = batches_of(resolved, ready.prepared.train, labels)
        found = equip(program, batches, teacher)
        seconds = program.compile_seconds
        session.directory.event("compile", stage=name, seconds=round(seconds, 3))
        session.display.say(f"stage {name}: compiled in {duration(seconds)}")
        return found

    def _proceed_labelling(self) -> None:
        self._session.heartbeat.phase("labelling")
        self._session.agreement.check()

    def _hand_over(
        self, state: TrainState, before: ResolvedStage, after: ResolvedStage
    ) -> TrainState:
        """The state laid out for the next stage: where its mesh is another, by way of the
        checkpoint just begun.
        """
        if before.layout.sizes == after.layout.sizes:
            return state

        def laid_out() -> TrainState:
            self._saver.wait()
            return self._saver.read(after, self._step)

        return self._session.unsaving(laid_out, "restoring")

    def _steps(
        self,
        stage: StageRun,
        state: TrainState,
        recorder: Recorder,
        evaluations: Evaluations,
        until: int,
    ) -> TrainState:
        """Makes the steps of a stage until as many as `until` are made in all."""
        session, resolved, found = self._session, stage.resolved, state
        first = resolved.first_step
        with recorder.apart():
            if self._step == first:
                state = session.unsaving(lambda: stage.enter(found, session.display), "entering")
        with BatchFeed(session, stage.batches, self._step - first, until - first) as feed:
            while self._step < until and not self._stopping:
                state = self._make_step(stage, state, feed, recorder)
                if self._step < resolved.last_step and not self._stopping:
                    self._evaluate_and_save(stage, state, recorder, evaluations)
            recorder.flush()
        return state

    def _make_step(
        self, stage: StageRun, state: TrainState, feed: BatchFeed, recorder: Recorder
    ) -> TrainState:
        """Dispatches a step, and reads the metrics of the one before."""
        began = time.monotonic()
        try:
            batch = feed.next(self._step + 1)
        except Interrupted:
            self._stopping = True
            return state
        placed = stage.place(batch)
        waited = time.monotonic() - began
        self._profile.before(self._step + 1, state)
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step + 1):
            state, metrics = stage.step(state, placed)
        self._step += 1
        self._profile.after(self._step, state)
        recorder.observe(self._step, metrics, waited)
        self._session.heartbeat.step(self._step)
        self._stopping = self._session.agreement.to_stop()
        return state

    def _evaluate_and_save(
        self, stage: StageRun, state: TrainState, recorder: Recorder, evaluations: Evaluations
    ) -> None:
        """Evaluates and saves in the middle of a stage, where it is time."""
        if evaluations.due(self._step):
            with recorder.apart():
                self._unless_stopped(lambda: evaluations.within(stage, state))
        if self._step % self._session.run.checkpoint.every_steps == 0 and not self._stopping:
            # This writes the step's row first, so that a kill never leaves a checkpoint whose step
            # has no row.
            with recorder.apart():
                self._saver.save(state)

    def _unless_stopped(self, work: Callable[[], None]) -> None:
        """Does some work; where a stop comes first, the loop ends and saves."""
        try:
            work()
        except Interrupted:
            self._stopping = True
