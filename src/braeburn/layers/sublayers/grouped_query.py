"""Grouped-query attention, of which the kinds of attention are made."""

import math
from collections.abc import Mapping

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import AttentionConfig, GroupedQueryConfig, ModelConfig, QKNorm
from braeburn.layers import rope
from braeburn.layers.attention.backend import Scope
from braeburn.layers.norm import rms_norm, rms_norm_of_heads
from braeburn.layers.spec import ParamSpec
from braeburn.layers.sublayers import rotary
from braeburn.layers.sublayers.definition import Context, Kept, Signals, bias, matrix, norm
from braeburn.layers.sublayers.rotary import Rotation


def qk_norm_of(config: GroupedQueryConfig, model: ModelConfig) -> QKNorm:
    """What the norm of queries and keys runs over."""
    if config.qk_norm is not None:
        return config.qk_norm
    return "head" if model.qk_norm else "none"


def query_specs(config: GroupedQueryConfig, model: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of what makes queries, of sinks, and of the output."""
    specs = {
        "query": matrix(model, ("embed",), ("heads", "head_dim")),
        "attention_output": matrix(model, ("heads", "head_dim"), ("embed",)),
    }
    if config.bias:
        specs["query_bias"] = bias(model, "heads", "head_dim")
        specs["attention_output_bias"] = bias(model, "embed")
    if config.sinks:
        specs["sinks"] = bias(model, "heads")
    return specs | _norm_spec(config, model, "query_norm", "heads")


def key_value_specs(config: GroupedQueryConfig, model: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of what makes keys and values."""
    specs = {
        "key": matrix(model, ("embed",), ("kv_heads", "head_dim")),
        "value": matrix(model, ("embed",), ("kv_heads", "head_dim")),
    }
    if config.bias:
        specs |= {
            "key_bias": bias(model, "kv_heads", "head_dim"),
            "value_bias": bias(model, "kv_heads", "head_dim"),
        }
    return specs | _norm_spec(config, model, "key_norm", "kv_heads")


def _norm_spec(
    config: GroupedQueryConfig, model: ModelConfig, name: str, heads: str
) -> dict[str, ParamSpec]:
    kind = qk_norm_of(config, model)
    if kind == "none":
        return {}
    return {name: norm(model, "head_dim") if kind == "head" else norm(model, heads, "head_dim")}


def specs(config: GroupedQueryConfig, model: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of a layer that makes its own keys and values."""
    return query_specs(config, model) | key_value_specs(config, model)


def rotation(config: AttentionConfig, model: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """The rotation of every position, of whole heads."""
    return rotary.rotation(config, model, model.head_dim, positions)


def cache(config: GroupedQueryConfig, window: int | None = None) -> tuple[Kept, ...]:
    """A token's key and value."""
    kept = Kept(("kv_heads", "head_dim"), window)
    return kept, kept


def _normalised(
    x_BTNH: Float[Array, "B T N H"], name: str, context: Context
) -> Float[Array, "B T N H"]:
    """Queries or keys behind their norm, if they have one."""
    if name not in context.weights:
        return x_BTNH
    scale, epsilon = context.weights[name], context.model.norm_epsilon
    if qk_norm_of(context.config, context.model) == "head":
        return rms_norm(x_BTNH, scale, epsilon)
    return rms_norm_of_heads(x_BTNH, scale, context.specs[name], epsilon, context.execution)


def positioned(x: Mapping[str, Array], context: Context) -> dict[str, Array]:
    """Queries and keys, normalised and rotated.

    What the backward pass may find kept of them by their names is their projections where a norm
    follows, whose gradient needs them, and otherwise the result.

    Args:
        x: projections [B, T, heads, H], any of "query" and "key".
        context: weights and configuration of the layer.

    Returns:
        Those of the same names. Queries are scaled where the layer's scale is not the usual one.
    """
    normed = {name for name in x if f"{name}_norm" in context.weights}
    found = {
        name: checkpoint_name(with_whole_cotangent(value), name) if name in normed else value
        for name, value in x.items()
    }
    steps = [
        lambda name, value: _normalised(value, f"{name}_norm", context),
        lambda _, value: rope.rotate(value, *context.prepared),
    ]
    for step in steps if context.config.qk_norm_first else reversed(steps):
        found = {name: step(name, value) for name, value in found.items()}
    if "query" in found and context.config.scale is not None:
        # Every back end divides scores by sqrt(head_dim).
        found["query"] *= context.config.scale * math.sqrt(context.model.head_dim)
    return {
        name: value if name in normed else checkpoint_name(value, name)
        for name, value in found.items()
    }


@jax.custom_vjp
def with_whole_cotangent(projected: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """A projection as it is, whose cotangent is an array before the products that read it.

    XLA for TPUs would work out the gradients of norm and rotation within these products, again for
    each tile: in AFM-server's step one of them took up to three times its cycles
    (`docs/decisions.md`).
    """
    return projected


def _with_whole_cotangent_forward(projected: Array) -> tuple[Array, None]:
    return projected, None


def _with_whole_cotangent_backward(_: None, cotangent: Array) -> tuple[Array]:
    return (lax.optimization_barrier(cotangent),)


with_whole_cotangent.defvjp(_with_whole_cotangent_forward, _with_whole_cotangent_backward)


def attend_and_project(
    query_BTNH: Float[Array, "B T N H"], signals: Signals, context: Context, window: int | None
) -> tuple[Float[Array, "B T D"], Signals]:
    """Attention to given keys and values, and the output projection.

    Args:
        query_BTNH: normalised and rotated queries.
        signals: the keys and values, and the layer's state.
        context: weights and configuration.
        window: positions that a token sees, itself among them; None for all earlier ones.

    Returns:
        This tensor shard's part of a sum, and the signals with the layer's new state.
    """
    sinks = context.vector("sinks") if context.config.sinks else None
    scope = Scope(window, sinks)
    attended_BTNH = context.memory.attend(query_BTNH, signals.keys_and_values, scope)
    state = context.activation_hook("heads", attended_BTNH, signals.state)
    signals = signals._replace(state=state)
    return context.product(attended_BTNH, "attention_output"), signals


def self_attention(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context, window: int | None = None
) -> tuple[Float[Array, "B T D"], Signals]:
    """Attention of tokens to themselves and earlier ones, at most the last `window` of them.

    Args:
        x_BTD: normalised hidden states of all tensor shards' tokens.
        signals: the layer's state among them.
        context: weights and configuration.
        window: positions that a token sees, itself among them; None for all earlier ones.

    Returns:
        This tensor shard's part of a sum, and the new signals.
    """
    query_BTNH = context.product(x_BTD, "query")
    key_BTKH = context.product(x_BTD, "key")
    value_BTKH = checkpoint_name(context.product(x_BTD, "value"), "value")
    found = positioned({"query": query_BTNH, "key": key_BTKH}, context)
    kept = (found["key"], value_BTKH)
    keys_and_values, state = context.memory.keep(kept, signals.state)
    signals = signals._replace(state=state, keys_and_values=keys_and_values)
    return attend_and_project(found["query"], signals, context, window)
