"""Qwen3 with experts, as the tests compare it with transformers."""

from typing import Any

from hf_models import LINEAR, make, rope_of

from braeburn.config import LayerConfig, ModelConfig
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
    # As upcycled with experts in every second layer; the last repeat is cut short.
    "qwen3-moe-every-second": (make(pattern=(LayerConfig(), *FEW), num_layers=5), 40),
    "qwen3-moe-but-the-second": (
        make(
            pattern=(LayerConfig(),),
            tail_pattern=(LayerConfig(), *FEW),
            tail_layers=4,
            num_layers=6,
            tied_embeddings=False,
        ),
        40,
    ),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    found: Any = next(
        layer.feed_forward for layer in model.layer_configs if layer.feed_forward.kind == "experts"
    )
    # Models with experts in every second layer have none in the second one, where they have a tail.
    dense = LayerConfig() in model.layer_configs
    return {
        "decoder_sparse_step": 2 if dense else 1,
        "mlp_only_layers": [1] if model.tail_layers else [],
        "rope_parameters": rope_of(model),
        "num_experts": found.num_experts,
        "num_experts_per_tok": found.experts_per_token,
        "moe_intermediate_size": found.expert_dim,
        "norm_topk_prob": found.normalize,
    }
