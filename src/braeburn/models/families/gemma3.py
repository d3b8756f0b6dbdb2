"""Gemma 3, text alone (arXiv 2503.19786): layers that see the last tokens, five of them for each
that sees all, norms around each sublayer, GeGLU, embeddings times sqrt(d_model).
"""

from collections.abc import Mapping
from typing import Any

from braeburn.config import LayerConfig, ModelConfig, RopeScaling
from braeburn.config.sublayers.full import FullAttention
from braeburn.config.sublayers.geglu import GeGLU
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.errors import UserError
from braeburn.models.families import llama
from braeburn.models.families.definition import Family, Gguf
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    layer_types_field,
    layer_types_of,
    parse_common,
    parse_scaling,
    refuse_others,
    scaling_fields,
    shortest_pattern,
    uneven_heads,
    window_attention,
    window_layers,
    window_of,
)
from braeburn.reading import shown

# Fields that change the computation, with the only values under which it is ours.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False,),
    "quantization_config": (None,),
}
DEFAULTS = Defaults(
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131_072,
    sliding_window=4096,
    tie_word_embeddings=True,
    rope_theta=1_000_000.0,
)
LOCAL_ROPE_THETA = 10_000.0
# Of the layers, every so many-th sees all earlier tokens, where a file does not say which.
PATTERN_LENGTH = 6
# llama.cpp takes models of so many layers for the 27B, whose scale is that of d_model / num_heads.
LARGEST = 62

NAMES = {
    **llama.NAMES,
    "layers/attention_output_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/ffn_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/ffn_output_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
GGUF_NAMES = {
    **llama.GGUF_NAMES,
    "layers/attention_output_norm": "blk.{}.post_attention_norm.weight",
    "layers/ffn_output_norm": "blk.{}.post_ffw_norm.weight",
}


def layers(
    window: int, scale: float | None = None, local_base: float = LOCAL_ROPE_THETA
) -> tuple[LayerConfig, LayerConfig]:
    """A layer that sees the last tokens, and one that sees all.

    Args:
        window: how many the former sees, itself among them.
        scale: of attention's scores; None for 1 / sqrt(head_dim).
        local_base: of the rotation of the former; the latter have the model's.
    """
    sliding = SlidingAttention(window=window, rope_base=local_base, scale=scale)
    local, all_earlier = (
        LayerConfig(attention=attention, feed_forward=GeGLU(), norms="both")
        for attention in (sliding, FullAttention(scale=scale))
    )
    return local, all_earlier


def pattern(window: int, scale: float | None = None) -> tuple[LayerConfig, ...]:
    """The pattern of the published models; arguments as of `layers`."""
    local, all_earlier = layers(window, scale)
    return (local,) * (PATTERN_LENGTH - 1) + (all_earlier,)


def _matches(model: ModelConfig) -> bool:
    sliding = {
        layer.attention
        for layer in model.layer_configs
        if isinstance(layer.attention, SlidingAttention)
    }
    if len(sliding) > 1:
        return False
    scale = model.layer_configs[0].attention.scale
    usual = {LayerConfig(attention=FullAttention(scale=scale), feed_forward=GeGLU(), norms="both")}
    for attention in sliding:
        usual |= set(layers(attention.window, scale, attention.rope_base or LOCAL_ROPE_THETA))
    return model.qk_norm and model.scaled_embedding and set(model.layer_configs) <= usual


def _rope(contents: Contents) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of the rotation in layers that see all tokens, and in the others."""
    config, stated = contents.config, contents.stated
    by_kind = config.rope_parameters or {}
    all_earlier = dict(by_kind.get("full_attention") or {}) | dict(config.rope_scaling or {})
    local = dict(by_kind.get("sliding_attention") or {})
    theta = config.rope_theta
    all_earlier.setdefault("rope_theta", DEFAULTS.rope_theta if theta is None else theta)
    local.setdefault("rope_theta", stated.get("rope_local_base_freq", LOCAL_ROPE_THETA))
    if local.get("rope_type", "default") != "default":
        raise UserError(
            f"rope_parameters.sliding_attention.rope_type={shown(local['rope_type'])} cannot be "
            f"imported; choose a model with rope_type='default' there"
        )
    return all_earlier, local


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others(contents.stated, ONLY)
    fields = parse_common(contents, defaults)
    all_earlier, local = _rope(contents)
    scalar = contents.stated.get("query_pre_attn_scalar", 256)
    scale = None if scalar == fields["head_dim"] else scalar**-0.5
    window = window_of(contents, defaults)
    every = contents.stated.get("sliding_window_pattern", PATTERN_LENGTH)

    def usual(number: int) -> str:
        return "sliding_attention" if (number + 1) % every else "full_attention"

    types = layer_types_of(contents, defaults, fields["num_layers"], usual)
    sees_last, sees_all = layers(window or 1, scale, local["rope_theta"])
    by_type = {"sliding_attention": sees_last, "full_attention": sees_all}
    return {
        **fields,
        "qk_norm": True,
        "scaled_embedding": True,
        "rope_base": all_earlier["rope_theta"],
        "rope_scaling": parse_scaling(all_earlier, contents.config, defaults),
        "pattern": shortest_pattern([by_type[type_] for type_ in types]),
    }


def _fields(model: ModelConfig) -> dict[str, Any]:
    sliding, stretched = window_attention(model), scaling_fields(model)
    scale = model.layer_configs[0].attention.scale
    local = (sliding.rope_base if sliding else None) or LOCAL_ROPE_THETA
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": model.head_dim if scale is None else round(scale**-2),
        "sliding_window": sliding.window if sliding else DEFAULTS.sliding_window,
        "layer_types": layer_types_field(model),
        # transformers 5 reads the first of these, transformers 4 the others.
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.rope_base} | stretched,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "rope_theta": model.rope_base,
        "rope_local_base_freq": local,
        "rope_scaling": stretched or None,
    }


def _gguf_keys(model: ModelConfig) -> Mapping[str, Any]:
    sliding = window_attention(model)
    if sliding is None:
        return {}
    return {
        "attention.sliding_window": sliding.window,
        "attention.sliding_window_pattern": window_layers(model),
        "rope.freq_base_swa": float(sliding.rope_base or LOCAL_ROPE_THETA),
    }


def _gguf_refusal(model: ModelConfig) -> str | None:
    scale, largest = model.layer_configs[0].attention.scale, model.num_layers == LARGEST
    expected = (model.d_model // model.num_heads if largest else model.head_dim) ** -0.5
    found = model.head_dim**-0.5 if scale is None else scale
    if abs(found - expected) <= 1e-6 * expected:
        return None
    return (
        f"attention.scale={found:.6g} is not the {expected:.6g} that llama.cpp takes for a Gemma 3 "
        f"of {model.num_layers} layers; export with --format hf"
    )


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    matches=_matches,
    types={"gemma3_text": DEFAULTS},
    names=NAMES,
    parse=_parse,
    fields=_fields,
    refusal=lambda model: uneven_heads(model, "a Gemma 3"),
    more_fields=frozenset({"scaled_embedding"}),
    norm_offset=1.0,
    gguf=Gguf("gemma3", GGUF_NAMES, keys=_gguf_keys, refusal=_gguf_refusal),
)

# As published: the scale of the 27B alone is not that of its heads.
SCALING = RopeScaling(kind="linear", factor=8.0)
COMMON: dict[str, Any] = {
    "head_dim": 256,
    "norm_epsilon": 1e-6,
    "rope_base": 1_000_000.0,
    "z_loss": 0.0,
    "scaled_embedding": True,
}


def gemma3_1b() -> ModelConfig:
    """Gemma 3 1B, 26 layers of which four see all tokens; 32,768 tokens at most."""
    return ModelConfig(
        vocab_size=262_144,
        d_model=1152,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        ffn_dim=6912,
        pattern=pattern(512),
        **COMMON,
    )


def gemma3_4b() -> ModelConfig:
    """Gemma 3 4B without its vision tower; 131,072 tokens at most."""
    return ModelConfig(
        vocab_size=262_208,
        d_model=2560,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        ffn_dim=10_240,
        rope_scaling=SCALING,
        pattern=pattern(1024),
        **COMMON,
    )
