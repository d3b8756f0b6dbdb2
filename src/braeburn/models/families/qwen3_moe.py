"""Qwen3 with experts (arXiv 2505.09388), as Qwen3-30B-A3B and Qwen3-235B-A22B."""

import math
from typing import Any

from braeburn.config import LayerConfig, ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.errors import UserError
from braeburn.models.families.definition import Family, Gguf
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    check_windows,
    checked_size,
    parse_common,
    parse_rope,
    refuse_others,
    repeating_fields,
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
from braeburn.reading import shown

_SIZES: Sizes = {
    "num_experts": ("num_experts", 128),
    "experts_per_token": ("num_experts_per_tok", 8),
    "expert_dim": ("moe_intermediate_size", 768),
}
_EXPERT = "model.layers.{}.mlp.experts.{}"


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    stated = contents.stated
    refuse_others({**stated, **contents.rope}, ONLY)
    sliding = sliding_layer_types(contents)
    if contents.config.use_sliding_window and window_of(contents, defaults) is not None:
        sliding = "use_sliding_window=True"
    check_windows(contents, defaults, sliding)
    fields = parse_common(contents, defaults)
    normalize = bool(stated.get("norm_topk_prob"))
    (sparse,) = pattern(**parse_experts(stated, _SIZES), normalize=normalize)
    are_sparse = _parse_sparse(contents, fields["num_layers"])
    return {
        **fields,
        **parse_rope(contents, defaults),
        "qk_norm": True,
        **repeating_fields([sparse if is_sparse else LayerConfig() for is_sparse in are_sparse]),
    }


def _parse_sparse(contents: Contents, num_layers: int) -> list[bool]:
    """Whether each layer has experts: each `decoder_sparse_step`-th that is not in
    `mlp_only_layers`.
    """
    step = contents.stated.get("decoder_sparse_step")
    step = checked_size("decoder_sparse_step", 1 if step is None else step)
    dense = contents.stated.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(number) is not int for number in dense):
        raise UserError(
            f"mlp_only_layers={shown(dense)} is not a list of numbers of layers; give it those of "
            f"the layers without experts, of which 0 is the first"
        )
    without = frozenset(dense)
    return [(i + 1) % step == 0 and i not in without for i in range(num_layers)]


def _sparse_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields that `_parse_sparse` reads."""
    sparse = {i for i, layer in enumerate(model.layer_configs) if layer != LayerConfig()}
    step = math.gcd(*(i + 1 for i in sparse))
    others = set(range(step - 1, model.num_layers, step)) - sparse
    return {"decoder_sparse_step": step, "mlp_only_layers": sorted(others)}


def _experts(model: ModelConfig) -> Experts:
    """Those of a model of this family."""
    found = experts_of(model, dense=True)
    assert found is not None
    return found


def _fields(model: ModelConfig) -> dict[str, Any]:
    found = _experts(model)
    return {
        "hidden_act": "silu",
        **rope_fields(model),
        **fields_of_experts(found, _SIZES),
        "norm_topk_prob": found.normalize,
        **_sparse_fields(model),
    }


def _gguf_keys(model: ModelConfig) -> dict[str, Any]:
    found = _experts(model)
    return {**gguf_keys(found), "expert_feed_forward_length": found.expert_dim}


def _gguf_refusal(model: ModelConfig) -> str | None:
    if LayerConfig() in model.layer_configs:
        return (
            "layers without experts are nothing that llama.cpp runs in a model of type qwen3_moe; "
            "train with experts in all layers, or export with --format hf"
        )
    if not _experts(model).normalize:
        return (
            "normalize=false is nothing that llama.cpp runs in a model of type qwen3_moe; train "
            "with normalize=true, or export with --format hf"
        )
    return refusal(model)


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    matches=lambda model: model.qk_norm and experts_of(model, dense=True) is not None,
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
