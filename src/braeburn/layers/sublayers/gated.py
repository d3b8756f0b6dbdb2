"""Gated feed-forward sublayers (arXiv 2002.05202), of which the kinds differ by activation."""

from collections.abc import Callable
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from braeburn.config import ModelConfig
from braeburn.layers.spec import ParamSpec
from braeburn.layers.sublayers.definition import Context, Signals, Sublayer, matrix


def specs(config: Any, model: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of the three matrices."""
    return {
        "gate": matrix(model, ("embed",), ("ffn",)),
        "up": matrix(model, ("embed",), ("ffn",)),
        "down": matrix(model, ("ffn",), ("embed",)),
    }


def gated(activation: Callable[[Array], Array]) -> Sublayer:
    """The sublayer activation(x gate) * (x up), then down."""

    def apply(
        x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
    ) -> tuple[Float[Array, "B T D"], Signals]:
        gate_BTF = checkpoint_name(context.linear(x_BTD, "gate"), "ffn_gate")
        up_BTF = checkpoint_name(context.linear(x_BTD, "up"), "ffn_up")
        hidden_BTF = activation(gate_BTF) * up_BTF
        state = context.activation_hook("ffn", hidden_BTF, signals.state)
        return context.linear(hidden_BTF, "down"), signals._replace(state=state)

    return Sublayer(specs=specs, apply=apply)
