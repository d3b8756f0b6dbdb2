"""Llamas, as the tests compare them with transformers."""

from typing import Any

from hf_models import LINEAR, LLAMA3, make, rope_of

from braeburn.config import ModelConfig

# name -> (model, length of the compared sequence)
MODELS = {
    "llama": (make(qk_norm=False, rope_base=10_000.0), 40),
    "llama-9-heads-3-kv": (
        make(qk_norm=False, d_model=72, num_heads=9, num_kv_heads=3, head_dim=8),
        40,
    ),
    "llama-one-kv-wide-heads": (
        make(qk_norm=False, d_model=60, num_heads=5, num_kv_heads=1, head_dim=20),
        40,
    ),
    "llama-untied": (
        make(qk_norm=False, num_kv_heads=4, tied_embeddings=False, scan_layers=False),
        40,
    ),
    "llama-llama3-long": (make(qk_norm=False, rope_scaling=LLAMA3, num_layers=1, ffn_dim=32), 1500),
    "llama-linear": (make(qk_norm=False, rope_scaling=LINEAR, tied_embeddings=False), 300),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    return {"rope_parameters": rope_of(model)}
