"""The programs of text generation: one pass over the prompts, then one token at a time over a
cache, on any mesh.

`begin` reads a batch of prompts and draws the first token of each; `go_on` draws more, as many as
it is asked for in one call. Like the train step these are programs of one device in a `shard_map`:
the axes that split a batch deal out the rows, `fsdp` gathers weights layer by layer, and the shards
of `tensor` each have their heads, with the cache of these, and their part of the vocabulary.

Shapes are named by letters, as in `models/decoder.py`; N is the new tokens that there is room for,
and v = V / tensor.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from braeburn.config import Execution, MeshConfig, ModelConfig
from braeburn.config.rules import Placement
from braeburn.errors import UserError
from braeburn.evaluate.sampling import Sampling, choose
from braeburn.layers.spec import ParamSpec, Tree
from braeburn.layers.weights import type_on_cpus
from braeburn.models import cached, decoder
from braeburn.parallel.collectives import FSDP, all_to_all, reduce_scatter
from braeburn.parallel.layout import Layout
from braeburn.parallel.rules import BATCH, batch_shards, partition


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


def inference_layout(model: ModelConfig, layout: Layout) -> Layout:
    """Where parameters lie to generate from, on the mesh of a layout.

    Raises:
        UserError: the mesh splits sequences.
    """
    return replace(layout, execution=inference(layout.execution), specs=cached.apart_specs(model))


def types(layout: Layout) -> Tree:
    """The type of each parameter that is generated from.

    Args:
        layout: of `inference_layout`.
    """
    compute = jnp.dtype(layout.execution.precision.compute)

    def one(spec: ParamSpec) -> Any:
        held = spec.held_in(compute)
        return type_on_cpus(spec, held) if layout.platform == "cpu" else held

    return jax.tree.map(one, layout.specs)


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
    return execution.mesh.split_along(execution.rules.batch.activations)


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
        types(layout),
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
