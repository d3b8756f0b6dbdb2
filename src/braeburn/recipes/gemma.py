"""Gemma 3 (arXiv 2503.19786): sizes and tokens as published; batches and rates, unpublished, of
their class.
"""

from braeburn.config import AdamW, Checkpoint, Data, Remat, Run, Schedule, Source, Stage
from braeburn.models.families import gemma3


def gemma3_1b() -> Run:
    """Gemma 3 1B: 2T tokens of 32,768, layers that see the last 512 tokens between those that see
    all.
    """
    stage = Stage(
        tokens=2_000_000_000_000,
        sequence_length=32_768,
        batch_tokens=2**22,
        mixture={"web": 0.8, "code": 0.2},
        learning_rate=1e-3,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=2000, floor=0.1),
    )
    sources = {
        name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl")
        for name in ("web", "code")
    }
    return Run(
        name="gemma3-1b",
        model=gemma3.gemma3_1b(),
        stages={"pretrain": stage},
        data=Data(sources=sources),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )
