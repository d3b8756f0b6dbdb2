"""What lies where: the configuration's rules, applied to the logical axes of an array.

Parameters, optimizer state and activations each have their column. A parameter is stored by the
first and multiplied by the last: along axes that only its storage is split along, it is gathered
for its product, layer by layer.
"""

import math
from collections.abc import Mapping
from typing import Literal

from jax.sharding import PartitionSpec

from braeburn.config import (
    SHARDED,
    Execution,
    MeshConfig,
    ModelConfig,
    Run,
    ShardingRules,
    divisors,
    some,
)
from braeburn.errors import UserError
from braeburn.parallel.collectives import CONTEXT, FSDP, PIPELINE, TENSOR

Kind = Literal["parameters", "optimizer", "activations"]
BATCH, LENGTH = "batch", "length"


def axes_of(rules: ShardingRules, kind: Kind) -> frozenset[str]:
    """All axes of the mesh that a column of the rules splits along."""
    placements = [getattr(rules, name) for name in type(rules).model_fields]
    named = frozenset(axis for placement in placements for axis in getattr(placement, kind))
    return named | set(SHARDED) if FSDP in named else named


def stored_along(rules: ShardingRules, mesh: MeshConfig) -> tuple[str, ...]:
    """The axes of more than one device, but for `tensor` and `context`, that weights are stored
    split along: each layer gathers its own along these.
    """
    axes = axes_of(rules, "parameters") - {TENSOR, CONTEXT}
    return tuple(axis for axis, size in mesh.sizes.items() if size > 1 and axis in axes)


def mesh_axes(
    axes: tuple[str, ...], shape: tuple[int, ...], kind: Kind, execution: Execution, role: str = ""
) -> list[tuple[str, ...]]:
    """The mesh axes of more than one device that each dimension of an array is split along.

    Args:
        axes: the logical axis of each dimension.
        shape: sizes over all devices.
        kind: the column of the rules.
        execution: resolved sizes of the mesh, and the rules.
        role: that of the parameter, if it is one.

    Returns:
        The names of the mesh axes for each dimension, none for a dimension that is not split.

    Raises:
        UserError: the mesh does not divide a dimension, or two dimensions are split along one axis
            of it.
    """
    sizes = execution.mesh.sizes
    placements = [execution.rules.of(name, role) for name in axes]
    split: list[tuple[str, ...]] = []
    # An axis that one dimension names is not meant by the `fsdp` of another.
    named = {axis for placement in placements for axis in getattr(placement, kind)} - {FSDP}
    meant = [execution.mesh.split_along(getattr(rule, kind), named) for rule in placements]
    # Dimensions that may stay whole give way to those that may not.
    taken = {
        axis
        for placement, along in zip(placements, meant, strict=True)
        if not placement.whole_if_uneven
        for axis in along
    }
    for name, size, placement, along in zip(axes, shape, placements, meant, strict=True):
        if placement.whole_if_uneven:
            along = tuple(axis for axis in along if axis not in taken)
        shards = math.prod(sizes[axis] for axis in along)
        if size % shards:
            if not placement.whole_if_uneven:
                raise UserError(_uneven(f"the {size} of {name!r}", size, along, execution))
            along = ()
        if placement.whole_if_uneven:
            taken |= set(along)
        split.append(along)
    used = [axis for dimension in split for axis in dimension]
    for axis in used:
        if used.count(axis) > 1:
            clash = [name for name, along in zip(axes, split, strict=True) if axis in along]
            raise UserError(
                f"the rules split {' and '.join(map(repr, clash))} of one array of {kind} along "
                f"the mesh axis {axis!r}; give one of them another axis, as with "
                f"rules.{clash[-1]}.{kind}=[], or set mesh.{axis} to 1"
            )
    return split


def partition(
    axes: tuple[str, ...], shape: tuple[int, ...], kind: Kind, execution: Execution, role: str = ""
) -> PartitionSpec:
    """How an array with these logical axes is split over the mesh.

    Args:
        axes: the logical axis of each dimension.
        shape: sizes over all devices.
        kind: the column of the rules.
        execution: resolved sizes of the mesh, and the rules.
        role: that of the parameter, if it is one.

    Returns:
        The same as `mesh_axes`, as JAX's shardings take it.

    Raises:
        UserError: the mesh does not divide a dimension, or two dimensions are split along one axis
            of it.
    """
    split = mesh_axes(axes, shape, kind, execution, role)
    return PartitionSpec(*(along[0] if len(along) == 1 else along or None for along in split))


def check(
    run: Run,
    name: str,
    model: ModelConfig,
    execution: Execution,
    parameters: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], str]],
) -> None:
    """Refuses a mesh that does not divide a stage of a run.

    Args:
        run: the run.
        name: of the stage.
        model: one that the stage finds, trains or leaves.
        execution: resolved sizes of the mesh, and the rules.
        parameters: logical axes, shape and role of each parameter by its path.

    Raises:
        UserError: naming the axis at fault, and sizes of it that would work.
    """
    check_model(model, execution, parameters)
    sizes = execution.mesh.sizes
    stage = run.stages[name]
    if execution.mesh.pipeline > 1:
        _check_pipeline(run, name, model, execution)
    sequences = stage.batch_size // stage.accumulation_steps
    execution = execution.of_stage
    splits = execution.mesh.split_along(execution.rules.batch.activations)
    if sequences % batch_shards(execution):
        what = f"stages.{name}: the {sequences} sequences of a batch"
        if stage.accumulation_steps > 1:
            what += f" over accumulation_steps={stage.accumulation_steps}"
        raise UserError(_uneven(what, sequences, splits, execution))
    pieces = sequence_pieces(execution.mesh)
    if stage.sequence_length % pieces:
        axis = "context" if sizes["context"] > 1 else "tensor"
        others = pieces // sizes[axis]
        fits = [
            n for n in divisors(stage.sequence_length) if stage.sequence_length % (n * others) == 0
        ]
        raise UserError(
            f"stages.{name}: mesh.{axis}={sizes[axis]} splits sequences of {stage.sequence_length} "
            f"tokens into {pieces} pieces, which do not come out even; set mesh.{axis} to one of "
            f"{some(fits or [1])}"
        )


def _check_pipeline(run: Run, name: str, model: ModelConfig, execution: Execution) -> None:
    """Refuses a pipeline that a stage of a run cannot be carried out by."""
    mesh, stage = execution.mesh, run.stages[name]
    repeats = sum(segment.repeats for segment in model.segments)
    if mesh.pipeline * mesh.stages_per_device > repeats:
        each = f" x mesh.stages_per_device={mesh.stages_per_device}"
        raise UserError(
            f"stages.{name}: mesh.pipeline={mesh.pipeline}"
            f"{each if mesh.stages_per_device > 1 else ''} is more stages than the {repeats} "
            f"repeats of the model's pattern of layers; set mesh.pipeline to at most "
            f"{max(1, repeats // mesh.stages_per_device)}"
        )
    steps = stage.accumulation_steps
    if mesh.stages_per_device > 1 and steps % mesh.pipeline:
        shards, batch = batch_shards(execution.of_stage), stage.batch_size
        fits = [n for n in divisors(batch) if n % mesh.pipeline == 0 and batch // n % shards == 0]
        advice = (
            f"stages.{name}.accumulation_steps to one of {some(fits)}, or mesh.stages_per_device "
            f"to 1"
            if fits
            else "mesh.stages_per_device to 1"
        )
        raise UserError(
            f"stages.{name}: accumulation_steps={steps} is not a multiple of mesh.pipeline="
            f"{mesh.pipeline}, which mesh.stages_per_device={mesh.stages_per_device} needs for "
            f"microbatches to take turns; set {advice}"
        )
    if run.offload.activations:
        raise UserError(
            f"offload.activations={list(run.offload.activations)} cannot wait on the host in a "
            f"pipeline (mesh.pipeline={mesh.pipeline}), whose microbatches take turns; set "
            f"offload.activations to []"
        )
    for axis in type(execution.rules).model_fields:
        along = mesh.split_along(getattr(execution.rules, axis).parameters)
        if PIPELINE in along[:-1] and not axis.startswith("norm_"):
            raise UserError(
                f"rules.{axis}.parameters={list(getattr(execution.rules, axis).parameters)} must "
                f"name 'fsdp' last for mesh.pipeline={mesh.pipeline} to deal layers out; move it "
                f"to the end"
            )


def batch_shards(execution: Execution) -> int:
    """How many parts of equal size the sequences of a batch are split into."""
    sizes = execution.mesh.sizes
    return math.prod(
        sizes[axis] for axis in execution.mesh.split_along(execution.rules.batch.activations)
    )


def token_axes(execution: Execution) -> tuple[str, ...]:
    """The mesh axes of more than one device whose devices have different tokens of a batch."""
    rules = execution.rules
    return execution.mesh.split_along((*rules.batch.activations, *rules.length.activations))


def sequence_pieces(mesh: MeshConfig) -> int:
    """How many pieces of equal length a sequence is cut into: a context shard holds two, an early
    one and a late one, each split over tensor.
    """
    return (2 if mesh.context > 1 else 1) * mesh.context * mesh.tensor


def check_model(
    model: ModelConfig,
    execution: Execution,
    parameters: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], str]],
) -> None:
    """Refuses a mesh that does not divide a model.

    Args:
        model: the model.
        execution: resolved sizes of the mesh, and the rules.
        parameters: logical axes, shape and role of each parameter by its path.

    Raises:
        UserError: naming the axis at fault, and sizes of it that would work.
    """
    tensor = execution.mesh.tensor
    # Experts first: fewer sizes of `expert` divide them than divide `embed`.
    for path, (axes, shape, role) in sorted(
        parameters.items(), key=lambda item: "experts" not in item[1][0]
    ):
        try:
            for kind in ("parameters", "optimizer", "activations"):
                partition(axes, shape, kind, execution, role)
        except UserError as error:
            raise UserError(f"model parameter {path!r}: {error}") from None
    if model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        fits = [
            n
            for n in divisors(model.num_heads)
            if model.num_kv_heads % n == 0 or n % model.num_kv_heads == 0
        ]
        raise UserError(
            f"mesh.tensor={tensor} neither divides nor is a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}; set mesh.tensor to one of {some(fits)}"
        )


def _uneven(what: str, size: int, axes: tuple[str, ...], execution: Execution) -> str:
    """What does not divide, and sizes of the axis to blame that would."""
    sizes = execution.mesh.sizes
    split = {axis: sizes[axis] for axis in axes if sizes[axis] > 1}
    shards = math.prod(split.values())
    named = " x ".join(f"mesh.{axis}={n}" for axis, n in split.items())
    # The axis whose own size alone mends it; fully sharded before the others, since it is the one
    # inferred.
    remedies = []
    for axis in sorted(split, key=lambda axis: axis != "fsdp"):
        fits = [n for n in divisors(size) if size % (shards // split[axis] * n) == 0]
        if fits:
            remedies.append(f"mesh.{axis} to one of {some(fits)}")
    return (
        f"{what} cannot be split into {shards} equal parts ({named}); set "
        f"{' or '.join(remedies) or 'them to 1'}"
    )
