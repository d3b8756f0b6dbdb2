"""Text generation: prompts in, text out, whatever the number of prompts, devices and processes.

The compiled programs are those of `decoding.py`. This module lays parameters out for them, makes
batches of prompts, and gives what is written as it comes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from braeburn.config import MeshConfig, ModelConfig, Precision, read_run
from braeburn.errors import UserError
from braeburn.evaluate.decoding import (
    Draws,
    Prompts,
    cache_bytes,
    check_mesh,
    inference_layout,
    programs,
    types,
    weight_bytes,
)
from braeburn.evaluate.sampling import UNFILTERED, Sampling
from braeburn.layers.spec import Tree, random_key
from braeburn.layers.weights import BITS, to_bits
from braeburn.models import decoder
from braeburn.parallel.layout import Layout, one_device
from braeburn.parallel.rules import BATCH, batch_shards, partition
from braeburn.train.trained import Trained, load

# New tokens that the cache has room for at first; it grows when a text gets longer.
FIRST_ROOM = 256
# New tokens of each row in one call of the program, where nobody waits for each.
STEPS_AT_ONCE = 32
# The same, where somebody does.
STEPS_OF_STREAM = 4
ROWS_AT_ONCE = 32


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


@dataclass(frozen=True)
class Piece:
    """What was added to a prompt.

    Attributes:
        prompt: its number.
        tokens: the next tokens.
        end: why no more follow, "stop" or "length"; None where more may.
    """

    prompt: int
    tokens: list[int]
    end: str | None


@dataclass(frozen=True, eq=False)
class Ready:
    """A model whose parameters lie as generation needs them: see `ready`.

    Attributes:
        params: matrices in the type to compute in, or as `type_on_cpus` has them; norms float32;
            layers `apart`.
        model: sizes.
        layout: where the parameters lie; its execution is that of `inference`.
    """

    params: Tree
    model: ModelConfig
    layout: Layout


def ready(params: Tree, model: ModelConfig, layout: Layout, *, consume: bool = False) -> Ready:
    """Parameters as generation needs them: cast once, and each layer's by themselves.

    It goes parameter by parameter, so that no more than one is there twice.

    Args:
        params: of any float type, stacked, as `decoder.param_specs(model)` describes them.
        model: sizes.
        layout: of the parameters; its `precision.compute` is the type that matrices get.
        consume: gives each parameter up once it is cast.

    Raises:
        UserError: the mesh splits sequences.
    """
    own = inference_layout(model, layout)
    places, dtypes = own.parameters(), types(own)
    segments = {segment.name: segment.repeats for segment in model.segments}

    def cast(leaf: Any, places: tuple[NamedSharding, ...], dtype: Any, apart: bool) -> Any:
        leaf = jnp.asarray(leaf)
        if not apart and leaf.dtype == dtype and leaf.sharding.is_equivalent_to(*places, leaf.ndim):
            return (leaf,)
        # Waited for, since programs that gather hold each other up on CPUs of several processes
        # where many are on their way.
        found = jax.block_until_ready(_compiled_cast(places, dtype, apart)(leaf))
        if consume:
            leaf.delete()
        return found

    result: Tree = {}
    for name, tree in params.items():
        if name not in segments:
            (result[name],) = cast(tree, (places[name],), dtypes[name], apart=False)
            continue
        leaves, structure = jax.tree.flatten(tree)
        by_layer = [jax.tree.leaves(places[name][i]) for i in range(segments[name])]
        split = [
            cast(leaf, tuple(layer[number] for layer in by_layer), dtype, apart=True)
            for number, (leaf, dtype) in enumerate(
                zip(leaves, jax.tree.leaves(dtypes[name][0]), strict=True)
            )
        ]
        result[name] = tuple(
            jax.tree.unflatten(structure, [each[i] for each in split])
            for i in range(segments[name])
        )
    return Ready(result, model, own)


@functools.cache
def _compiled_cast(
    places: tuple[NamedSharding, ...], dtype: Any, apart: bool
) -> Callable[[Array], tuple[Array, ...]]:
    """The program that gives a leaf in a type and place, or each of its layers by itself."""

    def cast(leaf: Array) -> tuple[Array, ...]:
        parts = [leaf[i] for i in range(leaf.shape[0])] if apart else [leaf]
        return tuple(to_bits(each) if dtype == BITS else each.astype(dtype) for each in parts)

    return jax.jit(cast, out_shardings=places)


def load_ready(
    directory: Path, mesh: MeshConfig | None = None, compute: str | None = None
) -> tuple[Trained, Ready]:
    """The newest checkpoint of a run directory, to generate from.

    Args:
        directory: of the run.
        mesh: the devices to read it onto; None for one device.
        compute: the type of matrices and cache, "float32" or "bfloat16"; None for what the run
            computes in.

    Returns:
        What the directory holds, whose parameters are given up; and the model.

    Raises:
        UserError: see `trained.load`; or the mesh splits sequences.
    """
    if mesh is not None:
        check_mesh(mesh)
    # Never wider than it is used, and as it is stored where it is widened layer by layer.
    halved = (compute or read_run(directory).precision.compute) == "bfloat16"
    trained = load(directory, mesh, "bfloat16" if halved else None)
    precision = trained.run.precision
    if compute is not None:
        precision = Precision.model_validate(precision.model_dump() | {"compute": compute})
    execution = replace(trained.layout.execution, precision=precision)
    layout = replace(trained.layout, execution=execution)
    return trained, ready(trained.params, trained.model, layout, consume=True)


def generate(
    params: Tree,
    prompts: Sequence[Sequence[int]],
    model: ModelConfig,
    precision: Precision,
    generation: Generation,
) -> list[list[int]]:
    """Continues every prompt on one device: see `continuations`.

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
    check(prompts, model, generation)
    if not prompts:
        return []
    at_hand = ready(params, model, one_device(decoder.param_specs(model), precision))
    return collected(continuations(at_hand, prompts, generation, rows=len(prompts)), len(prompts))


def collected(pieces: Iterator[Piece], count: int) -> list[list[int]]:
    """All new tokens of each of so many prompts."""
    texts: list[list[int]] = [[] for _ in range(count)]
    for piece in pieces:
        texts[piece.prompt] += piece.tokens
    return texts


def continuations(
    at_hand: Ready,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    *,
    rows: int = ROWS_AT_ONCE,
    steps: int = STEPS_AT_ONCE,
) -> Iterator[Piece]:
    """Continues prompts, and gives what is added as it is drawn.

    Prompts of about the same length are continued together, so many at once; where there are more,
    the longest come first. What a prompt samples depends on the seed, its number and its text, not
    on the prompts beside it or the mesh. Lengths are rounded up, so other prompts of about the same
    length reuse the compiled programs.

    In several processes each is given the same prompts, and gets the same pieces.

    Args:
        at_hand: the model.
        prompts: token ids of each prompt, of any lengths.
        generation: how tokens are drawn, and how many.
        rows: prompts that are continued at once, rounded up to what the mesh deals out evenly.
        steps: new tokens of a row after which it is given what there is of them.

    Yields:
        Pieces, of which the last of each prompt tells why it ends.

    Raises:
        UserError: a prompt is empty or names no token of the model, or a setting is out of range.
    """
    check(prompts, at_hand.model, generation)
    shards = batch_shards(at_hand.layout.execution)
    size = -(-min(rows, len(prompts)) // shards) * shards
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(prompts), size or 1):
        numbers = longest_first[start : start + size]
        yield from _continue_batch(at_hand, prompts, numbers, size, generation, steps)


def check(prompts: Sequence[Sequence[int]], model: ModelConfig, generation: Generation) -> None:
    """Refuses prompts and settings that cannot be generated from.

    Raises:
        UserError: a prompt is empty or names no token of the model, or a setting is out of range.
    """
    _check_settings(generation)
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompts[{index}] is empty; start it with the tokenizer's begin token")
        if strange := [token for token in prompt if not 0 <= token < model.vocab_size]:
            raise UserError(
                f"prompts[{index}] has the token {strange[0]}, but vocab_size={model.vocab_size}; "
                f"encode it with the model's own tokenizer"
            )


def _check_settings(generation: Generation) -> None:
    """Refuses settings that are out of range.

    Raises:
        UserError: naming the setting and a value that would work.
    """
    sampling, limit = generation.sampling, generation.max_new_tokens
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
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


def _placed(values: Any, layout: Layout, spec: PartitionSpec) -> Array:
    """A host's array on the devices, of which each process has its own."""
    values = np.asarray(values)
    place = NamedSharding(layout.mesh, spec)
    return jax.make_array_from_callback(values.shape, place, lambda index: values[index])


def _draws(generation: Generation, layout: Layout) -> Draws:
    ids = generation.stop_ids
    # Of few distinct lengths, so that few programs are compiled.
    stops = np.full(8 if len(ids) <= 8 else round_up(len(ids)), -1, np.int32)
    stops[: len(ids)] = ids
    whole = PartitionSpec()
    data = _placed(jax.random.key_data(random_key(generation.seed)), layout, whole)
    return Draws(jax.random.wrap_key_data(data), _placed(stops, layout, whole))


def _continue_batch(
    at_hand: Ready,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    size: int,
    generation: Generation,
    steps: int,
) -> Iterator[Piece]:
    """The pieces of some prompts, in a batch of `size` rows."""
    layout = at_hand.layout
    limit = generation.max_new_tokens
    length, room = rooms(max(len(prompts[number]) for number in numbers), limit)
    tokens = np.zeros((size, length), np.int32)
    lengths = np.ones(size, np.int32)
    index = np.full(size, -1, np.int32)
    for row, number in enumerate(numbers):
        prompt = prompts[number]
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
        index[row] = number
    (axes,) = partition((BATCH,), (0,), "activations", layout.execution)
    texts = Prompts(
        *(_placed(values, layout, PartitionSpec(axes)) for values in (tokens, lengths, index))
    )
    draws = _draws(generation, layout)
    sampling = generation.sampling
    sampling = Sampling(float(sampling.temperature), sampling.top_k, float(sampling.top_p))
    run = programs(at_hand.model, layout.execution, layout.mesh, sampling)
    with layout.compiling():
        rows, told = run.begin(at_hand.params, texts, draws, room)
    step, given = 1, np.zeros(size, np.int64)
    running = set(range(len(numbers)))
    while True:
        written, counts = (np.asarray(values) for values in told)
        for row in sorted(running):
            end = "stop" if counts[row] < step else "length" if counts[row] == limit else None
            new = written[row, given[row] : counts[row]].tolist()
            given[row] = counts[row]
            if end:
                running.discard(row)
            if new or end:
                yield Piece(numbers[row], new, end)
        if not running:
            return
        if step == room:
            room = min(2 * room, round_up(limit))
            with layout.compiling():
                rows = run.grow(rows, room, length)
        step = min(step + steps, limit, room)
        until = _placed(np.int32(step), layout, PartitionSpec())
        with layout.compiling():
            rows, told = run.go_on(at_hand.params, rows, draws, until)


def memory(
    at_hand: Ready, prompts: Sequence[Sequence[int]], generation: Generation, rows: int
) -> dict[str, int]:
    """Bytes on each device of the "weights", and of the "cache" where it is largest.

    Args:
        at_hand: the model.
        prompts: token ids of each prompt, of any lengths.
        generation: how many tokens follow.
        rows: prompts that are continued at once.
    """
    limit = generation.max_new_tokens
    length, _ = rooms(max(map(len, prompts)), limit)
    execution = at_hand.layout.execution
    return {
        "weights": weight_bytes(at_hand.model, at_hand.layout),
        "cache": cache_bytes(
            at_hand.model, min(rows, len(prompts)), length + round_up(limit), execution
        ),
    }


def rooms(longest: int, limit: int) -> tuple[int, int]:
    """Of a batch, the length that prompts are padded to, and the new tokens that it has room for at
    first.

    Args:
        longest: tokens of the longest prompt.
        limit: the most new tokens.
    """
    return round_up(longest), round_up(min(limit, FIRST_ROOM))


def round_up(length: int) -> int:
    """The next power of two, at least 64: few distinct lengths, so few compilations."""
    return max(64, 1 << (int(length) - 1).bit_length())
