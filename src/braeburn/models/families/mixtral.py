"""Mixtral (arXiv 2401.04088), a Mistral with experts."""

from typing import Any

from braeburn.config import ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.models.families.definition import Family, Gguf
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    check_windows,
    parse_common,
    parse_rope,
    refuse_others,
    rope_fields,
    window_of,
)
from braeburn.models.families.llama import ONLY
from braeburn.models.families.mixtures import (
    Sizes,
    experts_of,
    fields_of_experts,
    gguf_keys,
    gguf_names,
    names,
    parse_experts,
    pattern,
)

_SIZES: Sizes = {
    "num_experts": ("num_local_experts", 8),
    "experts_per_token": ("num_experts_per_tok", 2),
    "expert_dim": ("intermediate_size", 14_336),
}
_EXPERT = "model.layers.{}.block_sparse_moe.experts.{}"


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others({**contents.stated, **contents.rope}, ONLY)
    window = window_of(contents, defaults)
    check_windows(contents, defaults, None if window is None else "model_type='mixtral'")
    return {
        **parse_common(contents, defaults),
        **parse_rope(contents, defaults),
        "qk_norm": False,
        # A softmax over the experts of a token alone, which is that over all of them, normalised.
        "pattern": pattern(**parse_experts(contents.stated, _SIZES), normalize=True),
    }


def _matches(model: ModelConfig) -> bool:
    found = experts_of(model)
    return found is not None and found.normalize and not model.qk_norm


def _experts(model: ModelConfig) -> Experts:
    """Those of a model of this family."""
    found = experts_of(model)
    assert found is not None
    return found


def _gguf_keys(model: ModelConfig) -> dict[str, int]:
    found = _experts(model)
    # To llama.cpp a Mixtral is a Llama, whose experts are as wide as feed-forward sublayers are.
    return {**gguf_keys(found), "feed_forward_length": found.expert_dim}


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    matches=_matches,
    types={
        "mixtral": Defaults(
            num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5
        )
    },
    names=names(
        router="model.layers.{}.block_sparse_moe.gate.weight",
        gate=f"{_EXPERT}.w1.weight",
        up=f"{_EXPERT}.w3.weight",
        down=f"{_EXPERT}.w2.weight",
    ),
    parse=_parse,
    fields=lambda model: {
        "hidden_act": "silu",
        **rope_fields(model),
        **fields_of_experts(_experts(model), _SIZES),
    },
    gguf=Gguf("llama", gguf_names(), interleaved=("query", "key"), keys=_gguf_keys),
)
