"""Qwen3, as the tests compare it with transformers."""

from typing import Any

from hf_models import LINEAR, LLAMA3, YARN, make, rope_of

from braeburn.config import ModelConfig

# name -> (model, length of the compared sequence)
MODELS = {
    "qwen3": (make(), 40),
    "qwen3-7-heads-1-kv": (
        make(d_model=48, num_heads=7, num_kv_heads=1, head_dim=10, num_layers=3),
        33,
    ),
    "qwen3-untied-wide-heads": (
        make(num_heads=3, num_kv_heads=3, head_dim=32, tied_embeddings=False),
        40,
    ),
    "qwen3-odd-sizes": (
        make(vocab_size=301, d_model=51, ffn_dim=77, num_heads=5, num_kv_heads=5, head_dim=6),
        17,
    ),
    "qwen3-long": (make(rope_base=1e6, num_layers=1, ffn_dim=32), 1500),
    "qwen3-linear": (make(rope_scaling=LINEAR, norm_epsilon=1e-5), 200),
    "qwen3-llama3": (make(rope_scaling=LLAMA3, num_kv_heads=1), 300),
    "qwen3-yarn": (make(rope_scaling=YARN, num_kv_heads=1), 200),
    "qwen3-yarn-not-truncated": (
        make(rope_scaling=YARN.model_copy(update={"truncate": False, "beta_fast": 8.0})),
        200,
    ),
    # As the recipe afm-3b: tied, eight query heads for each key head, wide heads.
    "afm": (
        make(d_model=96, num_layers=3, num_heads=16, num_kv_heads=2, head_dim=32, ffn_dim=252),
        128,
    ),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    return {"rope_parameters": rope_of(model)}
