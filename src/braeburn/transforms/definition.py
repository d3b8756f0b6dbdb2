"""What a transform is, beside its configuration: `DEFINITION` in the module named as its field.

A transform is what a stage does to a model besides training it. Between stages a state is always
that of an ordinary model. Within a stage it may hold further parameters, and the model may be
computed with effective weights that differ from the stored ones.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from braeburn.config import ModelConfig, Stage, StageModels
from braeburn.data.packing import Batch
from braeburn.layers.spec import ParamSpec, Tree
from braeburn.parallel.layout import Layout

# (all that a stage trains, steps of the stage so far) -> the effective weights of the model.
EffectiveWeights = Callable[[Tree, Any], Tree]


@dataclass(frozen=True)
class Found:
    """The model that a stage finds, for what a transform measures of it.

    Attributes:
        model: its sizes and RoPE base.
        params: its parameters, on the stage's mesh.
        layout: where they lie, and how the model is carried out.
        batches: the first of the stage, placed; each is made when it is asked for.
        seed: of the run, for what is drawn at random.
    """

    model: ModelConfig
    params: Tree
    layout: Layout
    batches: Iterable[Batch]
    seed: int


@dataclass(frozen=True)
class Change:
    """How the trees of a state change as a stage begins or ends; both functions are traced.

    Each is given a tree and what decides the change. As a stage begins, that is what `measure` has
    returned; as it ends, the parameters before the change.

    Attributes:
        params: (parameters, what decides) -> the new parameters.
        moments: (a tree of the optimizer's state in the form of the parameters, what decides) ->
            the new tree.
    """

    params: Callable[[Tree, Tree], Tree]
    moments: Callable[[Tree, Tree], Tree]


def trains_all(path: str, spec: ParamSpec) -> bool:
    """Whether a parameter trains, where all do."""
    return True


def measures_nothing(found: Found) -> Tree:
    """What decides how a stage begins, where nothing has to be measured."""
    return {}


@dataclass(frozen=True)
class Transform:
    """What one stage does to its model besides training it; by default nothing.

    Attributes:
        extra_specs: the specs of parameters beside the model's, in one tree with them. The names at
            its top are those of no parameter of a model; checkpoints have them at these paths.
        trains: (path, spec) -> whether a parameter trains. One that does not keeps its value.
        effective: gives the effective weights of each step; None where they are the stored ones.
        measure: what decides how the stage begins. It runs once, on the host, with programs of its
            own.
        enter: the change as the stage begins; None where the state stays as it is.
        leave: the change as the stage ends; None where the state stays as it is.
    """

    extra_specs: Tree = field(default_factory=dict)
    trains: Callable[[str, ParamSpec], bool] = trains_all
    effective: EffectiveWeights | None = None
    measure: Callable[[Found], Tree] = measures_nothing
    enter: Change | None = None
    leave: Change | None = None


# (configuration, models of the stage, its steps) -> the transform of the stage.
Definition = Callable[[Any, StageModels, int], Transform]


def transform_of(stage: Stage, models: StageModels) -> Transform:
    """The transform of a stage, of which there is one at most.

    Args:
        stage: its configuration.
        models: as the stage finds, trains and leaves them.
    """
    for name, config in stage.transforms.items():
        definition: Definition = importlib.import_module(f"braeburn.transforms.{name}").DEFINITION
        transform = definition(config, models, stage.steps)
        assert isinstance(transform, Transform)
        return transform
    return Transform()


def _zeros_added(moments: Tree, extras: Tree) -> Tree:
    return moments | jax.tree.map(jnp.zeros_like, extras)


# What was measured is added as extra parameters, of which the optimizer remembers nothing.
ADDED = Change(lambda params, extras: params | extras, _zeros_added)


def without(tree: Tree, extra_specs: Tree) -> Tree:
    """The model's part of a tree in the form of all that a stage trains."""
    return {name: child for name, child in tree.items() if name not in extra_specs}


def merged(effective: EffectiveWeights, steps: int, extra_specs: Tree) -> Change:
    """The change that makes the effective weights after `steps` steps the stored ones, and drops
    the extra parameters.
    """
    return Change(
        lambda params, _: effective(params, steps), lambda moments, _: without(moments, extra_specs)
    )
