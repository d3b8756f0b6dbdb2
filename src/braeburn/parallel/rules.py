"""The one table of what lies where: from the logical axes of arrays to the axes of the mesh.

Parameters, optimizer state and activations each have their column. A parameter is stored by the
first and used by the last: what is stored split along an axis that its use is not split along is
gathered for the use, layer by layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jax.sharding import PartitionSpec

from braeburn.config import MeshAxis, MeshConfig, ModelConfig, Run, divisors, some
from braeburn.errors import UserError

Kind = Literal["parameters", "optimizer", "activations"]


@dataclass(frozen=True)
class Placement:
    """Mesh axes that one logical axis is split along, the outermost first, for each kind of array.

    `whole_if_uneven` keeps a dimension whole where the mesh does not divide it; others are then
    refused.
    """

    parameters: tuple[MeshAxis, ...] = ()
    optimizer: tuple[MeshAxis, ...] = ()
    activations: tuple[MeshAxis, ...] = ()
    whole_if_uneven: bool = False


BATCH, LENGTH = "batch", "length"

# `norm.embed` holds for the `embed` of parameters whose role is norm, before the rule for `embed`.
RULES: dict[str, Placement] = {
    BATCH: Placement(activations=("replica", "data", "fsdp")),
    LENGTH: Placement(activations=("context",)),
    "vocab": Placement(("tensor",), ("tensor",), ("tensor",)),
    "embed": Placement(("fsdp",), ("fsdp",)),
    "heads": Placement(("tensor",), ("tensor",), ("tensor",)),
    "kv_heads": Placement(("tensor",), ("tensor",), ("tensor",), whole_if_uneven=True),
    "head_dim": Placement(),
    "ffn": Placement(("tensor",), ("tensor",), ("tensor",)),
    "layers": Placement(),
    "norm.embed": Placement(("fsdp", "tensor"), ("fsdp", "tensor"), whole_if_uneven=True),
    "norm.head_dim": Placement(("fsdp", "tensor"), ("fsdp", "tensor"), whole_if_uneven=True),
}


def mesh_axes(
    name: str, size: int, kind: Kind, mesh: MeshConfig, role: str = ""
) -> tuple[str, ...]:
    """The mesh axes of more than one device that a dimension is split along.

    Args:
        name: its logical axis.
        size: its length over all devices.
        kind: the column of the table.
        mesh: resolved sizes.
        role: that of the parameter, if it is one.

    Raises:
        UserError: the mesh does not divide the dimension.
    """
    rule = RULES.get(f"{role}.{name}") or RULES[name]
    axes = tuple(axis for axis in getattr(rule, kind) if mesh.sizes[axis] > 1)
    shards = math.prod(mesh.sizes[axis] for axis in axes)
    if size % shards == 0:
        return axes
    if rule.whole_if_uneven:
        return ()
    raise UserError(_uneven(f"the {size} of {name!r}", size, axes, mesh))


def partition(
    axes: tuple[str, ...], shape: tuple[int, ...], kind: Kind, mesh: MeshConfig, role: str = ""
) -> PartitionSpec:
    """How an array with these logical axes is split over the mesh.

    Raises:
        UserError: the mesh does not divide a dimension, or two dimensions are split along one axis
            of it.
    """
    split = [
        mesh_axes(name, size, kind, mesh, role) for name, size in zip(axes, shape, strict=True)
    ]
    used = [axis for dimension in split for axis in dimension]
    for axis in used:
        if used.count(axis) > 1:
            clash = [name for name, along in zip(axes, split, strict=True) if axis in along]
            raise UserError(
                f"the rules split {' and '.join(map(repr, clash))} of one array of {kind} along "
                f"the mesh axis {axis!r}; give one of them another axis in "
                f"braeburn.parallel.rules.RULES, or set mesh.{axis} to 1"
            )
    return PartitionSpec(*(along[0] if len(along) == 1 else along or None for along in split))


def check(
    run: Run,
    name: str,
    model: ModelConfig,
    mesh: MeshConfig,
    parameters: Mapping[str, tuple[tuple[str, ...], tuple[int, ...], str]],
) -> None:
    """Refuses a mesh that does not divide a stage of a run.

    Args:
        run: the run.
        name: of the stage.
        model: one that the stage finds, trains or leaves.
        mesh: resolved sizes.
        parameters: logical axes, shape and role of each parameter by its path.

    Raises:
        UserError: naming the axis at fault, and sizes of it that would work.
    """
    sizes = mesh.sizes
    tensor, context = sizes["tensor"], sizes["context"]
    for path, (axes, shape, role) in parameters.items():
        try:
            for kind in ("parameters", "optimizer", "activations"):
                partition(axes, shape, kind, mesh, role)
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
    stage = run.stages[name]
    sequences = stage.batch_size // stage.accumulation_steps
    splits = RULES[BATCH].activations
    if sequences % math.prod(sizes[axis] for axis in splits):
        what = f"stages.{name}: the {sequences} sequences of a batch"
        if stage.accumulation_steps > 1:
            what += f" over accumulation_steps={stage.accumulation_steps}"
        raise UserError(_uneven(what, sequences, splits, mesh))
    # A context shard holds two pieces of each sequence, an early one and a late one, each split
    # over tensor.
    pieces = (2 if context > 1 else 1) * context * tensor
    if stage.sequence_length % pieces:
        axis = "context" if context > 1 else "tensor"
        others = pieces // sizes[axis]
        fits = [
            n for n in divisors(stage.sequence_length) if stage.sequence_length % (n * others) == 0
        ]
        raise UserError(
            f"stages.{name}: mesh.{axis}={sizes[axis]} splits sequences of {stage.sequence_length} "
            f"tokens into {pieces} pieces, which do not come out even; set mesh.{axis} to one of "
            f"{some(fits or [1])}"
        )


def _uneven(what: str, size: int, axes: tuple[str, ...], mesh: MeshConfig) -> str:
    """What does not divide, and sizes of the axis to blame that would."""
    split = {axis: mesh.sizes[axis] for axis in axes if mesh.sizes[axis] > 1}
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
