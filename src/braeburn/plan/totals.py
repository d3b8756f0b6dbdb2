"""What a pass of all layers comes to with their attention, as quantities that grow with the tokens
of a device.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from braeburn.layers.attention.backend import Backend, Request
from braeburn.plan.attention import Accelerator, Attention, Cost, attention_of, kernel_width
from braeburn.plan.graph import Amount, Collective, Moved
from braeburn.plan.layers import Call, Layers


class Sequence(NamedTuple):
    """How sequences are worked on: what attention depends on beside its layer.

    Attributes:
        length: tokens of a whole one.
        context: devices that share it out.
        ring: whether keys are passed around a ring; otherwise they are gathered.
        accelerator: that they are worked on.
    """

    length: int
    context: int
    ring: bool
    accelerator: Accelerator

    def answer(self, call: Call) -> "Answer":
        """What a layer asks a back end for, and what answers."""
        request = replace(
            call.request,
            platform=self.accelerator.platform,
            sequence_length=self.length,
            context_shards=self.context,
            ring=self.ring,
            compute_capability=self.accelerator.compute_capability,
        )

        shared = request.num_heads // request.num_kv_heads
        one = replace(request, num_heads=shared, num_kv_heads=1)
        return Answer(request, *attention_of(self.accelerator, one))


class Answer(NamedTuple):
    """Attention of a layer on a target.

    Attributes:
        request: of the layer.
        costs: for one sequence and one key head.
        backend: that answers.
    """

    request: Request
    costs: Attention
    backend: Backend


class Kernels(NamedTuple):
    """Calls of one kind of attention in a fused kernel.

    Attributes:
        once: FLOPs of one product of queries and keys for each two keys, of all calls.
        forward: products in the forward pass and in what is recomputed.
        backward: calls of the backward pass, for each of the forward pass.
        window: positions that a query sees; None for all earlier ones.
        skips: whether tiles in which no query sees a key are passed over.
    """

    once: Amount
    forward: int
    backward: int
    window: int | None
    skips: bool

    def keys(self, length: int, tile: int) -> float:
        """Twice the keys that a query is multiplied with, on average over a sequence.

        Args:
            length: tokens of the sequence.
            tile: queries and keys that the kernel takes at once; 0 for single ones.
        """
        if not self.skips:
            return 2.0 * length
        tile = min(tile, length)
        # Beside its own tile, a tile of queries has earlier ones to see: at most those, in tokens.
        earlier = float(length - tile)
        if self.window is not None:
            reached = math.ceil((self.window - 1) / tile) * tile if tile else self.window
            earlier = min(earlier, reached)
        return (earlier + tile) * (2 - earlier / length)


@dataclass(frozen=True, eq=False)
class Totals:
    """A pass over a microbatch and its gradient.

    Attributes:
        flops: of matrix products but attention's.
        plain: of attention's products in no fused kernel.
        kernels: each kind of attention in a fused kernel.
        element_wise: bytes that the forward pass reads and writes in element-wise work.
        attention_bytes: those of attention in all passes.
        repeats: whether the backward pass recomputes some of them.
        collectives: all collectives.
        kept: bytes kept for the backward pass.
        named: of these, those with a name.
        weights: as `Layers.weights`.
        live: bytes held in the backward pass of a layer, at each moment that may be the fullest.
    """

    flops: Amount
    plain: Amount
    kernels: tuple[Kernels, ...]
    element_wise: Amount
    attention_bytes: Amount
    repeats: bool
    collectives: tuple[tuple[Collective, Moved], ...]
    kept: Amount
    named: Mapping[str, Amount]
    weights: tuple[float, float]
    live: tuple[Amount, ...]


@cache
def totals_of(layers: Layers, tokens: int, sequence: Sequence) -> Totals:
    """The totals of layers that were traced with `tokens`, for sequences of a kind."""
    # Sequences, or pieces of them, in the tokens that were traced.
    traced = tokens * sequence.context / sequence.length
    plain = attention_bytes = 0.0
    collectives = dict(layers.collectives)
    kept = Amount()
    for size in layers.kept.values():
        kept = kept + size
    answers = {call: sequence.answer(call) for call in layers.calls}
    for call, times in layers.calls.items():
        each = times * traced * call.request.num_kv_heads
        found = answers[call].costs
        for cost in _passes(call, found):
            plain += cost.flops * each
            attention_bytes += cost.element_wise * each
            for kind, (moved_bytes, count) in cost.collectives.items():
                key = Collective("context", kind, "tokens")
                moved = Moved(Amount(0.0, moved_bytes * each), count * times)
                collectives[key] = collectives[key] + moved if key in collectives else moved
        beside = {"kept": found.kept, "whole": found.kept_whole}.get(call.state, 0.0)
        kept = kept + Amount(0.0, beside * each)
    return Totals(
        layers.flops,
        Amount(0.0, plain),
        tuple(_kernel(c, times, answers[c], tokens) for c, times in layers.calls.items()),
        layers.element_wise,
        Amount(0.0, attention_bytes),
        layers.repeats,
        tuple(collectives.items()),
        kept,
        layers.kept,
        layers.weights,
        tuple(
            _live(size, call.state, answers[call], traced) if call else size
            for call, size in _fullest(layers).items()
        ),
    )


@cache
def _fullest(layers: Layers) -> dict[Call | None, Amount]:
    """Of the moments without attention and within each kind of it, the fullest."""
    found: dict[Call | None, Amount] = {}
    for size, call in layers.live:
        if call not in found or size.scaled > found[call].scaled:
            found[call] = size
    return found


def _passes(call: Call, found: Attention) -> Iterator[Cost]:
    """What attention does in a step."""
    yield found.forward
    if call.state == "forward":
        return
    if call.state != "whole":
        yield found.again if call.state == "kept" else found.again_whole
    yield found.backward


def _kernel(call: Call, times: int, answer: Answer, tokens: int) -> Kernels:
    request, found, backend = answer
    width = kernel_width(request, backend)
    once = Amount(0.0, times * request.num_heads * width * tokens)
    forward, backward = found.forward.calls, 0
    if call.state != "forward":
        forward += found.again_whole.calls if call.state == "again" else 0
        backward = found.backward.calls
    return Kernels(once, 2 * forward, backward, request.window, backend.skips)


def _live(size: Amount, state: str, answer: Answer, traced: float) -> Amount:
    request, found, backend = answer
    if backend.kernel:
        none, one = (backend.kernel(request, count) for count in (0, 1))
        return size + Amount(none, (one - none) * traced)
    if state == "forward":
        return size
    return size + Amount(0.0, found.live * request.num_kv_heads * traced)
