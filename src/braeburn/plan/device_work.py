"""What one device does in a program that runs forward alone, read from the program as it is traced
for a mesh and its own sizes.

The plan of training traces layers once and scales them, since it looks at thousands of layouts;
here a program is traced whole for each mesh, so that nothing about it is assumed.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Literal

from braeburn.config import MeshConfig
from braeburn.layers.attention.backend import Backend, Request, Scope
from braeburn.layers.attention.select import Arrays, outlined
from braeburn.layers.grouped.select import planned_for
from braeburn.parallel.sequence import gather_sequence
from braeburn.plan.attention import Accelerator, backend_of, kernel_width
from braeburn.plan.blocks import attention_call, request_of
from braeburn.plan.forward import CollectiveTotal
from braeburn.plan.graph import (
    ALIASES,
    Amount,
    Graph,
    Node,
    common_and_carried,
    element_wise_bytes,
    flatten_by_origin,
    inlined,
    live_bytes,
    needed,
    product_flops,
    rounds,
    total_collectives,
)
from braeburn.plan.job_programs import JobProgram
from braeburn.plan.totals import Kernels

# Operations whose result is the weight itself, in another type or shape.
_SAME_WEIGHT = {"convert_element_type", *ALIASES}


@dataclass(frozen=True)
class Product:
    """Equal matrix products.

    Attributes:
        flops: of each.
        bytes: of its operands and its result.
        times: how many there are.
    """

    flops: float
    bytes: float
    times: int


@dataclass(frozen=True)
class Kernel:
    """Equal calls of a fused kernel of attention.

    Attributes:
        calls: what they multiply.
        length: tokens of a sequence.
    """

    calls: Kernels
    length: int

    def flops(self, tile: int) -> float:
        """Of both products, over the tiles that causality and windows leave."""
        products = self.calls.forward * self.calls.keys(self.length, tile)
        return sum(self.calls.once) * products


@dataclass(frozen=True)
class DeviceWork:
    """What a device does in a program, or in one round of the loop that the program consists of.

    Attributes:
        products: matrix products, those of attention in plain XLA among them.
        kernels: fused kernels of attention.
        element_wise: the fewest bytes that all else reads and writes.
        collectives: but those of scalars and indices.
    """

    products: tuple[Product, ...]
    kernels: tuple[Kernel, ...]
    element_wise: float
    collectives: tuple[CollectiveTotal, ...]


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device while a program runs.

    Attributes:
        weights: of the model's.
        held: of the further arguments that the program names.
        arguments: of all others.
        results: that are not written over arguments.
        workspace: of what the program makes and drops, at its fullest moment.
        relaid: of weights that XLA copies into another order before a loop.
    """

    weights: float
    held: dict[str, float]
    arguments: float
    results: float
    workspace: float
    relaid: float = 0.0


def work_of_program(
    program: JobProgram, accelerator: Accelerator
) -> tuple[DeviceWork, DeviceMemory]:
    """What a device does in a program and holds meanwhile.

    Args:
        program: the program, laid over a mesh.
        accelerator: what the choice of attention's back end depends on.
    """

    def outline(request: Request, arrays: Arrays, mesh: MeshConfig, scope: Scope) -> Any:
        query, *keys = arrays[:3]
        asked = replace(
            request,
            platform=accelerator.platform,
            compute_capability=accelerator.compute_capability,
        )
        backend = backend_of(accelerator, asked)
        if backend.kernel is None:
            return backend.run(*arrays, mesh, scope)
        return attention_call(asked, query, *(gather_sequence(x, mesh) for x in keys))

    with outlined(outline), planned_for(accelerator.grouped):
        closed = jax.make_jaxpr(program.function)(*program.arguments)
    of_tokens = [
        index > 0
        for index, argument in enumerate(program.arguments)
        for _ in jax.tree.leaves(argument)
    ]
    whole = Part(closed.jaxpr, tuple(of_tokens))
    device = _device_part(whole) or whole

    def held(equation: Any) -> float:
        request = request_of(equation)
        if request is None:
            return 0.0
        kernel = backend_of(accelerator, request).kernel
        return float(kernel(request, equation.invars[0].aval.shape[0])) if kernel else 0.0

    graph = flatten_by_origin(device.jaxpr, device.of_tokens, held)
    once = _loop_body(graph, held) if program.rounds else (device.jaxpr, graph)
    memory = _memory(program, graph, once[1])
    if accelerator.platform in ("cuda", "rocm"):
        memory = replace(memory, relaid=_relaid(device))
    if accelerator.platform == "tpu" and program.rounds:
        memory = replace(memory, relaid=_sliced(once[1]))
    return _work(*once, accelerator), memory


@dataclass(frozen=True)
class Part:
    """A part of a traced program.

    Attributes:
        jaxpr: its operations.
        of_tokens: of each input, whether it was worked out of anything but weights.
    """

    jaxpr: Any
    of_tokens: tuple[bool, ...]


def _device_part(part: Part) -> Part | None:
    """The program of each device, which stands within a `shard_map`; None where there is none."""
    flags = dict(zip(part.jaxpr.invars, part.of_tokens, strict=True))
    for equation in part.jaxpr.eqns:
        # Literals are no inputs.
        given = tuple(
            not isinstance(var, Literal) and flags.get(var, False) for var in equation.invars
        )
        inner = inlined(equation)
        if inner is not None:
            below = Part(inner, given)
            if equation.primitive.name == "shard_map":
                return below
            if found := _device_part(below):
                return found
        for var in equation.outvars:
            flags[var] = any(given)
    return None


def _loop_body(graph: Graph, held: Any) -> tuple[Any, Graph]:
    """One round of the loop of unknown length that a program consists of."""
    (node,) = [node for node in graph.nodes if node.name == "while"]
    body = node.equation.params["body_jaxpr"].jaxpr
    flags = [bool(v.count.scaled) for v in node.inputs[node.equation.params["cond_nconsts"] :]]
    return body, flatten_by_origin(body, flags, held)


def _work(jaxpr: Any, graph: Graph, accelerator: Accelerator) -> DeviceWork:
    products: dict[tuple[float, float], int] = {}
    kernels: dict[tuple[Request, int], int] = {}
    for equation, times in rounds(jaxpr):
        request = request_of(equation)
        if request is not None:
            key = request, equation.invars[0].aval.shape[0] * equation.invars[0].aval.shape[1]
            kernels[key] = kernels.get(key, 0) + times
        elif flops := product_flops(equation):
            moved = sum(_bytes(var.aval) for var in (*equation.invars, *equation.outvars))
            products[flops, moved] = products.get((flops, moved), 0) + times
    nodes = needed(graph.nodes, graph.outputs)
    totals = [
        CollectiveTotal(key.axis, key.kind, sum(moved.bytes), moved.times, key.what)
        for key, moved in total_collectives(nodes).items()
    ]
    return DeviceWork(
        tuple(Product(*key, times) for key, times in products.items()),
        tuple(
            _kernel(request, tokens, times, backend_of(accelerator, request))
            for (request, tokens), times in kernels.items()
        ),
        sum(element_wise_bytes(nodes, graph.outputs, in_place=True)),
        tuple(totals),
    )


def _kernel(request: Request, tokens: int, times: int, backend: Backend) -> Kernel:
    width = kernel_width(request, backend)
    once = Amount(0.0, times * request.num_heads * width * tokens)
    return Kernel(Kernels(once, 2, 0, request.window, backend.skips), request.sequence_length)


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * aval.dtype.itemsize)


def _memory(program: JobProgram, graph: Graph, once: Graph) -> DeviceMemory:
    """What a device holds at the fullest moment of a program.

    Args:
        program: the program.
        graph: all of it.
        once: of it one round, where it is a loop.
    """
    weights, *others = (
        sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(argument))
        for argument in program.arguments
    )
    held = dict(zip(program.held, others, strict=False))
    nodes = needed(graph.nodes, graph.outputs)
    found = live_bytes(nodes, graph.inputs, graph.outputs, forward_alone=True)
    fullest = [max((size[kind] for _, size in found), default=0.0) for kind in (0, 1)]
    # Of a round's weights all may be gathered ahead of their products, and a second copy is made
    # as the gathered parts are put in order: compiled programs take about twice their size.
    gathered = 2 * max(map(_gathered, needed(once.nodes, once.outputs)), default=0.0)
    made = sum(sum(value.bytes) for value in dict.fromkeys(graph.outputs))
    taken = sum(others[index - 1] for index in program.given_up)
    return DeviceMemory(
        weights,
        held,
        sum(others[len(program.held) :]),
        max(0.0, made - taken),
        max(fullest[0], gathered) + fullest[1],
    )


def _relaid(part: Part) -> float:
    """Bytes of the stacks of weights whose layers are gathered along another dimension than the
    first.

    The libraries of GPUs gather along the first dimension of memory alone. XLA therefore copies
    such a stack once, before the loop over layers, so that the dimension comes first; in the type
    that it is stored in, and of all layers.
    """
    graph = flatten_by_origin(part.jaxpr, part.of_tokens)
    total = 0.0
    for node in graph.nodes:
        if node.name != "scan":
            continue
        first = sum(common_and_carried(node.equation))
        body = node.equation.params["jaxpr"].jaxpr
        of_weights = {
            var: index
            for index, var in enumerate(body.invars)
            if index >= first and not node.inputs[index].count.scaled
        }
        for index in _gathered_later(body, of_weights):
            total += sum(node.inputs[index].bytes)
    return total


def _sliced(once: Graph) -> float:
    """Bytes of the weights of which one round of a loop uses a slice: keys and values where a
    device has all heads and works with one of them.

    libtpu copies such a weight whole, before the loop, with the heads outermost.
    """
    given = set(once.inputs)
    sliced = {
        node.inputs[0]
        for node in once.nodes
        if node.name == "dynamic_slice" and node.inputs[0] in given and node.inputs[0].floating
    }
    return sum(value.bytes.fixed for value in sliced)


def _gathered_later(jaxpr: Any, of_weights: dict[Any, int]) -> set[int]:
    """Which weights are gathered along another dimension than the first.

    Args:
        jaxpr: of one layer.
        of_weights: the index of the weight that each variable holds, at first of inputs.
    """
    known, found = dict(of_weights), set()
    for equation in jaxpr.eqns:
        inner = inlined(equation)
        if inner is not None:
            below = {
                own: known[var]
                for own, var in zip(inner.invars, equation.invars, strict=True)
                if not isinstance(var, Literal) and var in known
            }
            found |= _gathered_later(inner, below)
            continue
        source = equation.invars[0] if equation.invars else None
        if source is None or isinstance(source, Literal) or source not in known:
            continue
        if equation.primitive.name == "all_gather":
            if equation.params["all_gather_dimension"] > 0:
                found.add(known[source])
        elif equation.primitive.name in _SAME_WEIGHT:
            known[equation.outvars[0]] = known[source]
    return found


def _shard_bytes(leaf: Any) -> float:
    """Bytes of a device's part of an array."""
    width = getattr(leaf.dtype, "itemsize", 4)
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * width)


def _gathered(node: Node) -> float:
    """Bytes of the weights that are gathered in one round of a loop over layers; of an operation
    that stands by itself, where layers are written out, those that it gathers.
    """
    length = node.equation.params.get("length", 1) if node.name == "scan" else 1
    return (
        sum(
            moved.bytes.fixed
            for key, moved in node.collectives.items()
            if (key.kind, key.what) == ("all-gather", "weights")
        )
        / length
    )
