"""Run directories to and from Hugging Face directories."""

import shutil
from pathlib import Path

import numpy as np

from braeburn.config import Checkpoint, Precision, Run, flatten
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.interop import huggingface
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.directory import RunDirectory
from braeburn.train.state import TrainState
from braeburn.train.trained import load

# What transformers is told of an import that was not trained here: no model of these families was made for less.
DEFAULT_POSITIONS = 4096


def export_huggingface(directory: Path, out: Path) -> int:
    """Writes the newest checkpoint of a run directory as a Hugging Face directory; returns its step.

    Raises:
        UserError: there is no whole checkpoint, or `out` is in use.
    """
    trained = load(directory)
    huggingface.write(
        out,
        trained.params,
        trained.model,
        trained.tokenizer,
        max_position_embeddings=trained.sequence_length or DEFAULT_POSITIONS,
    )
    return trained.step


def import_huggingface(source: Path, out: Path) -> Run:
    """Makes a run directory whose checkpoint 0 holds the weights of a Hugging Face directory.

    It has no stages: it can be evaluated, sampled and exported, and a recipe of the same model trains on from it.

    Raises:
        UserError: the directory holds no dense Llama or Qwen3 model, or `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {str(out)!r} is in use; choose a new or empty folder")
    model, params, tokenizer_path = huggingface.read(source)
    tokenizer = Tokenizer.load(tokenizer_path)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{str(tokenizer_path)!r} has {tokenizer.vocab_size} entries but the model only {model.vocab_size} rows; "
            f"restore the tokenizer.json that belongs to {str(source)!r}"
        )
    run = Run(name=source.absolute().name, model=model, stages={}, precision=Precision(compute="float32"))
    # Built beside its place and renamed, so that an interrupted import leaves nothing that looks whole.
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        directory = RunDirectory(partial)
        tokenizer.save(directory.tokenizer)
        checkpoints = Checkpoints(partial, Checkpoint())
        checkpoints.save(0, TrainState(np.int32(0), params, None), run, tokenizer.json)
        checkpoints.close()
        directory.write_config(run, {path: "import" for path, _ in flatten(run.model_dump())})
        directory.event("import", source=str(source))
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return run
