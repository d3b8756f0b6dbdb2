"""Llama 2 (arXiv 2307.09288) and Llama 3 (arXiv 2407.21783): sizes, batches and rates as published."""

from braeburn.config import AdamW, Checkpoint, Data, Model, Remat, RopeScaling, Run, Schedule, Source, Stage


def _run(name: str, model: Model, *, tokens: int, sequence_length: int, batch_tokens: int, learning_rate: float) -> Run:
    return Run(
        name=name,
        model=model,
        stages={
            "pretrain": Stage(
                tokens=tokens,
                sequence_length=sequence_length,
                batch_tokens=batch_tokens,
                mixture={"web": 1.0},
                learning_rate=learning_rate,
                weight_decay=0.1,
                schedule=Schedule(warmup_steps=2000, floor=0.1),
            )
        },
        data=Data(sources={"web": Source(paths=("data/web/*.jsonl.zst",), format="jsonl")}),
        optimizer=AdamW(),
        checkpoint=Checkpoint(every_steps=1000, keep_every_steps=50_000),
        remat=Remat(policy="save_named"),
    )


def llama2_7b() -> Run:
    """Llama 2 7B: 2T tokens, sequences of 4096, batches of 4M."""
    model = Model(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_dim=11_008,
        qk_norm=False,
        tied_embeddings=False,
        norm_epsilon=1e-5,
        rope_base=10_000.0,
        z_loss=0.0,
    )
    tokens = 2_000_000_000_000
    return _run("llama2-7b", model, tokens=tokens, sequence_length=4096, batch_tokens=2**22, learning_rate=3e-4)


def llama2_70b() -> Run:
    """Llama 2 70B: 2T tokens, sequences of 4096, batches of 4M."""
    model = Model(
        vocab_size=32_000,
        d_model=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=28_672,
        qk_norm=False,
        tied_embeddings=False,
        norm_epsilon=1e-5,
        rope_base=10_000.0,
        z_loss=0.0,
    )
    tokens = 2_000_000_000_000
    return _run("llama2-70b", model, tokens=tokens, sequence_length=4096, batch_tokens=2**22, learning_rate=1.5e-4)


def _llama3(num_layers: int, d_model: int, num_heads: int, ffn_dim: int) -> Model:
    return Model(
        vocab_size=128_256,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=ffn_dim,
        qk_norm=False,
        tied_embeddings=False,
        norm_epsilon=1e-5,
        rope_base=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
        z_loss=0.0,
    )


def llama3_8b() -> Run:
    """Llama 3.1 8B, RoPE scaling included: 15T tokens, sequences of 8192, batches of 8M."""
    model = _llama3(num_layers=32, d_model=4096, num_heads=32, ffn_dim=14_336)
    tokens = 15_000_000_000_000
    return _run("llama3-8b", model, tokens=tokens, sequence_length=8192, batch_tokens=2**23, learning_rate=3e-4)


def llama3_70b() -> Run:
    """Llama 3.1 70B, RoPE scaling included: 15T tokens, sequences of 8192, batches of 8M."""
    model = _llama3(num_layers=80, d_model=8192, num_heads=64, ffn_dim=28_672)
    tokens = 15_000_000_000_000
    return _run("llama3-70b", model, tokens=tokens, sequence_length=8192, batch_tokens=2**23, learning_rate=1.5e-4)
