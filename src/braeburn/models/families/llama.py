"""Llama 2 and 3, and Mistral, which is a Llama in all but name."""

from typing import Any

from braeburn.config import ModelConfig
from braeburn.models.families.definition import Family, Gguf, is_plain
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    check_windows,
    parse_common,
    parse_rope,
    refuse_others,
    rope_fields,
    sliding_layer_types,
    uneven_heads,
    window_of,
)

# Fields that change the computation, with the only values under which it is ours.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/query": "model.layers.{}.self_attn.q_proj.weight",
    "layers/query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/key": "model.layers.{}.self_attn.k_proj.weight",
    "layers/key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/value": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention_output": "model.layers.{}.self_attn.o_proj.weight",
    "layers/ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "layers/attention_norm": "blk.{}.attn_norm.weight",
    "layers/query": "blk.{}.attn_q.weight",
    "layers/query_norm": "blk.{}.attn_q_norm.weight",
    "layers/key": "blk.{}.attn_k.weight",
    "layers/key_norm": "blk.{}.attn_k_norm.weight",
    "layers/value": "blk.{}.attn_v.weight",
    "layers/attention_output": "blk.{}.attn_output.weight",
    "layers/ffn_norm": "blk.{}.ffn_norm.weight",
    "layers/gate": "blk.{}.ffn_gate.weight",
    "layers/up": "blk.{}.ffn_up.weight",
    "layers/down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}


def fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` that Llamas and Qwen3s have."""
    return {"hidden_act": "silu", "mlp_bias": False, **rope_fields(model)}


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others({**contents.stated, **contents.rope}, ONLY)
    sliding = sliding_layer_types(contents)
    if contents.config.model_type == "mistral":
        window = window_of(contents, defaults)
        sliding = "model_type='mistral'" if window is not None else None
    check_windows(contents, defaults, sliding)
    return {**parse_common(contents, defaults), **parse_rope(contents, defaults), "qk_norm": False}


def _refusal(model: ModelConfig) -> str | None:
    refusal = uneven_heads(model, "a Llama")
    return refusal and f"{refusal} or with qk_norm=true"


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    matches=lambda model: is_plain(model) and not model.qk_norm,
    types={
        "llama": Defaults(),
        "mistral": Defaults(
            num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096
        ),
    },
    names=NAMES,
    parse=_parse,
    fields=fields,
    refusal=_refusal,
    gguf=Gguf("llama", GGUF_NAMES, interleaved=("query", "key")),
)
