"""DeepSeek-V3 (arXiv 2412.19437): attention by latents, and experts behind a few dense layers."""

from collections.abc import Mapping
from typing import Any

from braeburn.config import LayerConfig, ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.config.sublayers.latent import LatentAttention
from braeburn.models.families.definition import Family
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    checked_size,
    parse_common,
    parse_rope,
    refuse_others,
    rope_fields,
)
from braeburn.models.families.llama import NAMES
from braeburn.models.families.mixtures import names, parse_experts

# Fields that change the computation, with the only values under which it is ours.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "rope_interleave": (True,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "quantization_config": (None,),
}
# Our sizes and (the name of the field, what transformers takes where it is left out).
_OF_EXPERTS = {
    "num_experts": ("n_routed_experts", 256),
    "experts_per_token": ("num_experts_per_tok", 8),
    "expert_dim": ("moe_intermediate_size", 2048),
    "groups": ("n_group", 8),
    "groups_per_token": ("topk_group", 4),
}
_OF_ATTENTION = {
    "latent_dim": ("kv_lora_rank", 512),
    "plain_dim": ("qk_nope_head_dim", 128),
    "rotated_dim": ("qk_rope_head_dim", 64),
}
_QUERIES = ("q_lora_rank", 1536)
_VALUES = ("v_head_dim", 128)
_DENSE = ("first_k_dense_replace", 3)
_SHARED = ("n_shared_experts", 1)
_SCALE = ("routed_scaling_factor", 2.5)
# What training alone knows of experts.
_TRAINED = {"balance_loss", "router_z_loss"}

_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_EXPERT = f"{_MLP}experts.{{}}."
_PLAIN = {path: name for path, name in NAMES.items() if path not in ("layers/key", "layers/value")}
_MIXTURE = names(
    router=f"{_MLP}gate.weight",
    gate=f"{_EXPERT}gate_proj.weight",
    up=f"{_EXPERT}up_proj.weight",
    down=f"{_EXPERT}down_proj.weight",
    others=_PLAIN,
)
TENSORS = {
    **_PLAIN,
    **_MIXTURE,
    "layers/router_bias": f"{_MLP}gate.e_score_correction_bias",
    "layers/shared_gate": f"{_MLP}shared_experts.gate_proj.weight",
    "layers/shared_up": f"{_MLP}shared_experts.up_proj.weight",
    "layers/shared_down": f"{_MLP}shared_experts.down_proj.weight",
    "layers/query_down": f"{_ATTENTION}q_a_proj.weight",
    "layers/query_latent_norm": f"{_ATTENTION}q_a_layernorm.weight",
    "layers/query_up": f"{_ATTENTION}q_b_proj.weight",
    "layers/key_value_down": f"{_ATTENTION}kv_a_proj_with_mqa.weight",
    "layers/latent_norm": f"{_ATTENTION}kv_a_layernorm.weight",
    "layers/key_value_up": f"{_ATTENTION}kv_b_proj.weight",
}


def layers(
    attention: LatentAttention, experts: Experts, num_layers: int, dense: int
) -> dict[str, Any]:
    """The fields of a `ModelConfig` that say which layers it has.

    Args:
        attention: of all layers.
        experts: of those behind the dense ones.
        num_layers: how many there are in all.
        dense: how many of them, the first ones, have no experts.
    """
    plain = LayerConfig(attention=attention)
    mixture = LayerConfig(attention=attention, feed_forward=experts)
    found: dict[str, Any] = {"num_layers": num_layers, "pattern": (plain if dense else mixture,)}
    if 0 < dense < num_layers:
        found |= {"tail_pattern": (mixture,), "tail_layers": num_layers - dense}
    return found


def _parts(model: ModelConfig) -> tuple[LatentAttention, Experts, int] | None:
    """The attention of all layers, the experts, and the number of dense layers; None of a model
    that is of another family.
    """
    configs = model.layer_configs
    attention, experts = configs[0].attention, configs[-1].feed_forward
    if not isinstance(attention, LatentAttention) or not isinstance(experts, Experts):
        return None
    dense = sum(not isinstance(layer.feed_forward, Experts) for layer in configs)
    # What has no place in a file must be as it usually is.
    sizes = (*_OF_ATTENTION, "query_latent_dim")
    of_attention = {field: getattr(attention, field) for field in sizes}
    told = (*_OF_EXPERTS, "scale", "shared_dim", *_TRAINED)
    of_experts = {field: getattr(experts, field) for field in told}
    plain = LayerConfig(attention=LatentAttention(**of_attention))
    usual = Experts(scores="sigmoid", bias=True, **of_experts)
    mixture = plain.model_copy(update={"feed_forward": usual})
    expected = [plain] * dense + [mixture] * (len(configs) - dense)
    return (attention, experts, dense) if list(configs) == expected else None


def _matches(model: ModelConfig) -> bool:
    parts = _parts(model)
    return parts is not None and parts[1].shared_dim > 0


def _refusal(model: ModelConfig) -> str | None:
    parts = _parts(model)
    assert parts is not None
    experts = parts[1]
    if experts.shared_dim % experts.expert_dim == 0:
        return None
    fits = -(-experts.shared_dim // experts.expert_dim) * experts.expert_dim
    return (
        f"shared_dim={experts.shared_dim} is not a multiple of expert_dim={experts.expert_dim}, "
        f"which files of type deepseek_v3 count it in; train with shared_dim={fits}"
    )


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    stated = contents.stated
    refuse_others({**stated, **contents.rope}, ONLY)
    common = parse_common(contents, defaults)
    # The rank of queries that are made without a latent is null.
    queries = stated.get(*_QUERIES)
    sizes = {ours: _number(stated, *field) for ours, field in _OF_ATTENTION.items()}
    sizes["query_latent_dim"] = 0 if queries is None else checked_size(_QUERIES[0], queries)
    experts = parse_experts(stated, _OF_EXPERTS)
    shared = {"shared_dim": _number(stated, *_SHARED) * experts["expert_dim"]}
    usual = {"scores": "sigmoid", "bias": True, "scale": stated.get(*_SCALE)}
    mixture = Experts.model_validate({**experts, **shared, **usual})
    attention = LatentAttention.model_validate(sizes)
    dense = min(_number(stated, *_DENSE, or_none=True), common["num_layers"])
    return {
        **common,
        **parse_rope(contents, defaults),
        "head_dim": _number(stated, *_VALUES),
        "num_kv_heads": 1,
        "qk_norm": False,
        **layers(attention, mixture, common["num_layers"], dense),
    }


def _number(stated: Mapping[str, Any], name: str, usual: int, or_none: bool = False) -> int:
    """A field that is a size, or 0 where there may be none."""
    value = stated.get(name)
    value = usual if value is None else value
    return 0 if or_none and type(value) is int and value == 0 else checked_size(name, value)


def _fields(model: ModelConfig) -> dict[str, Any]:
    parts = _parts(model)
    assert parts is not None
    attention, experts, dense = parts
    sizes = {field: getattr(attention, ours) for ours, (field, _) in _OF_ATTENTION.items()}
    sizes |= {field: getattr(experts, ours) for ours, (field, _) in _OF_EXPERTS.items()}
    return {
        **rope_fields(model),
        **sizes,
        "hidden_act": "silu",
        "rope_interleave": True,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "num_key_value_heads": model.num_heads,
        "head_dim": attention.rotated_dim,
        _VALUES[0]: model.head_dim,
        _QUERIES[0]: attention.query_latent_dim or None,
        _DENSE[0]: dense,
        _SHARED[0]: experts.shared_dim // experts.expert_dim,
        _SCALE[0]: experts.scale,
    }


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    matches=_matches,
    types={"deepseek_v3": Defaults(max_position_embeddings=4096)},
    names=TENSORS,
    parse=_parse,
    fields=_fields,
    refusal=_refusal,
    unread=lambda model: f"model.layers.{model.num_layers}.",
)
