"""Held-out evaluation within a stage and at its end, and what is told of it."""

import jax

from braeburn import background
from braeburn.data.prepare import Prepared
from braeburn.layers.spec import Tree
from braeburn.parallel.agreement import said_by_main
from braeburn.train.guard import check_share_of_skips
from braeburn.train.held_out import HeldOut
from braeburn.train.metrics import MetricsWriter
from braeburn.train.resolved import ResolvedStage
from braeburn.train.saving import Saver
from braeburn.train.session import Session
from braeburn.train.stage_run import StageRun
from braeburn.train.state import TrainState


class Evaluations:
    """Evaluates when it is time, once for each time, whichever calls make the steps.

    Attributes:
        writer: takes the results, and the rows of steps.
    """

    def __init__(self, session: Session, prepared: Prepared, saver: Saver, writer: MetricsWriter):
        """Takes the held-out text.

        Args:
            session: the call.
            prepared: the text.
            saver: has the parameters that an earlier call's last stage left.
            writer: takes the results.
        """
        self._session = session
        self._saver = saver
        self.writer = writer
        tokens = session.run.evaluation.tokens
        self._held_out = HeldOut(prepared, tokens, session.agreement.check)

    def due(self, step: int) -> bool:
        """Whether there is an evaluation within the stage after `step` steps."""
        every = self._session.run.evaluation.every_steps
        return every is not None and step % every == 0

    def within(self, stage: StageRun, state: TrainState) -> None:
        """Evaluates in the middle of a stage.

        Raises:
            Interrupted: a stop came first.
        """
        resolved, step = stage.resolved, int(state.step)

        def evaluated() -> dict[str, dict[str, float]]:
            with resolved.layout.compiling():
                params = stage.effective(state.params, state.optimizer.stage_steps)
            self._session.heartbeat.phase("evaluating")
            return self._held_out.results(resolved, params, resolved.models.trained)

        # Steps are not saved: several processes only stop where they agree to, between batches.
        alone = jax.process_count() == 1
        proceed = self._session.stop.check if alone else background.nothing_to_ask
        results = background.run(evaluated, "evaluating", proceed)
        self.writer.held_out(step, results)
        directory = self._session.directory
        directory.event("evaluation", stage=resolved.name, step=step, held_out=results)

    def make_up_within(self, stage: StageRun, state: TrainState) -> None:
        """Evaluates within a stage after the last step saved, where the call that made it was
        stopped before that.

        Raises:
            Interrupted: a stop came first.
        """
        step = int(state.step)
        if not self.due(step):
            return
        evaluated = [event["step"] for event in self._session.directory.events("evaluation")]
        if not _main_says("whether the last step was evaluated", step in evaluated):
            self.within(stage, state)

    def end(self, resolved: ResolvedStage, params: Tree, skipped: int) -> None:
        """Evaluates what a stage has left, and tells of its end; the step that ended it is saved by
        then.

        Args:
            resolved: the stage.
            params: of the model that it has left.
            skipped: of its steps.

        Raises:
            Interrupted: a stop was asked for.
            UserError: too many of its steps were skipped.
        """
        self._session.unsaving(lambda: self._end(resolved, params, skipped), "evaluating")

    def _end(self, resolved: ResolvedStage, params: Tree, skipped: int) -> None:
        name, stage, directory = resolved.name, resolved.stage, self._session.directory
        self._session.heartbeat.phase("evaluating")
        results = self._held_out.results(resolved, params, resolved.models.left)
        directory.event(
            "stage_end",
            stage=name,
            step=resolved.last_step,
            tokens=stage.steps * stage.batch_tokens,
            loss=directory.recent_loss(name) if directory.writes else None,
            held_out=results,
            skipped=skipped,
        )
        self.writer.held_out(resolved.last_step, results)
        for source, values in results.items():
            self._session.display.say(
                f"stage {name}: held-out {source} loss {values['loss']:.4f}, "
                f"{values['bits_per_byte']:.4f} bits per byte"
            )
        check_share_of_skips(resolved.run, name, skipped)

    def make_up_end(self, state: TrainState) -> None:
        """Ends the stage whose last step was the last saved, where the call that made it was
        stopped before that.

        Args:
            state: as it was saved.

        Raises:
            Interrupted: a stop was asked for.
            UserError: too many of the stage's steps were skipped.
        """
        session, step = self._session, int(state.step)
        if step == 0 or not session.ends_stage(step):
            return
        resolved = session.stage_at(step - 1)
        skipped = resolved.stage.steps - int(state.optimizer.stage_steps)
        ends = [end["step"] for end in session.directory.stage_results(step)]
        if _main_says("whether the stage was ended", step in ends):
            check_share_of_skips(resolved.run, resolved.name, skipped)
            return
        session.unsaving(
            lambda: self._end(resolved, self._saver.left(resolved), skipped), "evaluating"
        )


def _main_says(name: str, answer: bool) -> bool:
    """The answer of the main process, which has the run's files, in every process."""
    return said_by_main(name, str(answer)) == str(True)
