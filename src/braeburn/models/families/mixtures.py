"""What families of mixtures of experts have in common."""

from collections.abc import Mapping
from typing import Any

from braeburn.config import LayerConfig, ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.models.families.definition import Names
from braeburn.models.families.fields import checked_size
from braeburn.models.families.llama import GGUF_NAMES, NAMES

# The fields of `Experts` that say what is computed, and those that training alone knows.
_COMPUTED = {"num_experts", "experts_per_token", "expert_dim", "normalize"}
_TRAINED = {"balance_loss", "router_z_loss"}
# Our sizes of experts -> (the name of the field, what transformers takes where it is left out).
Sizes = Mapping[str, tuple[str, int]]


def pattern(**fields: Any) -> tuple[LayerConfig, ...]:
    """The layers of a mixture, with some fields of `Experts`."""
    return (LayerConfig(feed_forward=Experts(**fields)),)


def experts_of(model: ModelConfig, dense: bool = False) -> Experts | None:
    """The experts of a model whose layers are all the same, and usual but for these; None of
    others.

    Args:
        model: whose layers are looked at.
        dense: whether some of the layers may be usual and without experts.
    """
    layers = dict.fromkeys(model.layer_configs)
    if dense:
        layers.pop(LayerConfig(), None)
    if len(layers) != 1:
        return None
    (layer,) = layers
    found = layer.feed_forward
    if not isinstance(found, Experts):
        return None
    usual = Experts(**found.model_dump(include=_COMPUTED | _TRAINED))
    return found if layer == LayerConfig(feed_forward=usual) else None


def parse_experts(stated: Mapping[str, Any], sizes: Sizes) -> dict[str, int]:
    """The sizes of experts in a `config.json`.

    Args:
        stated: all fields of the file.
        sizes: the fields that are read.

    Raises:
        UserError: a field is no size.
    """
    found = {}
    for ours, (field, usual) in sizes.items():
        value = stated.get(field)
        if value is None and ours == "num_experts":
            # transformers reads either name.
            value = stated.get("num_experts", stated.get("num_local_experts"))
        found[ours] = checked_size(field, usual if value is None else value)
    return found


def fields_of_experts(found: Experts, sizes: Sizes) -> dict[str, int]:
    """The fields of a `config.json` that `parse_experts` reads."""
    return {field: getattr(found, ours) for ours, (field, _) in sizes.items()}


def names(router: str, gate: str, up: str, down: str, others: Names = NAMES) -> Names:
    """The names of the tensors of a Llama, some layers of which or all have experts in place of
    their feed-forward sublayer.

    Args:
        router: with `{}` for the number of the layer.
        gate: with a second `{}` for the number of the expert, as the next two; without where a
            tensor holds those of all experts.
        up: of the matrix that is multiplied by the activated gate.
        down: of the one back to the width of the model.
        others: the names of a Llama's tensors.
    """
    matrices = zip(("expert_gate", "expert_up", "expert_down"), (gate, up, down), strict=True)
    return {
        **others,
        "layers/router": router,
        **{f"layers/{path}": name for path, name in matrices},
    }


def gguf_names() -> Names:
    """The names that llama.cpp has for the tensors of a Llama with experts."""
    return names(
        router="blk.{}.ffn_gate_inp.weight",
        gate="blk.{}.ffn_gate_exps.weight",
        up="blk.{}.ffn_up_exps.weight",
        down="blk.{}.ffn_down_exps.weight",
        others=GGUF_NAMES,
    )


def gguf_keys(found: Experts) -> dict[str, int]:
    """The keys of a GGUF file that tell of experts in all architectures."""
    return {"expert_count": found.num_experts, "expert_used_count": found.experts_per_token}
