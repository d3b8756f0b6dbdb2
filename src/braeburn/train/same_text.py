"""The checks that a run goes on with the text that it was begun with, the same in all its
processes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from braeburn.config import Run
from braeburn.data.prepare import Prepared
from braeburn.errors import UserError
from braeburn.parallel.agreement import said_by_main
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.directory import RunDirectory


def saved_text(directory: RunDirectory, step: int) -> Any:
    """What a checkpoint tells of the text that it was trained on; None where there is none to tell.

    To be called in every process of a run: those of one run read a checkpoint together.
    """
    return Checkpoints(directory.path).facts(step).get("text") if step else None


def check_text(
    run: Run,
    directory: RunDirectory,
    step: int,
    saved: Any,
    prepared: Prepared,
    say: Callable[[str], None],
) -> None:
    """Refuses text other than that of the checkpoint to go on from, if a stage that has begun draws
    from it.

    On other text the same steps would see other sequences: some twice, some never, without a word.
    Text that only stages to come draw from may change.

    Args:
        run: the run.
        directory: its folder.
        step: of the checkpoint.
        saved: what `saved_text` gives for it.
        prepared: the text as it is now.
        say: takes a line where a change is accepted.

    Raises:
        UserError: naming the source and what accepts the change.
    """
    if step in (0, run.total_steps):
        return
    if not isinstance(saved, Mapping):
        say(
            f"checkpoint {step} does not tell on which text it was trained; going on with the "
            f"text as it is now"
        )
        return
    mixtures = [run.stages[stage].mixture for stage in run.begun_by(step)]
    drawn = {name for mixture in mixtures for name, weight in mixture.items() if weight > 0}
    changed = {name: prepared.fingerprints[name] for name in sorted(drawn) if name in saved}
    changed = {name: now for name, now in changed.items() if now != saved[name]}
    if not changed:
        return
    fingerprint = hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:12]
    if run.data.accept != fingerprint:
        raise UserError(
            f"the text of data.sources.{' and '.join(changed)} has changed since checkpoint {step} "
            f"of {str(directory.path)!r}, so that the steps to come would see other sequences; put "
            f"the files back, or go on with the text as it is now by --set "
            f"data.accept={fingerprint}"
        )
    details = {name: {"before": saved[name], "now": now} for name, now in changed.items()}
    directory.event("text_changed", step=step, accepted=fingerprint, sources=details)
    say(
        f"going on from step {step} with changed text of {' and '.join(changed)}, as data.accept "
        f"says"
    )


def require_same_text(prepared: Prepared) -> None:
    """Refuses to train where the processes of a run have different text, each from its own disk.

    Raises:
        UserError: naming the sources, in the process that differs from the main one.
    """
    of_main = json.loads(said_by_main("the text of the run", json.dumps(prepared.fingerprints)))
    different = [name for name, own in prepared.fingerprints.items() if own != of_main.get(name)]
    if different:
        raise UserError(
            f"process {jax.process_index()} reads other text than process 0 in "
            f"data.sources.{' and '.join(different)}; "
            f"give all machines the same files, or one that they share"
        )
