"""Distillation: what a student learns from a teacher, whose logits never exist whole either.

There are three kinds of target: the teacher's top-1 token (arXiv 2407.21075), its top-k tokens with
their probabilities renormalised (as in the Gemma 3 report, arXiv 2503.19786), and its distribution
over the whole vocabulary (arXiv 1503.02531). No gradient flows to the teacher.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, Distillation, Execution, MeshConfig, ModelConfig
from braeburn.data.packing import Batch
from braeburn.errors import UserError
from braeburn.layers.spec import Tree
from braeburn.models import decoder
from braeburn.objectives.definition import with_report
from braeburn.objectives.statistics import Expectation, LogSumExp, TopK
from braeburn.objectives.vocabulary import (
    LogitBlock,
    Objective,
    Projection,
    Reduction,
    Targets,
    reduce_vocabulary,
    vocabulary_loss,
)

# Bits of a number in float16.
HALF_EXPONENT, HALF_MANTISSA = 5, 10


class Labels(NamedTuple):
    """The top-k tokens of a teacher at each position, the most probable first.

    Attributes:
        ids: vocabulary ids, int32, which differ from one another at each position.
        log_probs: log-softmax over the whole vocabulary, float32.
    """

    ids: Int[Array, "B T K"]
    log_probs: Float[Array, "B T K"]


class _TopKStatistics(NamedTuple):
    """What is accumulated of each token for `top_k_labels`.

    Attributes:
        softmax: the running log-sum-exp of its logits.
        top_k: its k largest logits.
    """

    softmax: LogSumExp
    top_k: TopK


@dataclass(frozen=True)
class _TopKReduction(Reduction[None, _TopKStatistics]):
    """The `k` largest logits of each token, and the log-sum-exp of all."""

    k: int

    def start(self, shape: tuple[int, ...]) -> _TopKStatistics:
        return _TopKStatistics(LogSumExp.empty(shape), TopK.empty(shape, self.k))

    def update(
        self, statistics: _TopKStatistics, block: LogitBlock, tokens: None
    ) -> _TopKStatistics:
        return _TopKStatistics(
            statistics.softmax.update(block.logits),
            statistics.top_k.update(block.logits, block.ids),
        )


def top_k_labels(
    hidden: Float[Array, "B T D"], head: Float[Array, "V E"], k: int, mesh: MeshConfig = ONE_DEVICE
) -> Labels:
    """The `k` most probable next tokens of each position, the lower vocabulary id of equals first.

    The log-probabilities are rounded to what float16 holds, because a cache stores them so, and an
    online teacher's labels must equal cached ones.

    Args:
        hidden: final hidden states of this device's tokens, in the type to compute in.
        head: float32, this device's [V / tensor, D / fsdp] of the whole [V, D].
        k: labels per position.
        mesh: resolved sizes; with several devices, called inside `shard_map`.

    Returns:
        The labels, the same on each shard of `tensor`. They are not to be differentiated.

    Raises:
        UserError: the vocabulary has fewer than `k` tokens.
    """
    vocab_size = head.shape[0] * mesh.tensor
    if k > vocab_size:
        raise UserError(
            f"distillation.top_k={k} is more than the vocabulary's {vocab_size} tokens; "
            f"set distillation.top_k to at most {vocab_size}"
        )
    found = reduce_vocabulary(_TopKReduction(k), Projection(hidden, head), None, mesh)
    log_probs = found.top_k.logits - found.softmax.log_z[..., None]
    # Not by a cast there and back, which XLA may leave out.
    return Labels(
        found.top_k.ids, jax.lax.reduce_precision(log_probs, HALF_EXPONENT, HALF_MANTISSA)
    )


class _Tokens(NamedTuple):
    """What there is of each token besides its hidden state.

    Attributes:
        targets: the text's next tokens and the weights of the loss.
        label_ids: vocabulary ids of the teacher's top-k tokens, int32; None where the teacher's
            logits are at hand.
        label_probs: their probabilities at the temperature, float32, which sum to 1; None likewise.
    """

    targets: Targets
    label_ids: Int[Array, "B T K"] | None = None
    label_probs: Float[Array, "B T K"] | None = None


class _Statistics(NamedTuple):
    """What is accumulated of each token.

    Attributes:
        softmax: of the student's logits.
        tempered: of the student's logits / temperature.
        target_logit: the student's logit of the text's next token.
        teacher: what gives the mean of the student's logits / temperature under the teacher's
            probabilities: that sum itself for labels, an `Expectation` for the whole distribution.
    """

    softmax: LogSumExp
    tempered: LogSumExp
    target_logit: Float[Array, "B T"]
    teacher: Any

    @property
    def log_zs(self) -> Float[Array, "2 B T"]:
        """log Z of the student's logits, and of its logits / temperature.

        They are stacked, so that XLA does not find them equal at temperature 1: it would then
        contract the products of the gradient in another order, which changes last bits.
        """
        largest = jnp.stack([self.softmax.largest, self.tempered.largest])
        return largest + jnp.log(jnp.stack([self.softmax.total, self.tempered.total]))


class _Sums(NamedTuple):
    """Weighted sums over tokens.

    Attributes:
        nll: of the text's next tokens, in nats.
        distillation: cross-entropy between the teacher and the student at the temperature, in nats,
            times the temperature's square.
        squared_log_z: of log(Z)^2.
    """

    nll: Float[Array, ""]
    distillation: Float[Array, ""]
    squared_log_z: Float[Array, ""]


@dataclass(frozen=True)
class _Distilled(Objective[_Tokens, _Statistics]):
    """What the kinds of target have in common.

    Attributes:
        weight: of the teacher's targets; the text has the rest of 1.
        temperature: that both models' logits are divided by.
        z_loss: the coefficient of log(Z)^2.
    """

    weight: float
    temperature: float
    z_loss: float

    def _mean_logit(self, teacher: Any) -> Float[Array, "B T"]:
        """The mean of the student's logits / temperature under the teacher's probabilities."""
        raise NotImplementedError

    def _start(self, shape: tuple[int, ...], teacher: Any) -> _Statistics:
        empty = LogSumExp.empty(shape)
        return _Statistics(empty, empty, jnp.zeros(shape), teacher)

    def _update(
        self, statistics: _Statistics, block: LogitBlock, tokens: _Tokens, teacher: Any
    ) -> _Statistics:
        """The statistics with a further block taken in.

        Args:
            statistics: before the block.
            block: its logits.
            tokens: what there is of each token.
            teacher: the teacher's part of the statistics, with the block taken in already.
        """
        softmax = tempered = statistics.softmax.update(block.logits)
        if self.temperature != 1:
            tempered = statistics.tempered.update(block.logits / self.temperature)
        further = block.logits_at(tokens.targets.ids[..., None])[..., 0]
        return _Statistics(softmax, tempered, statistics.target_logit + further, teacher)

    def sums(self, statistics: _Statistics, tokens: _Tokens) -> _Sums:
        """Weighted sums over tokens of the loss's terms."""
        weights, log_z = tokens.targets.weights, statistics.softmax.log_z
        cross_entropy = statistics.tempered.log_z - self._mean_logit(statistics.teacher)
        return _Sums(
            nll=jnp.sum(weights * (log_z - statistics.target_logit)),
            distillation=self.temperature**2 * jnp.sum(weights * cross_entropy),
            squared_log_z=jnp.sum(weights * jnp.square(log_z)),
        )

    def loss(self, sums: _Sums) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted mean of the teacher's term and the text's plus the z-loss; both by name."""
        total = (
            self.weight * sums.distillation
            + (1 - self.weight) * sums.nll
            + self.z_loss * sums.squared_log_z
        )
        return total, {"loss": sums.nll, "distillation_loss": sums.distillation}

    def _gradient(
        self,
        statistics: _Statistics,
        logits: Float[Array, "B T N"],
        is_target: Any,
        teacher_probs: Array | float,
        weights: Float[Array, "B T"],
    ) -> Float[Array, "B T N"]:
        """The derivative of the loss with respect to some logits of each token.

        Args:
            statistics: of the tokens.
            logits: the student's, at N vocabulary ids.
            is_target: bool [B, T, N], whether these are the text's next tokens.
            teacher_probs: float32 [B, T, N], the teacher's probabilities there at the temperature.
            weights: of the tokens, float32.

        Returns:
            float32, as `logits`.
        """
        rest, strength = 1 - self.weight, self.weight * self.temperature
        log_z, tempered_log_z = statistics.log_zs[..., None]
        softmax = jnp.exp(logits - log_z) * (rest + 2 * self.z_loss * log_z)
        tempered = jnp.exp(logits / self.temperature - tempered_log_z)
        return (softmax + strength * (tempered - teacher_probs) - rest * is_target) * weights[
            ..., None
        ]


@dataclass(frozen=True)
class LabelDistillation(_Distilled):
    """Distillation from the teacher's top-k tokens, online or cached."""

    def start(self, shape: tuple[int, ...]) -> _Statistics:
        """The statistics of tokens of a shape [B, T] that have met no logits."""
        return self._start(shape, jnp.zeros(shape))

    def update(self, statistics: _Statistics, block: LogitBlock, tokens: _Tokens) -> _Statistics:
        """The statistics with a further block of logits taken in."""
        assert tokens.label_ids is not None and tokens.label_probs is not None
        further = jnp.sum(tokens.label_probs * block.logits_at(tokens.label_ids), axis=-1)
        teacher = statistics.teacher + further / self.temperature
        return self._update(statistics, block, tokens, teacher)

    def _mean_logit(self, teacher: Array) -> Float[Array, "B T"]:
        return teacher

    def logit_gradient(
        self, statistics: _Statistics, block: LogitBlock, tokens: _Tokens, dtype: Any
    ) -> Float[Array, "B T R"]:
        """The derivative of the loss with respect to a block's logits.

        Args:
            statistics: of the tokens, over the whole vocabulary.
            block: their logits at R rows.
            tokens: their targets, weights and labels.
            dtype: of the result.
        """
        assert tokens.label_ids is not None and tokens.label_probs is not None
        targets, weights = tokens.targets
        is_target = targets[..., None] == block.ids
        unlabelled = self._gradient(statistics, block.logits, is_target, 0.0, weights)
        # The few labels' gradients replace those that assume no label. To add the difference
        # instead, the whole array would be needed before it is rounded to `dtype`.
        labelled = self._gradient(
            statistics,
            block.logits_at(tokens.label_ids),
            targets[..., None] == tokens.label_ids,
            tokens.label_probs,
            weights,
        )
        sequences, positions, _ = jnp.indices((*targets.shape, 1), sparse=True)
        at = (sequences, positions, block.indices(tokens.label_ids))
        return unlabelled.astype(dtype).at[at].set(labelled.astype(dtype), mode="drop")


@dataclass(frozen=True)
class DistributionDistillation(_Distilled):
    """Distillation from the teacher's distribution over the whole vocabulary."""

    def start(self, shape: tuple[int, ...]) -> _Statistics:
        """The statistics of tokens of a shape [B, T] that have met no logits."""
        return self._start(shape, Expectation.empty(shape))

    def update(self, statistics: _Statistics, block: LogitBlock, tokens: _Tokens) -> _Statistics:
        """The statistics with a further block of logits taken in."""
        assert block.teacher_logits is not None
        # The student's logits at padding are minus infinity, and no number times that is zero.
        values = jnp.where(block.ids >= 0, block.logits / self.temperature, 0)
        teacher = statistics.teacher.update(block.teacher_logits / self.temperature, values)
        return self._update(statistics, block, tokens, teacher)

    def _mean_logit(self, teacher: Expectation) -> Float[Array, "B T"]:
        return teacher.mean

    def logit_gradient(
        self, statistics: _Statistics, block: LogitBlock, tokens: _Tokens, dtype: Any
    ) -> Float[Array, "B T R"]:
        """The derivative of the loss with respect to a block's logits.

        Args:
            statistics: of the tokens, over the whole vocabulary.
            block: their logits at R rows.
            tokens: their targets and weights.
            dtype: of the result.
        """
        assert block.teacher_logits is not None
        targets, weights = tokens.targets
        log_z = statistics.teacher.log_z[..., None]
        probs = jnp.exp(block.teacher_logits / self.temperature - log_z)
        is_target = targets[..., None] == block.ids
        return self._gradient(statistics, block.logits, is_target, probs, weights).astype(dtype)


def distillation_loss(
    student: Projection,
    targets: Targets,
    teacher: Labels | Projection,
    distillation: Distillation,
    z_loss: float,
    execution: Execution,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sums over tokens of what a distilled student minimises.

    With q the student's probabilities, p the teacher's, w the `weight` and t the `temperature`, a
    token costs w t^2 H(p_t, q_t) + (1 - w) H(true token, q) + z_loss log(Z)^2, in nats, where H is
    the cross-entropy and the index t stands for softmax(logits / t). "label" has one-hot p and no
    temperature; "top_k" renormalises p_t over k tokens.

    Args:
        student: hidden states and head, on each device its own part.
        targets: the text's next tokens, of this device, the same on each shard of `tensor`.
        teacher: `Labels` for "label" and "top_k", of which more than asked for are left out, or the
            teacher's hidden states and head for "distribution".
        distillation: the kind of target, its weight and temperature.
        z_loss: the coefficient of log(Z)^2.
        execution: resolved mesh, and the type in which gradients are summed over `fsdp`.

    Returns:
        The local loss, to be differentiated, and metrics, which have no gradient: {"loss": the
        local negative log-likelihood of the true tokens, "distillation_loss": t^2 H(p_t, q_t)}.
        `vocabulary_loss` says what a mesh makes of these and of gradients.

    Raises:
        UserError: `Labels` has fewer tokens than `distillation` asks for.
    """
    if isinstance(teacher, Projection):
        whole = DistributionDistillation(distillation.weight, distillation.temperature, z_loss)
        return vocabulary_loss(whole, student, teacher, _Tokens(targets), execution)
    # The distribution of one token is the same at any temperature, so the student's has none
    # either.
    temperature = 1.0 if distillation.target == "label" else distillation.temperature
    count = 1 if distillation.target == "label" else distillation.top_k
    known = teacher.ids.shape[-1]
    if known < count:
        raise UserError(
            f"distillation.top_k={count}, but the teacher's cache holds {known} tokens a "
            f"position; set distillation.top_k to at most {known}, or build the cache anew"
        )
    ids, log_probs = (array[..., :count] for array in teacher)
    tokens = _Tokens(targets, ids, jax.nn.softmax(log_probs / temperature))
    labels = LabelDistillation(distillation.weight, temperature, z_loss)
    return vocabulary_loss(labels, student, None, tokens, execution)


def loss(
    params: Tree,
    batch: Batch,
    teacher: tuple[ModelConfig, Tree] | None,
    model: ModelConfig,
    distillation: Distillation,
    execution: Execution,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What training a student minimises on a batch, and its metrics.

    Args:
        params: the student's float32 parameters.
        batch: `inputs`, `targets`, `positions`, `segment_ids`, int32 [B, T], and `weights`, float32
            [B, T]. Cached labels of a teacher are its `teacher_ids`, int32 [B, T, k], and
            `teacher_log_probs`, float32 [B, T, k].
        teacher: a model with the student's vocabulary and its float32 parameters, which get no
            gradient; None where the batch holds its labels.
        model: the student's sizes.
        distillation: the kind of target, its weight and temperature.
        execution: how both are carried out; on several devices all arrays are this device's parts.

    Returns:
        The loss of `distillation_loss`, in nats, and {"loss": the weighted sum of the true tokens'
        nll, "distillation_loss": that of the teacher's term}. On several devices these are local
        losses, which sum to those of the whole batch.

    Raises:
        UserError: the vocabulary or the batch has fewer tokens than `distillation.top_k`.
    """
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    targets = None
    if teacher is not None and "teacher_ids" not in batch:
        of, taught = teacher
        with jax.named_scope("teacher"):
            head = decoder.head_matrix(taught)
            hidden = decoder.forward(taught, inputs, of, execution.forward_only)
            targets = _online_targets(Projection(hidden, head), distillation, execution)
            # The student begins when the teacher is done: a scheduler that hides collectives could
            # else run both at once, with the activations of both.
            inputs, targets = jax.lax.optimization_barrier((inputs, targets))
    hidden, report = decoder.reported_forward(params, inputs, batch["weights"], model, execution)
    with jax.named_scope("loss"):
        student = Projection(hidden, decoder.head_matrix(params))
        found = _of_targets(student, batch, targets, distillation, (model.z_loss, execution))
        return with_report(found, report)


def projected_loss(
    student: Projection,
    batch: Batch,
    teacher: Projection | None,
    distillation: Distillation,
    settings: tuple[float, Execution],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The part of `loss` that follows from final hidden states and heads.

    Args:
        student: hidden states and head of the student.
        batch: as of `loss`.
        teacher: those of an online teacher; None where the batch holds its labels.
        distillation: as of `loss`.
        settings: the coefficient of the z-loss, and how all is carried out.
    """
    targets = None
    if teacher is not None:
        with jax.named_scope("teacher"):
            targets = _online_targets(teacher, distillation, settings[1])
    return _of_targets(student, batch, targets, distillation, settings)


def _of_targets(
    student: Projection,
    batch: Batch,
    targets: Labels | Projection | None,
    distillation: Distillation,
    settings: tuple[float, Execution],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`projected_loss` with an online teacher's targets; None where the batch holds its labels."""
    if targets is None:
        targets = Labels(batch["teacher_ids"], batch["teacher_log_probs"])
    text = Targets(batch["targets"], batch["weights"])
    return distillation_loss(student, text, targets, distillation, *settings)


def _online_targets(
    teacher: Projection, distillation: Distillation, execution: Execution
) -> Labels | Projection:
    """What a student learns from an online teacher: labels, or hidden states and head.

    Args:
        teacher: its final hidden states and head, which get no gradient.
        distillation: the kind of target.
        execution: how it is carried out.

    Returns:
        Labels for "label" and "top_k", hidden states and head for "distribution".

    Raises:
        UserError: the vocabulary has fewer tokens than `distillation.top_k`.
    """
    teacher = jax.lax.stop_gradient(teacher)
    if distillation.target == "distribution":
        return teacher
    k = 1 if distillation.target == "label" else distillation.top_k
    return jax.lax.stop_gradient(top_k_labels(*teacher, k, execution.mesh))
