"""Qwen3, a Llama that normalises its queries and keys."""

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
    sliding_layer_types,
    window_of,
)
from braeburn.models.families.llama import GGUF_NAMES, NAMES, ONLY, fields

# transformers' default of the layers before those with a window.
MAX_WINDOW_LAYERS = 28


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others({**contents.stated, **contents.rope}, ONLY)
    check_windows(contents, defaults, _sliding(contents, defaults))
    return {**parse_common(contents, defaults), **parse_rope(contents, defaults), "qk_norm": True}


def _sliding(contents: Contents, defaults: Defaults) -> str | None:
    """What makes some layer's attention a window, as "field=value"; None where nothing does."""
    config = contents.config
    if config.layer_types is not None:
        return sliding_layer_types(contents)
    if not config.use_sliding_window or window_of(contents, defaults) is None:
        return None
    first = config.max_window_layers
    layers = contents.stated.get("num_hidden_layers", 0)
    is_used = not isinstance(layers, int) or layers > (
        MAX_WINDOW_LAYERS if first is None else first
    )
    return "use_sliding_window=True" if is_used else None


def gguf_refusal(model: ModelConfig) -> str | None:
    """Why llama.cpp would not run a model that normalises its queries and keys; None where it
    would.
    """
    if model.rope_scaling is None or model.rope_scaling.kind != "llama3":
        return None
    return (
        "rope_scaling.kind='llama3' together with qk_norm=true is nothing that llama.cpp runs; "
        "train with one of them, or export with --format hf"
    )


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    matches=lambda model: is_plain(model) and model.qk_norm,
    types={
        "qwen3": Defaults(
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=32_768,
            sliding_window=4096,
        )
    },
    names=NAMES,
    parse=_parse,
    fields=fields,
    gguf=Gguf("qwen3", GGUF_NAMES, refusal=gguf_refusal),
)
