"""What a stage minimises where it learns from its text alone: `DEFINITION` in the module of the
objective's kind.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from braeburn.config import Execution, ModelConfig, ObjectiveConfig
from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree
from braeburn.layers.sublayers.definition import Report
from braeburn.models.decoder import head_matrix, reported_forward
from braeburn.objectives.vocabulary import Objective, Projection, Targets, vocabulary_loss

# (configuration, model) -> the objective, whose tokens are `Targets`.
Definition = Callable[[Any, ModelConfig], Objective[Targets, Any]]


def objective_of(config: ObjectiveConfig, model: ModelConfig) -> Objective[Targets, Any]:
    """The objective of a stage by its configuration."""
    definition: Definition = importlib.import_module(
        f"braeburn.objectives.{config.kind}"
    ).DEFINITION
    found = definition(config, model)
    assert isinstance(found, Objective)
    return found


def text_loss(
    params: Tree,
    batch: Batch,
    objective: Objective[Targets, Any],
    model: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What training minimises on a batch, and its metrics.

    Args:
        params: float32 parameters.
        batch: `inputs`, `targets`, `positions`, `segment_ids`, int32 [B, T], and `weights`, float32
            [B, T].
        objective: of the tokens of the batch.
        model: sizes, and the RoPE base of the stage.
        execution: how it is carried out; on several devices params and batch are this device's
            parts.

    Returns:
        The loss and the metrics of the objective. On several devices these are local losses, which
        sum to those of the whole batch.
    """
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    hidden, report = reported_forward(params, inputs, batch["weights"], model, execution)
    with jax.named_scope("loss"):
        projection = Projection(hidden, head_matrix(params))
        return with_report(projected_text_loss(projection, batch, objective, execution), report)


def projected_text_loss(
    projection: Projection, batch: Batch, objective: Objective[Targets, Any], execution: Execution
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The part of `text_loss` that follows from final hidden states and the head.

    Args:
        projection: of these.
        batch: its `targets`, int32 [B, T], and `weights`, float32 [B, T].
        objective: of the tokens of the batch.
        execution: how it is carried out.
    """
    targets = Targets(batch["targets"], batch["weights"])
    return vocabulary_loss(objective, projection, None, targets, execution)


def with_report(
    found: tuple[Float[Array, ""], dict[str, Array]], report: Report | None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss and the metrics of an objective with what layers add to them."""
    if report is None:
        return found
    loss, metrics = found
    return loss + report.loss, metrics | report.metrics
