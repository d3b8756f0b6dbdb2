"""The `config.json` of a Hugging Face model as our `ModelConfig`, and back; the rules are those of
transformers 5.

Every field that changes the computation is read under each name that transformers reads it by, with
the same value winning, and the same default where it is left out. What we have not is refused by
the field that differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from braeburn.config import LARGEST_SIZES, ModelConfig, explain_validation_error
from braeburn.errors import UserError
from braeburn.reading import read_object, shown, validated


@dataclass(frozen=True)
class _Family:
    """What transformers takes a field for that the file leaves out."""

    architecture: str
    qk_norm: bool
    num_key_value_heads: int | None  # None for as many as query heads
    head_dim: int | None  # None for hidden_size / num_attention_heads
    max_position_embeddings: int
    sliding_window: int | None


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", False, None, None, 2048, None),
    "mistral": _Family("MistralForCausalLM", False, 8, None, 131_072, 4096),
    "qwen3": _Family("Qwen3ForCausalLM", True, 32, 128, 32_768, 4096),
}
_MAX_WINDOW_LAYERS = 28  # Qwen3's default of the layers before those with a window

# Fields that change the computation, with the only values under which it is ours.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
}
_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class _Config(BaseModel):
    """The fields of `config.json` that are read, beside sizes; all others are kept as they are."""

    model_config = ConfigDict(extra="allow")

    model_type: str | None = None
    tie_word_embeddings: bool | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    max_window_layers: int | None = None


def is_huggingface(directory: Path) -> bool:
    """Whether a folder's config.json is that of transformers; a run directory has one too."""
    try:
        return "model_type" in read_object(directory / "config.json", "restore it")
    except UserError:
        return False


def read_config(directory: Path) -> ModelConfig:
    """The sizes of the model in a Hugging Face directory; its weights are not read.

    Raises:
        UserError: its config.json is missing or damaged, or of a model that Braeburn has not.
    """
    path = directory / "config.json"
    contents = read_object(path, "name the folder of a downloaded Hugging Face model")
    return parse_config(contents, str(path))


def parse_config(contents: Mapping[str, Any], path: str) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        contents: of the file.
        path: names it in errors.

    Raises:
        UserError: a field has another type, or the model is one that Braeburn has not.
    """
    config = validated(_Config, contents, path, "download config.json again")
    try:
        return _parse(config, contents)
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path!r}: {explain_validation_error(error)}") from None


def _parse(config: _Config, contents: Mapping[str, Any]) -> ModelConfig:
    family = _FAMILIES.get(config.model_type or "")
    if family is None:
        raise UserError(
            f"model_type={shown(config.model_type)} cannot be imported; choose a model of type "
            f"{', '.join(list(_FAMILIES)[:-1])} or {list(_FAMILIES)[-1]}"
        )
    rope = config.rope_scaling or config.rope_parameters or {}
    stated = {**contents, **rope}
    for field, only in _ONLY.items():
        if stated.get(field) is not None and stated[field] not in only:
            raise UserError(
                f"{field}={shown(stated[field])} cannot be imported; choose a model with "
                f"{field}={only[0]!r}"
            )
    _check_windows(config, contents, family)
    sizes = _sizes(contents, family)
    return ModelConfig.model_validate(
        {
            **sizes,
            "qk_norm": family.qk_norm,
            "tied_embeddings": bool(config.tie_word_embeddings),
            "norm_epsilon": config.rms_norm_eps,
            "rope_base": rope.get(
                "rope_theta", 10_000.0 if config.rope_theta is None else config.rope_theta
            ),
            "rope_scaling": _parse_scaling(rope, config, family),
            "max_position_embeddings": config.max_position_embeddings or 0,
        }
    )


def _sizes(contents: Mapping[str, Any], family: _Family) -> dict[str, int]:
    """Our sizes, each checked to be one."""
    sizes: dict[str, int] = {}
    for ours, field in _SIZES.items():
        value = contents.get(field)
        if value is None and ours == "num_kv_heads":
            left_out = family.num_key_value_heads if field not in contents else None
            value = left_out or sizes["num_heads"]
        if value is None and ours == "head_dim":
            left_out = family.head_dim if field not in contents else None
            value = left_out or sizes["d_model"] // sizes["num_heads"]
        if type(value) is not int or value < 1:
            raise UserError(
                f"{field}={shown(value)} is not a size; give it the positive integer that the "
                f"weights have"
            )
        if value > LARGEST_SIZES[ours]:
            raise UserError(
                f"{field}={shown(value)} is more than {LARGEST_SIZES[ours]}, the largest that is "
                f"read; give it the size that the weights have"
            )
        sizes[ours] = value
    return sizes


def _check_windows(config: _Config, contents: Mapping[str, Any], family: _Family) -> None:
    """Refuses a model whose attention sees less than all earlier tokens of a text that it was made
    for.
    """
    other = next(
        (
            kind
            for kind in config.layer_types or ()
            if kind not in ("full_attention", "sliding_attention")
        ),
        None,
    )
    if other is not None:
        raise UserError(
            f"layer_types={shown(other)} cannot be imported; choose a model with "
            f"layer_types='full_attention'"
        )
    window = config.sliding_window if "sliding_window" in contents else family.sliding_window
    longest = config.max_position_embeddings or family.max_position_embeddings
    sliding = _has_windows(config, window)
    if sliding and (window is None or window < longest):
        raise UserError(
            f"{sliding} with sliding_window={window} cannot be imported, since "
            f"max_position_embeddings={longest} is more; choose a model with full attention"
        )


def _has_windows(config: _Config, window: int | None) -> str | None:
    """What makes some layer's attention a window, as "field=value"; None where nothing does."""
    if config.model_type == "mistral":
        return "model_type='mistral'" if window is not None else None
    if config.layer_types is not None:
        return (
            "layer_types='sliding_attention'" if "sliding_attention" in config.layer_types else None
        )
    if config.model_type != "qwen3" or not config.use_sliding_window or window is None:
        return None
    first = _MAX_WINDOW_LAYERS if config.max_window_layers is None else config.max_window_layers
    layers = getattr(config, "num_hidden_layers", 0)
    is_used = not isinstance(layers, int) or layers > first
    return "use_sliding_window=True" if is_used else None


def _parse_scaling(
    rope: Mapping[str, Any], config: _Config, family: _Family
) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`, as any version of transformers writes them."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            "rope_parameters differ by kind of layer; choose a model with one set of them for all"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in tuple(_SCALINGS):
        raise UserError(
            f"rope_type={shown(kind)} cannot be imported; choose a model with rope_type default, "
            f"{' or '.join(_SCALINGS)}"
        )
    original = "original_max_position_embeddings"
    found = dict(rope)
    # One that stands beside the scaling wins over one in it, as in transformers.
    if config.original_max_position_embeddings is not None:
        found[original] = config.original_max_position_embeddings
    found.setdefault(original, config.max_position_embeddings or family.max_position_embeddings)
    missing = [field for field in _SCALINGS[kind] if field not in found]
    if missing:
        raise UserError(
            f"rope_type={kind!r} lacks {', '.join(missing)}; download config.json again"
        )
    return {"kind": kind} | {field: found[field] for field in _SCALINGS[kind]}


def write_config(model: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """The `config.json` of a model, without the ids of its tokens.

    Args:
        model: the sizes; its family follows from `qk_norm`.
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.
    """
    family = "qwen3" if model.qk_norm else "llama"
    scaling = model.rope_scaling
    stretched = None
    if scaling is not None:
        stretched = {"rope_type": scaling.kind}
        stretched |= {field: getattr(scaling, field) for field in _SCALINGS[scaling.kind]}
    return {
        "architectures": [_FAMILIES[family].architecture],
        "model_type": family,
        **{field: getattr(model, ours) for ours, field in _SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": max_position_embeddings,
        # transformers 5 reads the first of these, transformers 4 and what was built on it the other
        # two.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base}
        | (stretched or {}),
        "rope_theta": model.rope_base,
        "rope_scaling": stretched,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
