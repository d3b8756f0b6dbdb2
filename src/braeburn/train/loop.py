"""The training loop: all stages of a run as one, from wherever the run directory's last checkpoint left off."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from braeburn.config import Model, Run, Stage, validate
from braeburn.data.corpus import files
from braeburn.data.loader import Batches, held_out_batches, prefetch
from braeburn.data.mixture import rounded_shares
from braeburn.data.prepare import Prepared, prepare, used_sources
from braeburn.data.tokenizer import Tokenizer
from braeburn.disk import check_space, explaining
from braeburn.errors import UserError
from braeburn.model.spec import Tree
from braeburn.optim.build import begin_stage
from braeburn.parallel.agreement import AnyProcess, main_first, noticing_loss, wait_for_all
from braeburn.parallel.layout import Layout
from braeburn.train.checkpoint import Checkpoints, Fault
from braeburn.train.compression import enter, leave, of_model, use_of
from braeburn.train.directory import RunDirectory
from braeburn.train.guard import StopRequest
from braeburn.train.heartbeat import Heartbeat
from braeburn.train.held_out import Evaluate, evaluator, measure
from braeburn.train.initial import initial_weights
from braeburn.train.metrics import MetricsWriter, Recorder
from braeburn.train.progress import Display, duration
from braeburn.train.same_text import check_text, require_same_text
from braeburn.train.stages import (
    Program,
    abstract_params,
    abstract_state,
    compile_stage,
    initial_state,
    layout_of,
    stage_optimizer,
    started_state,
)
from braeburn.train.state import TrainState
from braeburn.train.step import Batch
from braeburn.train.teaching import (
    FindTeacher,
    Teacher,
    check_tokenizers,
    find_in_run,
    last_step,
    live_model,
    teacher_stores,
    teachers_of,
)
from braeburn.train.trained import require_same_model, require_same_tokenizer


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: steps made in all.
        finished: whether every stage is done.
        stages: a row for each finished stage: stage, step, tokens, loss (the mean of its last steps, in nats) and
            held_out (results by source).
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
        follow: a finished directory of the same run, with all checkpoints, and a step: its stages teach, and from
            there on each step is made from the state that it had.

    Raises:
        UserError: anything that the user can mend; what is on disk stays whole.
    """
    if not run.stages:
        raise UserError(f"stages of the run {run.name!r} is empty; add a stage to train")
    # Of all stages, so that a mesh that does not fit the last is found out before the first.
    layouts = {name: layout_of(run, name) for name in run.stages}
    teachers = teachers_of(run, follow[0] if follow else out, layouts, find_teacher)
    main, heartbeat = jax.process_index() == 0, Heartbeat()
    heartbeat.phase("preparing")
    directory = RunDirectory(out, writes=main)
    with ExitStack() as held, Display(run.total_steps, quiet=not main) as display, StopRequest() as stop:
        held.enter_context(explaining(directory.path))
        held.enter_context(noticing_loss())
        main_first("the run directory was claimed", lambda: held.enter_context(directory.claim()))
        resumed, tokenizer, faults = _resume_point(directory, run)
        start = initial_weights(run, directory.path, resumed, find_teacher)
        if start and tokenizer is None:
            tokenizer = start.tokenizer
        first = next(iter(run.stages))
        state_shape = abstract_state(run, first, layouts[first])
        checkpoint_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_shape))
        check_space(directory.path, checkpoint_bytes, "a checkpoint takes", "free some or choose another --out")
        for name, source in used_sources(run).items():
            files(name, source)  # before work begins that an exit would have to wait for
        wait_for_all("the run was checked")
        used, present = layouts[first].num_devices, len(jax.devices())
        if used < present:
            display.say(f"using {used} of {present} devices; --set mesh.fsdp=-1 uses all")
        for line in rounded_shares(run.stages):
            display.say(line)
        ahead = _Ahead(run, layouts, teachers, resumed, start)

        def begin() -> _Loop:
            # Other processes go on with the tokenizer of the main one, and its token stores where they share a cache.
            own = tokenizer if main else Tokenizer.load(directory.tokenizer)
            prepared = prepare(run, display.say, own, verified_for=str(directory.path.absolute()))
            check_text(run, directory, resumed or 0, prepared, display.say)
            require_same_text(prepared)
            check_tokenizers(run, teachers, prepared.tokenizer)
            loop = _Loop(run, directory, layouts, teachers, prepared, ahead, display, stop, heartbeat, follow)
            if main:
                _set_aside(directory, faults, resumed, display.say)
                # Nothing was written until here, where no mistake of the user's is left to be found.
                directory.write_config(run, origins or {})
                prepared.tokenizer.save_all(directory.path)
            return loop

        return main_first("text was prepared", begin).run_from(resumed, stop_after_steps)


class _Ahead:
    """What the first stage to run needs of the compiler, worked on in a thread while text is being tokenised."""

    def __init__(
        self,
        run: Run,
        layouts: dict[str, Layout],
        teachers: dict[str, Teacher],
        resumed: int | None,
        start: Teacher | None = None,
    ):
        """Begins the work.

        Args:
            run: the run.
            layouts: of its stages.
            teachers: of its stages that have one.
            resumed: the step to go on from; None to begin.
            start: holds the weights to begin with; None for random ones.
        """
        worker = ThreadPoolExecutor(1)
        self.programs: dict[str, Future[Program]] = {}
        if resumed != run.total_steps:
            name = run.stage_at(resumed or 0)[0]
            teacher = live_model(run, name, teachers)
            self.programs[name] = worker.submit(compile_stage, run, name, layouts[name], teacher)
        layout = layouts[next(iter(run.stages))]
        self.state = None
        if resumed is None and start:
            self.state = worker.submit(started_state, run, layout, start.read)
        elif resumed is None:
            self.state = worker.submit(initial_state, run, layout)
        worker.shutdown(wait=False)


def calibration(stage: Stage, batches: Batches, layout: Layout) -> Iterator[Batch]:
    """The first batches of a stage of pruning, on which it measures activations, placed."""
    tokens = stage.pruning.calibration_tokens if stage.pruning else 0
    for index in range(min(stage.steps, -(-tokens // stage.batch_tokens))):
        yield layout.place(batches[index], batches.rows, stage.batch_size)


def _resume_point(directory: RunDirectory, run: Run) -> tuple[int | None, Tokenizer | None, list[Fault]]:
    """Where `run` may go on here: from which step, with which tokenizer (Nones to begin), past which damage."""
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
    if not step and tokenizer and run.data.tokenizer and Tokenizer.load(run.data.tokenizer).hash != tokenizer.hash:
        raise UserError(
            f"data.tokenizer={run.data.tokenizer!r} is not the tokenizer of the run in {str(directory.path)!r}; "
            f"leave data.tokenizer unset to go on with that one, or choose another --out"
        )
    return step, tokenizer, faults


def _set_aside(directory: RunDirectory, faults: list[Fault], resumed: int | None, say: Callable[[str], None]) -> None:
    """Keeps damaged checkpoints under other names, since their steps are about to be made again; tells of each."""
    for fault in faults:
        kept = Checkpoints(directory.path).set_aside(fault)
        directory.event("damage", step=fault.step, reason=fault.reason, kept=kept.name, resumed=resumed)
        say(
            f"warning: checkpoint {fault.step} is damaged ({fault.reason}); it is kept as {str(kept)!r}, "
            f"and training goes on from step {resumed}"
        )


class _Stopped(Exception):
    """A request to stop came while a teacher was labelling text."""


@dataclass
class _Loop:
    """The parts of a run that its stages share."""

    run: Run
    directory: RunDirectory
    layouts: dict[str, Layout]
    teachers: dict[str, Teacher]
    prepared: Prepared
    ahead: _Ahead
    display: Display
    stop: StopRequest
    heartbeat: Heartbeat
    follow: tuple[Path, int] | None = None
    stopping: bool = False
    evaluates: tuple[Any, Any] = (None, None)

    def __post_init__(self) -> None:
        # Those of all stages, so that text too short for the last is found out before the first.
        stages, stores = self.run.stages, self.prepared.train
        self.batches = {
            name: Batches(stage, name, self.run.seed, stores, self.layouts[name].rows(stage.batch_size))
            for name, stage in stages.items()
        }
        self.any_process, self.models = AnyProcess(), self.run.models()

    def run_from(self, resumed: int | None, stop_after_steps: int | None) -> Outcome:
        """Runs stages until the run is finished or asked to stop."""
        # Stages that teach a later one do so as they ended.
        lasting = [
            last_step(self.run, stage.teacher) for stage in self.run.stages.values() if stage.teacher in self.models
        ]
        with closing(Checkpoints(self.directory.path, self.run.checkpoint, lasting)) as self.checkpoints:
            step = self._run_from(resumed, stop_after_steps)
        total = self.run.total_steps
        if self.stopping:
            self.directory.event("preemption", step=step, signal=self.stop.signal)
        else:
            self.directory.event("stop", step=step, finished=step == total)
        self.display.say(f"{'finished' if step == total else 'stopped'} at step {step} of {total}")
        return Outcome(step, step == total, self.directory.stage_results(step) if self.directory.writes else [])

    def _run_from(self, resumed: int | None, stop_after_steps: int | None) -> int:
        if self.ahead.state:
            facts = self._facts(next(iter(self.run.stages)))
            self.directory.event("start", total_steps=self.run.total_steps, **facts)
            state = self.ahead.state.result()
        else:
            state = self._restore(resumed or 0)
        step, total = int(state.step), self.run.total_steps
        last = total if stop_after_steps is None else min(step + stop_after_steps, total)
        self.directory.forget_after(step)
        with closing(MetricsWriter(self.directory.path, quiet=not self.directory.writes)) as writer:
            while step < last and not self.stopping:
                name, stage, index = self.run.stage_at(step)
                try:
                    program = self._compile(name)
                except _Stopped:
                    break
                self.display.begin_stage(name, stage.steps, index)
                recorder = Recorder(self.run, name, writer, self.display, self.layouts[name].num_devices)
                state = self._steps(program, recorder, state, index, min(stage.steps, index + last - step))
                step = int(state.step)
                if self._ends_stage(step):
                    with self.layouts[name].compiling():
                        state = leave(self.run, name, state, self.layouts[name])
                    self._end_stage(program, state, writer)
                self._save(state)
                if step < last and not self.stopping:
                    state = self._hand_over(state, name, self.run.stage_at(step)[0])
        return step

    def _hand_over(self, state: TrainState, before: str, after: str) -> TrainState:
        """The state laid out for the next stage: where its mesh is another, by way of the checkpoint just begun."""
        if self.layouts[before].sizes == self.layouts[after].sizes:
            return state
        self.checkpoints.wait()
        return self._read(int(state.step), after)

    def _restore(self, step: int) -> TrainState:
        name = self.run.stage_at(min(step, self.run.total_steps - 1))[0]
        state = self._read(step, name)
        self.directory.event("resume", step=step, **self._facts(name))
        self.display.say(f"resuming from step {step} of {self.run.total_steps}")
        return state

    def _followed(self, state: TrainState, name: str) -> TrainState:
        """The state that a run to be followed had after as many steps; without one, the run's own."""
        if not self.follow or int(state.step) < self.follow[1]:
            return state
        with closing(Checkpoints(self.follow[0])) as checkpoints:
            return self._read(int(state.step), name, checkpoints)

    def _read(self, step: int, name: str, checkpoints: Checkpoints | None = None) -> TrainState:
        """The checkpoint of a step, laid out for a stage."""
        self.heartbeat.phase("restoring")
        layout, models = self.layouts[name], self.models[name]
        if self._ends_stage(step) or step == 0:
            layout = of_model(layout, models.left if step == self.run.total_steps else models.found)
        shape = abstract_state(self.run, name, layout)
        checkpoints = checkpoints or self.checkpoints
        return checkpoints.restore(step, shape, stage_optimizer(self.run, name, layout.specs).init)

    def _facts(self, name: str) -> dict[str, Any]:
        return {"processes": jax.process_count(), "mesh": self.layouts[name].sizes.sizes}

    def _compile(self, name: str) -> Program:
        """The program of a stage, with what it needs beside the state: its evaluation, and what its teacher says."""
        self.heartbeat.phase("compiling")
        stage, layout, model = self.run.stages[name], self.layouts[name], live_model(self.run, name, self.teachers)
        begun = self.ahead.programs.get(name)
        program = begun.result() if begun else compile_stage(self.run, name, layout, model)
        if stage.teacher in self.models:
            self.checkpoints.wait()  # for the one that teaches, if that stage has just ended
        self.teaching = [self.teachers[name].read(abstract_params(of_model(layout, model)))] if model else []
        if stage.teacher and stage.distillation.cached:
            self._label(name)
        use = use_of(self.run, name)
        self.use = jax.jit(use) if use else lambda params, step: params
        self.directory.event("compile", stage=name, seconds=round(program.compile_seconds, 3))
        self.display.say(f"stage {name}: compiled in {duration(program.compile_seconds)}")
        return program

    def _label(self, name: str) -> None:
        """Has the stage's batches hold what its teacher says of them."""

        def proceed() -> None:
            self.heartbeat.phase("labelling")
            if self.any_process.wants(self.stop.signal is not None):
                self.stopping = True
                raise _Stopped

        layout, stage, prepared = self.layouts[name], self.run.stages[name], self.prepared
        stores = teacher_stores(self.run, name, layout, self.teachers[name], prepared, self.display.say, proceed)
        rows = layout.rows(stage.batch_size)
        self.batches[name] = Batches(stage, name, self.run.seed, prepared.train, rows, stores)

    def _steps(self, program: Program, recorder: Recorder, state: TrainState, index: int, until: int) -> TrainState:
        """Makes the steps index..until of a stage. Metrics are read once the next step is on its way."""
        batches, layout = self.batches[program.name], self.layouts[program.name]
        if index == 0:
            state = self._followed(state, program.name)
            with layout.compiling():
                state = enter(self.run, program.name, state, layout, calibration(program.stage, batches, layout))
            state = state._replace(optimizer=begin_stage(state.optimizer))
        stream = prefetch(batches, index, self.run.data.workers, self.run.data.prefetch)
        step = int(state.step)
        for at in range(index, until):
            state = self._followed(state, program.name) if at else state
            began = time.monotonic()
            batch = layout.place(next(stream), batches.rows, program.stage.batch_size)
            waited = time.monotonic() - began
            state, metrics = program.step(state, batch, *self.teaching)
            step += 1
            recorder.observe(step, metrics, waited)
            self.heartbeat.step(step)
            if self.any_process.wants(self.stop.signal is not None):
                self.stopping = True
                break
            if not self._ends_stage(step):
                if self.run.evaluation.every_steps and step % self.run.evaluation.every_steps == 0:
                    with layout.compiling():
                        params = self.use(state.params, state.optimizer.stage_steps)
                    results = self._evaluate(program, params, self.models[program.name].trained)
                    recorder.writer.held_out(step, results)
                    self.directory.event("evaluation", stage=program.name, step=step, held_out=results)
                if step % self.run.checkpoint.every_steps == 0:
                    self._save(state)
        recorder.flush()
        return state

    def _ends_stage(self, step: int) -> bool:
        return step == self.run.total_steps or self.run.stage_at(step)[2] == 0

    def _save(self, state: TrainState) -> None:
        step = int(state.step)
        self.heartbeat.phase("saving")
        self.directory.require_present()
        facts = {"text": self.prepared.fingerprints}
        if self.checkpoints.save(step, state, self.run, self.prepared.tokenizer.to_json(), facts):
            self.directory.event("checkpoint", step=step)

    def _evaluate(self, program: Program, params: Tree, model: Model) -> dict[str, dict[str, float]]:
        self.heartbeat.phase("evaluating")
        stage, layout = program.stage, of_model(self.layouts[program.name], model)
        evaluate = self._evaluator(model, layout)
        sequences = max(1, stage.batch_size // stage.accumulation_steps)
        results = {}
        for source, store in self.prepared.held_out.items():
            if store is not None and stage.mixture.get(source):
                batches = held_out_batches(store, stage.sequence_length, sequences, self.run.evaluation.tokens)
                placed = (layout.place(batch, range(sequences), sequences) for batch in batches)
                results[source] = measure(evaluate, params, placed, store.byte_ratio)
        return results

    def _evaluator(self, model: Model, layout: Layout) -> Evaluate:
        """That of a model on a layout; the last is kept, for a stage to be evaluated often."""
        if self.evaluates[0] != (model, layout.sizes):
            evaluate = evaluator(model, self.run.precision, self.prepared.tokenizer.token_bytes, layout)
            self.evaluates = (model, layout.sizes), evaluate
        return self.evaluates[1]

    def _end_stage(self, program: Program, state: TrainState, writer: MetricsWriter) -> None:
        results = self._evaluate(program, state.params, self.models[program.name].left)
        step = int(state.step)
        writer.held_out(step, results)
        self.directory.event(
            "stage_end",
            stage=program.name,
            step=step,
            tokens=program.stage.steps * program.stage.batch_tokens,
            loss=self.directory.recent_loss(program.name) if self.directory.writes else None,
            held_out=results,
        )
        for source, values in results.items():
            self.display.say(
                f"stage {program.name}: held-out {source} loss {values['loss']:.4f}, "
                f"{values['bits_per_byte']:.4f} bits per byte"
            )
