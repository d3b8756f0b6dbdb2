"""What a student learns from a teacher, in chunks: the logits of neither ever exist whole.

Three kinds of target: the teacher's likeliest token (arXiv 2407.21075), its k likeliest with their
probabilities renormalised (as in the Gemma 3 report, arXiv 2503.19786), and all of the vocabulary
(arXiv 1503.02531).

As in `braeburn.objectives.cross_entropy`, whose loops and conventions these are, the gradient is
worked out in the forward pass. No gradient flows to the teacher.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, Distillation, Execution, MeshConfig, ModelConfig
from braeburn.errors import UserError
from braeburn.layers.spec import Tree
from braeburn.models import decoder
from braeburn.objectives.cross_entropy import (
    Normaliser,
    block_length,
    block_logits,
    blocked,
    chunk_length,
    chunk_logits,
    chunked,
    gradients_by_blocks,
    gradients_by_chunks,
    no_logits,
    normalise,
    places,
    scaled,
    whole,
)
from braeburn.parallel.collectives import FSDP, TENSOR, all_gather, all_max, all_sum

# What float16 keeps of a number.
HALF_EXPONENT, HALF_MANTISSA = 5, 10


class Likeliest(NamedTuple):
    """The tokens that a teacher holds likeliest, in falling order, and the logarithms of their
    probabilities.

    A token's `ids` differ from one another.
    """

    ids: Int[Array, "B T K"]
    log_probs: Float[Array, "B T K"]


class HiddenStates(NamedTuple):
    """What all of a teacher's probabilities follow from: final hidden states, and this device's
    part of the head.

    They are laid out as the student's in `cross_entropy`, and may be of another width.
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V E"]


def likeliest(
    hidden: Float[Array, "B T D"], head: Float[Array, "V E"], k: int, mesh: MeshConfig = ONE_DEVICE
) -> Likeliest:
    """The `k` likeliest next tokens of each position, the lower of equals first, with float32 [B,
    T, k] log-softmax.

    The logarithms are rounded to what float16 holds, because a cache stores them so and a live
    teacher is to say the same. Over a mesh the answer is the same on each shard of `tensor`;
    arguments as in `cross_entropy`.

    Raises:
        UserError: there are fewer than `k` tokens.
    """
    vocab_size = head.shape[0] * mesh.tensor
    if k > vocab_size:
        raise UserError(
            f"distillation.top_k={k} is more than the vocabulary's {vocab_size} tokens; "
            f"set distillation.top_k to at most {vocab_size}"
        )
    batch, total, width = hidden.shape
    if mesh.fsdp > 1:
        blocks = blocked(
            head, block_length(batch * total, width, head.shape[0]), hidden.dtype, mesh
        )

        def one_block(found: tuple[Normaliser, Likeliest], block: tuple[Array, Array]) -> Any:
            (normaliser, (ids, values)), (rows, shard) = found, block
            logits = block_logits(hidden, rows, all_gather(shard, FSDP, 1, mesh))
            more_ids, more_values = _best(logits, rows, k)
            best = _best_of(
                jnp.concatenate([ids, more_ids], -1), jnp.concatenate([values, more_values], -1), k
            )
            return (normalise(normaliser, logits), best), None

        nothing = Likeliest(jnp.full((batch, total, k), -1), jnp.full((batch, total, k), -jnp.inf))
        found, _ = jax.lax.scan(one_block, (no_logits((batch, total)), nothing), blocks)
        return _of_all_shards(*found, k, mesh)

    every_row, head_DV = places(head.shape[0], mesh), head.astype(hidden.dtype).T

    def one_chunk(_: None, hidden_BTD: Array) -> Any:
        logits = chunk_logits(hidden_BTD, head_DV)
        normaliser = normalise(no_logits(logits.shape[:2]), logits)
        return None, _of_all_shards(normaliser, _best(logits, every_row, k), k, mesh)

    _, (ids, log_probs) = jax.lax.scan(
        one_chunk, None, chunked(hidden, chunk_length(batch, total, head.shape[0]))
    )
    return Likeliest(whole(ids, total), whole(log_probs, total))


def _best(logits: Array, rows: Array, k: int) -> Likeliest:
    """The likeliest of some rows of the vocabulary, at most `k`, with logits in place of
    logarithms.
    """
    values, indices = jax.lax.top_k(logits, min(k, rows.size))
    return Likeliest(rows[indices], values)


def _best_of(ids: Array, logits: Array, k: int) -> Likeliest:
    """The likeliest of some tokens."""
    values, indices = jax.lax.top_k(logits, k)
    return Likeliest(jnp.take_along_axis(ids, indices, axis=-1), values)


def _of_all_shards(normaliser: Normaliser, best: Likeliest, k: int, mesh: MeshConfig) -> Likeliest:
    """The likeliest of the whole vocabulary, from what each tensor shard knows of its rows."""
    largest, total = normaliser
    scale, largest = _to_all_shards(largest, mesh)
    log_z = largest + jnp.log(all_sum(total * scale, TENSOR, mesh))
    ids, logits = best
    if mesh.tensor > 1:
        ids, logits = _best_of(
            all_gather(ids, TENSOR, 2, mesh), all_gather(logits, TENSOR, 2, mesh), k
        )
    # Not by a cast there and back, which XLA may leave out.
    return Likeliest(
        ids, jax.lax.reduce_precision(logits - log_z[..., None], HALF_EXPONENT, HALF_MANTISSA)
    )


def _to_all_shards(largest: Array, mesh: MeshConfig) -> tuple[Array, Array]:
    """What this tensor shard's sums of exponentials are scaled with before all are added, and the
    largest logit.
    """
    of_all = all_max(largest, TENSOR, mesh)
    return jnp.exp(largest - of_all), of_all


@dataclass(frozen=True)
class _Terms:
    """What the loss is made of: the share of the teacher, at which temperature, and the coefficient
    of the z-loss.
    """

    share: float
    temperature: float
    z_loss: float


class _Aims(NamedTuple):
    """Single tokens that a teacher teaches, and their probabilities."""

    ids: Int[Array, "B T K"]
    probabilities: Float[Array, "B T K"]


class _Block(NamedTuple):
    """Some rows of the vocabulary, their places there (-1 where they fill a block up), and the
    logits of some tokens.

    `taught` are the teacher's logits, None where it teaches single tokens.
    """

    rows: Int[Array, " R"]
    logits: Float[Array, "B T R"]
    taught: Float[Array, "B T R"] | None


class _Seen(NamedTuple):
    """What the logits met so far come to for each token; all but `student` at the temperature.

    `true` is the true token's logit, and `aimed` the sum of the logits times the teacher's
    probabilities: where all tokens are taught, times the exponentials that `teacher` sums, which is
    None else.
    """

    student: Normaliser
    tempered: Normaliser
    teacher: Normaliser | None
    true: Float[Array, "B T"]
    aimed: Float[Array, "B T"]


class _Known(NamedTuple):
    """As `_Seen`, of the whole vocabulary: logarithms of the sums of exponentials, and logits."""

    student: Float[Array, "B T"]
    tempered: Float[Array, "B T"]
    teacher: Float[Array, "B T"] | None
    true: Float[Array, "B T"]
    aimed: Float[Array, "B T"]


def _nothing(shape: tuple[int, ...], whole_distribution: bool) -> _Seen:
    empty = no_logits(shape)
    return _Seen(
        empty, empty, empty if whole_distribution else None, jnp.zeros(shape), jnp.zeros(shape)
    )


def _within(ids: Int[Array, "B T K"], rows: Int[Array, " R"]) -> Int[Array, "B T K"]:
    """Where in a block the tokens are, R where they are in another."""
    indices = ids - rows[0]
    return jnp.where((indices >= 0) & (indices < jnp.sum(rows >= 0)), indices, rows.size)


def _logits_of(ids: Int[Array, "B T K"], block: _Block) -> Float[Array, "B T K"]:
    """The logits of tokens, 0 where the block does not have them."""
    indices = _within(ids, block.rows)
    return jnp.take_along_axis(block.logits, indices, axis=-1, mode="fill", fill_value=0)


def _meet(
    seen: _Seen, block: _Block, targets: Array, aims: _Aims | None, temperature: float
) -> _Seen:
    """What is seen with a further block."""
    tempered = block.logits / temperature
    student = normalise(seen.student, block.logits)
    normaliser = student if temperature == 1 else normalise(seen.tempered, tempered)
    true = seen.true + _logits_of(targets[..., None], block)[..., 0]
    if seen.teacher is None or block.taught is None:
        assert aims is not None
        further = jnp.sum(aims.probabilities * _logits_of(aims.ids, block), axis=-1)
        return _Seen(student, normaliser, None, true, seen.aimed + further / temperature)
    taught = block.taught / temperature
    teacher = normalise(seen.teacher, taught)
    # Rows that fill a block up have logits of minus infinity, and no number times that is zero.
    further = jnp.sum(
        jnp.exp(taught - teacher[0][..., None]) * jnp.where(block.rows >= 0, tempered, 0), axis=-1
    )
    aimed = seen.aimed * jnp.exp(seen.teacher[0] - teacher[0]) + further
    return _Seen(student, normaliser, teacher, true, aimed)


def _join(seen: _Seen, mesh: MeshConfig) -> _Known:
    """What is known of the whole vocabulary, from what all tensor shards have seen of theirs."""
    normalisers = [seen.student, seen.tempered] + ([] if seen.teacher is None else [seen.teacher])
    largest, total = (jnp.stack(part) for part in zip(*normalisers, strict=True))
    scale, largest = _to_all_shards(largest, mesh)
    aimed = seen.aimed if seen.teacher is None else seen.aimed * scale[2]
    *totals, true, aimed = all_sum(
        jnp.concatenate([total * scale, jnp.stack([seen.true, aimed])]), TENSOR, mesh
    )
    student, tempered, *teacher = largest + jnp.log(jnp.stack(totals))
    if teacher:
        return _Known(student, tempered, teacher[0], true, aimed / totals[2])
    return _Known(student, tempered, None, true, aimed)


def _sums(known: _Known, weights: Array, temperature: float) -> tuple[Array, Array, Array]:
    """Over tokens: the true tokens' negative log-likelihood, what the teacher taught, and the
    square of log Z.
    """
    nll = jnp.sum(weights * (known.student - known.true))
    distilled = temperature**2 * jnp.sum(weights * (known.tempered - known.aimed))
    return nll, distilled, jnp.sum(weights * jnp.square(known.student))


def _slope(
    block: _Block,
    known: _Known,
    targets: Array,
    weights: Array,
    aims: _Aims | None,
    terms: _Terms,
    dtype: Any,
) -> Array:
    """The gradient with respect to a block's logits."""
    rest, strength = 1 - terms.share, terms.share * terms.temperature

    def slope(logits: Array, rows: Array, taught: Array | float) -> Array:
        log_z = known.student[..., None]
        student = jnp.exp(logits - log_z) * (rest + 2 * terms.z_loss * log_z)
        tempered = jnp.exp(logits / terms.temperature - known.tempered[..., None])
        true = targets[..., None] == rows
        return (
            (student + strength * (tempered - taught) - rest * true) * weights[..., None]
        ).astype(dtype)

    if block.taught is not None and known.teacher is not None:
        taught = jnp.exp(block.taught / terms.temperature - known.teacher[..., None])
        return slope(block.logits, block.rows, taught)
    assert aims is not None
    untaught = slope(block.logits, block.rows, 0.0)
    # Few places differ. They are put in whole: to add to them would need them all before they are
    # rounded.
    exact = slope(_logits_of(aims.ids, block), aims.ids, aims.probabilities)
    sequences, positions, _ = jnp.indices((*targets.shape, 1), sparse=True)
    return untaught.at[sequences, positions, _within(aims.ids, block.rows)].set(exact, mode="drop")


def distillation_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    teaching: Likeliest | HiddenStates,
    distillation: Distillation,
    z_loss: float,
    mesh: MeshConfig = ONE_DEVICE,
    reduce_dtype: Any = jnp.float32,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sums over tokens: what a distilled student minimises, and its parts, which have no
    gradient.

    With q the student's probabilities, p the teacher's, w the `weight` and t the `temperature`, a
    token costs w t^2 H(p_t, q_t) + (1 - w) H(true token, q) + z_loss log(Z)^2, in nats, where H is
    the cross-entropy and the index t stands for softmax(logits / t). "label" has one-hot p and no
    temperature; "top_k" renormalises p_t over k tokens.

    Args:
        hidden: this and all that is not named here, and what a mesh makes of gradients, as in
            `cross_entropy`.
        head: see there.
        targets: see there.
        weights: see there.
        teaching: `Likeliest` for "label" and "top_k", of which more than asked for are left out, or
            `HiddenStates` for "distribution".
        distillation: the kind of target.
        z_loss: see there.
        mesh: see there.
        reduce_dtype: see there.

    Returns:
        The sum, and {"nll": the negative log-likelihood of the true tokens, "distillation": t^2
        H(p_t, q_t)}.

    Raises:
        UserError: `Likeliest` has fewer tokens than `distillation` asks for.
    """
    # One token is all of its own distribution, at any temperature: the student's then has none
    # either.
    temperature = 1.0 if distillation.target == "label" else distillation.temperature
    aims: _Aims | HiddenStates
    if isinstance(teaching, HiddenStates):
        aims = teaching
    else:
        count = 1 if distillation.target == "label" else distillation.top_k
        known = teaching.ids.shape[-1]
        if known < count:
            raise UserError(
                f"distillation.top_k={count}, but the teacher's cache holds {known} tokens a "
                f"position; set distillation.top_k to at most {known}, or build the cache anew"
            )
        ids, log_probs = (array[..., :count] for array in teaching)
        aims = _Aims(ids, jax.nn.softmax(log_probs / temperature))
    terms = _Terms(distillation.weight, temperature, z_loss)
    return _distilled(hidden, head, targets, weights, aims, terms, mesh, reduce_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _distilled(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    teaching: _Aims | HiddenStates,
    terms: _Terms,
    mesh: MeshConfig,
    reduce_dtype: Any,
) -> tuple[Array, dict[str, Array]]:
    return _forward(hidden, head, targets, weights, teaching, terms, mesh, reduce_dtype)[0]


def _share(
    sums: tuple[Array, Array, Array], terms: _Terms, mesh: MeshConfig
) -> tuple[Array, dict[str, Array]]:
    """This tensor shard's equal part of the loss and its parts."""
    nll, distilled, penalty = sums
    total = terms.share * distilled + (1 - terms.share) * nll + terms.z_loss * penalty
    return total / mesh.tensor, {"nll": nll / mesh.tensor, "distillation": distilled / mesh.tensor}


def _forward(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    teaching: _Aims | HiddenStates,
    terms: _Terms,
    mesh: MeshConfig,
    reduce_dtype: Any,
) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, Array]]:
    if mesh.fsdp > 1:
        return _forward_by_blocks(
            hidden, head, targets, weights, teaching, terms, mesh, reduce_dtype
        )
    rows, length = (
        places(head.shape[0], mesh),
        chunk_length(targets.shape[0], targets.shape[1], head.shape[0]),
    )
    aims, teacher = (None, teaching) if isinstance(teaching, HiddenStates) else (teaching, None)
    if teacher:
        length = max(1, length // 2)  # a token has the logits of two models
        teacher_DV = teacher.head.astype(teacher.hidden.dtype).T

    def one_chunk(
        logits: Array,
        targets: Array,
        weights: Array,
        aims: _Aims | None,
        teacher_hidden: Array | None,
    ) -> tuple[Array, Any]:
        block = _Block(
            rows,
            logits,
            None if teacher_hidden is None else chunk_logits(teacher_hidden, teacher_DV),
        )
        seen = _meet(_nothing(targets.shape, aims is None), block, targets, aims, terms.temperature)
        known = _join(seen, mesh)
        slope = _slope(block, known, targets, weights, aims, terms, hidden.dtype)
        return slope, _sums(known, weights, terms.temperature)

    tokens = (targets, weights, aims, teacher.hidden if teacher else None)
    gradients, sums = gradients_by_chunks(hidden, head, tokens, length, one_chunk)
    return _share(sums, terms, mesh), gradients


def _forward_by_blocks(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    teaching: _Aims | HiddenStates,
    terms: _Terms,
    mesh: MeshConfig,
    reduce_dtype: Any,
) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, Array]]:
    aims, teacher = (None, teaching) if isinstance(teaching, HiddenStates) else (teaching, None)
    blocks: tuple[Array, ...]
    if teacher:  # a token has the logits of two models, and a block the rows of two heads
        width = hidden.shape[-1] + teacher.hidden.shape[-1]
        length = block_length(2 * targets.size, width, head.shape[0])
        _, teacher_head = blocked(teacher.head, length, teacher.hidden.dtype, mesh)
        blocks = *blocked(head, length, hidden.dtype, mesh), teacher_head
    else:
        blocks = blocked(
            head, block_length(targets.size, hidden.shape[-1], head.shape[0]), hidden.dtype, mesh
        )

    def of(logits: Array, rows: Array, teacher_shard: Array | None = None) -> _Block:
        if not teacher or teacher_shard is None:
            return _Block(rows, logits, None)
        return _Block(
            rows,
            logits,
            block_logits(teacher.hidden, rows, all_gather(teacher_shard, FSDP, 1, mesh)),
        )

    def see(seen: _Seen, block: tuple[Array, ...]) -> tuple[_Seen, None]:
        rows, shard, *others = block
        logits = block_logits(hidden, rows, all_gather(shard, FSDP, 1, mesh))
        return _meet(seen, of(logits, rows, *others), targets, aims, terms.temperature), None

    seen, _ = jax.lax.scan(see, _nothing(targets.shape, aims is None), blocks)
    known = _join(seen, mesh)

    def one_block(logits: Array, rows: Array, *others: Array) -> Array:
        return _slope(of(logits, rows, *others), known, targets, weights, aims, terms, hidden.dtype)

    gradients = gradients_by_blocks(hidden, head, blocks, one_block, mesh, reduce_dtype)
    return _share(_sums(known, weights, terms.temperature), terms, mesh), gradients


def _backward(
    terms: _Terms,
    mesh: MeshConfig,
    reduce_dtype: Any,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, dict[str, Array]],
) -> tuple[Array, Array, None, None, None]:
    return *scaled(gradients, cotangents[0]), None, None, None


_distilled.defvjp(_forward, _backward)


def loss(
    params: Tree,
    batch: dict[str, Array],
    teacher: tuple[ModelConfig, Tree] | None,
    model: ModelConfig,
    distillation: Distillation,
    execution: Execution,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What training a student minimises on a batch, and its parts: the counterpart of
    `cross_entropy.loss`.

    Args:
        params: the student's float32 parameters.
        batch: `inputs`, `targets`, `positions`, `segment_ids`, int32 [B, T], and `weights`, float32
            [B, T]. Labels that a teacher gave before are its `teacher_ids`, int32 [B, T, k], and
            `teacher_log_probs`, float32 [B, T, k].
        teacher: a model with the student's vocabulary and its float32 parameters, which get no
            gradient; None where the batch holds its labels.
        model: the student's sizes.
        distillation: what the teacher teaches.
        execution: how both are carried out; on several devices all arrays are this device's parts.

    Returns:
        The weighted sum of `distillation_loss`, and {"loss": that of the true tokens' nll alone,
        "distillation_loss": that of what the teacher taught}. On several devices, this device's
        shares of them.
    """
    mesh = execution.mesh
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    teaching: Likeliest | HiddenStates
    if "teacher_ids" in batch:
        teaching = Likeliest(batch["teacher_ids"], batch["teacher_log_probs"])
    else:
        assert teacher is not None
        teacher_model, teacher_params = teacher
        with jax.named_scope("teacher"):
            head = jax.lax.stop_gradient(decoder.head_matrix(teacher_params))
            said: Any = decoder.forward(
                teacher_params, inputs, teacher_model, execution.forward_only
            )
            if distillation.target != "distribution":
                said = likeliest(
                    said, head, 1 if distillation.target == "label" else distillation.top_k, mesh
                )
            # The student begins when the teacher is done: a scheduler that hides exchanges could
            # else run both at once, with the activations of both.
            inputs, said = jax.lax.optimization_barrier((inputs, jax.lax.stop_gradient(said)))
            teaching = HiddenStates(said, head) if distillation.target == "distribution" else said
    hidden = decoder.forward(params, inputs, model, execution)
    with jax.named_scope("loss"):
        head, reduce = decoder.head_matrix(params), jnp.dtype(execution.precision.reduce)
        token_wise = (batch["targets"], batch["weights"])
        total, parts = distillation_loss(
            hidden, head, *token_wise, teaching, distillation, model.z_loss, mesh, reduce
        )
    return total, {"loss": parts["nll"], "distillation_loss": parts["distillation"]}
