"""OLMo 2 (arXiv 2501.00656): sizes, batches and rates as published."""

from braeburn.config import AdamW, Checkpoint, Data, Remat, Run, Schedule, Source, Stage
from braeburn.models.families import olmo2


def olmo2_7b() -> Run:
    """OLMo 2 7B: 3.9T tokens of 4096, then 50B of better text as the rate falls to zero."""
    web = Stage(
        tokens=3_900_000_000_000,
        sequence_length=4096,
        batch_tokens=1024 * 4096,
        mixture={"web": 1.0},
        learning_rate=3e-4,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=2000, floor=0.1),
    )
    middle = web.replace(
        tokens=50_000_000_000,
        mixture={"web": 0.5, "reference": 0.5},
        learning_rate=3e-5,
        schedule=Schedule(decay="linear"),
    )
    sources = {
        name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl")
        for name in ("web", "reference")
    }
    return Run(
        name="olmo2-7b",
        model=olmo2.olmo2_7b(),
        stages={"web": web, "middle": middle},
        data=Data(sources=sources),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )
