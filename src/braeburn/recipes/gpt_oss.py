"""gpt-oss (arXiv 2508.10925): sizes as published; batches and rates, unpublished, of their
class.
"""

from braeburn.config import (
    AdamW,
    Checkpoint,
    Data,
    ModelConfig,
    Remat,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.models.families import gpt_oss


def gpt_oss_20b() -> Run:
    """gpt-oss 20B: 32 experts, of which a token uses 4 and 3.6B parameters."""
    return _run("gpt-oss-20b", gpt_oss.gpt_oss_20b(), learning_rate=4e-4)


def gpt_oss_120b() -> Run:
    """gpt-oss 120B: 128 experts, of which a token uses 4 and 5.1B parameters."""
    return _run("gpt-oss-120b", gpt_oss.gpt_oss_120b(), learning_rate=3e-4)


def _run(name: str, model: ModelConfig, *, learning_rate: float) -> Run:
    general = Stage(
        tokens=10_000_000_000_000,
        sequence_length=4096,
        batch_tokens=2**22,
        mixture={"web": 0.7, "code": 0.3},
        learning_rate=learning_rate,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=2000, floor=0.1),
    )
    # The rotation is stretched for these from the first step on, as the weights have it.
    longer = general.replace(
        tokens=100_000_000_000,
        sequence_length=32_768,
        mixture={"web": 0.5, "long": 0.5},
        learning_rate=learning_rate / 10,
    )
    sources = {
        name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl")
        for name in ("web", "code", "long")
    }
    return Run(
        name=name,
        model=model,
        stages={"general": general, "context": longer},
        data=Data(sources=sources),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )
