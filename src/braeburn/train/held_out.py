"""Loss on text that training never sees."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from braeburn.background import nothing_to_ask
from braeburn.config import Execution, ModelConfig
from braeburn.data.loader import held_out_batches
from braeburn.data.prepare import Prepared
from braeburn.layers.spec import Tree
from braeburn.models import decoder
from braeburn.objectives.cross_entropy import token_losses
from braeburn.parallel.layout import Layout
from braeburn.train.resolved import ResolvedStage

# Enough for devices never to wait, and few enough to stop soon.
BATCHES_AT_ONCE = 2

# The ending of the sums that are told by ranges of positions.
BY_POSITION = "_by_position"

Evaluate = Callable[[Tree, dict[str, Any]], dict[str, Array]]


def evaluation_sums(
    model: ModelConfig, token_bytes: np.ndarray, execution: Execution, positions: Sequence[int] = ()
) -> Evaluate:
    """The program of a device from parameters and a batch to its share of sums over the batch's
    weighted tokens.

    Args:
        model: sizes and RoPE base.
        token_bytes: UTF-8 bytes of each entry of the vocabulary, int32 [V].
        execution: how the model is carried out.
        positions: where ranges of positions in a document begin, ascending from 0; the sums then
            have the loss and the tokens of each range, too.
    """
    # A model may have more rows than its tokenizer has entries.
    lengths = np.zeros(model.vocab_size, np.float32)
    lengths[: len(token_bytes)] = token_bytes[: model.vocab_size]

    mesh = execution.mesh

    def sums(params: Tree, batch: dict[str, Array]) -> dict[str, Array]:
        inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
        hidden = decoder.forward(params, inputs, model, execution.forward_only)
        losses, _, correct = token_losses(
            hidden, decoder.head_matrix(params), batch["targets"], mesh
        )
        # Tensor shards have worked on the same tokens.
        weights = batch["weights"] / mesh.tensor
        found = {
            "nll": jnp.sum(weights * losses),
            "correct": jnp.sum(weights * correct),
            "tokens": jnp.sum(weights),
            "token_bytes": jnp.sum(weights * jnp.asarray(lengths)[batch["targets"]]),
        }
        if positions:
            ranges = jnp.searchsorted(jnp.asarray(positions), batch["positions"], side="right") - 1
            for name, values in (("nll", weights * losses), ("tokens", weights)):
                by_range = jax.ops.segment_sum(values.ravel(), ranges.ravel(), len(positions))
                found[f"{name}{BY_POSITION}"] = by_range
        return found

    return sums


def evaluator(
    model: ModelConfig, token_bytes: np.ndarray, layout: Layout, positions: Sequence[int] = ()
) -> Evaluate:
    """A compiled function from parameters and a batch to sums over the batch's weighted tokens.

    Args:
        model: sizes and RoPE base.
        token_bytes: UTF-8 bytes of each entry of the vocabulary, int32 [V].
        layout: where parameters and batches lie.
        positions: those of `evaluation_sums`.
    """
    sums = evaluation_sums(model, token_bytes, layout.execution, positions)
    compiled = jax.jit(layout.total(sums))

    def evaluate(params: Tree, batch: dict[str, Array]) -> dict[str, Array]:
        with layout.compiling():
            return compiled(params, batch)

    return evaluate


def measure(
    evaluate: Evaluate,
    params: Tree,
    batches: Iterable[dict[str, Any]],
    byte_ratio: float,
    proceed: Callable[[], None] = nothing_to_ask,
    positions: Sequence[int] = (),
) -> dict[str, Any]:
    """Results over all batches: loss in nats per token, perplexity, accuracy, bits per byte, and
    their denominators; where the sums have them, the loss and the tokens of ranges of positions.

    Tokens include the one that ends each document. Bytes are those of the text as it was read, in
    UTF-8: exactly where all of a text is measured, and otherwise as many as its tokens stand for,
    at the text's own ratio of the two.

    Args:
        evaluate: sums over a batch.
        params: the model's, laid out as `evaluate` expects them.
        batches: placed on the devices, at least one.
        byte_ratio: that of the token shards that the batches are from.
        proceed: called before each batch; what it raises ends the evaluation.
        positions: those that `evaluate` was made with.
    """
    parts: list[dict[str, np.ndarray]] = []
    running: deque[dict[str, Array]] = deque()

    def finish_oldest() -> None:
        parts.append({name: np.asarray(value) for name, value in running.popleft().items()})

    for batch in batches:
        proceed()
        running.append(evaluate(params, batch))
        if len(running) > BATCHES_AT_ONCE:
            finish_oldest()
    while running:
        finish_oldest()
    totals = {
        name: [math.fsum(values) for values in np.stack([part[name].ravel() for part in parts]).T]
        for name in parts[0]
    }
    sums = {name: values[0] for name, values in totals.items()}
    loss = sums["nll"] / sums["tokens"]
    text_bytes = round(sums["token_bytes"] * byte_ratio)
    by_position = [
        {
            "from": first,
            "loss": totals[f"nll{BY_POSITION}"][index] / tokens,
            "tokens": round(tokens),
        }
        for index, first in enumerate(positions)
        if (tokens := totals[f"tokens{BY_POSITION}"][index])
    ]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums["correct"] / sums["tokens"],
        "bits_per_byte": sums["nll"] / math.log(2) / max(text_bytes, 1),
        "tokens": int(sums["tokens"]),
        "bytes": text_bytes,
        **({"by_position": by_position} if positions else {}),
    }


class HeldOut:
    """The held-out text of a run, on which stages are evaluated."""

    def __init__(
        self, prepared: Prepared, tokens: int, proceed: Callable[[], None] = nothing_to_ask
    ):
        """Takes the text.

        Args:
            prepared: the text.
            tokens: of each source that are read at most.
            proceed: called before each batch; what it raises ends an evaluation.
        """
        self._prepared = prepared
        self._tokens = tokens
        self._proceed = proceed
        self._last: tuple[Any, Evaluate] | None = None

    def results(
        self, resolved: ResolvedStage, params: Tree, model: ModelConfig
    ) -> dict[str, dict[str, float]]:
        """Results of a model on the text of each source that a stage draws from.

        Args:
            resolved: the stage.
            params: of the model, on the stage's mesh.
            model: as the stage trains or leaves it.
        """
        stage, layout = resolved.stage, resolved.layout_of(model)
        evaluate = self._evaluator(model, layout)
        sequences = max(1, stage.batch_size // stage.accumulation_steps)
        results = {}
        for source, shards in self._prepared.held_out.items():
            if shards is not None and stage.mixture.get(source):
                batches = held_out_batches(shards, stage.sequence_length, sequences, self._tokens)
                placed = (layout.place(batch, range(sequences), sequences) for batch in batches)
                results[source] = measure(
                    evaluate, params, placed, shards.byte_ratio, self._proceed
                )
        return results

    def _evaluator(self, model: ModelConfig, layout: Layout) -> Evaluate:
        """That of a model on a layout; the last is kept, for a stage to be evaluated often."""
        key = (model, layout.sizes)
        if self._last is None or self._last[0] != key:
            self._last = key, evaluator(model, self._prepared.tokenizer.token_bytes, layout)
        return self._last[1]
