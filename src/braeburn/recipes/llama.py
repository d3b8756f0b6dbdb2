"""Llama 2 (arXiv 2307.09288) and Llama 3.1 (arXiv 2407.21783): sizes, batches and rates as
published.
"""

from typing import Any

from braeburn.config import (
    AdamW,
    Checkpoint,
    Data,
    MeshConfig,
    ModelConfig,
    NamedActivation,
    Remat,
    RopeScaling,
    Run,
    Schedule,
    Source,
    Stage,
)

SIZE_8B: dict[str, Any] = {"num_layers": 32, "d_model": 4096, "num_heads": 32, "head_dim": 128}
SIZE_70B: dict[str, Any] = {
    "num_layers": 80,
    "d_model": 8192,
    "num_heads": 64,
    "num_kv_heads": 8,
    "head_dim": 128,
    "ffn_dim": 28_672,
}
# What the backward pass finds kept: as much as fits, with a batch of the recipe, 512 chips of 95 GB
# with 70B and 256 of 32 GB with 8B.
WIDE: tuple[NamedActivation, ...] = ("query", "key", "value", "attention", "attention_output")
ALL: tuple[NamedActivation, ...] = (*WIDE, "ffn_gate", "ffn_up")
LEAST: tuple[NamedActivation, ...] = ("attention",)
COMMON: dict[str, Any] = {
    "qk_norm": False,
    "tied_embeddings": False,
    "norm_epsilon": 1e-5,
    "z_loss": 0.0,
}
LLAMA2: dict[str, Any] = COMMON | {"vocab_size": 32_000, "rope_base": 10_000.0}
LLAMA3: dict[str, Any] = COMMON | {
    "vocab_size": 128_256,
    "rope_base": 500_000.0,
    "rope_scaling": RopeScaling(kind="llama3", factor=8.0),
}


def llama2_7b() -> Run:
    """Llama 2 7B: 2T tokens, sequences of 4096, batches of 4M.

    Weights are split over 64 chips and not over all: libtpu writes gathers over a whole slice of
    three dimensions, and sums over 256 chips, as sums of whole arrays.
    """
    model = ModelConfig(**SIZE_8B, num_kv_heads=32, ffn_dim=11_008, **LLAMA2)
    return _run(
        "llama2-7b",
        model,
        tokens=2_000_000_000_000,
        sequence_length=4096,
        learning_rate=3e-4,
        keep=ALL,
    ).replace(mesh=MeshConfig(data=-1, fsdp=64))


def llama2_70b() -> Run:
    """Llama 2 70B: 2T tokens, sequences of 4096, batches of 4M.

    Weights are split over 128 chips, for the reason that `llama2_7b` has.
    """
    model = ModelConfig(**SIZE_70B, **LLAMA2)
    return _run(
        "llama2-70b",
        model,
        tokens=2_000_000_000_000,
        sequence_length=4096,
        learning_rate=1.5e-4,
        keep=(*WIDE, "ffn_up"),
    ).replace(mesh=MeshConfig(data=-1, fsdp=128))


def llama3_8b() -> Run:
    """Llama 3.1 8B, RoPE scaling included: 15T tokens, sequences of 8192, batches of 8M."""
    model = ModelConfig(**SIZE_8B, num_kv_heads=8, ffn_dim=14_336, **LLAMA3)
    return _run(
        "llama3-8b",
        model,
        tokens=15_000_000_000_000,
        sequence_length=8192,
        learning_rate=3e-4,
        keep=LEAST,
    )


def llama3_70b() -> Run:
    """Llama 3.1 70B, RoPE scaling included: 15T tokens, sequences of 8192, batches of 8M."""
    model = ModelConfig(**SIZE_70B, **LLAMA3)
    return _run(
        "llama3-70b",
        model,
        tokens=15_000_000_000_000,
        sequence_length=8192,
        learning_rate=1.5e-4,
        keep=WIDE,
    )


def _run(
    name: str,
    model: ModelConfig,
    *,
    tokens: int,
    sequence_length: int,
    learning_rate: float,
    keep: tuple[NamedActivation, ...],
) -> Run:
    pretrain = Stage(
        tokens=tokens,
        sequence_length=sequence_length,
        batch_tokens=1024 * sequence_length,
        mixture={"web": 1.0},
        learning_rate=learning_rate,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=2000, floor=0.1),
    )
    return Run(
        name=name,
        model=model,
        stages={"pretrain": pretrain},
        data=Data(sources={"web": Source(paths=("data/web/*.jsonl.zst",), format="jsonl")}),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named", names=keep),
    )
