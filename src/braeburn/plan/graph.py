"""A traced program as a flat graph: its values, and the operations between them with what each
costs.

Calls within the program, as of `jit`, `jax.checkpoint` and functions with a gradient of their own,
are replaced by what they do. Loops stay single operations, with the costs of all their rounds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from braeburn.layers.attention.cudnn import FURTHER_DOCUMENTS
from braeburn.layers.dispatch import FURTHER_ROUNDS
from braeburn.layers.grouped.request import Request as GroupedRequest
from braeburn.layers.grouped.select import Target as GroupedTarget
from braeburn.layers.grouped.select import choose
from braeburn.layers.low_precision import EIGHT_BITS
from braeburn.plan.storage import FLOAT

# JAX's names of collectives: how HLO names them, and whether the bytes are those of the result.
_COLLECTIVES = {
    "all_gather": ("all-gather", True),
    "reduce_scatter": ("reduce-scatter", False),
    "all_to_all": ("all-to-all", False),
    "ppermute": ("collective-permute", False),
    "psum": ("all-reduce", False),
    "psum_invariant": ("all-reduce", False),
    "pmax": ("all-reduce", False),
    "pmin": ("all-reduce", False),
}
# Operations whose operands and results are in memory, whatever stands before and after them.
_APART = {
    "dot_general",
    "ragged_dot_general",
    "conv_general_dilated",
    "gather",
    "scatter",
    "scatter-add",
    "sort",
    "top_k",
    "cumsum",
    "dynamic_update_slice",
    "scan",
    "while",
    "cond",
    "ffi_call",
    "pallas_call",
    *_COLLECTIVES,
}
# Of these, operations that do nothing but move or add up elements, so that their time is that of
# the memory.
_MOVED = {"gather", "scatter", "scatter-add", "sort", "top_k", "cumsum", "dynamic_update_slice"}
# Of these, operations that replace elements of their first operand, each with which operand has the
# new ones.
_REPLACING = {"scatter": 2, "scatter-add": 2, "dynamic_update_slice": 1}
# Operations whose result has the elements of their operand.
ALIASES = {"name", "reshape", "squeeze", "expand_dims", "copy", "optimization_barrier"}
_OPAQUE = {"pallas_call", "ffi_call"}


class Amount(NamedTuple):
    """A quantity of a program that works on many tokens: `fixed + scaled * tokens`, in units of the
    tokens that it was traced with.
    """

    fixed: float = 0.0
    scaled: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> "Amount":  # type: ignore[override]
        return Amount(self.fixed + other[0], self.scaled + other[1])

    def __mul__(self, factor: float) -> "Amount":  # type: ignore[override]
        return Amount(self.fixed * factor, self.scaled * factor)

    def at(self, tokens: float) -> float:
        """The quantity for `tokens` times as many tokens as were traced."""
        return self.fixed + self.scaled * tokens


NOTHING = Amount()


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """An array of the program.

    Attributes:
        bytes: its size.
        count: its elements.
        floating: whether they are floating-point numbers.
    """

    bytes: Amount
    count: Amount
    floating: bool


# Between the names of the axes of one collective.
_AND = " x "


def axes_of_name(axis: str) -> tuple[str, ...]:
    """The mesh axes that the name of a collective's axis stands for."""
    return tuple(axis.split(_AND))


class Collective(NamedTuple):
    """What tells collectives apart.

    Attributes:
        axis: of the mesh; of one along several axes their names, as "fsdp x expert".
        kind: as HLO names it.
        what: is moved, "weights" or "tokens".
    """

    axis: str
    kind: str
    what: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Each axis of the mesh that it runs along."""
        return axes_of_name(self.axis)


class Moved(NamedTuple):
    """Bytes on one device as `plan.collectives.Collective.bytes` counts them, and how often."""

    bytes: Amount
    times: float

    def __add__(self, other: tuple[Any, ...]) -> "Moved":
        return Moved(self.bytes + other[0], self.times + other[1])

    def __mul__(self, factor: float) -> "Moved":  # type: ignore[override]
        return Moved(self.bytes * factor, self.times * factor)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        equation: of the jaxpr that it comes from.
        inputs: the values that it reads.
        outputs: those that it makes.
        flops: of its matrix products, at the speed of those in the type to compute in.
        element_wise: bytes that a loop's own element-wise work moves; see `element_wise_bytes`.
        collectives: the bytes and number of its collectives, by kind.
        live: bytes that a loop holds beside its operands and results.
    """

    equation: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    flops: Amount = NOTHING
    element_wise: Amount = NOTHING
    collectives: Mapping[Collective, Moved] = field(default_factory=dict)
    live: Amount = NOTHING

    @property
    def name(self) -> str:
        """Of its primitive."""
        return str(self.equation.primitive.name)

    @property
    def opaque(self) -> bool:
        """Whether it is a kernel, of which the program does not tell what it does."""
        return self.name in _OPAQUE

    @property
    def apart(self) -> bool:
        """Whether it reads and writes memory, and is not part of a fusion."""
        return self.name in _APART


@dataclass(frozen=True, eq=False)
class Graph:
    """The operations of a program in the order of its text."""

    nodes: list[Node]
    inputs: list[Value]
    outputs: list[Value]


class Traced(NamedTuple):
    """What a program was traced with.

    Attributes:
        marker: a prime that divides the number of tokens that it was traced with, and no other
            size: arrays whose number of elements it divides grow with the tokens. 0 where all do.
        target: what products of experts are planned for.
        eight_bits: how many times faster products in 8 bits are than others, which have a FLOP of
            theirs counted as so much less.
    """

    marker: int = 0
    target: GroupedTarget = GroupedTarget("tpu")
    eight_bits: float = 1.0


AS_TRACED = Traced()


def flatten(closed: Any, traced: Traced = AS_TRACED) -> Graph:
    """The graph of a closed jaxpr.

    Args:
        closed: the program of one device.
        traced: what it was traced with.
    """
    return _Flattening(traced).graph(closed.jaxpr)


def flatten_by_origin(
    jaxpr: Any, of_tokens: Sequence[bool], held: Callable[[Any], float] = lambda equation: 0.0
) -> Graph:
    """The graph of a program that was traced with the sizes that it runs with: what is worked out
    of tokens counts as what grows with them, what is worked out of weights alone as fixed.

    Args:
        jaxpr: the program of one device, not closed.
        of_tokens: of each of its inputs, whether it is tokens, or was worked out of them.
        held: bytes that an opaque operation holds beside its operands and results.
    """
    return _ByOrigin(held).graph(jaxpr, of_tokens)


class _Flattening:
    # Whether there is no backward pass: see `live_bytes`.
    forward_alone = False

    def __init__(self, traced: Traced):
        self.marker, self.target, self.eight_bits = traced

    def fullness(self, size: Amount) -> float:
        """By which the fullest of several moments is found: the few tokens that are traced weigh
        too little beside weights, whose memory is counted by layers (`Layers.weights`).
        """
        return size.scaled

    def scales(self, count: int, sources: Sequence[Value]) -> bool:
        """Whether an array of so many elements, made of other arrays, grows with the tokens."""
        return not self.marker or (count % self.marker == 0 and count > 0)

    def value(self, aval: Any, sources: Sequence[Value] = ()) -> Value:
        count = math.prod(aval.shape)
        scales = self.scales(count, sources)
        try:
            width = jnp.dtype(aval.dtype).itemsize
            floating = jnp.issubdtype(aval.dtype, jnp.floating)
        except TypeError:  # of a random key
            width, floating = 4, False
        size = float(count * width)
        return Value(
            Amount(0.0, size) if scales else Amount(size),
            Amount(0.0, count) if scales else Amount(count),
            bool(floating),
        )

    def graph(self, jaxpr: Any, of_tokens: Sequence[bool] | None = None) -> Graph:
        values: dict[Any, Value] = {}
        for var in (*jaxpr.constvars, *jaxpr.invars):
            values[var] = self.value(var.aval)
        if of_tokens is not None:
            for var, scales in zip(jaxpr.invars, of_tokens, strict=True):
                values[var] = _sized(values[var], scales)
        nodes: list[Node] = []
        self.walk(jaxpr, values, nodes)
        return Graph(
            nodes,
            [values[var] for var in jaxpr.invars],
            [self.read(var, values) for var in jaxpr.outvars],
        )

    def read(self, var: Any, values: dict[Any, Value]) -> Value:
        return self.value(var.aval) if isinstance(var, Literal) else values[var]

    def walk(self, jaxpr: Any, values: dict[Any, Value], nodes: list[Node]) -> None:
        # What is rounded to 8 bits for several products is rounded once, as XLA has it.
        rounded: dict[Any, tuple[Value, ...]] = {}
        for equation in jaxpr.eqns:
            inputs = tuple(self.read(var, values) for var in equation.invars)
            inner = inlined(equation)
            if inner is None:
                known = _rounding(equation, values)
                outputs = rounded.get(known)
                if outputs is None:
                    outputs = tuple(self.value(var.aval, inputs) for var in equation.outvars)
                    nodes.append(self.node(equation, inputs, outputs))
                if known is not None:
                    rounded[known] = outputs
                values.update(zip(equation.outvars, outputs, strict=True))
                continue
            inner_values = dict(zip(inner.invars, inputs, strict=True))
            inner_values |= {var: self.value(var.aval) for var in inner.constvars}
            self.walk(inner, inner_values, nodes)
            for var, made in zip(equation.outvars, inner.outvars, strict=True):
                values[var] = self.read(made, inner_values)

    def node(self, equation: Any, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> Node:
        name, params = equation.primitive.name, equation.params
        if name in _COLLECTIVES:
            return Node(
                equation, inputs, outputs, collectives=_collectives_of(equation, inputs, outputs)
            )
        if name == "scan":
            return self.loop(equation, inputs, outputs, params["jaxpr"], params["length"])
        if name == "while":  # how often it runs is not known
            times = 0 if is_rarely_entered(str(equation.source_info.name_stack)) else 1
            return self.loop(equation, inputs, outputs, params["body_jaxpr"], times)
        if name == "cond":
            found = [self.loop(equation, inputs, outputs, b, 1) for b in params["branches"]]
            return max(found, key=lambda node: sum(node.flops))
        flops = self.flops(equation, inputs, outputs)
        if name == "ragged_dot_general":
            return self.grouped(Node(equation, inputs, outputs, flops=flops))
        return Node(equation, inputs, outputs, flops=flops)

    def grouped(self, node: Node) -> Node:
        """A product of rows and the matrices of their groups, with what the back end that the
        target chooses for it does beside.
        """
        equation = node.equation
        one, other = (var.aval for var in equation.invars[:2])
        result = equation.outvars[0].aval
        sums = result.ndim == 3  # over the rows of a group, as its gradient does
        groups, height, width = (result if sums else other).shape
        (ragged,) = equation.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        count = float(one.shape[ragged])
        asked = GroupedRequest(
            self.target.platform,
            one.dtype,
            one.shape[ragged],
            groups,
            height,
            width,
            self.target.compute_capability,
        )
        work = choose(asked)[0].work
        node = replace(node, flops=node.flops + Amount(2.0 * groups * work.rows * height * width))
        if not work.block:
            return node
        arrays = node.inputs[:2] if sums else (node.inputs[0], node.outputs[0])
        blocks = Amount(groups, count / work.block)
        if not arrays[0].count.scaled:
            blocks = Amount(sum(blocks))
        # A matrix is copied and read; a sum in float32 is written, and added to another.
        moved = 4 * FLOAT if sums else 3 * jnp.dtype(one.dtype).itemsize
        return replace(
            node,
            element_wise=blocks * (moved * height * width),
            live=sum((value.bytes for value in arrays), Amount()),
        )

    def loop(
        self,
        equation: Any,
        inputs: tuple[Value, ...],
        outputs: tuple[Value, ...],
        body: Any,
        length: int,
    ) -> Node:
        """What an equation with a body takes in all that it runs.

        Args:
            equation: of the traced program.
            inputs: the values that it reads.
            outputs: the values that it gives.
            body: the program that runs each time, a closed jaxpr.
            length: how often it runs.

        Returns:
            The sum over all times, and what one time holds at most.
        """
        graph = self.body(equation, inputs, body)
        nodes = needed(graph.nodes, graph.outputs)
        collectives = total_collectives(nodes)
        held = live_bytes(nodes, graph.inputs, graph.outputs, forward_alone=self.forward_alone)
        peak = max((size for _, size in held), default=Amount(), key=self.fullness)
        return Node(
            equation,
            inputs,
            outputs,
            flops=total_flops(nodes) * length,
            element_wise=element_wise_bytes(nodes, graph.outputs) * length,
            collectives={key: moved * length for key, moved in collectives.items()},
            live=peak,
        )

    def body(self, equation: Any, inputs: tuple[Value, ...], body: Any) -> Graph:
        """The graph of what an equation runs."""
        return self.graph(body.jaxpr)

    def flops(self, equation: Any, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> Amount:
        total = product_flops(equation)
        if _is_in_eight_bits(equation):
            total /= self.eight_bits
        # A product summed over the tokens, as the gradient of a weight, grows with them too.
        scales = any(value.count.scaled for value in (*inputs, *outputs))
        return Amount(0.0, total) if scales else Amount(total)


def _is_in_eight_bits(equation: Any) -> bool:
    """Whether an operation is a product in 8 bits, or rounds for one."""
    return EIGHT_BITS in str(equation.source_info.name_stack)


def _rounding(equation: Any, values: Mapping[Any, Value]) -> Any:
    """What an operation that rounds to 8 bits does and of what, the same for equal ones of a pass;
    None of others.
    """
    if equation.primitive.name in _APART or not _is_in_eight_bits(equation):
        return None
    read = tuple(
        str(var) if isinstance(var, Literal) else id(values[var]) for var in equation.invars
    )
    is_backward = "transpose(" in str(equation.source_info.name_stack)
    return equation.primitive.name, str(equation.params), read, is_backward


def product_flops(equation: Any) -> float:
    """Of a matrix product; 0 of other operations."""
    name, params = equation.primitive.name, equation.params
    shapes = [var.aval.shape for var in equation.invars]
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        each = 2.0 * math.prod(shapes[0][dim] for dim in summed)
    elif name == "ragged_dot_general":
        # One product of each row, whichever group it belongs to.
        (summed, _), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        (ragged,) = params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        each = 2.0 * math.prod(shapes[0][dim] for dim in summed)
        if ragged in summed:
            each /= equation.outvars[0].aval.shape[0]
    elif name == "conv_general_dilated":
        features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        each = 2.0 * math.prod(shapes[1]) / features
    else:
        return 0.0
    return float(each * math.prod(equation.outvars[0].aval.shape))


class _ByOrigin(_Flattening):
    """What grows with the tokens is told by what it was worked out of."""

    forward_alone = True

    def __init__(self, held: Callable[[Any], float]):
        super().__init__(AS_TRACED)
        self.held = held

    def fullness(self, size: Amount) -> float:
        return sum(size)

    def scales(self, count: int, sources: Sequence[Value]) -> bool:
        return any(source.count.scaled for source in sources)

    def node(self, equation: Any, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> Node:
        node = super().node(equation, inputs, outputs)
        return replace(node, live=Amount(0.0, self.held(equation))) if node.opaque else node

    def body(self, equation: Any, inputs: tuple[Value, ...], body: Any) -> Graph:
        flags = [bool(value.count.scaled) for value in inputs]
        name, params = equation.primitive.name, equation.params
        if name == "while":
            flags = flags[params["cond_nconsts"] :]
            first, count = params["body_nconsts"], len(flags) - params["body_nconsts"]
        elif name == "scan":
            first, count = common_and_carried(equation)
        else:
            flags, first, count = flags[1:], 0, 0
        # What one round hands to the next may come of tokens from the second round on.
        if any(flags):
            flags[first : first + count] = [True] * count
        return self.graph(body.jaxpr, flags)


def _sized(value: Value, scales: bool) -> Value:
    """A value that grows with the tokens, or does not."""

    def one(amount: Amount) -> Amount:
        return Amount(0.0, sum(amount)) if scales else Amount(sum(amount))

    return Value(one(value.bytes), one(value.count), value.floating)


def common_and_carried(equation: Any) -> tuple[int, int]:
    """How many inputs of a loop all rounds have in common, and how many one hands to the next."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From JAX 0.12 on.
    common, carried, _ = params["ft_in"].unpack()
    return len(common), len(carried)


def is_rarely_entered(source: str) -> bool:
    """Whether an operation, by the names around it in the traced program, is a loop that most steps
    do not enter.
    """
    return FURTHER_DOCUMENTS in source or FURTHER_ROUNDS in source


def rounds(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every operation of a program that is more than a call, with how often it runs.

    Loops of unknown length count once, but for those that most steps do not enter; of branches all
    are counted.
    """
    for equation in jaxpr.eqns:
        inner = inlined(equation)
        params = equation.params
        if inner is not None:
            yield from rounds(inner, times)
        elif equation.primitive.name == "scan":
            yield from rounds(params["jaxpr"].jaxpr, times * params["length"])
        elif equation.primitive.name == "while":
            if not is_rarely_entered(str(equation.source_info.name_stack)):
                yield from rounds(params["body_jaxpr"].jaxpr, times)
        elif equation.primitive.name == "cond":
            for branch in params["branches"]:
                yield from rounds(branch.jaxpr, times)
        else:
            yield equation, times


def inlined(equation: Any) -> Any:
    """The jaxpr that an operation stands for; None where it is one of its own."""
    if equation.primitive.name in _APART | _OPAQUE:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in equation.params:
            inner = equation.params[key]
            return inner.jaxpr if hasattr(inner, "jaxpr") else inner
    return None


def _collectives_of(
    equation: Any, inputs: tuple[Value, ...], outputs: tuple[Value, ...]
) -> dict[Collective, Moved]:
    """What a collective moves, without scalars and indices, which are small."""
    kind, of_result = _COLLECTIVES[equation.primitive.name]
    params = equation.params
    axes = params["axis_name"] if "axis_name" in params else params["axes"]
    axis = axes if isinstance(axes, str) else _AND.join(axes)
    found: dict[Collective, Moved] = {}
    for value, var in zip(outputs if of_result else inputs, equation.invars, strict=False):
        if not value.floating or math.prod(var.aval.shape) <= 1:
            continue
        what = "tokens" if value.bytes.scaled else "weights"
        _add(found, Collective(axis, kind, what), Moved(value.bytes, 1))
    return found


def _add(sums: dict[Collective, Moved], key: Collective, moved: Moved) -> None:
    sums[key] = sums[key] + moved if key in sums else moved


def total_flops(nodes: Iterable[Node]) -> Amount:
    """Of the matrix products of some operations."""
    total = Amount()
    for node in nodes:
        if node.flops != (0, 0):
            total = total + node.flops
    return total


def total_collectives(nodes: Iterable[Node]) -> dict[Collective, Moved]:
    """The bytes and number of the collectives of some operations, by kind."""
    sums: dict[Collective, Moved] = {}
    for node in nodes:
        for key, moved in node.collectives.items():
            _add(sums, key, moved)
    return sums


def needed(
    nodes: Sequence[Node],
    values: Iterable[Value],
    have: Callable[[Node], bool] = lambda node: False,
) -> list[Node]:
    """The operations, in order, that some values come from.

    Args:
        nodes: all operations.
        values: what is wanted.
        have: whether the results of an operation are there already.
    """
    wanted = set(values)
    found = []
    for node in reversed(nodes):
        if wanted.isdisjoint(node.outputs) or have(node):
            continue
        found.append(node)
        wanted.update(node.inputs)
    return found[::-1]


# Operations that cost nothing to recompute, and are recomputed in each fusion that uses them; and
# those that are recomputed where memory is short.
_CHEAP = {
    "convert_element_type",
    "broadcast_in_dim",
    "iota",
    "select_n",
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"),
}
_RECOMPUTED = _CHEAP | {"add", "add_any", "sub", "mul", "neg", "square", "transpose"}


class _Step(NamedTuple):
    """An operation with the arrays that it reads and makes; other names of an array are the array
    itself.
    """

    node: Node
    inputs: list[Value]
    outputs: list[Value]


def _steps(nodes: Sequence[Node]) -> tuple[list[_Step], Callable[[Value], Value]]:
    """The operations that are more than another name of an array, and the array that a value is."""
    arrays: dict[Value, Value] = {}
    found = []
    for node in nodes:
        inputs = [arrays.get(value, value) for value in node.inputs]
        if node.name in ALIASES:
            arrays.update(zip(node.outputs, inputs, strict=False))
        else:
            found.append(_Step(node, inputs, list(node.outputs)))
    return found, lambda value: arrays.get(value, value)


def distinct(nodes: Sequence[Node], values: Iterable[Value]) -> set[Value]:
    """The arrays that some values are, of which others may be further names."""
    array = _steps(nodes)[1]
    return {array(value) for value in values}


def _in_memory(steps: Sequence[_Step], outputs: Iterable[Value], cheap: set[str]) -> set[Value]:
    """The arrays that are written to memory: what operations that stand apart read and make, and
    what more than one of the fusions between them uses, unless it is `cheap` to recompute.
    """
    users: dict[Value, list[Node]] = {}
    for step in steps:
        for value in step.inputs:
            users.setdefault(value, []).append(step.node)
    written = set(outputs)
    # The array that the fusion ends with which an operation is part of.
    ends: dict[Node, Value] = {}
    for node, inputs, made in reversed(steps):
        if node.apart:
            written.update(inputs)
            written.update(made)
            continue
        for value in made:
            # In the order of the program, so that every trace gives the same.
            used_by = dict.fromkeys(ends.get(user, value) for user in users.get(value, ()))
            if value in written or (len(used_by) > 1 and node.name not in cheap):
                written.add(value)
                ends[node] = value
            elif used_by:
                ends.setdefault(node, next(iter(used_by)))
    return written


def element_wise_bytes(
    nodes: Sequence[Node], outputs: Iterable[Value], *, in_place: bool = False
) -> Amount:
    """The fewest bytes that the element-wise work of some operations reads and writes.

    Each fusion reads what it needs once and writes its result. Matrix products, kernels and
    collectives read and write in their own time.

    Args:
        nodes: the operations.
        outputs: of the program.
        in_place: whether what replaces elements of an array takes its memory, so that only the new
            elements are moved, as in a cache that is handed from round to round.
    """
    steps, array = _steps(nodes)
    written = _in_memory(steps, {array(value) for value in outputs}, _CHEAP)
    total = Amount()
    # What a fusion has read by the time that it has made a value.
    sources: dict[Value, set[Value]] = {}
    for node, inputs, made in steps:
        total = total + node.element_wise
        if node.apart:
            if in_place and node.name in _REPLACING:
                total = total + node.inputs[_REPLACING[node.name]].bytes * 2
            elif node.name in _MOVED:
                for value in made:
                    total = total + value.bytes * 2
            continue
        read: set[Value] = set()
        for value in inputs:
            read |= {value} if value in written else sources.get(value, {value})
        for value in made:
            sources[value] = read
            if value in written:
                for each in (value, *read):
                    total = total + each.bytes
    return total


def _overwritten(node: Node, inputs: Sequence[Value]) -> Sequence[Value]:
    """The operands whose memory an operation's results take, if nothing reads them later."""
    name, params = node.name, node.equation.params
    if name in _REPLACING:
        return inputs[:1]
    if name == "scan":
        first, count = common_and_carried(node.equation)
        return inputs[first : first + count]
    if name == "while":
        return inputs[params["cond_nconsts"] + params["body_nconsts"] :]
    return ()


class _Held(NamedTuple):
    """An array in memory.

    Attributes:
        begin: the operation that makes it, by its number.
        end: the last that reads it.
        sources: what the fusion has read that makes it, in the order of the program; nothing where
            none does.
    """

    begin: int
    end: int
    sources: tuple[Value, ...]


def _held(steps: Sequence[_Step], written: set[Value]) -> dict[Value, _Held]:
    """Every array that is written to memory, and from when to when it is held.

    What a fusion has read is held until it ends. Fusions that read the same are one.
    """
    begins: dict[Value, int] = {}
    ends: dict[Value, int] = {}
    sources: dict[Value, tuple[Value, ...]] = {}
    fusions: list[tuple[int, set[Value]]] = []
    for index, step in enumerate(steps):
        # In the order of the program, so that every trace gives the same.
        reads: dict[Value, None] = {}
        for value in step.inputs:
            reads |= dict.fromkeys((value,) if value in written else sources.get(value, (value,)))
        for value in step.outputs:
            sources[value] = () if step.node.apart else tuple(reads)
            if value not in written:
                continue
            begins[value] = index
            if not step.node.apart:
                there = max((begins.get(each, -1) for each in reads), default=-1)
                begins[value] = next(
                    (at for at, read in fusions if there < at and not read.isdisjoint(reads)), index
                )
                fusions.append((begins[value], set(reads)))
        if step.node.apart or not written.isdisjoint(step.outputs):
            at = max((begins.get(value, index) for value in step.outputs), default=index)
            for value in (*reads, *step.outputs):
                ends[value] = max(ends.get(value, 0), at)
    return {
        value: _Held(begin, ends.get(value, begin), sources[value])
        for value, begin in begins.items()
    }


def live_bytes(
    nodes: Sequence[Node],
    inputs: Iterable[Value],
    outputs: Iterable[Value],
    *,
    forward_alone: bool = False,
) -> list[tuple[Node, Amount]]:
    """Each operation, and the bytes of the arrays that are held while it runs.

    An operation that replaces elements, a loop and a fusion write over what nothing reads later.

    Args:
        nodes: the operations in order, all of them needed.
        inputs: values whose memory is counted elsewhere.
        outputs: others of this kind.
        forward_alone: whether there is no backward pass, in which memory is so short that XLA
            recomputes sums and products rather than hold them. Without one they are written where
            several operations use them.
    """
    steps, array = _steps(nodes)
    results = {array(value) for value in outputs}
    written = _in_memory(steps, results, _CHEAP if forward_alone else _RECOMPUTED)
    elsewhere = results | {array(value) for value in inputs}
    arrays = {
        value: span for value, span in _held(steps, written).items() if value not in elsewhere
    }
    made: dict[int, list[Value]] = {}
    ending: dict[int, list[Value]] = {}
    for value, span in arrays.items():
        made.setdefault(span.begin, []).append(value)
        ending.setdefault(span.end, []).append(value)
    held: set[Value] = set()
    total = Amount()
    found = []
    for index, (node, reads, _) in enumerate(steps):
        begun = made.get(index, ())
        freed = [
            value
            for value in _overwritten(node, reads)
            if value in held and arrays[value].end == index
        ]
        for value in begun:
            for each in arrays[value].sources:
                ends_here = each in held and arrays[each].end == index
                if ends_here and each.bytes == value.bytes and each not in freed:
                    freed.append(each)
                    break
        for value in dict.fromkeys(freed):
            held.discard(value)
            total = total + value.bytes * -1
        for value in begun:
            held.add(value)
            total = total + value.bytes
        found.append((node, total + node.live))
        for value in ending.get(index, ()):
            if value in held:
                held.discard(value)
                total = total + value.bytes * -1
    return found
