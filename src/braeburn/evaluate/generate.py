"""Text generation: one pass over the prompts, then one token at a time over a cache, on any mesh.

Two compiled programs do it, which the host calls for a batch of rows: `begin` reads the prompts and
draws the first token of each, and `go_on` draws more, as many as it is asked for in one call. Like
the train step these are programs of one device in a `shard_map`: the axes that split a batch deal
out the rows, `fsdp` gathers weights layer by layer, and the shards of `tensor` each have their
heads, with the cache of these, and their part of the vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from braeburn.config import Execution, MeshConfig, ModelConfig, Precision
from braeburn.config.rules import Placement
from braeburn.errors import UserError
from braeburn.evaluate.sampling import UNFILTERED, Sampling, choose
from braeburn.layers.spec import Tree, random_key
from braeburn.models import cached, decoder
from braeburn.parallel.collectives import FSDP, all_to_all, reduce_scatter
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


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
        tokens: vocabulary ids, padded on the right, int32 [B, T].
        lengths: tokens of each without the padding, int32 [B].
        number: of each prompt, which its random choices follow from, int32 [B]; -1 for a row that
            only fills up the batch.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    number: Int[Array, " B"]


class Draws(NamedTuple):
    """What decides which tokens are drawn; other values need no other program.

    Attributes:
        key: a random key.
        stop_ids: the tokens that end a row, int32 [S]; -1 equals no token.
    """

    key: Key[Array, ""]
    stop_ids: Int[Array, " S"]


class Rows(NamedTuple):
    """What is written after a number of steps.

    Attributes:
        step: the number, int32, at least 1.
        lengths: tokens of each prompt, int32 [B].
        number: of each prompt, int32 [B].
        tokens: those of each row, int32 [B, N]; only the first `step` are drawn yet.
        counts: how many of them come before the row's first stop token, int32 [B]; -1 for a row
            that only fills up the batch.
        cache: keys and values of the prompts and of all tokens but the newest, in the type to
            compute in, as `cached.empty_cache` describes them.
    """

    step: Int[Array, ""]
    lengths: Int[Array, " B"]
    number: Int[Array, " B"]
    tokens: Int[Array, "B N"]
    counts: Int[Array, " B"]
    cache: Any


class Told(NamedTuple):
    """What the host looks at, the same on every device.

    Attributes:
        tokens: of all rows, int32 [B, N].
        counts: of all rows, int32 [B].
    """

    tokens: Int[Array, "B N"]
    counts: Int[Array, " B"]


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


@dataclass(frozen=True)
class Programs:
    """The compiled programs, of whole arrays.

    Attributes:
        begin: (parameters, prompts, draws, new tokens that there is room for) -> (rows, told).
        go_on: (parameters, rows, draws, the step to stop at) -> (rows, told). It stops earlier
            where every row has ended. The rows that it is given are given up.
        grow: (rows, new tokens that there is to be room for, the padded length of prompts) -> rows.
            Those that it is given are given up.
    """

    begin: Callable[..., tuple[Rows, Told]]
    go_on: Callable[..., tuple[Rows, Told]]
    grow: Callable[[Rows, int, int], Rows]


def check_mesh(mesh: MeshConfig) -> None:
    """Refuses a mesh that generation cannot use.

    Raises:
        UserError: the mesh splits sequences.
    """
    if mesh.context != 1:
        instead = max(mesh.context, 2)
        raise UserError(
            f"--mesh context={mesh.context} splits sequences, but a text is written token by "
            f"token; deal prompts out to the devices with --mesh data={instead} instead"
        )


def inference(execution: Execution) -> Execution:
    """How a model is carried out to generate from.

    Norms are whole on each device: they are small, and gathering each takes as long as a matrix of
    a small model.

    Raises:
        UserError: the mesh splits sequences.
    """
    check_mesh(execution.mesh)
    whole = Placement(whole_if_uneven=True)
    rules = execution.rules.model_copy(update={"norm_embed": whole, "norm_head_dim": whole})
    return replace(execution.forward_only, rules=rules, split_tokens=False)


@dataclass(frozen=True, eq=False)
class Ready:
    """A model whose parameters lie as generation needs them: see `ready`.

    Attributes:
        params: matrices in the type to compute in, norms float32; layers `apart`.
        model: sizes.
        layout: where the parameters lie; its execution is that of `inference`.
    """

    params: Tree
    model: ModelConfig
    layout: Layout


def inference_layout(model: ModelConfig, layout: Layout) -> Layout:
    """Where parameters lie to generate from, on the mesh of a layout.

    Raises:
        UserError: the mesh splits sequences.
    """
    return replace(layout, execution=inference(layout.execution), specs=cached.apart_specs(model))


def types(model: ModelConfig, execution: Execution) -> Tree:
    """The type of each parameter that is generated from, where layers are apart."""
    compute = jnp.dtype(execution.precision.compute)
    return jax.tree.map(
        lambda spec: jnp.dtype(jnp.float32) if spec.role == "norm" else compute,
        cached.apart_specs(model),
    )


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
    places = own.parameters()
    dtypes = types(model, own.execution)
    segments = {segment.name: segment.repeats for segment in model.segments}

    def cast(leaf: Any, targets: list[tuple[Any, Any]], index: Sequence[int | None]) -> list[Any]:
        leaf = jnp.asarray(leaf)
        found = [
            _cast(leaf, i, dtype, place) for i, (dtype, place) in zip(index, targets, strict=True)
        ]
        if consume:
            jax.block_until_ready(found)
            if all(each is not leaf for each in found):
                leaf.delete()
        return found

    result: Tree = {}
    for name, tree in params.items():
        if name not in segments:
            (result[name],) = cast(tree, [(dtypes[name], places[name])], [None])
            continue
        repeats = range(segments[name])
        leaves, structure = jax.tree.flatten(tree)
        by_layer = [
            list(
                zip(jax.tree.leaves(dtypes[name][i]), jax.tree.leaves(places[name][i]), strict=True)
            )
            for i in repeats
        ]
        split = [
            cast(leaf, [by_layer[i][number] for i in repeats], repeats)
            for number, leaf in enumerate(leaves)
        ]
        result[name] = tuple(
            jax.tree.unflatten(structure, [each[i] for each in split]) for i in repeats
        )
    return Ready(result, model, own)


def _cast(leaf: Array, index: int | None, dtype: Any, place: NamedSharding) -> Array:
    """One layer of a leaf, or all of it, in a type and place; the leaf itself where nothing
    changes.
    """
    if index is None and leaf.dtype == dtype and leaf.sharding.is_equivalent_to(place, leaf.ndim):
        return leaf
    return _compiled_cast(place, dtype, index is not None)(leaf, 0 if index is None else index)


@functools.cache
def _compiled_cast(place: NamedSharding, dtype: Any, one_layer: bool) -> Callable[..., Array]:
    def cast(leaf: Array, index: Array) -> Array:
        if one_layer:
            leaf = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
        return leaf.astype(dtype)

    return jax.jit(cast, out_shardings=place)


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
    trained = load(directory, mesh)
    precision = trained.run.precision
    if compute is not None:
        precision = Precision.model_validate(precision.model_dump() | {"compute": compute})
    execution = replace(trained.layout.execution, precision=precision)
    layout = replace(trained.layout, execution=execution)
    return trained, ready(trained.params, trained.model, layout, consume=True)


@dataclass(frozen=True)
class Writing:
    """What the programs are compiled for.

    Attributes:
        model: what is computed.
        execution: how it is carried out, of `inference`.
        sampling: how tokens are drawn.
    """

    model: ModelConfig
    execution: Execution
    sampling: Sampling


def last_logits(
    params: Tree, hidden: Float[Array, "B D"], execution: Execution
) -> Float[Array, "B v"]:
    """Float32 logits of one position of each row, at this tensor shard's part of the vocabulary.

    Where the head is split over `fsdp`, the hidden states of a few rows travel, not the head.
    """
    mesh = execution.mesh
    head = decoder.head_matrix(params).astype(hidden.dtype)
    hidden = all_to_all(hidden, FSDP, 1, 0, mesh)
    logits = jnp.einsum("BD,VD->BV", hidden, head, preferred_element_type=jnp.float32)
    return reduce_scatter(logits, FSDP, 0, mesh)


def _append(logits: Float[Array, "B v"], rows: Rows, draws: Draws, writing: Writing) -> Rows:
    """One more token of each row."""
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(draws.key, rows.number)
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, rows.step)
    token = choose(logits, keys, writing.sampling, writing.execution.mesh)
    # A row still runs while it has as many tokens as there were steps.
    running = (rows.counts == rows.step) & ~jnp.isin(token, draws.stop_ids)
    return rows._replace(
        step=rows.step + 1,
        tokens=rows.tokens.at[:, rows.step].set(token),
        counts=rows.counts + running,
    )


def _row_axes(execution: Execution) -> tuple[str, ...]:
    """The axes of more than one device that deal out the rows of a batch."""
    sizes = execution.mesh.sizes
    return tuple(axis for axis in execution.rules.batch.activations if sizes[axis] > 1)


def _told(rows: Rows, execution: Execution) -> Told:
    told = Told(rows.tokens, rows.counts)
    if axes := _row_axes(execution):
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=0, tiled=True), told)
    return told


def begin_rows(
    params: Tree, prompts: Prompts, draws: Draws, room: int, writing: Writing
) -> tuple[Rows, Told]:
    """One device's program: reads its prompts, and draws the first token of each.

    Args:
        params: this device's part of them, as `ready` arranges them.
        prompts: this device's.
        draws: what decides which tokens are drawn.
        room: N, the new tokens that there is to be room for.
        writing: what the program is compiled for.
    """
    model, execution = writing.model, writing.execution
    batch, length = prompts.tokens.shape
    slots = length + room
    last, cache = cached.read(params, prompts.tokens, prompts.lengths, slots, model, execution)
    tokens = jnp.zeros((batch, room), jnp.int32)
    counts = jnp.where(prompts.number < 0, -1, 0)
    nothing = Rows(jnp.int32(0), prompts.lengths, prompts.number, tokens, counts, cache)
    rows = _append(last_logits(params, last, execution), nothing, draws, writing)
    return rows, _told(rows, execution)


def continue_rows(
    params: Tree, rows: Rows, draws: Draws, until: Int[Array, ""], writing: Writing
) -> tuple[Rows, Told]:
    """One device's program: draws tokens of its rows up to a step, or until all rows have ended.

    Args:
        params: this device's part of them, as `ready` arranges them.
        rows: this device's.
        draws: what decides which tokens are drawn.
        until: the step, int32, at most N.
        writing: what the program is compiled for.
    """
    model, execution = writing.model, writing.execution
    axes = _row_axes(execution)

    def some_run(rows: Rows) -> Bool[Array, ""]:
        running = jnp.any(rows.counts == rows.step)
        # Every device goes round equally often, for its collectives.
        return jax.lax.pmax(running, axes) if axes else running

    def unfinished(carry: tuple[Rows, Array]) -> Bool[Array, ""]:
        rows, running = carry
        return (rows.step < until) & running

    def advance(carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
        rows, _ = carry
        newest = jax.lax.dynamic_slice_in_dim(rows.tokens, rows.step - 1, 1, axis=1)
        inputs = (newest, (rows.lengths + rows.step - 1)[:, None])
        hidden, cache = cached.forward_cached(params, inputs, rows.cache, model, execution)
        logits = last_logits(params, hidden[:, 0], execution)
        rows = _append(logits, rows._replace(cache=cache), draws, writing)
        return rows, some_run(rows)

    rows, _ = jax.lax.while_loop(unfinished, advance, (rows, some_run(rows)))
    return rows, _told(rows, execution)


def rows_partition(model: ModelConfig, execution: Execution) -> Rows:
    """How rows are split over a mesh."""
    (rows,) = partition((BATCH,), (0,), "activations", execution)
    each: Any = PartitionSpec(rows)
    whole: Any = PartitionSpec()
    cache = cached.cache_partitions(model, execution)
    return Rows(whole, each, each, each, each, cache)


@functools.lru_cache(maxsize=16)
def programs(model: ModelConfig, execution: Execution, mesh: Any, sampling: Sampling) -> Programs:
    """The programs over whole arrays.

    They can be lowered for a mesh whose devices are not there, with `abstract_params` and
    `abstract_prompts`.

    Args:
        model: what is computed.
        execution: of `inference`.
        mesh: of JAX, abstract or not.
        sampling: how tokens are drawn.
    """
    layout = Layout(execution, mesh, cached.apart_specs(model))
    writing = Writing(model, execution, sampling)
    split = rows_partition(model, execution)
    prompts = Prompts(split.tokens, split.lengths, split.number)
    whole = PartitionSpec()

    def mapped(function: Callable, *in_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=(split, whole), check_vma=False
        )

    def begin(params: Tree, texts: Prompts, draws: Draws, room: int) -> tuple[Rows, Told]:
        def local(params: Tree, texts: Prompts, draws: Draws) -> tuple[Rows, Told]:
            return begin_rows(params, texts, draws, room, writing)

        return mapped(local, layout.partitions, prompts, whole)(params, texts, draws)

    def go_on(params: Tree, rows: Rows, draws: Draws, until: Array) -> tuple[Rows, Told]:
        def local(params: Tree, rows: Rows, draws: Draws, until: Array) -> tuple[Rows, Told]:
            return continue_rows(params, rows, draws, until, writing)

        return mapped(local, layout.partitions, split, whole, whole)(params, rows, draws, until)

    def grow(rows: Rows, room: int, length: int) -> Rows:
        def local(rows: Rows) -> Rows:
            wanted = jax.eval_shape(
                lambda: cached.empty_cache(model, rows.lengths.size, length + room, execution)
            )
            cache = jax.tree.map(
                lambda old, new: cached.grown(old, new.shape[-2]), rows.cache, wanted
            )
            tokens = jnp.pad(rows.tokens, ((0, 0), (0, room - rows.tokens.shape[1])))
            return rows._replace(tokens=tokens, cache=cache)

        return jax.shard_map(local, mesh=mesh, in_specs=(split,), out_specs=split, check_vma=False)(
            rows
        )

    return Programs(
        jax.jit(begin, static_argnums=3),
        jax.jit(go_on, donate_argnums=1),
        jax.jit(grow, static_argnums=(1, 2), donate_argnums=0),
    )


def abstract_params(model: ModelConfig, layout: Layout) -> Tree:
    """Shapes, types and places of the parameters to generate from, without values.

    Args:
        model: sizes.
        layout: of `inference_layout`; its mesh may be abstract.
    """
    return jax.tree.map(
        lambda spec, dtype, place: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=place),
        layout.specs,
        types(model, layout.execution),
        layout.parameters(),
    )


def abstract_prompts(batch: int, length: int, layout: Layout) -> tuple[Prompts, Draws]:
    """Shapes, types and places of a batch of prompts and of what draws tokens, without values.

    Args:
        batch: prompts on all devices.
        length: tokens of the longest, with padding.
        layout: of `inference_layout`; its mesh may be abstract.
    """
    (rows,) = partition((BATCH,), (0,), "activations", layout.execution)
    place = NamedSharding(layout.mesh, PartitionSpec(rows))
    each: Any = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=place)
    tokens: Any = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=place)
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    everywhere = layout.everywhere()
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    stop_ids: Any = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=everywhere)
    return Prompts(tokens, each, each), Draws(key, stop_ids)


def abstract_rows(model: ModelConfig, batch: int, length: int, room: int, layout: Layout) -> Rows:
    """Shapes, types and places of rows, without values: what `go_on` takes.

    Args:
        model: sizes.
        batch: prompts on all devices.
        length: tokens of the longest prompt, with padding.
        room: new tokens that there is room for.
        layout: of `inference_layout`; its mesh may be abstract.
    """
    function = programs(model, layout.execution, layout.mesh, Sampling(0.0)).begin
    prompts, draws = abstract_prompts(batch, length, layout)
    rows, _ = jax.eval_shape(function, abstract_params(model, layout), prompts, draws, room)
    split = rows_partition(model, layout.execution)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(layout.mesh, spec)
        ),
        rows,
        split,
    )


def cache_bytes(model: ModelConfig, batch: int, positions: int, execution: Execution) -> int:
    """Bytes of the cache on each device.

    Args:
        model: whose layers.
        batch: rows on all devices.
        positions: of prompt and new tokens that it has room for.
        execution: of `inference`: the mesh, and the type.
    """
    own = -(-batch // batch_shards(execution))
    shapes = jax.eval_shape(lambda: cached.empty_cache(model, own, positions, execution))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def weight_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of the parameters to generate from on each device.

    Args:
        model: sizes.
        layout: of `inference_layout`.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_params(model, layout))
    )


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


def round_up(length: int) -> int:
    """The next power of two, at least 64: few distinct lengths, so few compilations."""
    return max(64, 1 << (int(length) - 1).bit_length())
