"""gpt-oss, as the tests compare it with transformers."""

from typing import Any

from hf_models import make, rope_of

from braeburn.config import ModelConfig, RopeScaling
from braeburn.models.families import gpt_oss

# As published, with a shorter length before it was stretched.
YARN = RopeScaling(kind="yarn", factor=32.0, original_max_position_embeddings=64, truncate=False)
KIND: dict[str, Any] = {
    "qk_norm": False,
    "norm_epsilon": 1e-5,
    "rope_base": 150_000.0,
    "tied_embeddings": False,
}


def model(pattern: tuple[Any, ...], **fields: Any) -> ModelConfig:
    """A small gpt-oss with some of its fields changed."""
    return make(**{"ffn_dim": 48, "pattern": pattern, **KIND, **fields})


LOCAL, ALL_EARLIER = gpt_oss.layers(16, num_experts=6, experts_per_token=2, expert_dim=48)
# name -> (model, length of the compared sequence)
MODELS = {
    "gpt-oss": (model((LOCAL, ALL_EARLIER), rope_scaling=YARN, num_layers=4), 60),
    # The last repeat is cut short, and heads do not divide the width.
    "gpt-oss-cut-short": (
        model((LOCAL, ALL_EARLIER), num_layers=3, d_model=60, num_heads=8, num_kv_heads=1),
        100,
    ),
    "gpt-oss-all-see-all-without-biases": (
        model(
            gpt_oss.layers(128, bias=False, num_experts=4, experts_per_token=3, expert_dim=48)[1:],
            tied_embeddings=True,
            rope_scaling=YARN,
        ),
        40,
    ),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    attention = [layer.attention for layer in model.layer_configs]
    experts: Any = model.layer_configs[0].feed_forward
    windows = [one.window for one in attention if one.kind == "sliding"]
    return {
        "rope_parameters": rope_of(model),
        "attention_bias": attention[0].bias,
        "sliding_window": windows[0] if windows else 128,
        "layer_types": [
            "sliding_attention" if one.kind == "sliding" else "full_attention" for one in attention
        ],
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
    }
