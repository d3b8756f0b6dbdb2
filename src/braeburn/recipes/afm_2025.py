"""The on-device Apple Foundation Model of 2025 (arXiv 2507.13575; sizes as in Apple's adapter
toolkit): 35 layers that make keys and values, and 21 that reuse those of the last of them, which
need no cache of their own.
"""

from braeburn.config import (
    AfmOptimizer,
    Checkpoint,
    Data,
    FullAttention,
    LayerConfig,
    ModelConfig,
    Precision,
    Remat,
    Run,
    Schedule,
    Source,
    Stage,
    override,
)
from braeburn.config.sublayers.reused import ReusedAttention
from braeburn.recipes.quickstart import SOURCES

# Queries and keys are rotated before they are normalised.
MAKES_KEYS = LayerConfig(attention=FullAttention(qk_norm_first=False))
REUSES_KEYS = LayerConfig(attention=ReusedAttention(qk_norm_first=False))


def afm_on_device_2025() -> Run:
    """AFM on-device of 2025: 3.1B, 35 layers with keys and values and 21 that reuse them."""
    model = ModelConfig(
        vocab_size=153_600,
        d_model=2048,
        num_layers=56,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        ffn_dim=6656,
        pattern=(MAKES_KEYS,),
        tail_pattern=(REUSES_KEYS,),
        tail_layers=21,
    )
    core = Stage(
        tokens=13_400_000_000_000,
        sequence_length=4096,
        batch_tokens=2**22,
        mixture={"web": 0.7, "code": 0.2, "math": 0.1},
        learning_rate=0.01,
        weight_decay=3.16e-4,
        schedule=Schedule(warmup_steps=5000, floor=0.005),
    )
    sources = {
        name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl")
        for name in ("web", "code", "math")
    }
    return Run(
        name="afm-on-device-2025",
        model=model,
        stages={"core": core},
        data=Data(sources=sources),
        optimizer=AfmOptimizer(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )


def afm_on_device_2025_tiny() -> Run:
    """The same at toy size: a minute on a laptop, on Python's standard library."""
    stage = Stage(
        tokens=61_440,
        sequence_length=64,
        batch_tokens=1024,
        mixture={"code": 1.0},
        learning_rate=0.01,
        schedule=Schedule(warmup_steps=6, floor=0.1),
    )
    run = Run(
        name="afm-on-device-2025-tiny",
        model=afm_on_device_2025().model,
        stages={"core": stage},
        data=Data(sources={"code": SOURCES["code"]}),
        optimizer=AfmOptimizer(mup_base_width=64),
        precision=Precision(compute="float32"),
    )
    sizes = {
        "vocab_size": 512,
        "d_model": 64,
        "num_layers": 8,
        "tail_layers": 3,
        "num_heads": 4,
        "head_dim": 16,
        "ffn_dim": 208,
    }
    return override(run, {f"model.{name}": size for name, size in sizes.items()})
