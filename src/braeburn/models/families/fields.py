"""The fields of a Hugging Face `config.json`, as families of models read and write them.

Every field that changes the computation is read under each name that transformers 5 reads it by,
with the same value winning, and the same default where it is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from braeburn.config import LARGEST_SIZES, LayerConfig, ModelConfig
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.errors import UserError
from braeburn.reading import shown

# Our sizes and the names of theirs.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
}
# The kinds of rotary scaling, and the fields of each.
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# Those that may be left out, or null.
OPTIONAL_FIELDS = {
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
}


@dataclass(frozen=True)
class Defaults:
    """What transformers takes a field for that a file leaves out.

    Attributes:
        num_key_value_heads: None for as many as query heads.
        head_dim: None for hidden_size / num_attention_heads.
        max_position_embeddings: in tokens.
        sliding_window: in tokens; None for none.
        rms_norm_eps: added to the mean square.
        tie_word_embeddings: whether the embedding is the head.
        rope_theta: the base of the rotation.
        rope: what is said of rotary embeddings; None for nothing.
    """

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope: Mapping[str, Any] | None = None


class Config(BaseModel):
    """The fields of `config.json` that are read, beside sizes; all others are kept as they are."""

    model_config = ConfigDict(extra="allow")

    model_type: str | None = None
    tie_word_embeddings: bool | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    max_window_layers: int | None = None


@dataclass(frozen=True)
class Contents:
    """A `config.json`.

    Attributes:
        config: the fields that are read, of the right types.
        stated: all fields as they stand.
    """

    config: Config
    stated: Mapping[str, Any]

    @property
    def rope(self) -> Mapping[str, Any]:
        """What is said of rotary embeddings, under either name."""
        return self.config.rope_scaling or self.config.rope_parameters or {}


def refuse_others(stated: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses fields that change the computation into another than ours.

    Args:
        stated: all fields of a file.
        only: the values of each field under which the computation is ours.

    Raises:
        UserError: naming the field, its value and one that would do.
    """
    for field, allowed in only.items():
        if stated.get(field) is not None and stated[field] not in allowed:
            raise UserError(
                f"{field}={shown(stated[field])} cannot be imported; choose a model with "
                f"{field}={allowed[0]!r}"
            )


def checked_size(field: str, value: Any) -> int:
    """A value of a field, once it is known to be a size.

    Raises:
        UserError: it is none.
    """
    if type(value) is not int or value < 1:
        raise UserError(
            f"{field}={shown(value)} is not a size; give it the positive integer that the weights "
            f"have"
        )
    return value


def parse_sizes(contents: Contents, defaults: Defaults) -> dict[str, int]:
    """The sizes of a `ModelConfig`, each checked to be one.

    Raises:
        UserError: a field is no size, or larger than any that is read.
    """
    stated = contents.stated
    sizes: dict[str, int] = {}
    for ours, field in SIZES.items():
        value = stated.get(field)
        if value is None and ours == "num_kv_heads":
            left_out = defaults.num_key_value_heads if field not in stated else None
            value = left_out or sizes["num_heads"]
        if value is None and ours == "head_dim":
            left_out = defaults.head_dim if field not in stated else None
            value = left_out or sizes["d_model"] // sizes["num_heads"]
        value = checked_size(field, value)
        if value > LARGEST_SIZES[ours]:
            raise UserError(
                f"{field}={shown(value)} is more than {LARGEST_SIZES[ours]}, the largest that is "
                f"read; give it the size that the weights have"
            )
        sizes[ours] = value
    return sizes


def parse_common(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    """The fields of a `ModelConfig` that all families have but those of rotary embeddings."""
    config = contents.config
    epsilon, tied = config.rms_norm_eps, config.tie_word_embeddings
    return {
        **parse_sizes(contents, defaults),
        "tied_embeddings": defaults.tie_word_embeddings if tied is None else tied,
        "norm_epsilon": defaults.rms_norm_eps if epsilon is None else epsilon,
        "max_position_embeddings": config.max_position_embeddings or 0,
    }


def parse_rope(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    """The fields of a `ModelConfig` of rotary embeddings that are the same in all layers."""
    rope, theta = contents.rope or defaults.rope or {}, contents.config.rope_theta
    return {
        "rope_base": rope.get("rope_theta", defaults.rope_theta if theta is None else theta),
        "rope_scaling": parse_scaling(rope, contents.config, defaults),
    }


def check_windows(contents: Contents, defaults: Defaults, sliding: str | None) -> None:
    """Refuses a model whose attention sees less than all earlier tokens of a text that it was made
    for.

    Args:
        contents: of the file.
        defaults: of the family.
        sliding: what makes some layer's attention a window, as "field=value"; None where only
            `layer_types` may.

    Raises:
        UserError: naming the field at fault.
    """
    config = contents.config
    check_layer_types(config.layer_types or (), "'full_attention'")
    window = window_of(contents, defaults)
    longest = config.max_position_embeddings or defaults.max_position_embeddings
    if sliding and (window is None or window < longest):
        raise UserError(
            f"{sliding} with sliding_window={window} cannot be imported, since "
            f"max_position_embeddings={longest} is more; choose a model with full attention"
        )


def check_layer_types(kinds: Sequence[str], allowed: str) -> None:
    """Refuses kinds of layers that are not known.

    Args:
        kinds: of the layers.
        allowed: the kinds that the family has, as the advice names them.

    Raises:
        UserError: naming the first that is not known.
    """
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"layer_types={shown(kind)} cannot be imported; choose a model with "
                f"layer_types={allowed}"
            )


def window_of(contents: Contents, defaults: Defaults) -> int | None:
    """The length of the window that some layers may have, in tokens; None for none."""
    stated = "sliding_window" in contents.stated
    return contents.config.sliding_window if stated else defaults.sliding_window


def layer_types_of(
    contents: Contents, defaults: Defaults, num_layers: int, usual: Callable[[int], str]
) -> list[str]:
    """What each layer attends to, "sliding_attention" or "full_attention"; the latter in all where
    there is no window.

    Args:
        contents: of the file.
        defaults: of the family.
        num_layers: of the model.
        usual: of a layer by its number, counted from 0, where the file does not say.

    Raises:
        UserError: the file names other kinds, or another number of layers.
    """
    found = contents.config.layer_types
    if found is None:
        found = [usual(number) for number in range(num_layers)]
    check_layer_types(found, "'full_attention' and 'sliding_attention'")
    if len(found) != num_layers:
        raise UserError(
            f"layer_types names {len(found)} layers and num_hidden_layers={num_layers}; download "
            f"config.json again"
        )
    has_window = window_of(contents, defaults) is not None
    return found if has_window else ["full_attention"] * len(found)


def window_layers(model: ModelConfig) -> list[bool]:
    """Whether each layer sees the last tokens alone."""
    return [isinstance(layer.attention, SlidingAttention) for layer in model.layer_configs]


def window_attention(model: ModelConfig) -> SlidingAttention | None:
    """The attention of the layers that see the last tokens alone, if there are any."""
    for layer in model.layer_configs:
        if isinstance(layer.attention, SlidingAttention):
            return layer.attention
    return None


def layer_types_field(model: ModelConfig) -> list[str]:
    """The field `layer_types`, which `layer_types_of` reads."""
    return [
        "sliding_attention" if has_window else "full_attention"
        for has_window in window_layers(model)
    ]


def sliding_layer_types(contents: Contents) -> str | None:
    """The field `layer_types` as "field=value" where it names windows; None where it does not."""
    return (
        "layer_types='sliding_attention'"
        if "sliding_attention" in (contents.config.layer_types or ())
        else None
    )


def parse_scaling(
    rope: Mapping[str, Any], config: Config, defaults: Defaults
) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`, as any version of transformers writes them.

    Args:
        rope: what is said of rotary embeddings.
        config: of the file.
        defaults: of the family.

    Raises:
        UserError: they are of another kind than ours, or incomplete.
    """
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            "rope_parameters differ by kind of layer; choose a model with one set of them for all"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in tuple(SCALINGS):
        raise UserError(
            f"rope_type={shown(kind)} cannot be imported; choose a model with rope_type default, "
            f"{' or '.join(SCALINGS)}"
        )
    original = "original_max_position_embeddings"
    found = dict(rope)
    # One that stands beside the scaling wins over one in it, as in transformers.
    if config.original_max_position_embeddings is not None:
        found[original] = config.original_max_position_embeddings
    found.setdefault(original, config.max_position_embeddings or defaults.max_position_embeddings)
    missing = [field for field in SCALINGS[kind] if field not in found]
    if missing:
        raise UserError(
            f"rope_type={kind!r} lacks {', '.join(missing)}; download config.json again"
        )
    stated = (field for field in OPTIONAL_FIELDS.get(kind, ()) if found.get(field) is not None)
    return {"kind": kind} | {field: found[field] for field in (*SCALINGS[kind], *stated)}


def common_fields(model: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """The fields of a `config.json` that all families have but those of rotary embeddings.

    Args:
        model: the sizes.
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.
    """
    return {
        **{field: getattr(model, ours) for ours, field in SIZES.items()},
        "attention_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": max_position_embeddings,
    }


def rope_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` of rotary embeddings that are the same in all layers."""
    stretched = scaling_fields(model)
    return {
        # transformers 5 reads the first of these, transformers 4 and what was built on it the other
        # two.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base} | stretched,
        "rope_theta": model.rope_base,
        "rope_scaling": stretched or None,
    }


def scaling_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of rotary scaling; none where the model has no scaling."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    known = (*SCALINGS[scaling.kind], *OPTIONAL_FIELDS.get(scaling.kind, ()))
    fields = {field: getattr(scaling, field) for field in known}
    given = {field: value for field, value in fields.items() if value is not None}
    return {"rope_type": scaling.kind} | given


def uneven_heads(model: ModelConfig, family: str) -> str | None:
    """Why transformers would refuse a model whose width its heads do not divide, with a way out;
    None where they do.

    Args:
        model: the sizes.
        family: with its article.
    """
    if model.d_model % model.num_heads == 0:
        return None
    fits = -(-model.d_model // model.num_heads) * model.num_heads
    return (
        f"d_model={model.d_model} is not a multiple of num_heads={model.num_heads}, which "
        f"transformers refuses in {family}; train with d_model={fits}"
    )


def shortest_pattern(layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """The fewest layers that, repeated from the first layer on, give all of them."""
    return tuple(layers[: _periods(layers)[-1]])


def repeating_fields(layers: Sequence[LayerConfig]) -> dict[str, Any]:
    """The fields of a `ModelConfig` that give these layers, and few to compile: a pattern that
    repeats, or where none does twice, perhaps one that is followed by the repeats of another.

    Args:
        layers: from first to last.
    """
    pattern = shortest_pattern(layers)
    if 2 * len(pattern) <= len(layers):
        return {"pattern": pattern}
    # Of the layers before each one, and of those from it on.
    before = [0, *_periods(layers)]
    after = [*_periods(layers[::-1])[::-1], 0]

    def tail(begin: int) -> int:
        """The layers of one repeat, of which there is a whole number."""
        rest = len(layers) - begin
        return after[begin] if rest == 0 or rest % after[begin] == 0 else rest

    def compiled(begin: int) -> int:
        return before[begin] + begin % before[begin] + tail(begin)

    begin = min(range(len(layers), 0, -1), key=compiled)
    if begin == len(layers):
        return {"pattern": pattern}
    return {
        "pattern": tuple(layers[: before[begin]]),
        "tail_pattern": tuple(layers[begin : begin + tail(begin)]),
        "tail_layers": len(layers) - begin,
    }


def _periods(layers: Sequence[LayerConfig]) -> list[int]:
    """After how many layers the first one, the first two and so on repeat themselves, by the table
    of borders of Knuth, Morris and Pratt.
    """
    borders = [0]
    for layer in layers[1:]:
        border = borders[-1]
        while border and layers[border] != layer:
            border = borders[border - 1]
        borders.append(border + (layers[border] == layer))
    return [length - border for length, border in enumerate(borders, start=1)]
