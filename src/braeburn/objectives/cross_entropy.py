"""Cross-entropy with the true next token, and the z-loss that keeps log Z near zero."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, Execution, MeshConfig, ModelConfig, NextToken
from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree
from braeburn.objectives.definition import Definition, text_loss
from braeburn.objectives.statistics import LogSumExp
from braeburn.objectives.vocabulary import (
    LogitBlock,
    Objective,
    Projection,
    Targets,
    reduce_vocabulary,
    vocabulary_loss,
)


class TargetStatistics(NamedTuple):
    """What is accumulated of each token.

    Attributes:
        softmax: the running log-sum-exp of its logits.
        target_logit: the logit of its target, float32.
    """

    softmax: LogSumExp
    target_logit: Float[Array, "B T"]

    @property
    def nll(self) -> Float[Array, "B T"]:
        """The negative log-likelihood of the targets, in nats."""
        return self.softmax.log_z - self.target_logit


@dataclass(frozen=True)
class CrossEntropy(Objective[Targets, TargetStatistics]):
    """nll + z_loss * log(Z)^2 (PaLM, arXiv 2204.02311, section 5).

    Attributes:
        z_loss: the coefficient.
    """

    z_loss: float = 0.0

    def start(self, shape: tuple[int, ...]) -> TargetStatistics:
        """The statistics of tokens of a shape [B, T] that have met no logits."""
        return TargetStatistics(LogSumExp.empty(shape), jnp.zeros(shape))

    def update(
        self, statistics: TargetStatistics, block: LogitBlock, tokens: Targets
    ) -> TargetStatistics:
        """The statistics with a further block of logits taken in."""
        further = block.logits_at(tokens.ids[..., None])[..., 0]
        return TargetStatistics(
            statistics.softmax.update(block.logits), statistics.target_logit + further
        )

    def sums(self, statistics: TargetStatistics, tokens: Targets) -> tuple[Array, Array]:
        """Weighted sums over tokens of nll and of log(Z)^2."""
        nll = jnp.sum(tokens.weights * statistics.nll)
        return nll, jnp.sum(tokens.weights * jnp.square(statistics.softmax.log_z))

    def loss(self, sums: tuple[Array, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sum of nll and z-loss, and {"loss": nll alone}."""
        nll, squared_log_z = sums
        return nll + self.z_loss * squared_log_z, {"loss": nll}

    def logit_gradient(
        self, statistics: TargetStatistics, block: LogitBlock, tokens: Targets, dtype: Any
    ) -> Float[Array, "B T R"]:
        """(softmax * (1 + 2 * z_loss * log Z) - one-hot target) * weight.

        Args:
            statistics: of the tokens, over the whole vocabulary.
            block: their logits at R rows.
            tokens: their targets and weights.
            dtype: of the result.
        """
        log_z = statistics.softmax.log_z[..., None]
        probabilities = jnp.exp(block.logits - log_z)
        one_hot = tokens.ids[..., None] == block.ids
        gradient = probabilities * (1 + 2 * self.z_loss * log_z) - one_hot
        return (gradient * tokens.weights[..., None]).astype(dtype)


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    mesh: MeshConfig = ONE_DEVICE,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """The loss of each token by itself, for evaluation; it is not to be differentiated.

    Args:
        hidden: final hidden states of this device's tokens, in the type to compute in.
        head: float32, this device's [V / tensor, D / fsdp] of the whole [V, D].
        targets: vocabulary ids, int32.
        mesh: resolved sizes; with several devices, called inside `shard_map`.

    Returns:
        For each token, in float32 and the same on each shard of `tensor`: its negative
        log-likelihood in nats, log Z, and 1 where its logit is the largest, else 0.
    """
    tokens = Targets(targets, jnp.ones(targets.shape))
    found = reduce_vocabulary(CrossEntropy(), Projection(hidden, head), tokens, mesh)
    top_1 = found.target_logit == found.softmax.largest
    return found.nll, found.softmax.log_z, top_1.astype(jnp.float32)


def cross_entropy(
    projection: Projection, targets: Targets, z_loss: float, execution: Execution
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sums over tokens of cross-entropy and z-loss.

    Args:
        projection: hidden states and head, on each device its own part.
        targets: of this device's tokens, the same on each shard of `tensor`.
        z_loss: the coefficient of log(Z)^2.
        execution: resolved mesh, and the type in which gradients are summed over `fsdp`.

    Returns:
        The local nll plus z-loss in nats, to be differentiated, and {"loss": the local nll alone},
        which has no gradient. `vocabulary_loss` says what a mesh makes of both and of gradients.
    """
    return vocabulary_loss(CrossEntropy(z_loss), projection, None, targets, execution)


def loss(
    params: Tree, batch: Batch, model: ModelConfig, execution: Execution
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What training minimises on a batch, and its metrics.

    Args:
        params: float32 parameters.
        batch: `inputs`, `targets`, `positions`, `segment_ids`, int32 [B, T], and `weights`, float32
            [B, T].
        model: sizes, and the RoPE base of the stage.
        execution: how it is carried out; on several devices params and batch are this device's
            parts.

    Returns:
        The weighted sum of nll and z-loss in nats, and {"loss": the weighted sum of nll alone}. On
        several devices these are local losses, which sum to those of the whole batch.
    """
    return text_loss(params, batch, CrossEntropy(model.z_loss), model, execution)


def _cross_entropy(config: NextToken, model: ModelConfig) -> CrossEntropy:
    return CrossEntropy(model.z_loss)


DEFINITION: Definition = _cross_entropy
