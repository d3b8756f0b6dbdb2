"""What one device stores of a model's parameters and of what the optimizer remembers of them, by
the rules of a run, and the collectives of a step that keep copies of both equal.
"""

import math
from functools import cache
from typing import NamedTuple

import jax

from braeburn.config import (
    Execution,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ShardingRules,
    WeightType,
)
from braeburn.layers.spec import ParamSpec, Tree, walk
from braeburn.models.decoder import param_specs
from braeburn.optim.definition import Parameters, initial_state
from braeburn.parallel.layout import parameter_of
from braeburn.parallel.rules import Kind, axes_of, mesh_axes
from braeburn.plan.identity import by_identity

FLOAT = 4
# Axes of the mesh in the order in which the gradients of copies are summed.
COPIES = ("tensor", "context", "pipeline", "expert", "fsdp", "data", "replica")


class Shared(NamedTuple):
    """The collectives between copies along one axis, in one step.

    Attributes:
        axis: of the mesh.
        bytes: on one device, as `plan.collectives.Collective.bytes` counts them.
        times: how many there are, one for each array.
    """

    axis: str
    bytes: float
    times: int


class Storage(NamedTuple):
    """What a device stores, and the collectives that this takes.

    Attributes:
        parameters: how many numbers of the parameters the device stores.
        part: the fraction of all parameters that the device stores.
        optimizer_bytes: of what the optimizer remembers.
        summed: the collectives that sum the gradients of copies.
        updated: the collectives that gather parameters after an update, where each device updates
            a smaller part than it stores.
    """

    parameters: float
    part: float
    optimizer_bytes: float
    summed: tuple[Shared, ...]
    updated: tuple[Shared, ...]


@cache
def specs_of(model: ModelConfig) -> Tree:
    """The specs of a model's parameters."""
    return param_specs(model)


@cache
def _state(
    optimizer: OptimizerConfig, model: ModelConfig
) -> tuple[tuple[int, tuple[str, ...] | None], ...]:
    """Bytes of each array that an optimizer remembers, over all devices, and the parameter that it
    lies like; None where every device has a copy.
    """
    shapes = {path: spec.shape for path, spec in _specs_by_path(model).items()}
    state = initial_state(optimizer, Parameters(specs_of(model), model))
    return tuple(
        (leaf.size * leaf.dtype.itemsize, parameter_of(path, leaf, shapes))
        for path, leaf in jax.tree.leaves_with_path(state)
        if leaf.ndim
    )


def held_bytes(
    model: ModelConfig, rules: ShardingRules, mesh: MeshConfig, weights: WeightType
) -> list[tuple[ParamSpec, float]]:
    """Each parameter of a model, and the bytes of it that a device holds for a job after training.

    Args:
        model: whose parameters.
        rules: what lies where.
        mesh: resolved sizes.
        weights: the type that all but norms are held in.

    Raises:
        UserError: the mesh does not divide the parameters as the rules split them.
    """
    size_of, split = mesh.sizes, axes_of_parameters(model, rules, "parameters", mesh)
    return [
        (
            spec,
            math.prod(spec.shape)
            * spec.held_in(weights).itemsize
            / math.prod(size_of[axis] for axis in split[path]),
        )
        for path, spec in _specs_by_path(model).items()
    ]


@by_identity
def storage_of(
    model: ModelConfig, optimizer: OptimizerConfig, rules: ShardingRules, mesh: MeshConfig
) -> Storage:
    """What a device stores of a model and its optimizer.

    Args:
        model: whose parameters.
        optimizer: that updates them.
        rules: what lies where.
        mesh: resolved sizes.

    Raises:
        UserError: the mesh does not divide the parameters as the rules split them.
    """
    size_of, specs = mesh.sizes, _specs_by_path(model)
    stored, remembered = (
        axes_of_parameters(model, rules, kind, mesh) for kind in ("parameters", "optimizer")
    )
    shards = {path: math.prod(size_of[a] for a in axes) for path, axes in remembered.items()}
    elements = {
        path: math.prod(spec.shape) / math.prod(size_of[axis] for axis in stored[path])
        for path, spec in specs.items()
    }
    summed: dict[str, list[float]] = {}
    updated: dict[str, list[float]] = {}
    for path, axes in stored.items():
        moved = FLOAT * elements[path]
        for axis in COPIES:
            if size_of[axis] > 1 and axis not in axes:
                summed.setdefault(axis, []).append(moved)
                # The sum over several axes is scattered along the first for the next.
                moved /= size_of[axis]
        moved = FLOAT * elements[path]
        for axis in sorted(remembered[path] - axes):
            updated.setdefault(axis, []).append(moved)
            moved /= size_of[axis]
    total = sum(elements.values())
    return Storage(
        total,
        total / sum(math.prod(spec.shape) for spec in specs.values()),
        sum(
            size / (1 if path is None else shards[path]) for size, path in _state(optimizer, model)
        ),
        _together(summed),
        _together(updated),
    )


@cache
def _specs_by_path(model: ModelConfig) -> dict[tuple[str, ...], ParamSpec]:
    return {tuple(path.split("/")): spec for path, spec in walk(specs_of(model))}


def axes_of_parameters(
    model: ModelConfig, rules: ShardingRules, kind: Kind, mesh: MeshConfig
) -> dict[tuple[str, ...], frozenset[str]]:
    """The axes of the mesh that each parameter, or the state that lies like it, is split along.

    Args:
        model: whose parameters.
        rules: what lies where.
        kind: "parameters", or "optimizer" for the state.
        mesh: resolved sizes.

    Raises:
        UserError: the mesh does not divide the parameters as the rules split them.
    """
    named = axes_of(rules, kind)
    sizes = {axis: size for axis, size in mesh.sizes.items() if axis in named}
    return _axes_of(model, rules, kind, MeshConfig.model_validate({"fsdp": 1} | sizes))


@by_identity
def _axes_of(
    model: ModelConfig, rules: ShardingRules, kind: Kind, mesh: MeshConfig
) -> dict[tuple[str, ...], frozenset[str]]:
    """`axes_of_parameters` for a mesh of one device along all axes that the rules do not name."""
    execution = Execution(mesh, rules)
    return {
        path: frozenset(
            axis
            for along in mesh_axes(spec.axes, spec.shape, kind, execution, spec.role)
            for axis in along
        )
        for path, spec in _specs_by_path(model).items()
    }


def _together(moved: dict[str, list[float]]) -> tuple[Shared, ...]:
    return tuple(Shared(axis, sum(sizes), len(sizes)) for axis, sizes in moved.items())
