"""Cross-entropy in chunks of tokens: the logits of a whole batch never exist.

The gradient is worked out in the forward pass, chunk by chunk, while each chunk's logits are at
hand (the idea of Liger Kernel, arXiv 2410.10989), so nothing of the size of the vocabulary is kept
or computed twice.

Over a mesh these are programs of one device. The shards of `tensor` hold the same tokens and share
the vocabulary out: they exchange three numbers a token, never logits. With `fsdp` no device holds
its rows of the head whole: they are gathered in blocks, each to meet all of the device's tokens,
first for log Z and once more for the gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, Execution, MeshConfig, ModelConfig
from braeburn.layers.linear import flat, product
from braeburn.layers.spec import Tree
from braeburn.models.decoder import forward, head_matrix
from braeburn.parallel.collectives import (
    FSDP,
    TENSOR,
    all_gather,
    all_max,
    all_sum,
    axis_index,
    reduce_scatter,
)

# Float32 logits that exist at once: 256 MiB.
MAX_LOGITS = 2**26

# Of the logits met so far, for each token: (largest, sum of exp(logit - largest)).
Normaliser = tuple[Float[Array, "B T"], Float[Array, "B T"]]

# Of one shard of the vocabulary, for each token: (largest logit, sum of exp(logit - largest), the
# target's logit or 0).
Statistics = tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
    """Positions per chunk.

    A chunk has 1,024 tokens, or fewer where these would have over 2^26 logits (256 MiB in float32).
    Large batches take a sixteenth of their tokens at once, up to 4,096: each chunk reads and writes
    the head's whole gradient.
    """
    tokens = max(min(1024, MAX_LOGITS // vocab_size), min(4096, batch * length // 16))
    return max(1, min(length, tokens // batch))


def block_length(tokens: int, width: int, vocab_size: int) -> int:
    """Rows of the head that are gathered at once: an eighth, or fewer where they or their logits
    would have over 2^26.

    Args:
        tokens: how many meet each block.
        width: length of a gathered row.
        vocab_size: rows in all.
    """
    return max(1, min(-(-vocab_size // 8), MAX_LOGITS // max(tokens, width)))


def chunked(array: Array, length: int) -> Array:
    """[B, T, ...] as [T / length, B, length, ...], padded with zeros where `length` does not divide
    T.
    """
    batch, total = array.shape[:2]
    array = jnp.pad(array, [(0, 0), (0, -total % length)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(array.reshape(batch, -1, length, *array.shape[2:]), 1, 0)


def whole(chunks: Array, total: int) -> Array:
    """The inverse of `chunked`."""
    array = jnp.moveaxis(chunks, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :total]


def chunk_logits(hidden_BTD: Array, head_DV: Array) -> Float[Array, "B T V"]:
    """Float32 logits of a chunk of tokens."""
    return product(hidden_BTD, head_DV, jnp.float32)


def places(count: int, mesh: MeshConfig) -> Int[Array, " V"]:
    """The places in the whole vocabulary of this shard's `count` rows."""
    return jnp.arange(count) + axis_index(TENSOR, mesh) * count


def normalise(normaliser: Normaliser, logits: Float[Array, "B T V"]) -> Normaliser:
    """The normaliser with further logits taken in (the online softmax of arXiv 1805.02867)."""
    largest, total = normaliser
    larger = jnp.maximum(largest, jnp.max(logits, axis=-1))
    return larger, total * jnp.exp(largest - larger) + jnp.sum(
        jnp.exp(logits - larger[..., None]), axis=-1
    )


def no_logits(shape: tuple[int, ...]) -> Normaliser:
    """The normaliser of tokens before they have met any logit."""
    zeros = jnp.zeros(shape, jnp.float32)
    return zeros - jnp.inf, zeros


def _update(statistics: Statistics, logits: Array, one_hot: Array) -> Statistics:
    """The statistics with further logits [B, T, V] taken in."""
    largest, total, chosen = statistics
    largest, total = normalise((largest, total), logits)
    return largest, total, chosen + jnp.sum(jnp.where(one_hot, logits, 0), axis=-1)


def _no_statistics(targets_BT: Array) -> Statistics:
    largest, total = no_logits(targets_BT.shape)
    return largest, total, total


def _joined(statistics: Statistics, mesh: MeshConfig) -> tuple[Array, Array, Array]:
    """log Z, the target's logit, and 1 where that is the largest, from the statistics of all tensor
    shards.
    """
    local, total, chosen = statistics
    largest = all_max(local, TENSOR, mesh)
    total, chosen = all_sum(jnp.stack([total * jnp.exp(local - largest), chosen]), TENSOR, mesh)
    return largest + jnp.log(total), chosen, (chosen == largest).astype(jnp.float32)


def _statistics(logits: Array, targets_BT: Array, mesh: MeshConfig) -> tuple[Array, Array, Array]:
    """log Z, the target's logit, and 1 where that is the largest, from this shard's logits of some
    tokens.
    """
    if mesh.tensor > 1:
        one_hot = targets_BT[..., None] == places(logits.shape[-1], mesh)
        return _joined(_update(_no_statistics(targets_BT), logits, one_hot), mesh)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    return log_z, chosen, (jnp.argmax(logits, axis=-1) == targets_BT).astype(jnp.float32)


def _slope(
    logits: Array, log_z: Array, one_hot: Array, weights_BT: Array, z_loss: float, dtype: Any
) -> Array:
    """The gradient with respect to the logits."""
    probabilities = jnp.exp(logits - log_z[..., None])
    slope = (probabilities * (1 + 2 * z_loss * log_z[..., None]) - one_hot) * weights_BT[..., None]
    return slope.astype(dtype)


def blocked(
    head: Float[Array, "V E"], length: int, dtype: Any, mesh: MeshConfig
) -> tuple[Int[Array, "N R"], Float[Array, "N R E"]]:
    """Rows of the head in blocks of `length` to gather, in `dtype`: their places in the whole
    vocabulary, and they.

    The last block is filled up with rows of zeros, whose place is -1.
    """
    padding = -head.shape[0] % length
    rows = jnp.pad(places(head.shape[0], mesh), (0, padding), constant_values=-1)
    head = jnp.pad(head.astype(dtype), ((0, padding), (0, 0)))
    return rows.reshape(-1, length), head.reshape(-1, length, head.shape[1])


def _blocks(hidden_BTD: Array, head: Array, mesh: MeshConfig) -> tuple[Array, Array]:
    batch, total, width = hidden_BTD.shape
    return blocked(head, block_length(batch * total, width, head.shape[0]), hidden_BTD.dtype, mesh)


def block_logits(
    hidden_BTD: Array, rows: Int[Array, " R"], head_RD: Array
) -> Float[Array, "B T R"]:
    """Float32 logits of all tokens at the rows of a gathered block, minus infinity at those that
    fill it up.
    """
    logits = product(hidden_BTD, head_RD.T, jnp.float32)
    return jnp.where(rows >= 0, logits, -jnp.inf)


def _statistics_by_blocks(
    hidden_BTD: Array, head: Array, targets_BT: Array, mesh: MeshConfig
) -> tuple[Array, Array, Array]:
    """As `_statistics`, of all tokens, where the head is split over fsdp."""

    def one_block(statistics: Statistics, block: tuple[Array, Array]) -> tuple[Statistics, None]:
        rows, shard = block
        logits = block_logits(hidden_BTD, rows, all_gather(shard, FSDP, 1, mesh))
        return _update(statistics, logits, targets_BT[..., None] == rows), None

    statistics, _ = jax.lax.scan(
        one_block, _no_statistics(targets_BT), _blocks(hidden_BTD, head, mesh)
    )
    return _joined(statistics, mesh)


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    mesh: MeshConfig = ONE_DEVICE,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """For each token, in float32: its negative log-likelihood in nats, log Z, and 1 where it was
    the likeliest.

    Over a mesh: of this device's tokens, the same on each shard of `tensor`; arguments as in
    `cross_entropy`.
    """
    if mesh.fsdp > 1:
        log_z, chosen, correct = _statistics_by_blocks(hidden, head, targets, mesh)
        return log_z - chosen, log_z, correct
    batch, total = targets.shape
    head_DV = head.astype(hidden.dtype).T

    def one_chunk(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        hidden_BTD, targets_BT = chunk
        log_z, chosen, correct = _statistics(chunk_logits(hidden_BTD, head_DV), targets_BT, mesh)
        return None, (log_z - chosen, log_z, correct)

    length = chunk_length(batch, total, head.shape[0])
    _, results = jax.lax.scan(one_chunk, None, (chunked(hidden, length), chunked(targets, length)))
    losses, log_z, correct = (whole(result, total) for result in results)
    return losses, log_z, correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    z_loss: float,
    mesh: MeshConfig = ONE_DEVICE,
    reduce_dtype: Any = jnp.float32,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens: (nll + z_loss * log(Z)^2, to be differentiated; nll alone, which
    has no gradient).

    The z-loss keeps the logits' normaliser near one (PaLM, arXiv 2204.02311, section 5).

    Over a mesh, inside `shard_map`, each device returns its share: the results of all devices sum
    to those of the whole batch, the shards of `tensor` returning equal parts of what their tokens
    come to. Gradients are of that sum over devices, whose cotangents must be equal along `tensor`
    and `fsdp`:
      * for `hidden`, the part that comes through this shard's rows of the head. The shards of
        `tensor` each have such a part for the same tokens, and the transpose of the gather that
        gave them the tokens adds them up.
      * for `head`, that of the tokens of all devices along `fsdp`. It is not summed over the other
        axes: the devices of `replica`, `data` and `context` each have that of their own tokens.

    Args:
        hidden: final hidden states of this device's tokens, in the type to compute in; the same on
            each shard of `tensor`, different along all other axes.
        head: float32, this device's [V / tensor, D / fsdp] of the whole [V, D].
        targets: places in the whole vocabulary, int32.
        weights: float32.
        z_loss: coefficient.
        mesh: resolved sizes.
        reduce_dtype: the type in which the head's gradient is summed over `fsdp`.
    """
    losses, log_z, _ = token_losses(hidden, head, targets, mesh)
    return _share(jnp.sum(weights * losses), jnp.sum(weights * jnp.square(log_z)), z_loss, mesh)


def _share(nll: Array, penalty: Array, z_loss: float, mesh: MeshConfig) -> tuple[Array, Array]:
    """This shard's equal part of what its tokens come to: (nll and z-loss, nll alone)."""
    return (nll + z_loss * penalty) / mesh.tensor, nll / mesh.tensor


def gradients_by_chunks(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    tokens: tuple[Any, ...],
    length: int,
    one_chunk: Callable[..., tuple[Float[Array, "B C V"], Any]],
) -> tuple[tuple[Array, Array], Any]:
    """The gradients for `hidden` and `head`, and sums over tokens, from chunks of C = `length`
    positions.

    Args:
        hidden: as in `cross_entropy`.
        head: this shard's rows, whole.
        tokens: what else there is of each token, trees of arrays [B, T, ...].
        length: positions per chunk.
        one_chunk: maps a chunk's logits and its part of `tokens`, filled up with zeros, to the
            slope at the logits, in the type of `hidden`, and a tree of scalars to sum.
    """
    head_VD = head.astype(hidden.dtype)
    # Transposed once for all chunks: a CPU multiplies rows faster than it multiplies columns.
    head_DV = head_VD.T

    def step(
        head_gradient: Array, chunk: tuple[Array, tuple[Any, ...]]
    ) -> tuple[Array, tuple[Any, Array]]:
        hidden_BTD, tokens = chunk
        slope, sums = one_chunk(chunk_logits(hidden_BTD, head_DV), *tokens)
        hidden_gradient = product(slope, head_VD)
        head_gradient += product(flat(slope).T, flat(hidden_BTD), jnp.float32)
        return head_gradient, (sums, hidden_gradient)

    chunks = jax.tree.map(lambda array: chunked(array, length), (hidden, tokens))
    head_gradient, (sums, hidden_gradient) = jax.lax.scan(
        step, jnp.zeros(head.shape, jnp.float32), chunks
    )
    gradients = whole(hidden_gradient, hidden.shape[1]), head_gradient.astype(head.dtype)
    return gradients, jax.tree.map(jnp.sum, sums)


def gradients_by_blocks(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V E"],
    blocks: tuple[Array, ...],
    one_block: Callable[..., Float[Array, "B T R"]],
    mesh: MeshConfig,
    reduce_dtype: Any,
) -> tuple[Array, Array]:
    """The gradients for `hidden` and `head`, from blocks of the vocabulary that meet all tokens.

    Args:
        hidden: as in `cross_entropy`.
        head: this device's part.
        blocks: of `blocked`, and what else there is of each block.
        one_block: maps a block's logits, its rows' places and the rest of `blocks` to the slope at
            the logits, in the type of `hidden`.
        mesh: resolved sizes.
        reduce_dtype: the type in which the head's gradient is summed over `fsdp`.
    """

    def step(hidden_gradient: Array, block: tuple[Array, ...]) -> tuple[Array, Array]:
        rows, shard, *others = block
        head_RD = all_gather(shard, FSDP, 1, mesh)
        slope = one_block(block_logits(hidden, rows, head_RD), rows, *others)
        hidden_gradient += product(slope, head_RD, jnp.float32)
        gradient_RD = product(flat(slope).T, flat(hidden), jnp.float32)
        return hidden_gradient, reduce_scatter(
            gradient_RD.astype(reduce_dtype), FSDP, 1, mesh
        ).astype(head.dtype)

    hidden_gradient, head_gradient = jax.lax.scan(
        step, jnp.zeros(hidden.shape, jnp.float32), blocks
    )
    head_gradient = head_gradient.reshape(-1, head.shape[1])[: head.shape[0]]
    return hidden_gradient.astype(hidden.dtype), head_gradient


def scaled(gradients: tuple[Array, Array], scale: Float[Array, ""]) -> tuple[Array, Array]:
    """The gradients for `hidden` and `head`, times what comes from above."""
    hidden_gradient, head_gradient = gradients
    return (scale * hidden_gradient).astype(hidden_gradient.dtype), scale * head_gradient


def _forward(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    z_loss: float,
    mesh: MeshConfig,
    reduce_dtype: Any,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    if mesh.fsdp > 1:
        return _forward_by_blocks(hidden, head, targets, weights, z_loss, mesh, reduce_dtype)

    def one_chunk(
        logits: Array, targets_BT: Array, weights_BT: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        log_z, chosen, _ = _statistics(logits, targets_BT, mesh)
        nll = jnp.sum(weights_BT * (log_z - chosen))
        penalty = jnp.sum(weights_BT * jnp.square(log_z))
        one_hot = targets_BT[..., None] == places(head.shape[0], mesh)
        return _slope(logits, log_z, one_hot, weights_BT, z_loss, hidden.dtype), (nll, penalty)

    batch, total = targets.shape
    length = chunk_length(batch, total, head.shape[0])
    gradients, (nll, penalty) = gradients_by_chunks(
        hidden, head, (targets, weights), length, one_chunk
    )
    return _share(nll, penalty, z_loss, mesh), gradients


def _forward_by_blocks(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    z_loss: float,
    mesh: MeshConfig,
    reduce_dtype: Any,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    log_z, chosen, _ = _statistics_by_blocks(hidden, head, targets, mesh)
    outputs = _share(
        jnp.sum(weights * (log_z - chosen)), jnp.sum(weights * jnp.square(log_z)), z_loss, mesh
    )

    def one_block(logits: Array, rows: Array) -> Array:
        return _slope(logits, log_z, targets[..., None] == rows, weights, z_loss, hidden.dtype)

    return outputs, gradients_by_blocks(
        hidden, head, _blocks(hidden, head, mesh), one_block, mesh, reduce_dtype
    )


def _backward(
    z_loss: float,
    mesh: MeshConfig,
    reduce_dtype: Any,
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
    return *scaled(residuals, cotangents[0]), None, None


cross_entropy.defvjp(_forward, _backward)


def loss(
    params: Tree, batch: dict[str, Array], model: ModelConfig, execution: Execution
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What training minimises on a batch, and its parts.

    Args:
        params: float32 parameters.
        batch: `inputs`, `targets`, `positions`, `segment_ids`, int32 [B, T], and `weights`, float32
            [B, T].
        model: sizes, and the RoPE base of the stage.
        execution: how it is carried out; on several devices params and batch are this device's
            parts.

    Returns:
        The weighted sum of nll and z-loss in nats, and {"loss": the weighted sum of nll alone}. On
        several devices, this device's shares of them.
    """
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    hidden = forward(params, inputs, model, execution)
    with jax.named_scope("loss"):
        head, reduce = head_matrix(params), jnp.dtype(execution.precision.reduce)
        token_wise = batch["targets"], batch["weights"]
        total, nll = cross_entropy(hidden, head, *token_wise, model.z_loss, execution.mesh, reduce)
    return total, {"loss": nll}
