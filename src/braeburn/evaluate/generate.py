"""Text generation: one pass over the prompts, then one token at a time over a cache, in two
compiled programs.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from braeburn.config import Execution, ModelConfig, Precision
from braeburn.errors import UserError
from braeburn.layers.spec import Tree, random_key
from braeburn.models import decoder

# Divided by less, logits leave float32's range. Any difference between two is then far beyond what
# chance could turn.
GREEDY_BELOW = 1e-30

DEFAULT_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, otherwise from what top-k and then
    top-p leave.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


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


def generate(
    params: Tree,
    prompts: Sequence[Sequence[int]],
    model: ModelConfig,
    precision: Precision,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Continues every prompt, all at once.

    What a row samples depends on `seed`, its index and its prompt, not on the rows beside it.
    Lengths are rounded up, so other prompts of about the same length reuse the compiled programs.

    Args:
        params: parameters of any float type, as `decoder.param_specs(model)` describes them.
        prompts: token ids of each prompt, of any lengths.
        model: sizes.
        precision: the type to compute in; logits are float32.
        max_new_tokens: the most tokens to add to a prompt.
        temperature: divides the logits; 0 takes the likeliest token, as does anything below 1e-30.
        top_k: how many of the likeliest tokens to sample from; None for all.
        top_p: samples from the fewest likeliest tokens whose probabilities sum to this.
        seed: of the sampling, of any size.
        stop_ids: the tokens that end a row; they are not returned.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: a prompt is empty or names no token of the model, or a setting is out of range.
    """
    sampling = Sampling(float(temperature), top_k, float(top_p))
    for allowed, sentence in (
        (
            0 <= temperature < float("inf"),
            f"temperature={temperature} is not 0 or more; set it to 0 for greedy text",
        ),
        (
            top_k is None or top_k >= 1,
            f"top_k={top_k} leaves no token; set top_k to 1 or more, or to None for all",
        ),
        (0 < top_p <= 1, f"top_p={top_p} is not in (0, 1]; set top_p to 1 to keep all tokens"),
        (
            max_new_tokens >= 1,
            f"max_new_tokens={max_new_tokens} adds nothing; set max_new_tokens to 1 or more",
        ),
    ):
        if not allowed:
            raise UserError(sentence)
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompts[{index}] is empty; start it with the tokenizer's begin token")
        if strange := [token for token in prompt if not 0 <= token < model.vocab_size]:
            raise UserError(
                f"prompts[{index}] has the token {strange[0]}, but vocab_size={model.vocab_size}; "
                f"encode it with the model's own tokenizer"
            )
    if not prompts:
        return []

    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), round_up(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    capacity = round_up(max_new_tokens)
    execution = Execution(precision=precision)
    logits, cache = prefill(params, tokens, lengths, model, execution, capacity)
    key = random_key(seed)
    # Of few distinct lengths, so that few programs are compiled; -1 equals no token.
    stops = np.full(8 if len(stop_ids) <= 8 else round_up(len(stop_ids)), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    generated, counts = decode(
        params,
        logits,
        cache,
        lengths,
        key,
        max_new_tokens,
        stops,
        model,
        execution,
        sampling,
        capacity,
    )
    return [
        row[:count].tolist()
        for row, count in zip(np.asarray(generated), np.asarray(counts), strict=True)
    ]


def round_up(length: int) -> int:
    """The next power of two, at least 64: few distinct lengths, so few compilations."""
    return max(64, 1 << (int(length) - 1).bit_length())


def last_logits(params: Tree, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Float32 logits of one position of each row."""
    head = decoder.head_matrix(params).astype(hidden.dtype)
    return jnp.einsum("BD,VD->BV", hidden, head, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "execution", "capacity"))
def prefill(
    params: Tree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    model: ModelConfig,
    execution: Execution,
    capacity: int,
) -> tuple[Float[Array, "B V"], Any]:
    """Logits after each row's last token, and a cache of the prompts with room for `capacity` more
    positions.

    Rows are padded on the right. The slots of the padding hold its keys and values, but a query
    sees only the slots up to its own position, and a row overwrites each of them before it gets
    there.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    cache = decoder.empty_cache(model, batch, length, execution)
    hidden, cache = decoder.forward_cached(params, (tokens, positions), cache, model, execution)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    room = [(0, 0), (0, 0), (0, capacity), (0, 0), (0, 0)]
    return last_logits(params, last), jax.tree.map(lambda slots: jnp.pad(slots, room), cache)


@functools.partial(jax.jit, static_argnames=("model", "execution", "sampling", "capacity"))
def decode(
    params: Tree,
    logits: Float[Array, "B V"],
    cache: Any,
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    limit: Int[Array, ""],
    stop_ids: Int[Array, " S"],
    model: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    capacity: int,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """Up to `limit` <= `capacity` new tokens of each row, and how many come before the first of
    `stop_ids`.
    """
    batch = logits.shape[0]
    # Matrices in the type that they are multiplied in, so that it is done once and not for each
    # token.
    dtype = execution.precision.compute
    params = jax.tree.map(
        lambda spec, leaf: leaf if spec.role == "norm" else leaf.astype(dtype),
        decoder.param_specs(model),
        params,
    )
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

    def append(
        generated: Array, counts: Array, logits: Array, step: Int[Array, ""] | int
    ) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(row_keys, step), sampling)
        running = (counts == step) & ~jnp.isin(token, stop_ids)
        return generated.at[:, step].set(token), counts + running

    # A row still runs while it has as many tokens as there were steps.
    def unfinished(state: tuple) -> Array:
        step, _, counts, _ = state
        return (step < limit) & jnp.any(counts == step)

    def advance(state: tuple) -> tuple:
        step, generated, counts, cache = state
        newest = jax.lax.dynamic_slice_in_dim(generated, step - 1, 1, axis=1)
        positions = (lengths + step - 1)[:, None]
        inputs = (newest, positions)
        hidden, cache = decoder.forward_cached(params, inputs, cache, model, execution)
        return step + 1, *append(generated, counts, last_logits(params, hidden[:, 0]), step), cache

    empty = jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32)
    state = (jnp.int32(1), *append(*empty, logits, 0), cache)
    _, generated, counts, _ = jax.lax.while_loop(unfinished, advance, state)
    return generated, counts


def choose(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """The next token of each row."""
    if sampling.temperature < GREEDY_BELOW:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filter_logits(
    logits: Float[Array, "*B V"], top_k: int | None, top_p: float
) -> Float[Array, "*B V"]:
    """The logits with -inf for every token but those to sample from.

    Top-k keeps the `top_k` likeliest, the lower id first among equals. Top-p then keeps the fewest
    of these, likeliest first, whose probabilities among them sum to at least `top_p`.
    """
    vocab_size = logits.shape[-1]
    if (top_k is None or top_k >= vocab_size) and top_p >= 1:
        return logits
    # `top_k` is in descending order with the lower id first among equals, so what is kept is a
    # prefix of it.
    ranked, ids = jax.lax.top_k(logits, min(top_k or vocab_size, vocab_size))
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = (
        jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1) - 1
        if top_p < 1
        else jnp.full_like(ids[..., :1], -1)
    )
    last_logit, last_id = (jnp.take_along_axis(values, last, axis=-1) for values in (ranked, ids))
    kept = (logits > last_logit) | ((logits == last_logit) & (jnp.arange(vocab_size) <= last_id))
    return jnp.where(kept, logits, -jnp.inf)
