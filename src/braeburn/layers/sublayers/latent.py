"""Attention whose keys and values are made of one latent that all heads share (DeepSeek-V2, arXiv
2405.04434, section 2.1).

To train, each head's keys and values are made of the latents and attended to like any others. To
generate, the matrices that would make them are multiplied to queries and results instead, so that
queries meet the latents themselves, and nothing else is kept of a token (section 2.1.2).

Shapes are named by letters: B sequences, T positions, D d_model, N heads, R latent_dim, P
plain_dim, r rotated_dim, H the sum of these, W numbers of a head's value.
"""

import math

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import ModelConfig
from braeburn.config.sublayers.latent import LatentAttention
from braeburn.layers import rope
from braeburn.layers.attention.backend import EVERYTHING
from braeburn.layers.norm import rms_norm
from braeburn.layers.spec import ParamSpec
from braeburn.layers.sublayers import rotary
from braeburn.layers.sublayers.definition import Context, Kept, Signals, Sublayer, matrix
from braeburn.layers.sublayers.rotary import Rotation


def specs(config: LatentAttention, model: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of the matrices, and of the norm of each latent."""
    latent, queries = config.latent_dim, config.query_latent_dim
    key_dim, value_dim = config.head_dims(model.head_dim)
    found = {
        "key_value_down": _down(model, latent + config.rotated_dim),
        "latent_norm": ParamSpec((latent,), ("latent",), "norm"),
        "key_value_up": _up(model, latent, config.plain_dim + value_dim),
        "attention_output": matrix(model, ("heads", "head_dim"), ("embed",)),
    }
    if not queries:
        shape, axes = (model.d_model, model.num_heads, key_dim), ("embed", "heads", "key_dim")
        return found | {"query": ParamSpec(shape, axes, "matrix", ("embed",))}
    return found | {
        "query_down": _down(model, queries),
        "query_latent_norm": ParamSpec((queries,), ("latent",), "norm"),
        "query_up": _up(model, queries, key_dim),
    }


def _down(model: ModelConfig, size: int) -> ParamSpec:
    return ParamSpec((model.d_model, size), ("embed", "latent"), "matrix", ("embed",))


def _up(model: ModelConfig, latent: int, size: int) -> ParamSpec:
    shape, axes = (latent, model.num_heads, size), ("latent", "heads", "key_dim")
    return ParamSpec(shape, axes, "matrix", ("latent",))


def rotation(config: LatentAttention, model: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """The rotation of every position, of the rotated part of heads."""
    return rotary.rotation(config, model, config.rotated_dim, positions)


def score_scale(config: LatentAttention, model: ModelConfig) -> float:
    """What the products of queries and keys are multiplied by."""
    key_dim, _ = config.head_dims(model.head_dim)
    scale = config.scale if config.scale is not None else key_dim**-0.5
    scaling = rotary.scaling_of(config, model)
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    # DeepSeek-V2, section 3.1.4: queries and keys are multiplied by it once each.
    return scale * rope.yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


def _query(x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T N H"]:
    """Queries before their rotation."""
    if not context.config.query_latent_dim:
        return context.linear(x_BTD, "query")
    latent = context.linear(x_BTD, "query_down")
    latent = rms_norm(latent, context.weights["query_latent_norm"], context.model.norm_epsilon)
    return context.linear(latent, "query_up")


def apply(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
) -> tuple[Float[Array, "B T D"], Signals]:
    """This tensor shard's part of a sum over heads."""
    config, model = context.config, context.model
    plain_dim, latent_dim = config.plain_dim, config.latent_dim
    query_BTNH = _query(x_BTD, context)
    rotated = rope.rotate_neighbours(query_BTNH[..., plain_dim:], *context.prepared)
    plain_BTNP = query_BTNH[..., :plain_dim]

    down = context.linear(x_BTD, "key_value_down")
    latent_BTR = rms_norm(
        down[..., :latent_dim], context.weights["latent_norm"], model.norm_epsilon
    )
    shared_BT1r = rope.rotate_neighbours(down[..., None, latent_dim:], *context.prepared)
    kept = jnp.concatenate([latent_BTR[:, :, None], shared_BT1r], axis=-1)
    (held,), state = context.memory.keep((kept,), signals.state)

    if context.memory.holds_past:
        up_RNH = context.used(x_BTD, "key_value_up")
        query = jnp.einsum("BTNP,RNP->BTNR", plain_BTNP, up_RNH[..., :plain_dim])
        query = _scaled(jnp.concatenate([query, rotated], axis=-1), context)
        # Of the latents with the rotated part, since a slice of the cache would be a copy of it.
        found_BTNR = context.memory.attend(query, (held, held), EVERYTHING)[..., :latent_dim]
        attended_BTNW = jnp.einsum("BTNR,RNW->BTNW", found_BTNR, up_RNH[..., plain_dim:])
    else:
        up_BTNH = context.linear(latent_BTR, "key_value_up")
        keys = up_BTNH[..., :plain_dim]
        shared = jnp.broadcast_to(shared_BT1r, (*keys.shape[:-1], config.rotated_dim))
        query = _scaled(jnp.concatenate([plain_BTNP, rotated], axis=-1), context)
        query = checkpoint_name(query, "query")
        key = checkpoint_name(jnp.concatenate([keys, shared], axis=-1), "key")
        value = checkpoint_name(up_BTNH[..., plain_dim:], "value")
        attended_BTNW = context.memory.attend(query, (key, value), EVERYTHING)

    state = context.activation_hook("heads", attended_BTNW, state)
    return context.linear(attended_BTNW, "attention_output"), signals._replace(state=state)


def _scaled(query: Float[Array, "B T N H"], context: Context) -> Float[Array, "B T N H"]:
    """Queries for back ends that divide scores by the square root of H."""
    factor = score_scale(context.config, context.model) * math.sqrt(query.shape[-1])
    return query if math.isclose(factor, 1.0) else query * factor


def cache(config: LatentAttention) -> tuple[Kept, ...]:
    """A token's latent and the rotated part of its key, as one head of both."""
    return (Kept(("latent_heads", "latent"), sizes=(1, config.latent_dim + config.rotated_dim)),)


DEFINITION = Sublayer(specs=specs, apply=apply, prepare=rotation, cache=cache)
