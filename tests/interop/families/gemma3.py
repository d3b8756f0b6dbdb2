"""Gemma 3, as the tests compare it with transformers."""

from typing import Any

from hf_models import LINEAR, make

from braeburn.config import ModelConfig
from braeburn.models.families import gemma3


def model(pattern: tuple[Any, ...], **fields: Any) -> ModelConfig:
    """A small Gemma 3 with some of its fields changed."""
    return make(scaled_embedding=True, pattern=pattern, **fields)


SEES_LAST, SEES_ALL = gemma3.layers(24)
# name -> (model, length of the compared sequence)
MODELS = {
    "gemma3": (model(gemma3.pattern(16), num_layers=6), 40),
    # The last repeat is cut short, as in all of the published ones.
    "gemma3-cut-short": (model((SEES_LAST, SEES_ALL), num_layers=3, rope_base=1e6), 100),
    "gemma3-scaled": (
        model(
            gemma3.layers(24, scale=12**-0.5),
            num_layers=2,
            rope_base=1e6,
            rope_scaling=LINEAR,
            num_kv_heads=1,
        ),
        200,
    ),
    "gemma3-all-see-all": (model((SEES_ALL,), num_layers=2, tied_embeddings=False), 40),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    attention = [layer.attention for layer in model.layer_configs]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling is not None:
        rope |= {"rope_type": model.rope_scaling.kind, "factor": model.rope_scaling.factor}
    scale = attention[0].scale
    windows = [one.window for one in attention if one.kind == "sliding"]
    return {
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "query_pre_attn_scalar": 12 if scale else model.head_dim,
        "sliding_window": windows[0] if windows else 4096,
        "layer_types": [
            "sliding_attention" if one.kind == "sliding" else "full_attention" for one in attention
        ],
    }
