"""The recipes of `make demo-real`: a pruned model learns from the model it was cut from, and is
then trained with the weights that a Q4_0 file holds.

    REAL=runs/real braeburn train benchmarks/real_recipe.py:distilled --out runs/real/distilled

The environment variable `REAL` names the folder that holds the run directories `imported` and
`pruned`, and the text.
"""

import os
from pathlib import Path

from braeburn.config import (
    ONE_DEVICE,
    AdamW,
    Checkpoint,
    Data,
    Distillation,
    ModelConfig,
    Precision,
    Quantization,
    Run,
    Schedule,
    Source,
    Stage,
)

FOLDER = Path(os.environ.get("REAL", "runs/real"))
# Small batches, since a few minutes of two cores see few tokens, and steps count for more.
LENGTH = 512
BATCH_TOKENS = 1024


def distilled() -> Run:
    """The pruned model, taught by the model it was cut from."""
    return _run("pruned", "distil", _stage(tokens=40 * BATCH_TOKENS, learning_rate=1e-4))


def rounded() -> Run:
    """The distilled model, taught further with its weights rounded to 4 bits."""
    stage = _stage(tokens=12 * BATCH_TOKENS, learning_rate=5e-5)
    return _run("distilled", "round", stage.replace(quantization=Quantization(kind="int4")))


def _stage(tokens: int, learning_rate: float) -> Stage:
    """A stage in which the imported model teaches what it knows of the text."""
    return Stage(
        tokens=tokens,
        sequence_length=LENGTH,
        batch_tokens=BATCH_TOKENS,
        mixture={"text": 1.0},
        learning_rate=learning_rate,
        schedule=Schedule(warmup_steps=2, floor=0.1),
        teacher=str(FOLDER / "imported"),
        # A pruned model knows most of what its teacher does: whole distributions tell it the rest.
        distillation=Distillation(target="distribution", weight=1.0),
    )


def _run(start: str, name: str, stage: Stage) -> Run:
    """A run of one stage.

    Args:
        start: the run directory in `FOLDER` whose model and weights it starts from.
        name: of the stage.
        stage: what is trained.
    """
    return Run(
        name=f"smollm2-{name}",
        model=ModelConfig.from_directory(FOLDER / start),
        initial_weights=str(FOLDER / start),
        stages={name: stage},
        # The demonstration measures each model on other text, which is in no source.
        data=Data(sources={"text": Source(paths=(str(FOLDER / "text.jsonl"),))}, held_out=0.0),
        optimizer=AdamW(),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        # Only the last checkpoint is used; with its optimizer state each takes a gigabyte.
        checkpoint=Checkpoint(every_steps=20, keep_last=1),
    )
