"""What the traced programs of a stage come to, for any number of tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from braeburn.config import NO_OFFLOAD, Remat
from braeburn.layers.attention.backend import Request
from braeburn.plan.blocks import Block, Shapes, neighbours, policy_of, programs, request_of
from braeburn.plan.graph import Amount, Collective, Moved, Node, live_bytes, needed
from braeburn.plan.trace import Pass, Policy, graph_of, keeps, peaks, rematerialize

# What of a request depends on the target alone.
TARGETS: dict[str, Any] = {
    "platform": "",
    "sequence_length": 0,
    "context_shards": 1,
    "ring": False,
    "compute_capability": None,
}


@dataclass(frozen=True)
class Call:
    """Attention of one kind in the layers.

    Attributes:
        request: what its layer asks for; all that depends on the target is left open.
        state: what becomes of its result: "kept" for the backward pass, computed "again" there,
            kept with all that belongs to it ("whole"), or not needed there ("forward").
    """

    request: Request
    state: str


@dataclass(frozen=True, eq=False)
class Layers:
    """What all layers of a model do in a pass over a microbatch, and its gradient.

    Attributes:
        flops: of their matrix products but attention's.
        element_wise: bytes that the forward pass reads and writes in element-wise work.
        repeats: whether the backward pass recomputes some of them.
        collectives: their collectives but attention's.
        calls: of attention, and how many of each kind there are.
        kept: bytes kept for the backward pass by name; "" has what has no name.
        weights: bytes of one layer's gathered weights, and of their gradients before they are
            scattered.
        live: bytes that the backward pass of one layer holds otherwise, at each moment; of those
            within attention, which it is.
    """

    flops: Amount
    element_wise: Amount
    repeats: bool
    collectives: Mapping[Collective, Moved]
    calls: Mapping[Call, int]
    kept: Mapping[str, Amount]
    weights: tuple[float, float]
    live: tuple[tuple[Amount, Call | None], ...]


@dataclass(frozen=True, eq=False)
class Around:
    """What embedding, final norm and loss do, with their gradients.

    Attributes:
        flops: of their matrix products.
        element_wise: bytes that they read and write in element-wise work.
        collectives: their collectives.
    """

    flops: Amount
    element_wise: Amount
    collectives: Mapping[Collective, Moved]


def layers_of(shapes: Shapes, remat: Remat) -> Layers:
    """The layers of a stage's model under a rematerialisation policy."""
    names = remat.names if remat.policy == "save_named" else ()
    return _layers(shapes, remat.policy, names)


@cache
def _layers(shapes: Shapes, policy: str, names: tuple[str, ...]) -> Layers:
    if between := neighbours(shapes):
        one, other, share = between
        ends = [_per_token(_layers(each, policy, names), 1 / each.tokens) for each in (one, other)]
        # Where they are other programs, this one is traced as well.
        if len(ends[0].live) == len(ends[1].live):
            return _per_token(_mixed(ends[0], ends[1], share), shapes.tokens)
    remat = Remat(policy=policy, names=names) if names else Remat(policy=policy)  # type: ignore
    keeping = policy_of(remat, NO_OFFLOAD, shapes.rules, shapes.split)
    return _sum([_trained(block, keeping) for block in programs(shapes).blocks if block.trained])


@cache
def teacher_layers_of(shapes: Shapes) -> Layers:
    """The layers of a stage's teacher, which run forward alone."""
    return _sum([_untrained(block) for block in programs(shapes).blocks if not block.trained])


@cache
def around_of(shapes: Shapes) -> Around:
    """What is around the layers of a stage's models."""
    if between := neighbours(shapes):
        one, other, share = between
        first, second = around_of(one), around_of(other)
        scales = shapes.tokens / one.tokens, shapes.tokens / other.tokens

        def mixed(here: Amount, there: Amount) -> Amount:
            return _between(
                Amount(here.fixed, here.scaled * scales[0]),
                Amount(there.fixed, there.scaled * scales[1]),
                share,
            )

        return Around(
            mixed(first.flops, second.flops),
            mixed(first.element_wise, second.element_wise),
            {
                key: Moved(mixed(here.bytes, there.bytes), max(here.times, there.times))
                for key, here, there in _paired(first.collectives, second.collectives)
            },
        )
    graph = graph_of(programs(shapes).around)
    found = Pass.of(graph.nodes, graph.outputs)
    return Around(found.flops, found.element_wise, found.collectives)


def _paired(
    one: Mapping[Collective, Moved], other: Mapping[Collective, Moved]
) -> Iterator[tuple[Collective, Moved, Moved]]:
    """The collectives of two programs; of those that only one has, nothing of the other: a norm
    that one joins along two axes at once may be split along one of them in the other.
    """
    nothing = Moved(Amount(), 0)
    for key in dict.fromkeys([*one, *other]):
        yield key, one.get(key, nothing), other.get(key, nothing)


def _between(one: Amount, other: Amount, share: float) -> Amount:
    return one * (1 - share) + other * share


def _mixed(one: Layers, other: Layers, share: float) -> Layers:
    """Layers between two that differ in nothing but sizes."""

    def between(here: float, there: float) -> float:
        return here + (there - here) * share

    calls = {
        call: replace(
            call,
            request=replace(
                call.request,
                num_heads=round(between(call.request.num_heads, end.request.num_heads)),
                num_kv_heads=round(between(call.request.num_kv_heads, end.request.num_kv_heads)),
            ),
        )
        for call, end in zip(one.calls, other.calls, strict=True)
    }
    return Layers(
        _between(one.flops, other.flops, share),
        _between(one.element_wise, other.element_wise, share),
        one.repeats,
        {
            key: Moved(_between(here.bytes, there.bytes, share), max(here.times, there.times))
            for key, here, there in _paired(one.collectives, other.collectives)
        },
        {calls[call]: times for call, times in one.calls.items()},
        {name: _between(size, other.kept[name], share) for name, size in one.kept.items()},
        (between(one.weights[0], other.weights[0]), between(one.weights[1], other.weights[1])),
        tuple(
            (_between(here[0], there[0], share), calls[here[1]] if here[1] else None)
            for here, there in zip(one.live, other.live, strict=True)
        ),
    )


def _per_token(layers: Layers, factor: float) -> Layers:
    """Layers over `factor` times as many tokens."""

    def over(size: Amount) -> Amount:
        return Amount(size.fixed, size.scaled * factor)

    return Layers(
        over(layers.flops),
        over(layers.element_wise),
        layers.repeats,
        {key: Moved(over(size), times) for key, (size, times) in layers.collectives.items()},
        layers.calls,
        {name: over(size) for name, size in layers.kept.items()},
        layers.weights,
        tuple((over(size), call) for size, call in layers.live),
    )


def _trained(block: Block, policy: Policy) -> Layers:
    program = block.program
    recomputed = rematerialize(program, policy, block.varying)
    kept: dict[str, Amount] = {}
    for value, name in recomputed.kept:
        kept[name or ""] = kept.get(name or "", Amount()) + value.bytes
    for value in recomputed.inputs:
        if value in block.carry:
            kept[""] = kept.get("", Amount()) + value.bytes
    forward = needed(program.forward, [*program.outputs, *(value for value, _ in recomputed.kept)])
    once = Pass.of(needed(program.forward, program.outputs), program.outputs)
    passes = [Pass.of(nodes) for nodes in (forward, recomputed.again, program.backward)]
    collectives: dict[Collective, Moved] = {}
    for each in passes:
        for key, moved in each.collectives.items():
            collectives[key] = collectives[key] + moved if key in collectives else moved
    states = {node: _state(node, program.forward, policy) for node in once.calls}
    calls = [_call(node, state) for node, state in states.items()]
    own = set(program.gradients) - block.carry
    # A repeat reads its inputs out of what was kept, and writes its outputs beside it.
    handed_on = sum(v.bytes.scaled for v in block.carry if v in {*program.inputs})
    live = [
        (Amount(0.0, size.scaled + handed_on), _backward_call(node, calls))
        for node, size in peaks(program, recomputed, own)
    ]
    found = _repeated(
        Layers(
            passes[0].flops + passes[1].flops + passes[2].flops,
            once.element_wise,
            bool(recomputed.again),
            collectives,
            _counted(calls),
            kept,
            _weights(collectives),
            tuple(live),
        ),
        block.repeats,
    )
    # What all layers have in common is kept once, with its gradient.
    once_kept = [value.bytes * 2 for value in recomputed.inputs if value in block.shared]
    return replace(found, kept=_added(found.kept, {"": sum(once_kept, Amount())}))


def _untrained(block: Block) -> Layers:
    program = block.program
    nodes = needed(program.forward, program.outputs)
    found = Pass.of(nodes, program.outputs)
    calls = [_call(node, "forward") for node in found.calls]
    handed_on = sum(v.bytes.scaled for v in block.carry if v in {*program.inputs})
    live = [
        (Amount(0.0, size.scaled + 2 * handed_on), _backward_call(node, calls))
        for node, size in live_bytes(nodes, program.inputs, program.outputs)
    ]
    return _repeated(
        Layers(
            found.flops,
            found.element_wise,
            False,
            found.collectives,
            _counted(calls),
            {},
            _weights(found.collectives),
            tuple(live),
        ),
        block.repeats,
    )


def _state(call: Node, nodes: list[Node], policy: Policy) -> str:
    if keeps(policy, call):
        return "whole"
    names = [node for node in nodes if node.name == "name" and node.inputs[0] in call.outputs]
    return "kept" if any(keeps(policy, node) for node in names) else "again"


def _call(node: Node, state: str) -> Call:
    request = request_of(node.equation)
    assert request
    return Call(replace(request, **TARGETS), state)


def _backward_call(node: Node, calls: list[Call]) -> Call | None:
    """Attention whose backward pass an operation is."""
    if request_of(node.equation) is None:
        return None
    asked = _call(node, "").request
    return next(call for call in calls if call.request == asked)


def _counted(calls: list[Call]) -> dict[Call, int]:
    return {call: calls.count(call) for call in calls}


def _weights(collectives: Mapping[Collective, Moved]) -> tuple[float, float]:
    """Bytes of the weights gathered in a pass, and of their gradients.

    They are gathered as often as their gradients are not scattered: once where there is none, else
    before the forward and before the backward pass.
    """
    gathered = [m for key, m in collectives.items() if _is(key, "all-gather")]
    scattered = [m for key, m in collectives.items() if _is(key, "reduce-scatter")]
    passes = 2 if scattered else 1
    return (
        sum(moved.bytes.fixed for moved in gathered) / passes,
        sum(moved.bytes.fixed for moved in scattered),
    )


def _is(key: Collective, kind: str) -> bool:
    return key.kind == kind and key.what == "weights"


def _repeated(layers: Layers, times: int) -> Layers:
    """Several equal layers, of which one is worked on at a time."""
    return Layers(
        layers.flops * times,
        layers.element_wise * times,
        layers.repeats,
        {key: moved * times for key, moved in layers.collectives.items()},
        {call: count * times for call, count in layers.calls.items()},
        {name: size * times for name, size in layers.kept.items()},
        layers.weights,
        layers.live,
    )


def _sum(parts: list[Layers]) -> Layers:
    """Some layers after others."""
    first, *others = parts
    for other in others:
        first = Layers(
            first.flops + other.flops,
            first.element_wise + other.element_wise,
            first.repeats or other.repeats,
            _added(first.collectives, other.collectives),
            _added(first.calls, other.calls),
            _added(first.kept, other.kept),
            max(first.weights, other.weights, key=sum),
            (*first.live, *other.live),
        )
    return first


def _added(one: Mapping, other: Mapping) -> dict:
    return {
        key: one[key] + other[key] if key in one and key in other else one.get(key, other.get(key))
        for key in {**one, **other}
    }
