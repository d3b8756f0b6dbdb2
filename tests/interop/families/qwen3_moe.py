"""Qwen3 with experts, as the tests compare it with transformers."""

from typing import Any

from hf_models import LINEAR, make, rope_of

from braeburn.config import ModelConfig
from braeburn.models.families.mixtures import pattern

FEW = pattern(num_experts=6, experts_per_token=2, expert_dim=48)
# name -> (model, length of the compared sequence)
MODELS = {
    "qwen3-moe": (make(pattern=FEW), 40),
    "qwen3-moe-untied-not-normalized": (
        make(
            pattern=pattern(num_experts=4, experts_per_token=3, expert_dim=36, normalize=False),
            tied_embeddings=False,
            num_layers=3,
        ),
        60,
    ),
    "qwen3-moe-one-expert": (
        make(pattern=pattern(num_experts=3, experts_per_token=1, expert_dim=40)),
        33,
    ),
    "qwen3-moe-linear": (make(pattern=FEW, rope_scaling=LINEAR, num_kv_heads=1), 200),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    found: Any = model.layer_configs[0].feed_forward
    return {
        "rope_parameters": rope_of(model),
        "num_experts": found.num_experts,
        "num_experts_per_tok": found.experts_per_token,
        "moe_intermediate_size": found.expert_dim,
        "norm_topk_prob": found.normalize,
    }
