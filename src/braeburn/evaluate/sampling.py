"""How the next token is drawn from logits, whose vocabulary may be split over devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.parallel.collectives import TENSOR, all_gather, axis_index

# Divided by less, logits leave float32's range. Any difference between two is then far beyond what
# chance could turn.
GREEDY_BELOW = 1e-30

DEFAULT_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from what top-k and then top-p leave.

    Attributes:
        temperature: divides the logits; 0 takes the top-1 token, as does anything below 1e-30.
        top_k: how many of the most probable tokens to draw from; None for all.
        top_p: draws from the fewest of the most probable tokens whose probabilities sum to this.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


UNFILTERED = Sampling()

# Defaults of a model that `Sampling` has no field for, each with the value at which it changes
# nothing.
_NOT_APPLIED = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def sampling_defaults(said: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
    """How tokens are drawn where the user says nothing: as the model's `generation_config.json` has
    it.

    Args:
        said: its fields; empty for a model that was trained here.

    Returns:
        The sampling; and the fields that ask for something which is not applied here, as
        "name=value".
    """
    temperature = said.get("temperature", 1.0 if said.get("do_sample") else DEFAULT_TEMPERATURE)
    if said.get("do_sample") is False:
        temperature = 0.0
    not_applied = [
        f"{name}={said[name]}"
        for name, neutral in _NOT_APPLIED.items()
        if said.get(name, neutral) != neutral
    ]
    return Sampling(temperature, said.get("top_k") or None, said.get("top_p", 1.0)), not_applied


def choose(
    logits: Float[Array, "B v"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    mesh: MeshConfig = ONE_DEVICE,
) -> Int[Array, " B"]:
    """The next token of each row, the same on every shard of `tensor` and on any mesh.

    Args:
        logits: at this tensor shard's part of the vocabulary, float32, v = V / tensor.
        keys: a random key for each row.
        sampling: how a token is drawn.
        mesh: resolved sizes; with several tensor shards the call is inside a `shard_map`.
    """
    if sampling.temperature >= GREEDY_BELOW:
        logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p, mesh)
        # The token of which logit and noise sum to most is a draw from the softmax. Each shard
        # makes the noise of the whole vocabulary, as one device would, and takes its part.
        size = logits.shape[-1]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (size * mesh.tensor,)))(keys)
        first = axis_index(TENSOR, mesh) * size
        logits += jax.lax.dynamic_slice_in_dim(noise, first, size, axis=-1)
    return _largest(logits, mesh)


def _largest(logits: Float[Array, "B v"], mesh: MeshConfig) -> Int[Array, " B"]:
    """The id of the largest logit of each row, the lowest among equals."""
    own = jnp.argmax(logits, axis=-1)[:, None]
    value = all_gather(jnp.take_along_axis(logits, own, axis=-1), TENSOR, 1, mesh)
    first = axis_index(TENSOR, mesh) * logits.shape[-1]
    ids = all_gather(own + first, TENSOR, 1, mesh)
    shard = jnp.argmax(value, axis=-1)[:, None]
    return jnp.take_along_axis(ids, shard, axis=-1)[:, 0].astype(jnp.int32)


def filter_logits(
    logits: Float[Array, "*B v"], top_k: int | None, top_p: float, mesh: MeshConfig = ONE_DEVICE
) -> Float[Array, "*B v"]:
    """The logits with -inf for every token but those to sample from.

    Top-k keeps the `top_k` largest, the lower id first among equals. Top-p then keeps the fewest
    of these, the largest first, whose probabilities among them sum to at least `top_p`.

    Args:
        logits: at this tensor shard's part of the vocabulary, v = V / tensor.
        top_k: None for all.
        top_p: in (0, 1].
        mesh: resolved sizes; with several tensor shards the call is inside a `shard_map`.
    """
    size = logits.shape[-1]
    vocab_size = size * mesh.tensor
    if (top_k is None or top_k >= vocab_size) and top_p >= 1:
        return logits
    count = min(top_k or vocab_size, vocab_size)
    first = axis_index(TENSOR, mesh) * size
    # `top_k` is in descending order with the lower id first among equals, so what is kept is a
    # prefix of it. What the shards found stands in the order of their ids, so that this holds of
    # the largest among them, too.
    ranked, ids = jax.lax.top_k(logits, min(count, size))
    if mesh.tensor > 1:
        last_dim = logits.ndim - 1
        candidates = all_gather(ranked, TENSOR, last_dim, mesh)
        candidate_ids = all_gather(ids + first, TENSOR, last_dim, mesh)
        ranked, places = jax.lax.top_k(candidates, count)
        ids = jnp.take_along_axis(candidate_ids, places, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = (
        jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1) - 1
        if top_p < 1
        else jnp.full_like(ids[..., :1], -1)
    )
    last_logit, last_id = (jnp.take_along_axis(values, last, axis=-1) for values in (ranked, ids))
    own_ids = first + jnp.arange(size)
    kept = (logits > last_logit) | ((logits == last_logit) & (own_ids <= last_id))
    return jnp.where(kept, logits, -jnp.inf)
