"""What attention costs on one device: of a fused kernel what it declares, of plain XLA what its
traced program does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice

from braeburn.config import MeshConfig
from braeburn.layers.attention.backend import ATTENTION, Backend, Request, Scope, nothing
from braeburn.layers.attention.blocked import blocked_attention
from braeburn.layers.attention.select import choose
from braeburn.layers.grouped.select import Target as GroupedTarget
from braeburn.parallel.sequence import gather_sequence
from braeburn.plan.blocks import attention_call, request_of
from braeburn.plan.graph import Node, Traced, Value, needed
from braeburn.plan.storage import FLOAT
from braeburn.plan.trace import Pass, Program, differentiate, on_each_device, peaks, rematerialize

# Tokens of half a shard that are traced around a kernel, whatever there are.
KERNEL_LENGTH = 64


@dataclass(frozen=True)
class Cost:
    """What some of attention's operations do on one device, for one sequence and one key head.

    Attributes:
        flops: of matrix products that XLA carries out.
        calls: of a fused kernel.
        element_wise: bytes read and written, but by the kernel.
        collectives: bytes and times by kind.
    """

    flops: float
    calls: int
    element_wise: float
    collectives: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Attention:
    """What attention costs in each pass, for one sequence and one key head with its query heads.

    Attributes:
        forward: the forward pass.
        again: what the backward pass recomputes where the result is kept.
        again_whole: what it recomputes where it is not.
        backward: the backward pass.
        kept: bytes that are kept with the result, under its name.
        kept_whole: bytes that are kept beside it where nothing is recomputed.
        live: the most bytes that the backward pass holds at once.
    """

    forward: Cost
    again: Cost
    again_whole: Cost
    backward: Cost
    kept: float
    kept_whole: float
    live: float


@dataclass(frozen=True)
class Accelerator:
    """What the choice of a back end depends on.

    Attributes:
        platform: as `Request` has it; "other" of chips that JAX has no compiler for, which are
            taken to have a fused kernel.
        compute_capability: of an NVIDIA GPU.
        fp8: how many times faster products are in fp8 than in bf16.
        int8: the same in int8.
    """

    platform: str = "other"
    compute_capability: tuple[int, int] | None = None
    fp8: float = 1.0
    int8: float = 1.0

    @property
    def grouped(self) -> GroupedTarget:
        """What products of experts are planned for: other chips are taken to have a kernel of
        `ragged_dot`, as TPUs have.
        """
        platform = "tpu" if self.platform == "other" else self.platform
        return GroupedTarget(platform, self.compute_capability)


WITH_KERNEL = Accelerator()


# Stands for a fused kernel of a chip that JAX has no compiler for; it is never run.
OTHER = Backend("other", lambda _: None, blocked_attention, nothing)


def backend_of(accelerator: Accelerator, request: Request) -> Backend:
    """The back end that a device of this kind takes."""
    if accelerator.platform == "other" and not request.ring:
        return OTHER
    return choose(request)[0]


@cache
def attention_of(accelerator: Accelerator, request: Request) -> tuple[Attention, Backend]:
    """The costs of attention for one sequence and one key head, and the back end.

    Args:
        accelerator: of the target.
        request: for one key head; `num_heads` are the query heads that share it.
    """
    backend = backend_of(accelerator, request)
    if backend.kernel is None:
        return _costs(_traced(request, backend.run)), backend
    # What there is around a kernel are the keys of a whole sequence, the same for each token of it
    # and for any number of devices that share it out.
    shards = request.context_shards
    length = 4 * KERNEL_LENGTH
    heads = request.head_dim, request.value_dim
    around = _around_kernel(request.dtype, heads, min(shards, 2), length)
    found = _scaled(around, request.sequence_length / length)
    # A kernel keeps its log-sum-exp, one number for each query and head, and its result with what
    # that is filled up by.
    queries = request.num_heads * request.sequence_length / shards
    filling = backend.filled(request.value_dim) - request.value_dim
    beside = queries * (FLOAT + filling * request.dtype.itemsize)
    return replace(found, kept=beside, kept_whole=found.kept_whole + beside), backend


def kernel_width(request: Request, backend: Backend) -> float:
    """The numbers of a head that a kernel multiplies by, the mean of those of keys and values."""
    return (backend.filled(request.head_dim) + backend.filled(request.value_dim)) / 2


@cache
def _around_kernel(dtype: Any, heads: tuple[int, int], shards: int, length: int) -> Attention:
    request = Request("", dtype, length, 1, 1, *heads, shards)

    def run(query: Any, key: Any, value: Any, ids: Any, mesh: MeshConfig, scope: Scope) -> Any:
        return attention_call(request, query, *(gather_sequence(x, mesh) for x in (key, value)))

    return _costs(_traced(request, run))


def _scaled(found: Attention, factor: float) -> Attention:
    """Attention over `factor` times as many tokens in as many calls."""

    def scaled(cost: Cost) -> Cost:
        moved = {kind: (size * factor, times) for kind, (size, times) in cost.collectives.items()}
        return replace(cost, element_wise=cost.element_wise * factor, collectives=moved)

    return Attention(
        scaled(found.forward),
        scaled(found.again),
        scaled(found.again_whole),
        scaled(found.backward),
        found.kept * factor,
        found.kept_whole * factor,
        found.live * factor,
    )


def _traced(request: Request, run: Callable[..., Any]) -> Program:
    """Attention and its gradient for one sequence."""
    mesh = MeshConfig(
        fsdp=1,
        context=request.context_shards,
        context_attention="ring" if request.ring else "all_gather",
    )
    length = request.sequence_length // request.context_shards
    query, key, result, value = (
        jax.ShapeDtypeStruct((1, length, heads, size), request.dtype)
        for size in (request.head_dim, request.value_dim)
        for heads in (request.num_heads, request.num_kv_heads)
    )
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    sinks = [jax.ShapeDtypeStruct((request.num_heads,), jnp.float32)] * request.sinks

    def attended(*arguments: Any) -> list[Any]:
        return [run(*arguments[:4], mesh, Scope(request.window, *arguments[4:]))]

    return differentiate(
        attended,
        [query, key, value, ids, *sinks],
        [True, True, True, False, *[True] * len(sinks)],
        [result],
        lambda function: on_each_device(function, mesh, AbstractDevice("", None, "cpu")),
        Traced(),
    )


def _costs(program: Program) -> Attention:
    def named(primitive: Any, *_: Any, **settings: Any) -> bool:
        return bool(primitive.name == "name" and settings["name"] == ATTENTION)

    saving = rematerialize(program, named, program.inputs)
    nothing = rematerialize(program, lambda *_, **__: False, program.inputs)
    everything = rematerialize(program, None, program.inputs)
    # Attention's result is needed by what follows it too.
    again_whole = needed(
        program.forward,
        [*program.outputs, *(value for node in nothing.again for value in node.outputs)],
    )
    result = set(program.outputs)
    live = max((size.scaled for _, size in peaks(program, saving, ())), default=0.0)
    return Attention(
        forward=_cost(needed(program.forward, program.outputs), program.outputs),
        again=_cost(saving.again, ()),
        again_whole=_cost(again_whole, program.outputs),
        backward=_cost(program.backward, program.gradients),
        kept=sum(v.bytes.scaled for v, _ in saving.kept if v not in result),
        kept_whole=sum(v.bytes.scaled for v, _ in everything.kept if v not in result),
        live=live,
    )


def _cost(nodes: list[Node], outputs: Iterable[Value]) -> Cost:
    found = Pass.of(nodes, outputs)
    moved: dict[str, tuple[float, float]] = {}
    for key, (size, times) in found.collectives.items():
        before = moved.get(key.kind, (0.0, 0.0))
        moved[key.kind] = before[0] + size.scaled, before[1] + times
    calls = sum(request_of(call.equation) is not None for call in found.calls)
    return Cost(found.flops.scaled, calls, found.element_wise.scaled, moved)
