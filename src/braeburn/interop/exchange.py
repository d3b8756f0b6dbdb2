"""Run directories to and from the files of other software."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from braeburn.config import ModelConfig, Precision, Run, WeightType
from braeburn.data.tokenizer import Tokenizer
from braeburn.disk import check_new
from braeburn.errors import UserError
from braeburn.interop import gguf, huggingface, stablehlo
from braeburn.models.huggingface_config import is_huggingface
from braeburn.parallel.agreement import main_first
from braeburn.parallel.processes import is_main
from braeburn.train.state import TrainState
from braeburn.train.stored import placed_pieces
from braeburn.train.teaching import Teacher, files_identity, find_in_run
from braeburn.train.trained import found_run, open_stored

# What other software is told of an import that tells of no length: no model of these families was
# made for less.
DEFAULT_POSITIONS = 4096


def export_huggingface(directory: Path, out: Path, dtype: WeightType = "float32") -> int:
    """Writes the newest checkpoint of a run directory as a Hugging Face directory; returns its
    step.

    Args:
        directory: the run.
        out: the folder to make.
        dtype: of all weights.

    Raises:
        UserError: there is no whole checkpoint, or `out` is in use.
    """
    trained = open_stored(directory)
    huggingface.write(
        out,
        trained.params,
        trained.model,
        trained.tokenizer,
        huggingface.Files(trained.sequence_length or DEFAULT_POSITIONS, dtype),
    )
    return trained.step


def export_gguf(directory: Path, out: Path, type_: gguf.Type) -> tuple[int, Path, list[str]]:
    """Writes the newest checkpoint of a run directory as one GGUF file.

    Args:
        directory: the run.
        out: the file, where its name ends in `.gguf`, or else a folder to hold `NAME-TYPE.gguf`.
        type_: of matrices and embeddings.

    Returns:
        The checkpoint's step; the file; the parameters that are float16 though `type_` is another.

    Raises:
        UserError: there is no whole checkpoint, the file exists or cannot be written, or llama.cpp
            has no such model or tokenizer.
    """
    trained = open_stored(directory)
    path = out if out.suffix == ".gguf" else out / f"{trained.run.name}-{type_}.gguf"
    file = gguf.File(trained.sequence_length or DEFAULT_POSITIONS, type_, trained.run.name)
    uneven: list[str] = []

    def write() -> None:
        if is_main():  # the one file is written by one process
            uneven.extend(gguf.write(path, trained.params, trained.model, trained.tokenizer, file))

    main_first(f"{path} was written", write)
    return trained.step, path, uneven


def export_stablehlo(
    directory: Path, out: Path, platforms: Sequence[str], dtype: WeightType | None = None
) -> dict[str, Any]:
    """Writes the newest checkpoint of a run directory as programs that plain JAX runs.

    Args:
        directory: the run.
        out: the folder to make.
        platforms: that the programs are for, by JAX's names.
        dtype: of matrices and of what is computed; None for what the run computes in.

    Returns:
        What `program.json` in the folder tells.

    Raises:
        UserError: there is no whole checkpoint, `out` is in use, or a program would not run on all
            of the platforms.
    """
    trained = open_stored(directory)
    compute = dtype or trained.run.precision.compute
    return main_first(
        f"{out} was written",
        lambda: stablehlo.write(out, trained, platforms, compute) if is_main() else {},
    )


def import_huggingface(source: Path, out: Path, dtype: WeightType | None = None) -> Run:
    """Makes a run directory whose checkpoint 0 holds the weights of a Hugging Face directory.

    It has no stages: it can be evaluated, sampled and exported, and a recipe of the same model
    trains on from it. Weights are copied one layer after the other, and never lie in memory whole;
    of several processes, each copies its share.

    Args:
        source: the Hugging Face directory.
        out: the folder to make; several processes must all see it.
        dtype: that weights other than norms are stored in; by default bfloat16 where the source has
            them so, and float32 otherwise.

    Raises:
        UserError: the directory holds no model of a family that Braeburn has, or `out` is in
            use.
    """
    check_new(out)
    model, params, tokenizer_file = huggingface.open_weights(source, dtype)
    tokenizer = _tokenizer_of(model, tokenizer_file)
    run = Run(name=_name_of(source), model=model, stages={}, precision=Precision(compute="float32"))
    found_run(out, run, TrainState(np.int32(0), params, None), tokenizer, "import", source)
    return run


def _name_of(folder: Path) -> str:
    """A name for a run, after a folder."""
    name = re.sub(r"[^\w.,+=@()\[\]-]", "-", folder.absolute().name).lstrip(".,+=@()[]-")
    return name[:100] or "imported"


def find_teacher(path: Path) -> Teacher:
    """The teacher that a Hugging Face directory holds, or a run directory or one of its
    checkpoints.

    Raises:
        UserError: it is none of these, or of no family that Braeburn has, or it cannot be
            read.
    """
    if not is_huggingface(path):
        return find_in_run(path)
    model, tokenizer_file = huggingface.describe(path)
    return Teacher(
        model=model,
        tokenizer=_tokenizer_of(model, tokenizer_file),
        identity=lambda: files_identity(path),
        read=lambda params: jax.tree.map(placed_pieces, huggingface.open_weights(path)[1], params),
    )


def _tokenizer_of(model: ModelConfig, path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, once it is sure that the model has a row for each
    token.
    """
    tokenizer = Tokenizer.load(path, "restore the tokenizer files that belong to the model")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{str(path)!r} has {tokenizer.vocab_size} entries but the model only "
            f"{model.vocab_size} rows; "
            f"restore the tokenizer.json that belongs to {str(path.parent)!r}"
        )
    return tokenizer
