"""Mixtral, as the tests compare it with transformers."""

from typing import Any

from hf_models import make, rope_of

from braeburn.config import ModelConfig
from braeburn.models.families.mixtures import pattern

FEW = pattern(num_experts=4, experts_per_token=2, expert_dim=96)
# name -> (model, length of the compared sequence)
MODELS = {
    "mixtral": (make(qk_norm=False, pattern=FEW, norm_epsilon=1e-5), 40),
    "mixtral-untied-7-heads-1-kv": (
        make(
            qk_norm=False,
            pattern=pattern(num_experts=5, experts_per_token=3, expert_dim=60),
            ffn_dim=60,
            tied_embeddings=False,
            d_model=48,
            num_heads=7,
            num_kv_heads=1,
            head_dim=12,
        ),
        70,
    ),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    found: Any = model.layer_configs[0].feed_forward
    return {
        "rope_parameters": rope_of(model),
        "num_local_experts": found.num_experts,
        "num_experts_per_tok": found.experts_per_token,
    }
