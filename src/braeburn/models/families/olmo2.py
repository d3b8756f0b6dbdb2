"""OLMo 2 (arXiv 2501.00656): a norm on what each sublayer adds and none before it, and one over all
heads of queries and of keys.
"""

from typing import Any

from braeburn.config import FullAttention, LayerConfig, ModelConfig
from braeburn.models.families import llama
from braeburn.models.families.definition import Family, Gguf
from braeburn.models.families.fields import (
    Contents,
    Defaults,
    parse_common,
    parse_rope,
    refuse_others,
    rope_fields,
)

# Fields that change the computation, with the only values under which it is ours.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "quantization_config": (None,),
}
LAYER = LayerConfig(attention=FullAttention(qk_norm="width"), norms="after")

# A Llama's and those of other norms, in whose place it has none of a Llama's.
NAMES = {
    **llama.NAMES,
    "layers/attention_output_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/ffn_output_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
GGUF_NAMES = {
    **llama.GGUF_NAMES,
    "layers/attention_output_norm": "blk.{}.post_attention_norm.weight",
    "layers/ffn_output_norm": "blk.{}.post_ffw_norm.weight",
}


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others(contents.stated, ONLY)
    return {
        **parse_common(contents, defaults),
        **parse_rope(contents, defaults),
        "qk_norm": False,
        "pattern": (LAYER,),
    }


def _gguf_refusal(model: ModelConfig) -> str | None:
    if model.tied_embeddings:
        return (
            "tied_embeddings=true is nothing that llama.cpp reads of an OLMo 2; train with "
            "tied_embeddings=false, or export with --format hf"
        )
    if model.num_heads * model.head_dim != model.d_model:
        return (
            f"num_heads={model.num_heads} heads of head_dim={model.head_dim} are not as wide as "
            f"d_model={model.d_model}, as llama.cpp takes those of an OLMo 2 to be; export with "
            f"--format hf"
        )
    return None


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    matches=lambda model: set(model.layer_configs) == {LAYER},
    types={"olmo2": Defaults(rms_norm_eps=1e-5)},
    names=NAMES,
    parse=_parse,
    fields=lambda model: {"hidden_act": "silu", **rope_fields(model)},
    gguf=Gguf("olmo2", GGUF_NAMES, refusal=_gguf_refusal),
)


def olmo2_7b() -> ModelConfig:
    """OLMo 2 7B, of sequences up to 4096 tokens."""
    return ModelConfig(
        vocab_size=100_352,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_dim=11_008,
        qk_norm=False,
        tied_embeddings=False,
        norm_epsilon=1e-6,
        rope_base=500_000.0,
        z_loss=1e-5,
        pattern=(LAYER,),
    )
