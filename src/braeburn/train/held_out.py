"""Loss on text that training never sees."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from braeburn.config import Model, Precision
from braeburn.model import transformer
from braeburn.model.loss import token_losses
from braeburn.model.spec import Tree

Evaluate = Callable[[Tree, dict[str, Any]], dict[str, Array]]


@dataclass(frozen=True)
class HeldOut:
    """Sums over tokens that were predicted.

    Attributes:
        nll: negative log-likelihood in nats.
        correct: tokens that were the likeliest.
        tokens: tokens predicted, the end of each document included.
        text_bytes: UTF-8 bytes that those tokens stand for.
    """

    nll: float
    correct: float
    tokens: float
    text_bytes: float

    def summary(self) -> dict[str, float]:
        """Loss in nats per token, perplexity, accuracy, bits per byte, and the counts behind them."""
        loss = self.nll / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.correct / self.tokens,
            "bits_per_byte": self.nll / math.log(2) / max(self.text_bytes, 1.0),
            "tokens": int(self.tokens),
            "bytes": int(self.text_bytes),
        }


def evaluator(model: Model, precision: Precision, token_bytes: np.ndarray) -> Evaluate:
    """A compiled function from parameters and a batch to sums over the batch's weighted tokens.

    Args:
        model: sizes and RoPE base.
        precision: the type to compute in.
        token_bytes: UTF-8 bytes of each entry of the vocabulary, int32 [V].
    """
    # A model may have more rows than its tokenizer has entries.
    lengths = np.zeros(model.vocab_size, np.float32)
    lengths[: len(token_bytes)] = token_bytes[: model.vocab_size]

    @jax.jit
    def evaluate(params: Tree, batch: dict[str, Array]) -> dict[str, Array]:
        hidden = transformer.forward(
            params, batch["inputs"], batch["positions"], batch["segment_ids"], model, precision
        )
        losses, _, correct = token_losses(hidden, transformer.head_matrix(params), batch["targets"])
        weights = batch["weights"]
        return {
            "nll": jnp.sum(weights * losses),
            "correct": jnp.sum(weights * correct),
            "tokens": jnp.sum(weights),
            "text_bytes": jnp.sum(weights * jnp.asarray(lengths)[batch["targets"]]),
        }

    return evaluate


def measure(evaluate: Evaluate, params: Tree, batches: Iterable[dict[str, Any]]) -> HeldOut:
    """Sums over all batches, added up in float64 on the host."""
    sums = [evaluate(params, batch) for batch in batches]
    return HeldOut(**{name: math.fsum(float(part[name]) for part in sums) for name in HeldOut.__annotations__})
