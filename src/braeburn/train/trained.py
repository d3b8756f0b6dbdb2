"""What a run directory holds for use after training."""

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from braeburn.config import Checkpoint, Model, Run, flatten, read_run
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.tokenizer_settings import TOKENIZER_CONFIG
from braeburn.errors import UserError
from braeburn.model import transformer
from braeburn.model.spec import Tree, abstract
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.compression import trained_specs, use_of
from braeburn.train.directory import RunDirectory
from braeburn.train.stages import model_at
from braeburn.train.state import TrainState


@dataclass(frozen=True)
class Trained:
    """The newest checkpoint of a run, ready to use.

    Attributes:
        run: the run that made it.
        step: steps made by then.
        model: the model as the stage of that step trained it, RoPE base included.
        params: float32 parameters.
        tokenizer: the tokenizer that it was trained with.
        sequence_length: of the longest sequences that it was trained on, here or elsewhere; 0 where unknown.
    """

    run: Run
    step: int
    model: Model
    params: Tree
    tokenizer: Tokenizer
    sequence_length: int


def load(directory: Path) -> Trained:
    """Reads the newest checkpoint of a run directory.

    Raises:
        UserError: the folder holds no run or no whole checkpoint, or its tokenizer is not the checkpoint's.
    """
    run = read_run(directory)
    checkpoints = Checkpoints(directory)
    step = checkpoints.newest()
    if step is None:
        raise UserError(f"{str(directory)!r} holds no complete checkpoint; train for at least one checkpoint first")
    model, sequence_length = model_at(run, step)
    params = _params(run, step, checkpoints)
    _, saved_tokenizer = checkpoints.restore_run(step)
    saved = Tokenizer.from_json(saved_tokenizer)
    tokenizer = read_tokenizer(directory)
    require_same_tokenizer(tokenizer, saved, directory / "tokenizer.json", step)
    if not (directory / TOKENIZER_CONFIG).exists():  # as in run directories of earlier versions
        tokenizer = saved
    return Trained(run, step, model, params, tokenizer, sequence_length)


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a run directory.

    Raises:
        UserError: its files are missing or unsound.
    """
    return Tokenizer.load(directory / "tokenizer.json", "put the run's own tokenizer.json back")


def _params(run: Run, step: int, checkpoints: Checkpoints) -> Tree:
    """Those of a checkpoint; of one from the middle of a stage, as the stage uses them."""
    if step < run.total_steps:
        name, _, index = run.stage_at(step)
        use = use_of(run, name) if index else None
        if use:
            return use(checkpoints.restore_params(step, abstract(trained_specs(run, name))), index)
    return checkpoints.restore_params(step, abstract(transformer.param_specs(model_at(run, step)[0])))


def require_same_tokenizer(present: Tokenizer, saved: Tokenizer, path: Path, step: int) -> None:
    """Refuses a tokenizer other than the one that a checkpoint was trained with.

    Raises:
        UserError: naming the file and the checkpoint.
    """
    if present.hash != saved.hash:
        raise UserError(
            f"the tokenizer {str(path)!r} is not the one that checkpoint {step} was trained with; "
            f"put that run's own tokenizer.json back"
        )


def ordinary_step(run: Run, directory: Path, step: int | None = None) -> int:
    """A checkpoint's step, the newest by default, if it holds a model as it is between stages or while one trains it.

    Raises:
        UserError: there is none, or it was made in the middle of a stage that cuts or rounds at its end.
    """
    step = Checkpoints(directory).newest() if step is None else step
    if step is None or not (directory / "checkpoints" / str(step)).is_dir():
        raise UserError(f"{str(directory)!r} holds no complete checkpoint; train for at least one checkpoint first")
    if step < run.total_steps:
        name, _, index = run.stage_at(step)
        if index and use_of(run, name):
            raise UserError(
                f"checkpoint {step} of {str(directory)!r} is from the middle of the stage {name!r}, which cuts or "
                f"rounds weights at its end; train that stage to its end, or name an earlier checkpoint"
            )
    return step


def found_run(out: Path, run: Run, state: TrainState, tokenizer: Tokenizer, origin: str, source: Path) -> None:
    """Makes a run directory whose checkpoint 0 holds a state.

    It is built beside its place and renamed, so that an interrupted call leaves nothing that looks whole.

    Args:
        out: the folder, new or empty.
        run: to be told by its `config.json`.
        state: parameters, and the optimizer's state or None.
        tokenizer: of the run.
        origin: of the run's values, and the kind of the event that tells of the making.
        source: the folder that it was made from.
    """
    # A name that nothing else has: what lies beside `out` is not this call's to remove.
    partial = out.absolute().with_name(f".{out.absolute().name}.partial-{uuid.uuid4().hex}")
    try:
        directory = RunDirectory(partial)
        tokenizer.save_all(partial)
        checkpoints = Checkpoints(partial, Checkpoint())
        checkpoints.save(0, state, run, tokenizer.to_json())
        checkpoints.close()
        directory.write_config(run, {path: origin for path, _ in flatten(run.model_dump())})
        directory.event(origin, source=str(source))
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
