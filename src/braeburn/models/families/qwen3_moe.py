"""Qwen3 with experts (arXiv 2505.09388), as Qwen3-30B-A3B and Qwen3-235B-A22B."""

from typing import Any

from braeburn.config import LayerConfig, ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.errors import UserError
from braeburn.models.families.definition import Family
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
from braeburn.models.families.llama import NAMES, ONLY, rope_fields
from braeburn.reading import shown

# Fields that change the computation, with the only values under which it is ours.
_ONLY: dict[str, tuple[Any, ...]] = {**ONLY, "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
# Sizes of experts, with what transformers takes for those that a file leaves out.
_SIZES = {
    "num_experts": ("num_experts", 128),
    "experts_per_token": ("num_experts_per_tok", 8),
    "expert_dim": ("moe_intermediate_size", 768),
}
_DENSE = ("gate", "up", "down")
_EXPERT = "model.layers.{}.mlp.experts.{}"


def experts(**fields: Any) -> tuple[LayerConfig, ...]:
    """The pattern of layers of such a model."""
    return (LayerConfig(feed_forward=Experts(**fields)),)


def _usual(layer: LayerConfig) -> bool:
    """Whether a layer is one of these, whatever its sizes and what training adds to the loss."""
    found = layer.feed_forward
    if not isinstance(found, Experts):
        return False
    free = {"num_experts", "experts_per_token", "expert_dim", "normalize"}
    trained = {"balance_loss", "router_z_loss"}
    kept = found.model_dump(include=free | trained)
    return layer == LayerConfig(feed_forward=Experts(**kept))


def _parse(contents: Contents, defaults: Defaults) -> dict[str, Any]:
    refuse_others({**contents.stated, **contents.rope}, _ONLY)
    sliding = sliding_layer_types(contents)
    if contents.config.use_sliding_window and window_of(contents, defaults) is not None:
        sliding = "use_sliding_window=True"
    check_windows(contents, defaults, sliding)
    sizes: dict[str, Any] = {}
    for ours, (field, usual) in _SIZES.items():
        # The name that other mixtures have, which transformers reads as well.
        stated = contents.stated.get(field)
        if stated is None and field == "num_experts":
            stated = contents.stated.get("num_local_experts")
        value = usual if stated is None else stated
        if type(value) is not int or value < 1:
            raise UserError(
                f"{field}={shown(value)} is not a size; give it the positive integer that the "
                f"weights have"
            )
        sizes[ours] = value
    normalize = contents.stated.get("norm_topk_prob")
    return {
        **parse_common(contents, defaults),
        **parse_rope(contents, defaults),
        "qk_norm": True,
        "pattern": experts(**sizes, normalize=bool(normalize)),
    }


def _fields(model: ModelConfig) -> dict[str, Any]:
    found = model.layer_configs[0].feed_forward
    assert isinstance(found, Experts)
    return {
        "hidden_act": "silu",
        **rope_fields(model),
        **{field: getattr(found, ours) for ours, (field, _) in _SIZES.items()},
        "norm_topk_prob": found.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    matches=lambda model: (
        model.qk_norm
        and len(set(model.layer_configs)) == 1
        and all(_usual(layer) for layer in model.layer_configs)
    ),
    types={
        "qwen3_moe": Defaults(
            num_key_value_heads=4, max_position_embeddings=32_768, sliding_window=4096
        )
    },
    names={
        **{path: name for path, name in NAMES.items() if path.split("/")[-1] not in _DENSE},
        "layers/router": "model.layers.{}.mlp.gate.weight",
        "layers/expert_gate": f"{_EXPERT}.gate_proj.weight",
        "layers/expert_up": f"{_EXPERT}.up_proj.weight",
        "layers/expert_down": f"{_EXPERT}.down_proj.weight",
    },
    parse=_parse,
    fields=_fields,
)
