"""The curve of a run whose steps are each made from the state that another run had.

Runs that are equal but for rounding errors part where a weight lies half-way between two levels.
Step by step from the same states they can still be compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from braeburn.background import nothing_to_ask
from braeburn.config import Run
from braeburn.data.prepare import Prepared, prepare
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.held_out import HeldOut
from braeburn.train.resolved import ResolvedStage, resolve_stages
from braeburn.train.saving import read_state
from braeburn.train.stage_run import StageRun, batches_of, equip
from braeburn.train.stages import abstract_state, compile_stage, initial_state, shardings_of
from braeburn.train.state import TrainState
from braeburn.train.teaching import Teacher, cached_labels, find_in_run, teachers_of, with_teachers
from braeburn.train.transitions import leaving

# Values by what they are, in order: figures of each step, held-out losses at last.
Curve = list[tuple[str, float]]


def followed_curve(run: Run, reference: Path, start: int, figures: Sequence[str]) -> Curve:
    """The figures of each step of a run, and the held-out loss after each of its stages.

    Args:
        run: with the stages of the reference, on other meshes.
        reference: the directory of a finished run with a checkpoint of every step. Teachers are
            read from it.
        start: steps made when the reference's states begin to be followed; before, each step goes
            on from the run's own.
        figures: metrics of a step.
    """
    stages = resolve_stages(run)
    teachers = teachers_of(stages, reference, find_in_run)
    stages = with_teachers(stages, teachers)
    prepared = prepare(run, lambda line: None)
    held_out = HeldOut(prepared, run.evaluation.tokens)
    state = initial_state(next(iter(stages.values())))
    curve: Curve = []
    ends: Curve = []
    with closing(Checkpoints(reference)) as checkpoints:
        for name, resolved in stages.items():
            stage = _equipped(resolved, teachers.get(name), prepared)
            found = abstract_state(resolved, resolved.layout_of(resolved.models.found))
            state = jax.device_put(state, shardings_of(found))
            for step in range(resolved.first_step, resolved.last_step):
                if step >= start:
                    state = read_state(checkpoints, resolved, step)
                state, metrics = _step(stage, state, step)
                for figure in figures:
                    curve.append((f"step {step + 1} {figure}", float(metrics[figure])))
            state = leaving(resolved)(state)
            ends += _held_out(held_out, resolved, state)
    return curve + ends


def _equipped(resolved: ResolvedStage, teacher: Teacher | None, prepared: Prepared) -> StageRun:
    """A stage ready to make steps, with the labels of a cached teacher."""
    labels = None
    if teacher and resolved.stage.distillation.cached:
        labels = cached_labels(resolved, teacher, prepared, lambda line: None, nothing_to_ask)
    batches = batches_of(resolved, prepared.train, labels)
    return equip(compile_stage(resolved), batches, teacher)


def _step(stage: StageRun, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """A step of the run from the state that it finds."""
    index = step - stage.resolved.first_step
    if index == 0:
        state = stage.enter(state)
    return stage.step(state, stage.place(stage.batches[index]))


def _held_out(
    held_out: HeldOut, resolved: ResolvedStage, state: TrainState
) -> Iterator[tuple[str, float]]:
    results = held_out.results(resolved, state.params, resolved.models.left)
    for source, result in results.items():
        yield f"held-out {source} after step {resolved.last_step}", result["loss"]
