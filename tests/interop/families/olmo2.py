"""OLMo 2, as the tests compare it with transformers."""

from typing import Any

from hf_models import LINEAR, make, rope_of

from braeburn.config import ModelConfig
from braeburn.models.families import olmo2

KIND: dict[str, Any] = {"qk_norm": False, "pattern": (olmo2.LAYER,), "norm_epsilon": 1e-5}
# name -> (model, length of the compared sequence)
MODELS = {
    "olmo2": (make(tied_embeddings=False, **KIND), 40),
    "olmo2-grouped": (
        make(d_model=48, num_heads=6, num_kv_heads=2, head_dim=8, rope_base=500_000.0, **KIND),
        100,
    ),
    "olmo2-linear": (make(num_kv_heads=4, rope_scaling=LINEAR, num_layers=1, **KIND), 200),
}


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration beside those of all families."""
    return {"rope_parameters": rope_of(model)}
