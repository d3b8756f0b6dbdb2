"""Programs of one device traced without devices, with their backward pass, and what a
rematerialisation policy keeps and recomputes of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jax.sharding import AbstractDevice, PartitionSpec

from braeburn.config import MeshConfig
from braeburn.parallel.mesh import abstract_mesh
from braeburn.plan.graph import (
    Amount,
    Collective,
    Graph,
    Moved,
    Node,
    Traced,
    Value,
    element_wise_bytes,
    flatten,
    live_bytes,
    needed,
    total_collectives,
    total_flops,
)

# The name of the outputs' cotangents, with which the backward pass begins.
_BACKWARD = "backward"
REMATERIALIZED = {"remat2", "checkpoint"}

# (primitive, types of its operands, its parameters) -> whether its results are kept; as
# `jax.checkpoint` takes it. None keeps everything.
Policy = Callable[..., Any] | None


def on_each_device(function: Callable, mesh: MeshConfig, device: AbstractDevice) -> Callable:
    """A function of one device's arrays, which may run collectives over a mesh, shard_map-ped."""
    spec = PartitionSpec()
    return jax.shard_map(
        function, mesh=abstract_mesh(mesh, device), in_specs=spec, out_specs=spec, check_vma=False
    )


@dataclass(frozen=True, eq=False)
class Program:
    """A program and its gradient.

    Attributes:
        forward: its operations.
        backward: those of its gradient.
        inputs: of the program.
        outputs: of the program.
        gradients: of the inputs that have one.
    """

    forward: list[Node]
    backward: list[Node]
    inputs: list[Value]
    outputs: list[Value]
    gradients: list[Value]


def differentiate(
    function: Callable[..., Sequence[Any]],
    arguments: Sequence[Any],
    moving: Sequence[bool],
    results: Sequence[Any],
    wrap: Callable[[Callable], Callable],
    traced: Traced,
) -> Program:
    """A function and its gradient, traced.

    Args:
        function: of arrays, to a sequence of arrays.
        arguments: their types.
        moving: whether the gradient is wanted, of each.
        results: the types of what the function returns.
        wrap: gives the function its mesh; see `on_each_device`.
        traced: see `flatten`.
    """

    def program(arguments: Sequence[Any], above: Sequence[Any]) -> tuple[Any, Any]:
        def of_moving(*moved: Any) -> list[Any]:
            rest = iter(moved)
            given = (
                next(rest) if moves else argument
                for argument, moves in zip(arguments, moving, strict=True)
            )
            return list(function(*given))

        if not any(moving):
            return of_moving(), []
        outputs, pull = jax.vjp(
            of_moving, *(a for a, moves in zip(arguments, moving, strict=True) if moves)
        )
        above = [
            checkpoint_name(x, _BACKWARD)
            if jnp.issubdtype(y.dtype, jnp.floating)
            else np.zeros(y.shape, jax.dtypes.float0)
            for x, y in zip(above, outputs, strict=True)
        ]
        return outputs, pull(above)

    closed = jax.make_jaxpr(wrap(program))(list(arguments), list(results))
    graph = flatten(closed, traced)
    names = [node.equation.params.get("name") for node in graph.nodes]
    begin = names.index(_BACKWARD) if _BACKWARD in names else len(graph.nodes)
    count = len(results)
    return Program(
        graph.nodes[:begin],
        needed(graph.nodes[begin:], graph.outputs[count:]),
        graph.inputs[: len(arguments)],
        graph.outputs[:count],
        graph.outputs[count:],
    )


def evaluate(
    jaxpr: Any,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    instead: Callable[[Any, list[Any]], Sequence[Any] | None] = lambda equation, inputs: None,
) -> list[Any]:
    """The results of a jaxpr, without rematerialisation.

    Args:
        jaxpr: the program.
        constants: the values of its constants.
        arguments: those of its arguments.
        instead: gives the results of an equation, from its inputs; None for what it computes.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    return carry_out(jaxpr.eqns, values, jaxpr.outvars, instead)


def carry_out(
    equations: Iterable[Any],
    values: dict[Any, Any],
    wanted: Sequence[Any],
    instead: Callable[[Any, list[Any]], Sequence[Any] | None] = lambda equation, inputs: None,
) -> list[Any]:
    """The values of some variables, without rematerialisation.

    Args:
        equations: of a jaxpr, in order.
        values: of the variables that these do not make; those that they make are added.
        wanted: the variables.
        instead: see `evaluate`.
    """

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for equation in equations:
        inputs = [read(var) for var in equation.invars]
        results = instead(equation, inputs)
        if results is None:
            results = _results(equation, inputs, instead)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(var) for var in wanted]


def _results(equation: Any, inputs: list[Any], instead: Callable) -> Sequence[Any]:
    primitive, params = equation.primitive, equation.params
    if primitive.name in REMATERIALIZED:
        return evaluate(params["jaxpr"], (), inputs, instead)
    if primitive.name in ("jit", "pjit"):
        return evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs, instead)
    bound = primitive.get_bind_params(params)
    # JAX before 0.10 gives the functions within apart.
    functions, settings = bound if isinstance(bound, tuple) else ((), bound)
    results = primitive.bind(*functions, *inputs, **settings)
    return results if primitive.multiple_results else [results]


@dataclass(frozen=True)
class Pass:
    """What some operations cost.

    Attributes:
        flops: of their matrix products.
        element_wise: bytes that their element-wise work moves at least.
        collectives: the bytes and number of their collectives, by kind.
        calls: their calls of kernels.
    """

    flops: Amount
    element_wise: Amount
    collectives: Mapping[Collective, Moved]
    calls: tuple[Node, ...] = ()

    @classmethod
    def of(cls, nodes: Sequence[Node], outputs: Iterable[Value] | None = None) -> "Pass":
        """The cost of nodes; that of element-wise work only where their `outputs` are given."""
        return cls(
            total_flops(nodes),
            Amount() if outputs is None else element_wise_bytes(nodes, outputs),
            total_collectives(nodes),
            tuple(node for node in nodes if node.name == "ffi_call"),
        )


@dataclass(frozen=True)
class Recomputed:
    """A program under a rematerialisation policy.

    Attributes:
        again: operations that the backward pass recomputes.
        kept: values that the forward pass keeps for it, each with its name if it has one.
        inputs: those of the program that it needs.
    """

    again: list[Node]
    kept: list[tuple[Value, str | None]]
    inputs: list[Value]


def keeps(policy: Policy, node: Node) -> bool:
    """Whether a policy keeps the results of an operation."""
    if policy is None:
        return True
    equation = node.equation
    kept = policy(equation.primitive, *(var.aval for var in equation.invars), **equation.params)
    # Else an object that tells what becomes of it: kept, kept on the host, or recomputed.
    return kept if isinstance(kept, bool) else type(kept).__name__ != "RecomputeType"


def rematerialize(program: Program, policy: Policy, varying: Iterable[Value]) -> Recomputed:
    """What `jax.checkpoint` with a policy makes of a program.

    Args:
        program: the program, traced without rematerialisation.
        policy: what it keeps.
        varying: its inputs that differ from one round of the loop around it to the next. What
            follows from the others alone is not kept for each round.
    """
    made = {value for node in program.backward for value in node.outputs}
    read = {value for node in program.backward for value in node.inputs} - made
    saving = {node for node in program.forward if keeps(policy, node)}
    again = [] if policy is None else needed(program.forward, read, lambda node: node in saving)
    read |= {value for node in again for value in node.inputs}
    changing, kept = set(varying), []
    for node in program.forward:
        if changing.isdisjoint(node.inputs):
            continue
        changing.update(node.outputs)
        if node in saving:
            name = node.equation.params["name"] if node.name == "name" else None
            kept += [(value, name) for value in node.outputs if value in read]
    return Recomputed(again, kept, [value for value in program.inputs if value in read])


def peaks(
    program: Program, recomputed: Recomputed, elsewhere: Iterable[Value]
) -> list[tuple[Node, Amount]]:
    """The bytes that are held as each operation of the backward pass runs, beside what was kept.

    Args:
        program: the program.
        recomputed: what was kept for its backward pass, and what that pass recomputes.
        elsewhere: gradients whose memory is counted elsewhere.
    """
    nodes = _late(recomputed.again) + program.backward
    found = [*program.inputs, *(value for value, _ in recomputed.kept)]
    return live_bytes(_late(nodes), found, elsewhere)


def _late(nodes: Sequence[Node]) -> list[Node]:
    """The operations with each gathering of weights just before what reads it first."""
    waiting: dict[Value, list[Node]] = {}
    found: list[Node] = []

    def add(node: Node) -> None:
        for value in node.inputs:
            for each in waiting.pop(value, ()):
                add(each)
        found.append(node)

    for node in nodes:
        if node.name == "all_gather" and not node.outputs[0].bytes.scaled:
            waiting.setdefault(node.outputs[0], []).append(node)
        else:
            add(node)
    return found


def graph_of(program: Program) -> Graph:
    """All operations of a program that its outputs and gradients come from."""
    results = [*program.outputs, *program.gradients]
    return Graph(needed(program.forward + program.backward, results), program.inputs, results)
