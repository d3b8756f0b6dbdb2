"""The programs of a stage, taken from the loss that it trains with: each block of layers, and all
that is around them.

This module alone knows how the loss of a stage is called. What the layers are it reads from the
traced program: a loop over stacked parameters is a block, its body one repeat of the block's
pattern, its length the number of repeats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jax.sharding import AbstractDevice

from braeburn.config import (
    Distillation,
    Execution,
    MeshConfig,
    ModelConfig,
    Offload,
    Precision,
    Remat,
)
from braeburn.errors import UserError
from braeburn.layers.attention.backend import ATTENTION
from braeburn.layers.attention.select import outlined
from braeburn.layers.spec import Tree, walk
from braeburn.models import decoder
from braeburn.objectives import cross_entropy, distillation
from braeburn.parallel.collectives import CONTEXT
from braeburn.parallel.rules import mesh_axes, partition
from braeburn.plan.graph import total_collectives
from braeburn.plan.trace import (
    REMATERIALIZED,
    Policy,
    Program,
    differentiate,
    evaluate,
    on_each_device,
)

# Of an axis along which weights are split: what is gathered does not depend on it.
FSDP_TRACED = 2
# Tokens that a loss takes in one chunk, whatever it is.
_MOST_TOKENS = 500
_LARGEST_PRIME = 127

# Devices along `tensor` that are traced, as far as a model allows.
SIZES = (2, 4, 8, 16, 32, 64)

FORWARD, BACKWARD = "attention_forward", "attention_backward"


@dataclass(frozen=True, eq=False)
class Shapes:
    """All that the sizes of a stage's programs on one device depend on, but for the tokens.

    Each is one of its kind: see `shapes_of`.

    Attributes:
        model: that is trained.
        precision: of its activations and sums.
        tensor: devices along `tensor`.
        fsdp: whether weights are split along `fsdp`.
        context: devices along `context`.
        teacher: a model that runs forward beside it, and what it teaches; None where there is none.
    """

    model: ModelConfig
    precision: Precision
    tensor: int = 1
    fsdp: bool = False
    context: int = 1
    teacher: tuple[ModelConfig, Distillation] | None = None

    @property
    def mesh(self) -> MeshConfig:
        """The mesh that is traced."""
        return MeshConfig(
            fsdp=FSDP_TRACED if self.fsdp else 1, context=self.context, tensor=self.tensor
        )

    @cached_property
    def marker(self) -> int:
        """A prime that divides none of the models' sizes."""
        models = [self.model, *(self.teacher[:1] if self.teacher else [])]
        sizes = {v for m in models for v in m.model_dump().values() if isinstance(v, int) and v > 1}
        largest = max(5, min(_LARGEST_PRIME, _MOST_TOKENS // self.tensor))
        return next(
            n
            for n in range(largest, 1, -1)
            if all(n % d for d in range(2, n)) and all(size % n for size in sizes)
        )

    @cached_property
    def tokens(self) -> int:
        """Tokens that are traced, on all tensor shards together."""
        return self.tensor * self.marker


@cache
def shapes_of(
    model: ModelConfig,
    precision: Precision,
    tensor: int,
    fsdp: bool,
    context: int = 1,
    teacher: tuple[ModelConfig, Distillation] | None = None,
) -> Shapes:
    """The shapes that a model's programs are traced with.

    Args:
        model: that is trained; see `sized`.
        precision: of its activations and sums.
        tensor: devices along `tensor`.
        fsdp: whether weights are split along `fsdp`.
        context: devices along `context`, where more than attention depends on them.
        teacher: a teacher's model with what it teaches, or None.
    """
    return Shapes(model, precision, tensor, fsdp, context, teacher)


@cache
def sized(model: ModelConfig) -> ModelConfig:
    """The model without what changes no size of its programs."""
    return model.model_copy(update={"rope_base": 1.0, "rope_scaling": None, "scan_layers": True})


@cache
def _splits(model: ModelConfig, tensor: int) -> frozenset[str] | None:
    """The parameters that are split along `tensor`; None where it does not divide the model."""
    execution = Execution(MeshConfig(fsdp=1, tensor=tensor))
    split = set()
    try:
        for path, spec in walk(decoder.param_specs(model)):
            axes = mesh_axes(spec.axes, spec.shape, "parameters", execution, spec.role)
            if spec.role != "norm":
                split |= {
                    f"{path} {name}" for name, along in zip(spec.axes, axes, strict=True) if along
                }
    except UserError:
        return None
    return frozenset(split)


@cache
def neighbours(shapes: Shapes) -> tuple[Shapes, Shapes, float] | None:
    """Two shapes with fewer and with more devices along `tensor`, and how far between them these
    are; None for shapes that are traced themselves.

    Where the same parameters are split, each array either has its part of a dimension, or all of
    it: what there is for each token is linear in 1 / tensor.
    """
    model, tensor = shapes.model, shapes.tensor
    if tensor == 1:
        return None
    splits = _splits(model, tensor)
    alike = [n for n in SIZES if _splits(model, n) == splits]
    if splits is None or not alike or not alike[0] < tensor < alike[-1]:
        return None
    ends = [
        shapes_of(model, shapes.precision, n, shapes.fsdp, shapes.context, shapes.teacher)
        for n in (alike[0], alike[-1])
    ]
    share = (1 / alike[0] - 1 / tensor) / (1 / alike[0] - 1 / alike[-1])
    return ends[0], ends[1], share


@cache
def crosses_context(model: ModelConfig, precision: Precision) -> bool:
    """Whether anything but attention exchanges along `context`: else its size changes nothing but
    the tokens of a device.
    """
    found = programs(shapes_of(model, precision, 1, False, 2))
    graphs = [found.around, *(block.program for block in found.blocks)]
    return any(
        key.axis == CONTEXT
        for program in graphs
        for key in total_collectives(program.forward + program.backward)
    )


@dataclass(frozen=True, eq=False)
class Block:
    """A loop over layers.

    Attributes:
        program: one repeat of its pattern.
        repeats: how many there are.
        carry: the inputs and gradients of the program that go from one repeat to the next: values
            of both kinds.
        varying: its inputs that differ between repeats.
        trained: whether it has a gradient; a teacher's has none.
    """

    program: Program
    repeats: int
    carry: frozenset[Any]
    varying: frozenset[Any]
    trained: bool


@dataclass(frozen=True, eq=False)
class Programs:
    """What a step does with a part of a batch.

    Attributes:
        blocks: of layers; beside a teacher, its alone.
        around: embedding, final norm and loss, with their gradients.
    """

    blocks: tuple[Block, ...]
    around: Program


def _loss(shapes: Shapes) -> Callable[..., Any]:
    """The loss of a stage as its train step differentiates it: of parameters, batch and a teacher's
    parameters.
    """
    model = shapes.model
    execution = Execution(shapes.mesh, precision=shapes.precision)
    if shapes.teacher is None:
        return lambda params, batch: cross_entropy.loss(params, batch, model, execution)[0]
    taught_by, targets = shapes.teacher
    return lambda params, batch, teacher: distillation.loss(
        params, batch, (taught_by, teacher), model, targets, execution
    )[0]


@cache
def policy_of(remat: Remat, offload: Offload, fsdp: bool) -> Policy:
    """What a rematerialised layer keeps, as `jax.checkpoint` is told."""
    mesh = MeshConfig(fsdp=FSDP_TRACED if fsdp else 1)
    execution = Execution(mesh, remat=remat, offload=offload)
    body = decoder.rematerialized(lambda x: x, execution)
    for equation in jax.make_jaxpr(body)(0.0).eqns:
        if equation.primitive.name in REMATERIALIZED:
            policy: Policy = equation.params["policy"]
            return policy
    return None


def _parameters(model: ModelConfig, mesh: MeshConfig) -> tuple[Tree, list[bool]]:
    """The types of one device's part of the parameters, and whether each is stacked over layers."""

    def part(spec: Any) -> Any:
        split = tuple(partition(spec.axes, spec.shape, "parameters", Execution(mesh), spec.role))
        shape = list(spec.shape)
        for dim, axes in enumerate(split):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                shape[dim] //= mesh.sizes[axis]
        return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)

    specs = decoder.param_specs(model)
    return jax.tree.map(part, specs), [spec.stacked for spec in jax.tree.leaves(specs)]


@jax.custom_vjp
def attention_call(query: Any, key: Any, value: Any) -> Any:
    """What stands for attention in a traced program: one call forward and one backward, whose costs
    are worked out apart.
    """
    return _attention_forward(query, key, value)[0]


def _attention_forward(query: Any, key: Any, value: Any) -> tuple[Any, tuple[Any, ...]]:
    result = jax.ShapeDtypeStruct(query.shape, query.dtype)
    output = checkpoint_name(jax.ffi.ffi_call(FORWARD, result)(query, key, value), ATTENTION)
    return output, (query, key, value, output)


def _attention_backward(residuals: tuple[Any, ...], above: Any) -> tuple[Any, ...]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3]]
    return tuple(jax.ffi.ffi_call(BACKWARD, results)(*residuals, above))


attention_call.defvjp(_attention_forward, _attention_backward)


@cache
def programs(shapes: Shapes) -> Programs:
    """The programs of a stage for a mesh, traced for any device."""
    mesh = shapes.mesh
    device = AbstractDevice("", None, "cpu")
    params, stacked = _parameters(shapes.model, mesh)
    given, blocks_of = [params], list(stacked)
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((1, shapes.tokens), dtype)
        for name, dtype in (types | {"weights": jnp.float32}).items()
    }
    given.append(batch)
    blocks_of += [False] * len(batch)
    if shapes.teacher:
        taught_by, stacked = _parameters(shapes.teacher[0], mesh)
        given.append(taught_by)
        blocks_of += stacked

    def wrap(function: Callable) -> Callable:
        return on_each_device(function, mesh, device)

    loss, structure = _loss(shapes), jax.tree.structure(given)
    leaves = jax.tree.leaves(given)
    moving = [index < len(jax.tree.leaves(params)) for index in range(len(leaves))]
    with outlined(lambda request, query, key, value, *_: attention_call(query, key, value)):
        whole = jax.make_jaxpr(wrap(lambda *leaves: loss(*jax.tree.unflatten(structure, leaves))))(
            *leaves
        )
    (mapped,) = whole.jaxpr.eqns
    inner, constants = (
        mapped.params["jaxpr"],
        dict(zip(whole.jaxpr.constvars, whole.consts, strict=True)),
    )
    order = [
        whole.jaxpr.invars.index(v) if v in whole.jaxpr.invars else None for v in mapped.invars
    ]
    loops = _loops(inner, order, blocks_of, moving)
    # Beside a teacher the layers that are trained are those that there are without one.
    blocks = tuple(
        _block(eqn, moves, wrap, shapes.marker)
        for eqn, moves in loops.items()
        if not (shapes.teacher and any(moves))
    )

    # What is made of stacked parameters before the loop, as norms that are gathered at once.
    prepared = {
        equation: [
            index
            for index, (var, moves) in enumerate(zip(equation.invars, flags, strict=True))
            if moves and var not in inner.invars and index >= _first_stacked(equation)
        ]
        for equation, flags in loops.items()
    }

    def around(*leaves: Any) -> list[Any]:
        arguments = [
            constants[var] if index is None else leaves[index]
            for var, index in zip(mapped.invars, order, strict=True)
        ]
        made: list[Any] = []

        def past_layers(equation: Any, inputs: list[Any]) -> Sequence[Any] | None:
            if equation not in loops:
                return None
            made.extend(inputs[index] for index in prepared[equation])
            first, count = equation.params["num_consts"], equation.params["num_carry"]
            states = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in equation.outvars[count:]]
            return [*inputs[first : first + count], *states]

        return [*evaluate(inner, (), arguments, past_layers), *made]

    results = [jax.ShapeDtypeStruct((), jnp.float32)]
    for equation, indices in prepared.items():
        avals = [equation.invars[index].aval for index in indices]
        results += [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return Programs(blocks, differentiate(around, leaves, moving, results, wrap, shapes.marker))


def _first_stacked(equation: Any) -> int:
    """The first input of a loop that differs between its rounds."""
    return int(equation.params["num_consts"] + equation.params["num_carry"])


def _loops(
    jaxpr: Any, order: Sequence[int | None], stacked: Sequence[bool], moving: Sequence[bool]
) -> dict[Any, list[bool]]:
    """The loops over layers of a program, each with whether its inputs depend on what is trained.

    Args:
        jaxpr: the program of a device.
        order: which argument each of its inputs is; None of constants.
        stacked: whether an argument is a parameter stacked over layers.
        moving: whether an argument is trained.
    """
    of_layers, trained = set(), set()
    for var, index in zip(jaxpr.invars, order, strict=True):
        if index is not None and stacked[index]:
            of_layers.add(var)
        if index is not None and moving[index]:
            trained.add(var)
    found = {}
    for equation in jaxpr.eqns:
        inputs = [v for v in equation.invars if not isinstance(v, Literal)]
        if not trained.isdisjoint(inputs) and equation.primitive.name != "stop_gradient":
            trained.update(equation.outvars)
        if of_layers.isdisjoint(inputs):
            continue
        if equation.primitive.name == "scan":
            found[equation] = [
                v in trained and bool(jnp.issubdtype(v.aval.dtype, jnp.floating))
                for v in equation.invars
            ]
        else:
            of_layers.update(equation.outvars)
    return found


def _block(equation: Any, moves: list[bool], wrap: Callable, marker: int) -> Block:
    params, body = equation.params, equation.params["jaxpr"]
    first, count = params["num_consts"], params["num_carry"]
    # What one repeat hands on depends on what is trained if anything does.
    moves = [
        move or (any(moves) and first <= index < first + count) for index, move in enumerate(moves)
    ]
    program = differentiate(
        lambda *arguments: evaluate(body.jaxpr, body.consts, arguments),
        [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals],
        moves,
        [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.out_avals],
        wrap,
        marker,
    )
    indices = [index for index, move in enumerate(moves) if move]
    handed_on = {program.inputs[index] for index in range(first, first + count)}
    handed_on |= {
        gradient
        for index, gradient in zip(indices, program.gradients, strict=False)
        if first <= index < first + count
    }
    return Block(
        program,
        params["length"],
        frozenset(handed_on),
        frozenset(program.inputs[first:]),
        any(moves),
    )
