"""What a run directory holds for use after training."""

from dataclasses import dataclass
from pathlib import Path

from braeburn.config import Model, Run, read_run
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.model import transformer
from braeburn.model.spec import Tree, abstract
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.stages import model_at


@dataclass(frozen=True)
class Trained:
    """The newest checkpoint of a run, ready to use.

    Attributes:
        run: the run that made it.
        step: steps made by then.
        model: the model as the stage of that step trained it, RoPE base included.
        params: float32 parameters.
        tokenizer: the tokenizer that it was trained with.
        sequence_length: of the longest sequences that it was trained on; 0 for an import that was not trained here.
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
    params = checkpoints.restore_params(step, abstract(transformer.param_specs(model)))
    _, saved_tokenizer = checkpoints.restore_run(step)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    require_same_tokenizer(tokenizer, Tokenizer.from_json(saved_tokenizer), directory / "tokenizer.json", step)
    return Trained(run, step, model, params, tokenizer, sequence_length)


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
