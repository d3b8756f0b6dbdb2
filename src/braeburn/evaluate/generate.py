"""Text generation: one pass over the prompts, then one token at a time over a cache, in two
compiled programs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

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


@dataclass(frozen=True)
class Generation:
    """How prompts are continued.

    Attributes:
        max_new_tokens: the most tokens to add to a prompt.
        sampling: how each is drawn.
        seed: of the sampling, of any size.
        stop_ids: the tokens that end a row; they are not returned.
    """

    max_new_tokens: int
    sampling: Sampling = UNFILTERED
    seed: int = 0
    stop_ids: Sequence[int] = ()


class Rows(NamedTuple):
    """Prompts that the model has read, and room for what it writes.

    Attributes:
        lengths: tokens of each prompt, int32 [B].
        logits: after the last token of each, float32 [B, V].
        cache: keys and values of the prompts, with slots for N more positions.
        tokens: zeros where the new tokens go, int32 [B, N].
    """

    lengths: Int[Array, " B"]
    logits: Float[Array, "B V"]
    cache: Any
    tokens: Int[Array, "B N"]


class Draws(NamedTuple):
    """What decides which tokens are drawn, and how many; other values need no other program.

    Attributes:
        key: a random key.
        limit: the most new tokens of a row, int32, at most N of `Rows`.
        stop_ids: the tokens that end a row, int32 [S]; -1 equals no token.
    """

    key: Key[Array, ""]
    limit: Int[Array, ""]
    stop_ids: Int[Array, " S"]


class Written(NamedTuple):
    """What is written after a number of steps.

    Attributes:
        step: the number, int32.
        tokens: those of each row, int32 [B, N]; only the first `step` are drawn yet.
        counts: how many of them come before the row's first stop token, int32 [B].
        cache: keys and values of the prompts and of all tokens but the newest.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B N"]
    counts: Int[Array, " B"]
    cache: Any


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
    generation: Generation,
) -> list[list[int]]:
    """Continues every prompt, all at once.

    What a row samples depends on the seed, its index and its prompt, not on the rows beside it.
    Lengths are rounded up, so other prompts of about the same length reuse the compiled programs.

    Args:
        params: parameters of any float type, as `decoder.param_specs(model)` describes them.
        prompts: token ids of each prompt, of any lengths.
        model: sizes.
        precision: the type to compute in; logits are float32.
        generation: how tokens are drawn, and how many.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: a prompt is empty or names no token of the model, or a setting is out of range.
    """
    _check(generation)
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
    execution = Execution(precision=precision)
    capacity = round_up(generation.max_new_tokens)
    rows = prefill(params, jnp.asarray(tokens), jnp.asarray(lengths), model, execution, capacity)
    ids = generation.stop_ids
    # Of few distinct lengths, so that few programs are compiled.
    stops = np.full(8 if len(ids) <= 8 else round_up(len(ids)), -1, np.int32)
    stops[: len(ids)] = ids
    draws = Draws(
        random_key(generation.seed), jnp.int32(generation.max_new_tokens), jnp.asarray(stops)
    )
    sampling = generation.sampling
    sampling = Sampling(float(sampling.temperature), sampling.top_k, float(sampling.top_p))
    written, counts = decode(params, rows, draws, model, execution, sampling)
    return [
        row[:count].tolist()
        for row, count in zip(np.asarray(written), np.asarray(counts), strict=True)
    ]


def _check(generation: Generation) -> None:
    """Refuses settings that are out of range.

    Raises:
        UserError: naming the setting and a value that would work.
    """
    temperature, top_k, top_p = dataclasses.astuple(generation.sampling)
    limit = generation.max_new_tokens
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature} is not 0 or more; set it to 0 for greedy text")
    if top_k is not None and top_k < 1:
        raise UserError(
            f"top_k={top_k} leaves no token; set top_k to 1 or more, or to None for all"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is not in (0, 1]; set top_p to 1 to keep all tokens")
    if limit < 1:
        raise UserError(f"max_new_tokens={limit} adds nothing; set max_new_tokens to 1 or more")


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
) -> Rows:
    """Reads the prompts.

    Rows are padded on the right. The slots of the padding hold its keys and values, but a query
    sees only the slots up to its own position, and a row overwrites each of them before it gets
    there.

    Args:
        params: parameters of any float type.
        tokens: vocabulary ids of the prompts, int32 [B, T].
        lengths: tokens of each prompt without its padding, int32 [B].
        model: what is computed.
        execution: on one device.
        capacity: N, the most new tokens that there shall be room for.

    Returns:
        The rows that `decode` goes on from.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    cache = decoder.empty_cache(model, batch, length, execution)
    hidden, cache = decoder.forward_cached(params, (tokens, positions), cache, model, execution)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    room = [(0, 0), (0, 0), (0, capacity), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda slots: jnp.pad(slots, room), cache)
    tokens = jnp.zeros((batch, capacity), jnp.int32)
    return Rows(lengths, last_logits(params, last), cache, tokens)


@functools.partial(jax.jit, static_argnames=("model", "execution", "sampling"))
def decode(
    params: Tree,
    rows: Rows,
    draws: Draws,
    model: ModelConfig,
    execution: Execution,
    sampling: Sampling,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """Writes up to `draws.limit` new tokens of each row.

    Args:
        params: parameters of any float type.
        rows: the prompts that were read, of `prefill`.
        draws: the random key, the limit and the stop tokens.
        model: what is computed.
        execution: on one device.
        sampling: how a token is drawn.

    Returns:
        The tokens, and how many of each row come before its first stop token.
    """
    batch = rows.tokens.shape[0]
    # Matrices in the type that they are multiplied in, so that it is done once and not for each
    # token.
    dtype = execution.precision.compute
    params = jax.tree.map(
        lambda spec, leaf: leaf if spec.role == "norm" else leaf.astype(dtype),
        decoder.param_specs(model),
        params,
    )
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(draws.key, jnp.arange(batch))

    def append(logits: Float[Array, "B V"], written: Written) -> Written:
        """One more token of each row."""
        step, tokens, counts, cache = written
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        token = choose(logits, keys, sampling)
        # A row still runs while it has as many tokens as there were steps.
        running = (counts == step) & ~jnp.isin(token, draws.stop_ids)
        return Written(step + 1, tokens.at[:, step].set(token), counts + running, cache)

    def unfinished(written: Written) -> Bool[Array, ""]:
        return (written.step < draws.limit) & jnp.any(written.counts == written.step)

    def advance(written: Written) -> Written:
        newest = jax.lax.dynamic_slice_in_dim(written.tokens, written.step - 1, 1, axis=1)
        inputs = (newest, (rows.lengths + written.step - 1)[:, None])
        hidden, cache = decoder.forward_cached(params, inputs, written.cache, model, execution)
        return append(last_logits(params, hidden[:, 0]), written._replace(cache=cache))

    nothing = Written(jnp.int32(0), rows.tokens, jnp.zeros(batch, jnp.int32), rows.cache)
    written = jax.lax.while_loop(unfinished, advance, append(rows.logits, nothing))
    return written.tokens, written.counts


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

    Top-k keeps the `top_k` largest, the lower id first among equals. Top-p then keeps the fewest
    of these, the largest first, whose probabilities among them sum to at least `top_p`.
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
