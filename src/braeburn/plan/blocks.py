"""The programs of a stage, taken from the loss that it trains with: each block of layers, and all
that is around them.

This module alone knows how the loss of a stage is called. What the layers are it reads from the
traced program: the body of a loop over stacked parameters is one repeat of a pattern, and each part
of it that is rematerialised by itself is a layer of that pattern.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

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
    NextToken,
    ObjectiveConfig,
    Offload,
    Precision,
    Remat,
    ShardingRules,
)
from braeburn.config.execution import USUAL_RULES
from braeburn.errors import UserError
from braeburn.layers.attention.backend import ATTENTION, Request
from braeburn.layers.attention.select import outlined
from braeburn.layers.dispatch import ROOM_PARTS
from braeburn.layers.grouped.select import Target as GroupedTarget
from braeburn.layers.grouped.select import planned_for
from braeburn.layers.spec import Tree, walk
from braeburn.models import decoder
from braeburn.objectives import distillation
from braeburn.objectives.definition import objective_of, text_loss
from braeburn.parallel.collectives import CONTEXT
from braeburn.parallel.rules import Kind, mesh_axes
from braeburn.plan.graph import Traced, common_and_carried, total_collectives
from braeburn.plan.trace import (
    REMATERIALIZED,
    Policy,
    Program,
    carry_out,
    differentiate,
    evaluate,
    on_each_device,
)

# The size that is traced of an axis along which weights are split; what is gathered does not depend
# on it.
SPLIT_TRACED = 2
# Each layer is traced as a part of its own; what is kept of it is decided later.
EACH_LAYER = Remat(policy="full")
# Tokens that a loss takes in one chunk, whatever it is.
_MOST_TOKENS = 500
_LARGEST_PRIME = 127

# Devices along `tensor` that are traced, as far as a model allows.
SIZES = (2, 4, 8, 16, 32, 64)

FORWARD, BACKWARD = "attention_forward", "attention_backward"


class ExpertSplit(NamedTuple):
    """How the experts of a stage are sharded.

    Attributes:
        shards: devices along `expert`.
        dispatch: `mesh.expert_dispatch`.
        room: `mesh.expert_room`.
        target: what their products, and those in 8 bits, are planned for.
    """

    shards: int = 1
    dispatch: str = "gather"
    room: float = 1.0
    target: GroupedTarget = GroupedTarget("tpu")


class Split(NamedTuple):
    """Over which devices a stage is sharded, as far as sizes on one of them depend on it.

    Attributes:
        tensor: devices along `tensor`.
        stored: other axes but `context` that weights are stored split along; see `stored_along`.
        context: devices along `context`, where more than attention depends on them.
        experts: of a model that has experts, how these are sharded: `expert` is then not among
            `stored`.
        eight_bits: how many times faster the device is in the products of `precision.matmul` than
            in others.
    """

    tensor: int = 1
    stored: tuple[str, ...] = ()
    context: int = 1
    experts: ExpertSplit = ExpertSplit()
    eight_bits: float = 1.0


ONE_PART = Split()
NEXT_TOKEN = NextToken()


def traced_mesh(split: Split) -> MeshConfig:
    """A mesh whose programs have the shapes of those of a stage that is split so."""
    sizes = {"fsdp": 1, **dict.fromkeys(split.stored, SPLIT_TRACED)}
    sizes |= {"context": split.context, "tensor": split.tensor}
    if split.experts.shards > 1:
        sizes["expert"] = split.experts.shards
    dispatch = {"expert_dispatch": split.experts.dispatch, "expert_room": split.experts.room}
    return MeshConfig.model_validate(sizes | dispatch)


def _sizes_in(values: Any) -> Iterator[int]:
    """All integers of a configuration as plain data."""
    if isinstance(values, dict):
        values = values.values()
    elif isinstance(values, int):
        yield values
        return
    elif not isinstance(values, list | tuple):
        return
    for value in values:
        yield from _sizes_in(value)


@dataclass(frozen=True, eq=False)
class Shapes:
    """All that the sizes of a stage's programs on one device depend on, but for the tokens.

    Each is one of its kind: see `shapes_of`.

    Attributes:
        model: that is trained.
        precision: of its activations and sums.
        rules: what lies where.
        split: over which devices.
        learns: the objective that it is trained with or, beside a teacher, how it is distilled.
        teacher: a model that runs forward beside it; None where there is none.
    """

    model: ModelConfig
    precision: Precision
    rules: ShardingRules = USUAL_RULES
    split: Split = ONE_PART
    learns: ObjectiveConfig | Distillation = NEXT_TOKEN
    teacher: ModelConfig | None = None

    @property
    def traced(self) -> Traced:
        """What a program is traced with."""
        return Traced(self.marker, self.split.experts.target, self.split.eight_bits)

    @property
    def mesh(self) -> MeshConfig:
        """The mesh that is traced."""
        return traced_mesh(self.split)

    @property
    def execution(self) -> Execution:
        """How the programs that are traced are carried out."""
        return Execution(self.mesh, self.rules, self.precision, EACH_LAYER)

    @cached_property
    def marker(self) -> int:
        """A prime that divides none of the models' sizes."""
        models = [self.model, *([self.teacher] if self.teacher else [])]
        sizes = {size for model in models for size in _sizes_in(model.model_dump()) if size > 1}
        sizes.add(self.split.experts.shards)
        largest = max(5, min(_LARGEST_PRIME, _MOST_TOKENS // self.split.tensor))
        # Where all primes up to the largest divide some size, the loss is traced in several chunks.
        return next(
            n
            for n in itertools.chain(range(largest, 1, -1), itertools.count(largest + 1))
            if all(n % d for d in range(2, n)) and all(size % n for size in sizes)
        )

    @cached_property
    def tokens(self) -> int:
        """Tokens that are traced, on all tensor shards together.

        With experts that are sharded they have the factors that buffers for assignments need to
        grow with the tokens: see `layers/dispatch.py`.
        """
        shards = self.split.experts.shards
        return self.split.tensor * self.marker * (1 if shards == 1 else ROOM_PARTS * shards)


@cache
def shapes_of(
    model: ModelConfig,
    precision: Precision,
    rules: ShardingRules = USUAL_RULES,
    split: Split = ONE_PART,
    learns: ObjectiveConfig | Distillation = NEXT_TOKEN,
    teacher: ModelConfig | None = None,
) -> Shapes:
    """The shapes that a model's programs are traced with.

    Args:
        model: that is trained; see `sized`.
        precision: of its activations and sums.
        rules: what lies where.
        split: over which devices.
        learns: the objective that it is trained with or, beside a teacher, how it is distilled.
        teacher: the model of an online teacher, or None; see `sized`.
    """
    return Shapes(model, precision, rules, split, learns, teacher)


@cache
def sized(model: ModelConfig) -> ModelConfig:
    """The model without what changes no size of its programs."""
    return model.model_copy(update={"rope_base": 1.0, "rope_scaling": None, "scan_layers": True})


@cache
def _split_along_tensor(
    model: ModelConfig, rules: ShardingRules, tensor: int
) -> frozenset[str] | None:
    """The parameters that are split along `tensor`; None where it does not divide the model."""
    execution = Execution(MeshConfig(fsdp=1, tensor=tensor), rules)
    split = set()
    try:
        for path, spec in walk(decoder.param_specs(model)):
            # Where a norm that is used in parts has one row, JAX sums nothing over its rows.
            kind: Kind = "activations" if spec.role == "norm" else "parameters"
            axes = mesh_axes(spec.axes, spec.shape, kind, execution, spec.role)
            split |= {
                f"{path} {name}{' of one' if spec.role == 'norm' and size == tensor else ''}"
                for name, size, along in zip(spec.axes, spec.shape, axes, strict=True)
                if along
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
    model, split, tensor = shapes.model, shapes.split, shapes.split.tensor
    if tensor == 1:
        return None
    along_tensor = _split_along_tensor(model, shapes.rules, tensor)
    sizes = [n for n in SIZES if _split_along_tensor(model, shapes.rules, n) == along_tensor]
    if along_tensor is None or not sizes or not sizes[0] < tensor < sizes[-1]:
        return None
    fewer, more = sizes[0], sizes[-1]
    ends = [
        shapes_of(
            model,
            shapes.precision,
            shapes.rules,
            split._replace(tensor=size),
            shapes.learns,
            shapes.teacher,
        )
        for size in (fewer, more)
    ]
    share = (1 / fewer - 1 / tensor) / (1 / fewer - 1 / more)
    return ends[0], ends[1], share


@cache
def crosses_context(model: ModelConfig, precision: Precision, rules: ShardingRules) -> bool:
    """Whether anything but attention has a collective along `context`: else its size changes
    nothing but the tokens of a device.
    """
    found = programs(shapes_of(model, precision, rules, Split(context=2)))
    graphs = [found.around, *(block.program for block in found.blocks)]
    return any(
        key.axis == CONTEXT
        for program in graphs
        for key in total_collectives(program.forward + program.backward)
    )


@dataclass(frozen=True, eq=False)
class Block:
    """Equal layers.

    Attributes:
        program: one of them.
        repeats: how many there are.
        carry: the inputs and gradients of the program that go from one layer to the next: values of
            both kinds.
        varying: its inputs that differ between layers.
        shared: its inputs that all of them have in common and that are worked out of tokens and
            trained, as keys and values that are reused.
        trained: whether it has a gradient; a teacher's has none.
    """

    program: Program
    repeats: int
    carry: frozenset[Any]
    varying: frozenset[Any]
    shared: frozenset[Any]
    trained: bool


@dataclass(frozen=True, eq=False)
class Programs:
    """What a step does with a microbatch.

    Attributes:
        blocks: of layers; where there is a teacher, the teacher's alone.
        around: embedding, final norm and loss, with their gradients.
    """

    blocks: tuple[Block, ...]
    around: Program


def _loss(shapes: Shapes) -> Callable[..., Any]:
    """The loss of a stage as its train step differentiates it: of parameters, batch and a teacher's
    parameters.
    """
    model, execution, learns = shapes.model, shapes.execution, shapes.learns
    if isinstance(learns, ObjectiveConfig):
        objective = objective_of(learns, model)
        return lambda params, batch: text_loss(params, batch, objective, model, execution)[0]
    teacher_model = shapes.teacher
    assert teacher_model is not None
    return lambda params, batch, teacher: distillation.loss(
        params, batch, (teacher_model, teacher), model, learns, execution
    )[0]


@cache
def policy_of(remat: Remat, offload: Offload, rules: ShardingRules, split: Split) -> Policy:
    """What a rematerialised layer keeps, as `jax.checkpoint` is told.

    Args:
        remat: what is kept.
        offload: what of it waits on the host.
        rules: what lies where.
        split: over which devices.
    """
    execution = Execution(traced_mesh(split), rules, remat=remat, offload=offload)
    body = decoder.rematerialized(lambda x: x, execution)
    for equation in jax.make_jaxpr(body)(0.0).eqns:
        if equation.primitive.name in REMATERIALIZED:
            policy: Policy = equation.params["policy"]
            return policy
    return None


def _parameters(model: ModelConfig, execution: Execution) -> tuple[Tree, list[bool]]:
    """The types of one device's part of the parameters, and whether each is stacked over layers."""
    sizes = execution.mesh.sizes

    def part(spec: Any) -> Any:
        split = mesh_axes(spec.axes, spec.shape, "parameters", execution, spec.role)
        shape = tuple(
            size // math.prod(sizes[axis] for axis in along)
            for size, along in zip(spec.shape, split, strict=True)
        )
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    specs = decoder.param_specs(model)
    return jax.tree.map(part, specs), [spec.stacked for spec in jax.tree.leaves(specs)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_call(request: Request, query: Any, key: Any, value: Any) -> Any:
    """What stands for attention in a traced program: one call forward and one backward, whose costs
    are worked out apart, by the request that both carry.

    Args:
        request: what is asked for.
        query: [B, t, N, H].
        key: [B, t, K, H].
        value: [B, t, K, W].

    Returns:
        What is attended to, [B, t, N, W] of the type of `query`.
    """
    return _attention_forward(request, query, key, value)[0]


def _attention_forward(
    request: Request, query: Any, key: Any, value: Any
) -> tuple[Any, tuple[Any, ...]]:
    result = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    made = jax.ffi.ffi_call(FORWARD, result)(query, key, value, request=request)
    output = checkpoint_name(made, ATTENTION)
    return output, (query, key, value, output)


def _attention_backward(
    request: Request, residuals: tuple[Any, ...], above: Any
) -> tuple[Any, ...]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3]]
    return tuple(jax.ffi.ffi_call(BACKWARD, results)(*residuals, above, request=request))


attention_call.defvjp(_attention_forward, _attention_backward)


def request_of(equation: Any) -> Request | None:
    """What a call of attention in a traced program asks for; None of other operations."""
    if equation.primitive.name != "ffi_call":
        return None
    if equation.params["target_name"] not in (FORWARD, BACKWARD):
        return None
    request: Request = dict(equation.params["attributes"])["request"]
    return request


@cache
def programs(shapes: Shapes) -> Programs:
    """The programs of a stage for a mesh, traced for any device."""
    # Attention is outlined in what is traced first; experts are also traced anew with gradients.
    with planned_for(shapes.split.experts.target):
        return _programs(shapes)


def _programs(shapes: Shapes) -> Programs:
    mesh = shapes.mesh
    device = AbstractDevice("", None, "cpu")
    params, stacked = _parameters(shapes.model, shapes.execution)
    given, blocks_of = [params], list(stacked)
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((1, shapes.tokens), dtype)
        for name, dtype in (types | {"weights": jnp.float32}).items()
    }
    given.append(batch)
    blocks_of += [False] * len(batch)
    if shapes.teacher:
        of_teacher, stacked = _parameters(shapes.teacher, shapes.execution)
        given.append(of_teacher)
        blocks_of += stacked

    def wrap(function: Callable) -> Callable:
        return on_each_device(function, mesh, device)

    loss, structure = _loss(shapes), jax.tree.structure(given)
    leaves = jax.tree.leaves(given)
    moving = [index < len(jax.tree.leaves(params)) for index in range(len(leaves))]
    with outlined(lambda request, arrays, *_: attention_call(request, *arrays[:3])):
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
        block
        for eqn, moves in loops.items()
        if not (shapes.teacher and any(moves))
        for block in _blocks(eqn, moves, wrap, shapes.traced)
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
            first, count = common_and_carried(equation)
            states = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in equation.outvars[count:]]
            return [*inputs[first : first + count], *states]

        return [*evaluate(inner, (), arguments, past_layers), *made]

    results = [jax.ShapeDtypeStruct((), jnp.float32)]
    for equation, indices in prepared.items():
        avals = [equation.invars[index].aval for index in indices]
        results += [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return Programs(blocks, differentiate(around, leaves, moving, results, wrap, shapes.traced))


def _first_stacked(equation: Any) -> int:
    """The first input of a loop that differs between its rounds."""
    return sum(common_and_carried(equation))


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
                not isinstance(v, Literal)
                and v in trained
                and bool(jnp.issubdtype(v.aval.dtype, jnp.floating))
                for v in equation.invars
            ]
        else:
            of_layers.update(equation.outvars)
    return found


def _layers(body: Any) -> Iterator[list[Any]]:
    """The equations of each layer of a loop's body: a layer ends with what is rematerialised."""
    found: list[Any] = []
    last = max(
        (i for i, eqn in enumerate(body.eqns) if eqn.primitive.name in REMATERIALIZED), default=-1
    )
    for index, equation in enumerate(body.eqns):
        found.append(equation)
        if equation.primitive.name in REMATERIALIZED and index < last:
            yield found
            found = []
    yield found


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _blocks(equation: Any, flags: list[bool], wrap: Callable, traced: Traced) -> list[Block]:
    """The layers of a loop, the equal ones of a pattern as one block.

    Args:
        equation: the loop.
        flags: whether each of its inputs depends on what is trained.
        wrap: see `differentiate`.
        traced: see `flatten`.
    """
    params, body = equation.params, equation.params["jaxpr"]
    first, count = common_and_carried(equation)
    constants = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    index_of = {var: index for index, var in enumerate(body.jaxpr.invars)}
    equations = list(_layers(body.jaxpr))
    read_later: set[Any] = set(_variables(body.jaxpr.outvars))
    outputs: list[list[Any]] = []
    for layer in reversed(equations):
        made = [var for eqn in layer for var in eqn.outvars]
        outputs.append([var for var in made if var in read_later])
        read_later |= {var for eqn in layer for var in _variables(eqn.invars)}
    found: dict[Any, Block] = {}
    for layer, results in zip(equations, reversed(outputs), strict=True):
        made_here = {var for eqn in layer for var in eqn.outvars}
        read = dict.fromkeys(var for eqn in layer for var in _variables(eqn.invars))
        inputs = [var for var in read if var not in made_here and var not in constants]
        # What a layer hands on depends on what is trained if anything does.
        indices = [index_of.get(var, first) for var in inputs]
        moves = [
            flags[index]
            or (
                any(flags)
                and first <= index < first + count
                and bool(jnp.issubdtype(var.aval.dtype, jnp.floating))
            )
            for var, index in zip(inputs, indices, strict=True)
        ]
        kinds = tuple((index >= first) + (index >= first + count) for index in indices)
        # Layers that the program has in common are one object in it.
        same = layer[0].params.get("jaxpr") if len(layer) == 1 else layer[0]
        key = id(same), kinds, tuple(moves)
        if key in found:
            found[key] = replace(found[key], repeats=found[key].repeats + params["length"])
            continue
        found[key] = _block(
            differentiate(
                lambda *arguments, layer=layer, inputs=inputs, results=results: carry_out(
                    layer, constants | dict(zip(inputs, arguments, strict=True)), results
                ),
                [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in inputs],
                moves,
                [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in results],
                wrap,
                traced,
            ),
            moves,
            kinds,
            params["length"],
        )
    return list(found.values())


def _block(program: Program, moves: list[bool], kinds: Sequence[int], length: int) -> Block:
    """The block of a layer's program.

    Args:
        program: the layer.
        moves: whether each of its inputs has a gradient.
        kinds: 0 of inputs that all repeats share, 1 of those that one hands to the next, 2 of those
            that each has of its own.
        length: repeats.
    """
    kind_of = dict(zip(program.inputs, kinds, strict=True))
    moving = [value for value, move in zip(program.inputs, moves, strict=True) if move]
    carry = {value for value, kind in kind_of.items() if kind == 1}
    carry |= {
        gradient
        for value, gradient in zip(moving, program.gradients, strict=False)
        if kind_of[value] == 1
    }
    return Block(
        program,
        length,
        frozenset(carry),
        frozenset(value for value, kind in kind_of.items() if kind),
        frozenset(value for value in moving if not kind_of[value] and value.bytes.scaled),
        any(moves),
    )
