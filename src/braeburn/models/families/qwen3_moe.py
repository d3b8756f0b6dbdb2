"""Qwen3 with experts (arXiv 2505.09388), as Qwen3-30B-A3B and Qwen3-235B-A22B."""

from typing import Any

from braeburn.config import ModelConfig
from braeburn.models.families.definition import Family, Gguf
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    check_windows,
    parse_common,
    parse_rope,
    refuse_others,
    rope_fields,
    sliding_layer_types,
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
from braeburn.models.families.qwen3 import gguf_refusal as refusal

# Fields that change the computation, with the only values under which it is ours.
_ONLY: dict[str, tuple[Any, ...]] = {**ONLY, "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
_SIZES: Sizes = {
    "num_experts": ("num_experts", 128),
    "experts_per_token": ("num_experts_per_tok", 8),
    "expert_dim": ("moe_intermediate_size", 768),
}
_EXPERT = "model.layers.{}.mlp.experts.{}"


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others({**contents.stated, **contents.rope}, _ONLY)
    sliding = sliding_layer_types(contents)
    if contents.config.use_sliding_window and window_of(contents, defaults) is not None:
        sliding = "use_sliding_window=True"
    check_windows(contents, defaults, sliding)
    normalize = bool(contents.stated.get("norm_topk_prob"))
    return {
        **parse_common(contents, defaults),
        **parse_rope(contents, defaults),
        "qk_norm": True,
        "pattern": pattern(**parse_experts(contents.stated, _SIZES), normalize=normalize),
    }


def _fields(model: ModelConfig) -> dict[str, Any]:
    found = experts_of(model)
    assert found is not None
    return {
        "hidden_act": "silu",
        **rope_fields(model),
        **fields_of_experts(model, _SIZES),
        "norm_topk_prob": found.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gguf_keys(model: ModelConfig) -> dict[str, Any]:
    found = experts_of(model)
    assert found is not None
    return {**gguf_keys(found), "expert_feed_forward_length": found.expert_dim}


def _gguf_refusal(model: ModelConfig) -> str | None:
    found = experts_of(model)
    if found is not None and not found.normalize:
        return (
            "normalize=false is nothing that llama.cpp runs in a model of type qwen3_moe; train "
            "with normalize=true, or export with --format hf"
        )
    return refusal(model)


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    matches=lambda model: model.qk_norm and experts_of(model) is not None,
    types={
        "qwen3_moe": Defaults(
            num_key_value_heads=4, max_position_embeddings=32_768, sliding_window=4096
        )
    },
    names=names(
        router="model.layers.{}.mlp.gate.weight",
        gate=f"{_EXPERT}.gate_proj.weight",
        up=f"{_EXPERT}.up_proj.weight",
        down=f"{_EXPERT}.down_proj.weight",
    ),
    parse=_parse,
    fields=_fields,
    gguf=Gguf("qwen3moe", gguf_names(), keys=_gguf_keys, refusal=_gguf_refusal),
)
