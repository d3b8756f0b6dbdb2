"""DeepSeek-V3, as the tests compare it with transformers."""

from typing import Any

from hf_models import YARN, make, rope_of

from braeburn.config import ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.config.sublayers.latent import LatentAttention
from braeburn.models.families.deepseek_v3 import layers

ATTENTION = LatentAttention(latent_dim=24, query_latent_dim=40, plain_dim=16, rotated_dim=8)
EXPERTS = Experts(
    num_experts=8,
    experts_per_token=3,
    expert_dim=36,
    scores="sigmoid",
    scale=2.5,
    bias=True,
    groups=4,
    groups_per_token=2,
    shared_dim=36,
)


def _model(
    attention: LatentAttention, experts: Experts, num_layers: int, dense: int, **fields: Any
) -> ModelConfig:
    found = layers(attention, experts, num_layers, dense)
    return make(num_kv_heads=1, qk_norm=False, tied_embeddings=False, **(found | fields))


# name -> (model, length of the compared sequence)
MODELS = {
    "deepseek-v3": (_model(ATTENTION, EXPERTS, num_layers=3, dense=1), 40),
    # Stretched by YaRN as the published models are, whose scores are multiplied as well.
    "deepseek-v3-yarn": (
        _model(
            ATTENTION,
            EXPERTS.model_copy(update={"shared_dim": 72, "groups": 1, "groups_per_token": 1}),
            num_layers=2,
            dense=0,
            rope_scaling=YARN.model_copy(update={"mscale": 1.0, "mscale_all_dim": 1.0}),
        ),
        200,
    ),
    "deepseek-v3-queries-without-a-latent": (
        _model(
            ATTENTION.model_copy(update={"query_latent_dim": 0, "rotated_dim": 6}),
            EXPERTS.model_copy(update={"scale": 1.0}),
            num_layers=4,
            dense=3,
            head_dim=20,
            num_heads=3,
        ),
        33,
    ),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    attention: Any = model.layer_configs[-1].attention
    experts: Any = model.layer_configs[-1].feed_forward
    return {
        "rope_parameters": rope_of(model),
        "num_key_value_heads": model.num_heads,
        "head_dim": attention.rotated_dim,
        "kv_lora_rank": attention.latent_dim,
        "q_lora_rank": attention.query_latent_dim or None,
        "qk_nope_head_dim": attention.plain_dim,
        "qk_rope_head_dim": attention.rotated_dim,
        "v_head_dim": model.head_dim,
        "first_k_dense_replace": sum(
            layer.feed_forward.kind != "experts" for layer in model.layer_configs
        ),
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared_dim // experts.expert_dim,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.expert_dim,
        "n_group": experts.groups,
        "topk_group": experts.groups_per_token,
        "routed_scaling_factor": experts.scale,
        "num_nextn_predict_layers": 0,
    }
