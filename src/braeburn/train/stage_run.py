"""A stage at work: its program, with all that a step needs beside the state."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from braeburn.config import Stage
from braeburn.data.loader import Batches
from braeburn.data.packing import Batch
from braeburn.data.teacher_labels import TeacherLabels
from braeburn.data.token_shards import TokenShards
from braeburn.layers.spec import Tree
from braeburn.optim.guard import begin_stage
from braeburn.parallel.layout import Layout
from braeburn.train.progress import Display
from braeburn.train.resolved import ResolvedStage
from braeburn.train.stages import Program, abstract_params
from braeburn.train.state import TrainState
from braeburn.train.teaching import Teacher
from braeburn.train.transitions import enter


@dataclass(frozen=True)
class StageRun:
    """A stage ready to make steps.

    Attributes:
        program: the compiled step.
        batches: of the stage, with a teacher's cached labels where there are any.
        teaching: the weights of an online teacher, or nothing.
        effective: (parameters, steps of the stage) -> the effective weights, which are evaluated.
    """

    program: Program
    batches: Batches
    teaching: tuple[Tree, ...]
    effective: Callable[[Tree, Any], Tree]

    @property
    def resolved(self) -> ResolvedStage:
        """The stage."""
        return self.program.stage

    def enter(self, state: TrainState, display: Display | None = None) -> TrainState:
        """The state that the stage's first step is made from, from the one that the stage finds.

        Args:
            state: that the stage finds.
            display: shows how far the transform has come with its measuring, where it measures.
        """
        stage, layout = self.resolved.stage, self.resolved.layout
        first = calibration(stage, self.batches, layout)
        if display:
            first = display.tracked(first, "measuring activations", calibration_steps(stage))
        with layout.compiling():
            state = enter(self.resolved, state, first)
        return state._replace(optimizer=begin_stage(state.optimizer))

    def place(self, batch: Batch) -> Batch:
        """A batch as it was read, on the devices."""
        size = self.resolved.stage.batch_size
        return self.resolved.layout.of_step.place(batch, self.batches.rows, size)

    def step(self, state: TrainState, placed: Batch) -> tuple[TrainState, dict[str, Any]]:
        """Dispatches a step. The state passed to it is given up.

        Returns:
            The next state and the step's metrics, which may still be at work.
        """
        return self.program.step(state, placed, *self.teaching)


def equip(program: Program, batches: Batches, teacher: Teacher | None) -> StageRun:
    """A stage ready to make steps; the weights of an online teacher are read here.

    Args:
        program: the compiled step.
        batches: of the stage.
        teacher: that of the stage, if it has one.
    """
    resolved = program.stage
    teaching: tuple[Tree, ...] = ()
    if resolved.teacher is not None:
        assert teacher is not None
        teaching = (teacher.read(abstract_params(resolved.layout_of(resolved.teacher))),)
    effective = resolved.transform.effective
    return StageRun(program, batches, teaching, jax.jit(effective) if effective else _as_stored)


def _as_stored(params: Tree, steps: Any) -> Tree:
    return params


def batches_of(
    resolved: ResolvedStage,
    shards: Mapping[str, TokenShards],
    labels: Mapping[str, TeacherLabels] | None = None,
) -> Batches:
    """The rows of a stage's batches that this process reads.

    Args:
        resolved: the stage.
        shards: tokens of each source.
        labels: the labels of the stage's teacher for each source, where they are cached.

    Raises:
        UserError: a source has fewer tokens than one sequence.
    """
    rows = resolved.layout.of_step.rows(resolved.stage.batch_size)
    return Batches(resolved.stage, resolved.name, resolved.run.seed, shards, rows, labels)


def calibration_steps(stage: Stage) -> int:
    """How many batches `calibration` gives."""
    tokens = max((config.measured_tokens for config in stage.transforms.values()), default=0)
    return min(stage.steps, -(-tokens // stage.batch_tokens))


def calibration(stage: Stage, batches: Batches, layout: Layout) -> Iterator[Batch]:
    """The first batches of a stage, placed: those that its transform measures activations on."""
    for index in range(calibration_steps(stage)):
        yield layout.of_step.place(batches[index], batches.rows, stage.batch_size)
