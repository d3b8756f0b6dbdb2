"""gpt-oss (arXiv 2508.10925): attention with sinks and biases, to the last tokens and to all in
turn, and experts with biases.
"""

from collections.abc import Mapping
from typing import Any

from braeburn.config import GroupedQueryConfig, LayerConfig, ModelConfig, RopeScaling
from braeburn.config.sublayers.experts import Experts
from braeburn.config.sublayers.full import FullAttention
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.errors import UserError
from braeburn.models.families.definition import Family, Placing
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    layer_types_field,
    layer_types_of,
    parse_common,
    parse_rope,
    refuse_others,
    rope_fields,
    shortest_pattern,
    window_attention,
    window_of,
)
from braeburn.models.families.mixtures import Sizes, names, parse_experts

# Fields that change the computation, with the only values under which it is ours.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (True, False),
    "swiglu_alpha": (1.702,),
    "swiglu_limit": (7.0,),
    "quantization_config": (None,),
}
# What transformers takes where a file says nothing of rotary embeddings.
ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEFAULTS = Defaults(
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    sliding_window=128,
    rms_norm_eps=1e-5,
    rope_theta=150_000.0,
    rope=ROPE,
)
_SIZES: Sizes = {
    "num_experts": ("num_local_experts", 128),
    "experts_per_token": ("num_experts_per_tok", 4),
    "expert_dim": ("intermediate_size", 2880),
}

_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
NAMES = {
    **names(
        router=f"{_MLP}.router.weight",
        gate=f"{_MLP}.experts.gate_up_proj",
        up=f"{_MLP}.experts.gate_up_proj",
        down=f"{_MLP}.experts.down_proj",
    ),
    "layers/query_bias": f"{_ATTENTION}.q_proj.bias",
    "layers/key_bias": f"{_ATTENTION}.k_proj.bias",
    "layers/value_bias": f"{_ATTENTION}.v_proj.bias",
    "layers/attention_output_bias": f"{_ATTENTION}.o_proj.bias",
    "layers/sinks": f"{_ATTENTION}.sinks",
    "layers/router_logit_bias": f"{_MLP}.router.bias",
    "layers/expert_gate_bias": f"{_MLP}.experts.gate_up_proj_bias",
    "layers/expert_up_bias": f"{_MLP}.experts.gate_up_proj_bias",
    "layers/expert_down_bias": f"{_MLP}.experts.down_proj_bias",
}
# As transformers 5 names them where it has read MXFP4.
ALIASES = {
    "layers/expert_gate": f"{_MLP}.experts.gate_up_proj_blocks",
    "layers/expert_up": f"{_MLP}.experts.gate_up_proj_blocks",
    "layers/expert_down": f"{_MLP}.experts.down_proj_blocks",
}
# Gate and up are one product, whose even columns are the gate.
PLACINGS = {
    "layers/expert_gate": Placing(inputs_first=True, parts=2, part=0),
    "layers/expert_up": Placing(inputs_first=True, parts=2, part=1),
    "layers/expert_down": Placing(inputs_first=True),
    "layers/expert_gate_bias": Placing(parts=2, part=0),
    "layers/expert_up_bias": Placing(parts=2, part=1),
}


def layers(window: int, *, bias: bool = True, **experts: Any) -> tuple[LayerConfig, LayerConfig]:
    """A layer that sees the last tokens, and one that sees all.

    Args:
        window: how many the former sees, itself among them.
        bias: whether the products of attention have biases.
        experts: fields of `Experts`.
    """
    feed_forward = Experts(linear_bias=True, activation="clamped", **experts)
    local, all_earlier = (
        LayerConfig(attention=attention, feed_forward=feed_forward)
        for attention in (
            SlidingAttention(window=window, bias=bias, sinks=True),
            FullAttention(bias=bias, sinks=True),
        )
    )
    return local, all_earlier


def _matches(model: ModelConfig) -> bool:
    experts = model.layer_configs[0].feed_forward
    if model.qk_norm or not isinstance(experts, Experts):
        return False
    described = {*_SIZES, "balance_loss", "router_z_loss"}
    usual = layers(
        _window(model) or 1, bias=_has_bias(model), **experts.model_dump(include=described)
    )
    return set(model.layer_configs) <= set(usual)


def _has_bias(model: ModelConfig) -> bool:
    """Whether the products of attention have biases."""
    attention = model.layer_configs[0].attention
    return isinstance(attention, GroupedQueryConfig) and attention.bias


def _window(model: ModelConfig) -> int | None:
    """How many tokens those layers see that do not see all; None where there are none."""
    attention = window_attention(model)
    return attention.window if attention else None


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    stated = contents.stated
    quantized = stated.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == "mxfp4":
        raise UserError(
            "quantization_config.quant_method='mxfp4' cannot be imported; load the model by "
            "transformers' AutoModelForCausalLM.from_pretrained(..., quantization_config="
            "Mxfp4Config(dequantize=True)) and import what its save_pretrained writes"
        )
    refuse_others(stated, ONLY)
    fields = parse_common(contents, defaults)
    window = window_of(contents, defaults)

    def alternating(number: int) -> str:
        return "full_attention" if number % 2 else "sliding_attention"

    types = layer_types_of(contents, defaults, fields["num_layers"], alternating)
    has_bias = stated.get("attention_bias")
    sees_last, sees_all = layers(
        window or 1,
        bias=True if has_bias is None else bool(has_bias),
        **parse_experts(stated, _SIZES),
    )
    by_type = {"sliding_attention": sees_last, "full_attention": sees_all}
    return {
        **fields,
        **parse_rope(contents, defaults),
        "qk_norm": False,
        "pattern": shortest_pattern([by_type[type_] for type_ in types]),
    }


def _fields(model: ModelConfig) -> dict[str, Any]:
    experts = model.layer_configs[0].feed_forward
    assert isinstance(experts, Experts)
    return {
        "hidden_act": "silu",
        "attention_bias": _has_bias(model),
        "swiglu_limit": 7.0,
        "sliding_window": _window(model) or DEFAULTS.sliding_window,
        "layer_types": layer_types_field(model),
        **rope_fields(model),
        **{field: getattr(experts, ours) for ours, (field, _) in _SIZES.items()},
    }


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    matches=_matches,
    types={"gpt_oss": DEFAULTS},
    names=NAMES,
    parse=_parse,
    fields=_fields,
    aliases=ALIASES,
    placings=PLACINGS,
)

# As published.
SCALING = RopeScaling(
    kind="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False
)
COMMON: dict[str, Any] = {
    "vocab_size": 201_088,
    "d_model": 2880,
    "num_heads": 64,
    "num_kv_heads": 8,
    "head_dim": 64,
    "ffn_dim": 2880,
    "qk_norm": False,
    "tied_embeddings": False,
    "norm_epsilon": 1e-5,
    "rope_base": 150_000.0,
    "rope_scaling": SCALING,
    "z_loss": 0.0,
}


def gpt_oss_20b() -> ModelConfig:
    """gpt-oss 20B: 32 experts, of which a token uses 4 and 3.6B parameters; 131,072 tokens at
    most.
    """
    pattern = layers(128, num_experts=32, experts_per_token=4, expert_dim=2880)
    return ModelConfig(num_layers=24, pattern=pattern, **COMMON)


def gpt_oss_120b() -> ModelConfig:
    """gpt-oss 120B: 128 experts, of which a token uses 4 and 5.1B parameters; 131,072 tokens at
    most.
    """
    pattern = layers(128, num_experts=128, experts_per_token=4, expert_dim=2880)
    return ModelConfig(num_layers=36, pattern=pattern, **COMMON)
