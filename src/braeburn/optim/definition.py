"""What an optimizer is, beside its configuration: `DEFINITION` in the module of its kind."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from braeburn.config import ModelConfig, OptimizerConfig, Stage
from braeburn.layers.spec import Tree


@dataclass(frozen=True)
class Definition:
    """An optimizer.

    Attributes:
        direction: (configuration, specs, model) -> the transformation of clipped gradients into
            updates, before the learning rate and without weight decay.
        second_moment: (state of `direction`) -> the running mean of squared gradients, as a tree
            like the parameters; None where it keeps none.
        weight_decay: (stage) -> what a parameter is multiplied by and loses in a step, before the
            schedule.
        no_decay: the roles of parameters that lose nothing.
    """

    direction: Callable[[Any, Tree, ModelConfig], optax.GradientTransformation]
    second_moment: Callable[[Any], Tree | None]
    weight_decay: Callable[[Stage], float]
    no_decay: frozenset[str]


def definition_of(config: OptimizerConfig) -> Definition:
    """The definition of an optimizer by its configuration."""
    found = importlib.import_module(f"braeburn.optim.{config.kind}").DEFINITION
    assert isinstance(found, Definition)
    return found
