"""The vocabulary-parallel loop: what objectives reduce over logits that never exist whole.

Logits come in blocks, some tokens at some rows of the head, and the gradient is worked out in the
forward pass, while a block's logits are at hand (the idea of Liger Kernel, arXiv 2410.10989): no
array of the size [tokens, vocabulary] is stored or computed twice. There are two ways through:

* **Chunks of tokens**, where each device has its rows of the head whole (`fsdp` = 1): a chunk meets
  all rows at once, so its statistics, loss and gradient follow in one pass.
* **Blocks of rows**, where rows are split over `fsdp`: the devices gather a block of rows, which
  meets all of the device's tokens, first for the statistics and once more for the gradient.

Over a mesh these are programs of one device. The shards of `tensor` hold the same tokens, and each
has a part of the vocabulary; what they exchange is a few numbers a token, never logits.

**To add an objective**, write one file with a frozen dataclass that derives from `Objective`. Its
fields are its settings, and its methods are pure functions of one block of logits:

1. `start` and `update` say what is accumulated for each token, as a tree of the kinds of
   `braeburn.objectives.statistics`. How these are joined over shards follows from their kinds.
2. `sums` says what is summed over tokens, from the statistics of the whole vocabulary, and `loss`
   what is minimised, and the metrics, from these sums.
3. `logit_gradient` is the derivative of the loss with respect to a block's logits.

Shapes are named by letters, as in `models/decoder.py`: B sequences, T positions, D d_model, V
vocabulary; and here R rows of the head in a block, K labels of a token, and E = D / fsdp, the part
of the width that a device stores.

`vocabulary_loss` carries it out on any mesh. What is only measured, not minimised, is a `Reduction`
(step 1 alone) for `reduce_vocabulary`. `cross_entropy.py` is the example.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import Execution, MeshConfig
from braeburn.layers.linear import flat, product
from braeburn.objectives import statistics as accumulated
from braeburn.parallel.collectives import FSDP, TENSOR, all_gather, axis_index, reduce_scatter

# Float32 logits that exist at once: 256 MiB.
MAX_LOGITS = 2**26

Tokens = TypeVar("Tokens")
Statistics = TypeVar("Statistics")
Carry = TypeVar("Carry")


class Projection(NamedTuple):
    """What a model's logits follow from: final hidden states, and the head that projects them.

    Attributes:
        hidden: of this device's tokens, in the type to compute in; the same on each shard of
            `tensor`, different along all other axes.
        head: float32, this device's [V / tensor, D / fsdp] of the whole [V, D].
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V E"]


class Targets(NamedTuple):
    """What a model is to predict at each position.

    Attributes:
        ids: vocabulary ids, int32.
        weights: what the loss of each token counts, float32; they usually sum to 1 over a batch.
    """

    ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]


class LogitBlock(NamedTuple):
    """The logits of some tokens at R consecutive rows of the vocabulary.

    Attributes:
        ids: vocabulary ids of the rows, int32; -1 at rows that only pad the block.
        logits: float32; minus infinity at padding.
        teacher_logits: those of the second model, float32; None where there is none.
    """

    ids: Int[Array, " R"]
    logits: Float[Array, "B T R"]
    teacher_logits: Float[Array, "B T R"] | None

    def indices(self, ids: Int[Array, "B T K"]) -> Int[Array, "B T K"]:
        """The indices in this block of vocabulary ids, R for ids of other blocks."""
        indices = ids - self.ids[0]
        inside = (indices >= 0) & (indices < jnp.sum(self.ids >= 0))
        return jnp.where(inside, indices, self.ids.size)

    def logits_at(self, ids: Int[Array, "B T K"]) -> Float[Array, "B T K"]:
        """The logits at vocabulary ids, 0 at ids of other blocks.

        The sum over all blocks and shards is therefore the logit.
        """
        return jnp.take_along_axis(
            self.logits, self.indices(ids), axis=-1, mode="fill", fill_value=0
        )


class Reduction(ABC, Generic[Tokens, Statistics]):
    """What is measured of each token over the vocabulary: frozen, hashable, its methods pure.

    `Tokens` is a tree of arrays [B, T, ...], what there is of each token besides its hidden state,
    and `Statistics` a tree of the kinds of `braeburn.objectives.statistics`.
    """

    @abstractmethod
    def start(self, shape: tuple[int, ...]) -> Statistics:
        """The statistics of tokens of a shape [B, T] that have met no logits."""

    @abstractmethod
    def update(self, statistics: Statistics, block: LogitBlock, tokens: Tokens) -> Statistics:
        """The statistics with a further block of logits taken in."""


class Objective(Reduction[Tokens, Statistics]):
    """What is minimised: a reduction, a loss of its statistics, and the loss's derivative.

    `statistics` are here those of the whole vocabulary, the same on each shard of `tensor`.
    """

    @abstractmethod
    def sums(self, statistics: Statistics, tokens: Tokens) -> Any:
        """A tree of float32 scalars: sums over some tokens, to be added up over all tokens."""

    @abstractmethod
    def loss(self, sums: Any) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and metrics by name, which have no gradient.

        Args:
            sums: as `sums` returns them, over all of this device's tokens. Both results must be
                linear in them, since the losses of devices and of microbatches are added up.
        """

    @abstractmethod
    def logit_gradient(
        self, statistics: Statistics, block: LogitBlock, tokens: Tokens, dtype: Any
    ) -> Float[Array, "B T R"]:
        """The derivative of the loss with respect to `block.logits`.

        Args:
            statistics: of the tokens, over the whole vocabulary.
            block: logits of the tokens; those at padding are minus infinity, where the derivative
                must be finite, and is then multiplied by rows of zeros.
            tokens: what there is of each token.
            dtype: of the result, that of the hidden states.
        """


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
    """Positions per chunk of tokens.

    A chunk has 1,024 tokens, or fewer where these would have over 2^26 logits (256 MiB in float32).
    Large batches take a sixteenth of their tokens at once, up to 4,096: each chunk reads and writes
    the head's whole gradient.

    Args:
        batch: sequences.
        length: positions of each.
        vocab_size: rows of the head on this device.
    """
    tokens = max(min(1024, MAX_LOGITS // vocab_size), min(4096, batch * length // 16))
    return max(1, min(length, tokens // batch))


def block_length(tokens: int, width: int, vocab_size: int) -> int:
    """Rows of the head that are gathered at once: an eighth, or fewer where they or their logits
    would have over 2^26 numbers.

    Args:
        tokens: how many meet each block.
        width: length of a gathered row.
        vocab_size: rows of the head on this tensor shard.
    """
    return max(1, min(-(-vocab_size // 8), MAX_LOGITS // max(tokens, width)))


def chunk(array: Any, length: int) -> Array:
    """An array [B, T, ...], of JAX or NumPy, as [T / length, B, length, ...], padded with zeros
    where `length` does not divide T.
    """
    batch, total = array.shape[:2]
    array = jnp.pad(array, [(0, 0), (0, -total % length)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(array.reshape(batch, -1, length, *array.shape[2:]), 1, 0)


def unchunk(chunks: Array, total: int) -> Array:
    """The inverse of `chunk`, for arrays of T = `total` positions."""
    array = jnp.moveaxis(chunks, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :total]


def vocabulary_ids(count: int, mesh: MeshConfig) -> Int[Array, " V"]:
    """The vocabulary ids of this tensor shard's `count` rows."""
    return jnp.arange(count) + axis_index(TENSOR, mesh) * count


class _Inputs(NamedTuple):
    """What the loop runs over.

    Attributes:
        projection: of the model whose logits are reduced, and which has a gradient.
        teacher: of a second model with the same vocabulary and maybe another width; None without.
        tokens: a tree of arrays [B, T, ...].
    """

    projection: Projection
    teacher: Projection | None
    tokens: Any


def _scan_chunks(
    visit: Callable[[Carry, LogitBlock, Array, Any], tuple[Carry, Any]],
    carry: Carry,
    inputs: _Inputs,
    mesh: MeshConfig,
) -> tuple[Carry, Any]:
    """Visits chunks of tokens, each with its logits at all of this shard's rows.

    Args:
        visit: maps what is carried, the logits, the chunk's hidden states [B, C, D] and its tokens,
            padded with zeros, to what is carried on and the chunk's results.
        carry: what is carried to the first chunk.
        inputs: with whole rows of the head.
        mesh: resolved sizes.

    Returns:
        What is carried from the last chunk, and results with a new first dimension, of chunks.
    """
    projection, teacher, _ = inputs
    batch, total, _ = projection.hidden.shape
    length = chunk_length(batch, total, projection.head.shape[0])
    if teacher:
        length = max(1, length // 2)  # a token has the logits of two models
    ids = vocabulary_ids(projection.head.shape[0], mesh)
    # Transposed once for all chunks: a CPU multiplies rows faster than it multiplies columns.
    head_DV = projection.head.astype(projection.hidden.dtype).T
    teacher_DV = teacher.head.astype(teacher.hidden.dtype).T if teacher else None

    def step(carry: Carry, part: tuple[Array, Array | None, Any]) -> tuple[Carry, Any]:
        hidden, teacher_hidden, tokens = part
        teacher_logits = None
        if teacher_hidden is not None and teacher_DV is not None:
            teacher_logits = product(teacher_hidden, teacher_DV, jnp.float32)
        block = LogitBlock(ids, product(hidden, head_DV, jnp.float32), teacher_logits)
        return visit(carry, block, hidden, tokens)

    parts = (projection.hidden, teacher.hidden if teacher else None, inputs.tokens)
    return jax.lax.scan(step, carry, jax.tree.map(lambda array: chunk(array, length), parts))


def _scan_blocks(
    visit: Callable[[Carry, LogitBlock, Array], tuple[Carry, Any]],
    carry: Carry,
    inputs: _Inputs,
    mesh: MeshConfig,
) -> tuple[Carry, Any]:
    """Visits blocks of gathered rows, each with the logits of all of this device's tokens.

    Args:
        visit: maps what is carried, the logits and the block's rows of the head [R, D] to what is
            carried on and the block's results.
        carry: what is carried to the first block.
        inputs: with rows of the head that are split over `fsdp`.
        mesh: resolved sizes.

    Returns:
        What is carried from the last block, and results with a new first dimension, of blocks.
    """
    projection, teacher, _ = inputs
    batch, total, width = projection.hidden.shape
    tokens = batch * total
    if teacher:  # a token has the logits of two models, and a block the rows of two heads
        width += teacher.hidden.shape[-1]
        tokens *= 2
    length = block_length(tokens, width, projection.head.shape[0])

    def logits_of(model: Projection, ids: Array, shard: Array) -> tuple[Array, Array]:
        head_RD = all_gather(shard, FSDP, 1, mesh)
        logits = product(model.hidden, head_RD.T, jnp.float32)
        return jnp.where(ids >= 0, logits, -jnp.inf), head_RD

    def step(carry: Carry, part: tuple[Array, Array, Array | None]) -> tuple[Carry, Any]:
        ids, shard, teacher_shard = part
        logits, head_RD = logits_of(projection, ids, shard)
        teacher_logits = None
        if teacher and teacher_shard is not None:
            teacher_logits, _ = logits_of(teacher, ids, teacher_shard)
        return visit(carry, LogitBlock(ids, logits, teacher_logits), head_RD)

    ids = vocabulary_ids(projection.head.shape[0], mesh)
    ids = jnp.pad(ids, (0, -ids.size % length), constant_values=-1).reshape(-1, length)
    teacher_shards = _row_blocks(teacher, length) if teacher else None
    return jax.lax.scan(step, carry, (ids, _row_blocks(projection, length), teacher_shards))


def _row_blocks(model: Projection, length: int) -> Float[Array, "N R E"]:
    """A head's rows in blocks of R = `length`, in the type to compute in; the last is padded with
    zeros.
    """
    head = model.head.astype(model.hidden.dtype)
    head = jnp.pad(head, ((0, -head.shape[0] % length), (0, 0)))
    return head.reshape(-1, length, head.shape[1])


def _reduce(
    reduction: Reduction[Tokens, Statistics], inputs: _Inputs, mesh: MeshConfig
) -> Statistics:
    """The statistics of all tokens over the whole vocabulary, a tree of arrays [B, T, ...]."""
    shape = inputs.projection.hidden.shape[:2]
    if mesh.sharded:

        def one_block(
            statistics: Statistics, block: LogitBlock, head_RD: Array
        ) -> tuple[Statistics, None]:
            return reduction.update(statistics, block, inputs.tokens), None

        found, _ = _scan_blocks(one_block, reduction.start(shape), inputs, mesh)
        return accumulated.join(found, mesh)

    def one_chunk(
        carry: None, block: LogitBlock, hidden: Array, tokens: Tokens
    ) -> tuple[None, Statistics]:
        return None, _of_chunk(reduction, block, tokens, mesh)

    _, results = _scan_chunks(one_chunk, None, inputs, mesh)
    return jax.tree.map(lambda result: unchunk(result, shape[1]), results)


def _of_chunk(
    reduction: Reduction[Tokens, Statistics], block: LogitBlock, tokens: Tokens, mesh: MeshConfig
) -> Statistics:
    """The statistics of tokens that meet all of this shard's rows at once.

    Args:
        reduction: what is accumulated.
        block: the tokens' logits at all rows of this tensor shard.
        tokens: what there is of each token.
        mesh: resolved sizes.

    Returns:
        Statistics over the whole vocabulary.
    """
    met = reduction.update(reduction.start(block.logits.shape[:2]), block, tokens)
    return accumulated.join(met, mesh)


def reduce_vocabulary(
    reduction: Reduction[Tokens, Statistics], model: Projection, tokens: Tokens, mesh: MeshConfig
) -> Statistics:
    """Statistics of each token over the whole vocabulary, which are not to be differentiated.

    Args:
        reduction: what is accumulated.
        model: hidden states and head, on each device its own part.
        tokens: a tree of arrays [B, T, ...] of this device's tokens.
        mesh: resolved sizes; with several devices, called inside `shard_map`.

    Returns:
        A tree of arrays [B, T, ...], the same on each shard of `tensor`.
    """
    return _reduce(reduction, _Inputs(model, None, tokens), mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def vocabulary_loss(
    objective: Objective[Any, Any],
    projection: Projection,
    teacher: Projection | None,
    tokens: Any,
    execution: Execution,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The local loss of an objective, to be differentiated, and its metrics, which have no
    gradient.

    Over a mesh, inside `shard_map`, the results of all devices sum to those of the whole batch: the
    shards of `tensor`, which hold the same tokens, each return an equal part of what these come to.
    Gradients are of that sum over devices, whose cotangents must be equal along `tensor` and
    `fsdp`:
      * for `projection.hidden`, the part that comes through this shard's rows of the head. The
        shards of `tensor` each have such a part for the same tokens, and the transpose of the
        gather that gave them the tokens adds them up.
      * for `projection.head`, that of the tokens of all devices along `fsdp`. It is not summed over
        the other axes: the devices of `replica`, `data` and `context` each have that of their own
        tokens.

    Args:
        objective: what is minimised; hashable.
        projection: hidden states and head, on each device its own part.
        teacher: those of a second model, whose logits the objective asks for, laid out likewise;
            the width may differ. It gets no gradient. None where the objective asks for none.
        tokens: a tree of arrays [B, T, ...] of this device's tokens, as the objective wants it. It
            gets no gradient.
        execution: its resolved `mesh`, and `precision.reduce`, the type in which the head's
            gradient is summed over `fsdp`.

    Returns:
        The loss, a float32 scalar, and float32 scalars by name.
    """
    inputs = _Inputs(projection, teacher, tokens)
    statistics = _reduce(objective, inputs, execution.mesh)
    return _local(objective, objective.sums(statistics, tokens), execution.mesh)


def _local(
    objective: Objective[Any, Any], sums: Any, mesh: MeshConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """This tensor shard's equal part of the loss and metrics of its tokens."""
    loss, metrics = objective.loss(sums)
    return loss / mesh.tensor, {name: value / mesh.tensor for name, value in metrics.items()}


def _forward(
    objective: Objective[Any, Any],
    projection: Projection,
    teacher: Projection | None,
    tokens: Any,
    execution: Execution,
) -> tuple[tuple[Array, dict[str, Array]], Projection]:
    """The results of `vocabulary_loss`, whose arguments these are, and the gradient for
    `projection`, which the backward pass only scales.
    """
    differentiate = _by_blocks if execution.mesh.sharded else _by_chunks
    sums, gradient = differentiate(objective, _Inputs(projection, teacher, tokens), execution)
    return _local(objective, sums, execution.mesh), gradient


def _by_chunks(
    objective: Objective[Any, Any], inputs: _Inputs, execution: Execution
) -> tuple[Any, Projection]:
    """The objective's sums, and the gradient, by chunks of tokens."""
    hidden, head = inputs.projection
    head_VD = head.astype(hidden.dtype)

    def one_chunk(
        head_gradient: Array, block: LogitBlock, chunk_hidden: Array, tokens: Any
    ) -> tuple[Array, tuple[Any, Array]]:
        statistics = _of_chunk(objective, block, tokens, execution.mesh)
        logit_gradient = objective.logit_gradient(statistics, block, tokens, hidden.dtype)
        hidden_gradient = product(logit_gradient, head_VD)
        head_gradient += product(flat(logit_gradient).T, flat(chunk_hidden), jnp.float32)
        return head_gradient, (objective.sums(statistics, tokens), hidden_gradient)

    head_gradient, (sums, hidden_gradient) = _scan_chunks(
        one_chunk, jnp.zeros(head.shape, jnp.float32), inputs, execution.mesh
    )
    gradient = Projection(
        unchunk(hidden_gradient, hidden.shape[1]), head_gradient.astype(head.dtype)
    )
    return jax.tree.map(jnp.sum, sums), gradient


def _by_blocks(
    objective: Objective[Any, Any], inputs: _Inputs, execution: Execution
) -> tuple[Any, Projection]:
    """The objective's sums, and the gradient, by blocks of the vocabulary."""
    (hidden, head), tokens, mesh = inputs.projection, inputs.tokens, execution.mesh
    reduce_dtype = jnp.dtype(execution.precision.reduce)
    statistics = _reduce(objective, inputs, mesh)

    def one_block(hidden_gradient: Array, block: LogitBlock, head_RD: Array) -> tuple[Array, Array]:
        logit_gradient = objective.logit_gradient(statistics, block, tokens, hidden.dtype)
        hidden_gradient += product(logit_gradient, head_RD, jnp.float32)
        gradient_RD = product(flat(logit_gradient).T, flat(hidden), jnp.float32)
        return hidden_gradient, reduce_scatter(
            gradient_RD.astype(reduce_dtype), FSDP, 1, mesh
        ).astype(head.dtype)

    hidden_gradient, head_gradient = _scan_blocks(
        one_block, jnp.zeros(hidden.shape, jnp.float32), inputs, mesh
    )
    head_gradient = head_gradient.reshape(-1, head.shape[1])[: head.shape[0]]
    gradient = Projection(hidden_gradient.astype(hidden.dtype), head_gradient)
    return objective.sums(statistics, tokens), gradient


def _backward(
    objective: Objective[Any, Any],
    execution: Execution,
    gradient: Projection,
    cotangents: tuple[Array, dict[str, Array]],
) -> tuple[Projection, None, None]:
    """The gradient for `projection`, times the loss's cotangent; none for teacher and tokens.

    Args:
        objective: not used.
        execution: not used.
        gradient: from the forward pass.
        cotangents: of the loss and of the metrics, of which the latter are ignored.
    """
    scale, _ = cotangents
    hidden = (scale * gradient.hidden).astype(gradient.hidden.dtype)
    return Projection(hidden, scale * gradient.head), None, None


vocabulary_loss.defvjp(_forward, _backward)
