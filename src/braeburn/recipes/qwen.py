"""Qwen3 models, dense and with experts (arXiv 2505.09388): sizes as published; batches and rates,
unpublished, of their class.
"""

from typing import Any

from braeburn.config import (
    AdamW,
    Checkpoint,
    Data,
    LayerConfig,
    ModelConfig,
    Remat,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.config.sublayers.experts import Experts

COMMON: dict[str, Any] = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "norm_epsilon": 1e-6,
    "rope_base": 10_000.0,
    "z_loss": 0.0,
}


def qwen3_0_6b() -> Run:
    """Qwen3 0.6B: tied embeddings, context lengthened from 4096 to 32,768."""
    model = ModelConfig(
        d_model=1024, num_layers=28, num_heads=16, num_kv_heads=8, ffn_dim=3072, **COMMON
    )
    return _run("qwen3-0.6b", model, learning_rate=1e-3)


def qwen3_8b() -> Run:
    """Qwen3 8B: untied embeddings, context lengthened from 4096 to 32,768."""
    sizes: dict[str, Any] = {
        "d_model": 4096,
        "num_layers": 36,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_dim": 12_288,
    }
    return _run(
        "qwen3-8b", ModelConfig(**sizes, tied_embeddings=False, **COMMON), learning_rate=3e-4
    )


def qwen3_30b_a3b() -> Run:
    """Qwen3 30B-A3B: 128 experts, of which a token uses 8 and 3.3B parameters."""
    sizes: dict[str, Any] = {
        "d_model": 2048,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "ffn_dim": 6144,
        "pattern": _experts(768),
    }
    return _run(
        "qwen3-30b-a3b", ModelConfig(**sizes, tied_embeddings=False, **COMMON), learning_rate=4e-4
    )


def qwen3_235b_a22b() -> Run:
    """Qwen3 235B-A22B: 128 experts, of which a token uses 8 and 22B parameters."""
    sizes: dict[str, Any] = {
        "d_model": 4096,
        "num_layers": 94,
        "num_heads": 64,
        "num_kv_heads": 4,
        "ffn_dim": 12_288,
        "pattern": _experts(1536),
    }
    return _run(
        "qwen3-235b-a22b", ModelConfig(**sizes, tied_embeddings=False, **COMMON), learning_rate=2e-4
    )


def _experts(expert_dim: int) -> tuple[LayerConfig, ...]:
    return (
        LayerConfig(
            feed_forward=Experts(num_experts=128, experts_per_token=8, expert_dim=expert_dim)
        ),
    )


def _run(name: str, model: ModelConfig, *, learning_rate: float) -> Run:
    general = Stage(
        tokens=30_000_000_000_000,
        sequence_length=4096,
        batch_tokens=2**22,
        mixture={"web": 0.8, "code": 0.2},
        learning_rate=learning_rate,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=2000, floor=0.1),
    )
    longer: dict[str, Any] = {
        "tokens": 100_000_000_000,
        "sequence_length": 32_768,
        "mixture": {"web": 0.5, "long": 0.5},
        "learning_rate": learning_rate / 10,
        "rope_base": 1_000_000.0,
    }
    sources = {
        name: Source(paths=(f"data/{name}/*.jsonl.zst",), format="jsonl")
        for name in ("web", "code", "long")
    }
    return Run(
        name=name,
        model=model,
        stages={"general": general, "context": general.replace(**longer)},
        data=Data(sources=sources),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )
