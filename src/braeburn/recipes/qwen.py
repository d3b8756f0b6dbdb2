"""Qwen3 dense models (arXiv 2505.09388): sizes as published; batches and rates are unpublished: those of their class."""

from braeburn.config import AdamW, Checkpoint, Data, Model, Remat, Run, Schedule, Source, Stage


def _run(name: str, model: Model, *, learning_rate: float) -> Run:
    schedule = Schedule(warmup_steps=2000, floor=0.1)
    return Run(
        name=name,
        model=model,
        stages={
            "general": Stage(
                tokens=30_000_000_000_000,
                sequence_length=4096,
                batch_tokens=2**22,
                mixture={"web": 0.8, "code": 0.2},
                learning_rate=learning_rate,
                weight_decay=0.1,
                schedule=schedule,
            ),
            "context": Stage(
                tokens=100_000_000_000,
                sequence_length=32_768,
                batch_tokens=2**22,
                mixture={"web": 0.5, "long": 0.5},
                learning_rate=learning_rate / 10,
                weight_decay=0.1,
                schedule=schedule,
                rope_base=1_000_000.0,
            ),
        },
        data=Data(
            sources={
                source: Source(paths=(f"data/{source}/*.jsonl.zst",), format="jsonl")
                for source in ("web", "code", "long")
            }
        ),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )


def qwen3_0_6b() -> Run:
    """Qwen3 0.6B: tied embeddings, context lengthened from 4096 to 32,768."""
    model = Model(
        vocab_size=151_936,
        d_model=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=3072,
        norm_epsilon=1e-6,
        rope_base=10_000.0,
        z_loss=0.0,
    )
    return _run("qwen3-0.6b", model, learning_rate=1e-3)


def qwen3_8b() -> Run:
    """Qwen3 8B: untied embeddings, context lengthened from 4096 to 32,768."""
    model = Model(
        vocab_size=151_936,
        d_model=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=12_288,
        tied_embeddings=False,
        norm_epsilon=1e-6,
        rope_base=10_000.0,
        z_loss=0.0,
    )
    return _run("qwen3-8b", model, learning_rate=3e-4)
