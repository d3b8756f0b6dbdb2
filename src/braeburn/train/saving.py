"""The states of a run in its checkpoints."""

from typing import Any

import jax

from braeburn.data.prepare import Prepared
from braeburn.layers.spec import Tree
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.resolved import ResolvedStage
from braeburn.train.session import Session
from braeburn.train.stages import abstract_params, abstract_state
from braeburn.train.state import TrainState


def read_state(checkpoints: Checkpoints, resolved: ResolvedStage, step: int) -> TrainState:
    """The state of a checkpoint, laid out for a stage: as the stage finds, trains or leaves it.

    Args:
        checkpoints: of the run.
        resolved: the stage.
        step: from the stage's first to its last.
    """
    layout = resolved.layout
    if step == resolved.last_step:
        layout = resolved.layout_of(resolved.models.left)
    elif step == resolved.first_step:
        layout = resolved.layout_of(resolved.models.found)
    init = resolved.optimizer_of(layout.specs).init
    return checkpoints.restore(step, abstract_state(resolved, layout), init)


class Saver:
    """Writes the states of a run, and reads them back."""

    def __init__(self, session: Session, prepared: Prepared):
        """Opens the run's checkpoints for writing.

        Args:
            session: the call.
            prepared: the text, which checkpoints tell of.
        """
        self._session = session
        self._prepared = prepared
        stages = session.stages
        # A stage that is the teacher of a later one is read as it ended, so that checkpoint stays.
        teachers = [stage.stage.teacher for stage in stages.values()]
        lasting = [stages[name].last_step for name in teachers if name in stages]
        run = session.run
        self._checkpoints = Checkpoints(session.directory.path, run.checkpoint, lasting)

    def save(self, state: TrainState) -> None:
        """Begins to write a state, unless its step is saved."""
        session, prepared, step = self._session, self._prepared, int(state.step)
        session.heartbeat.phase("saving")
        session.directory.require_present()
        if session.remote:
            session.remote.check()
        facts: dict[str, Any] = {"text": prepared.fingerprints}
        tokenizer = prepared.tokenizer.to_json()
        if self._checkpoints.save(step, state, session.run, tokenizer, facts):
            session.directory.event("checkpoint", step=step)

    def wait(self) -> None:
        """Waits until what was begun is written."""
        self._checkpoints.wait()

    def resume(self, step: int) -> TrainState:
        """The state to go on from; tells of it."""
        session, stage = self._session, self._session.stage_at(step)
        state = self.read(stage, step)
        session.directory.event("resume", step=step, **facts_of(stage))
        total = session.run.total_steps
        # Checkpoint 0 is of no earlier call: an import or a pruned model begins with one.
        session.display.say(
            f"resuming from step {step} of {total}"
            if step
            else f"beginning from the weights of checkpoint 0, with {total} steps to make"
        )
        return state

    def read(self, resolved: ResolvedStage, step: int) -> TrainState:
        """The state of a step, laid out for a stage."""
        self._session.heartbeat.phase("restoring")
        return read_state(self._checkpoints, resolved, step)

    def left(self, resolved: ResolvedStage) -> Tree:
        """The parameters that a stage has left."""
        wanted = abstract_params(resolved.layout_of(resolved.models.left))
        return self._checkpoints.restore_params(resolved.last_step, wanted)

    def close(self) -> None:
        """Waits until all is written."""
        self._checkpoints.close()


def facts_of(resolved: ResolvedStage) -> dict[str, Any]:
    """On what a stage runs, for the events that tell of it."""
    return {"processes": jax.process_count(), "mesh": resolved.layout.sizes.sizes}
