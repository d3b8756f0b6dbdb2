"""What a pass of all layers comes to with their attention, as quantities that grow with the tokens
of a device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp

from braeburn.layers.attention.backend import Request
from braeburn.plan.attention import Accelerator, Attention, Cost, attention_of
from braeburn.plan.graph import Amount, Collective, Moved
from braeburn.plan.layers import Call, Layers


class Sequence(NamedTuple):
    """How sequences are worked on: what attention depends on but for its heads.

    Attributes:
        length: tokens of a whole one.
        context: devices that share it out.
        ring: whether keys are passed around a ring; otherwise they are gathered.
        dtype: of activations.
        accelerator: that they are worked on.
    """

    length: int
    context: int
    ring: bool
    dtype: str
    accelerator: Accelerator

    def request(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Request:
        """What a back end of attention is asked for."""
        return Request(
            platform=self.accelerator.platform,
            dtype=jnp.dtype(self.dtype),
            sequence_length=self.length,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context_shards=self.context,
            ring=self.ring,
            compute_capability=self.accelerator.compute_capability,
        )

    def attention(self, call: Call) -> Attention:
        """The costs of attention for one sequence and one key head."""
        request = self.request(call.num_heads // call.num_kv_heads, 1, call.head_dim)
        return attention_of(self.accelerator, request)[0]


@dataclass(frozen=True, eq=False)
class Totals:
    """A pass over a part of the batch and its gradient.

    Attributes:
        flops: of matrix products but attention's.
        plain: of attention's products in no fused kernel.
        kernels: for each kind of attention in a fused kernel: FLOPs of one product of queries and
            keys for each key, products in the forward pass and in what is repeated, and calls of
            the backward pass.
        element_wise: bytes that the forward pass reads and writes in element-wise work.
        attention_bytes: those of attention in all passes.
        repeats: whether the backward pass works some of them out again.
        collectives: all exchanges.
        kept: bytes kept for the backward pass.
        named: of these, those with a name.
        weights: as `Layers.weights`.
        live: bytes held in the backward pass of a layer, at each moment that may be the fullest.
    """

    flops: Amount
    plain: Amount
    kernels: tuple[tuple[Amount, int, int], ...]
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
    for call, times in layers.calls.items():
        each = times * traced * call.num_kv_heads
        for cost in _passes(call, sequence.attention(call)):
            plain += cost.flops * each
            attention_bytes += cost.element_wise * each
            for kind, (moved_bytes, count) in cost.collectives.items():
                key = Collective("context", kind, "tokens")
                moved = Moved(Amount(0.0, moved_bytes * each), count * times)
                collectives[key] = collectives[key] + moved if key in collectives else moved
        found = sequence.attention(call)
        beside = {"kept": found.kept, "whole": found.kept_whole}.get(call.state, 0.0)
        kept = kept + Amount(0.0, beside * each)
    return Totals(
        layers.flops,
        Amount(0.0, plain),
        tuple(_kernel(call, times, sequence, tokens) for call, times in layers.calls.items()),
        layers.element_wise,
        Amount(0.0, attention_bytes),
        layers.repeats,
        tuple(collectives.items()),
        kept,
        layers.kept,
        layers.weights,
        tuple(_live(size, call, sequence, traced) for size, call in _fullest(layers)),
    )


def _fullest(layers: Layers) -> list[tuple[Amount, Call | None]]:
    """Of the moments without attention and within each kind of it, the fullest."""
    found: dict[Call | None, Amount] = {}
    for size, call in layers.live:
        if call not in found or size.scaled > found[call].scaled:
            found[call] = size
    return [(size, call) for call, size in found.items()]


def _passes(call: Call, found: Attention) -> Iterator[Cost]:
    """What attention does in a step."""
    yield found.forward
    if call.state == "forward":
        return
    if call.state != "whole":
        yield found.again if call.state == "kept" else found.again_whole
    yield found.backward


def _kernel(call: Call, times: int, sequence: Sequence, tokens: int) -> tuple[Amount, int, int]:
    found = sequence.attention(call)
    once = Amount(0.0, float(times * call.num_heads * call.head_dim * tokens))
    if call.state == "forward":
        return once, 2 * found.forward.calls, 0
    again = found.again_whole.calls if call.state == "again" else 0
    return once, 2 * (found.forward.calls + again), found.backward.calls


def _live(size: Amount, call: Call | None, sequence: Sequence, traced: float) -> Amount:
    if call is None:
        return size
    request = sequence.request(call.num_heads, call.num_kv_heads, call.head_dim)
    found, backend = attention_of(
        sequence.accelerator,
        sequence.request(call.num_heads // call.num_kv_heads, 1, call.head_dim),
    )
    if backend.kernel:
        none, one = (backend.kernel(request, count) for count in (0, 1))
        return size + Amount(none, (one - none) * traced)
    if call.state == "forward":
        return size
    return size + Amount(0.0, found.live * call.num_kv_heads * traced)
