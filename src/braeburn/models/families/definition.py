"""What a family of models is: how other software names its parameters, and describes its sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from braeburn.config import ModelConfig
from braeburn.models.families.fields import Contents, Defaults

# The fields of a `ModelConfig` that every family describes in its own words or compares in
# `matches`, and those that change nothing that is computed. A model with any other field set is one
# of those families alone that name the field.
KNOWN_FIELDS = frozenset(
    {
        "vocab_size",
        "d_model",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_dim",
        "qk_norm",
        "tied_embeddings",
        "norm_epsilon",
        "rope_base",
        "rope_scaling",
        "z_loss",
        "scan_layers",
        "max_position_embeddings",
        "pattern",
        "tail_pattern",
        "tail_layers",
    }
)

# Our parameter -> name of the tensor. Of a layer's parameters the key is "layers/" and the
# parameter's own name, and the tensor's name has `{}` for the number of the layer, and of experts a
# second one for that of the expert.
Names = Mapping[str, str]


@dataclass(frozen=True)
class Placing:
    """How one of our parameters lies in its tensor, where that is not as in a `torch.nn.Linear` of
    its own.

    Attributes:
        inputs_first: whether a matrix is [inputs, outputs], as ours are.
        parts: how many parameters of one layer share the tensor. Along its last dimension they
            take turns.
        part: whose turn it is of these, from 0 on.
    """

    inputs_first: bool = False
    parts: int = 1
    part: int = 0


USUAL = Placing()


@dataclass(frozen=True)
class Gguf:
    """A family in GGUF, the files that llama.cpp reads.

    Attributes:
        architecture: the name that llama.cpp has for it.
        names: of its tensors.
        interleaved: matrices whose outputs llama.cpp rotates by neighbours, where we rotate halves.
        keys: (model) -> keys below the architecture's name beside those of all families, or for one
            of these.
        refusal: (model) -> why llama.cpp would not run it, with a way out; None where it would.
    """

    architecture: str
    names: Names
    interleaved: tuple[str, ...] = ()
    keys: Callable[[ModelConfig], Mapping[str, Any]] = lambda model: {}
    refusal: Callable[[ModelConfig], str | None] = lambda model: None


@dataclass(frozen=True)
class Family:
    """A family of models as transformers has it.

    Attributes:
        model_type: that a `config.json` of ours has.
        architecture: the class of transformers.
        matches: whether a model is one of the family. The first family that matches is taken.
        types: the values of `model_type` that are read as this family, each with what transformers
            takes for fields that a file leaves out.
        names: of its tensors.
        parse: the fields of a `ModelConfig` that a `config.json` describes.
        fields: (model) -> the fields of a `config.json` beside those of all families.
        refusal: (model) -> why transformers would refuse it, with a way out; None where it would
            not.
        more_fields: of a `ModelConfig` that this family describes beside `KNOWN_FIELDS`.
        unread: (model) -> what the names begin with of tensors that are passed over, as those of
            parts that only training has; None where there are none.
        norm_offset: what a norm multiplies by beyond the value that is stored.
        aliases: other names that transformers writes some tensors under, by the keys of `names`.
        placings: of the parameters that lie in their tensors in another way than usual, by the keys
            of `names`.
        gguf: how it stands in GGUF files; None where none are written of it.
    """

    model_type: str
    architecture: str
    matches: Callable[[ModelConfig], bool]
    types: Mapping[str, Defaults]
    names: Names
    parse: Callable[[Contents, Defaults], dict[str, Any]]
    fields: Callable[[ModelConfig], Mapping[str, Any]] = lambda model: {}
    refusal: Callable[[ModelConfig], str | None] = lambda model: None
    more_fields: frozenset[str] = frozenset()
    unread: Callable[[ModelConfig], str | None] = lambda model: None
    norm_offset: float = 0.0
    aliases: Names = field(default_factory=dict)
    placings: Mapping[str, Placing] = field(default_factory=dict)
    gguf: Gguf | None = field(default=None)


def undescribed_fields(model: ModelConfig, family: Family) -> list[str]:
    """The fields of a model that are not at their defaults and of which a family knows nothing, so
    that what it writes would be another model.
    """
    return [
        name
        for name, field in type(model).model_fields.items()
        if name not in KNOWN_FIELDS | family.more_fields
        and getattr(model, name) != field.get_default(call_default_factory=True)
    ]


def is_plain(model: ModelConfig) -> bool:
    """Whether all layers are as the configuration has them by default: full attention and SwiGLU
    behind a norm each.
    """
    usual = ModelConfig.model_fields["pattern"].default[0]
    return all(layer == usual for layer in model.layer_configs)
