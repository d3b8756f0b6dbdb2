"""The first back end that supports what is asked, chosen as a call is traced."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Array, Float, Int

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers.attention.backend import EVERYTHING, Backend, Request, Scope
from braeburn.layers.attention.blocked import BLOCKED
from braeburn.layers.attention.masked import MASKED_CUDNN
from braeburn.layers.attention.packed import PACKED
from braeburn.layers.attention.ring import RING
from braeburn.layers.attention.splash import SPLASH
from braeburn.layers.platform import traced_for

logger = logging.getLogger(__name__)

# In the order in which they are asked.
BACKENDS = (PACKED, MASKED_CUDNN, SPLASH, BLOCKED)

# Queries, keys, values and segments.
Arrays = tuple[Array, Array, Array, Array]
# What takes the place of every back end.
Outline = Callable[[Request, Arrays, MeshConfig, Scope], Array]
_OUTLINE: ContextVar[Outline | None] = ContextVar("outline", default=None)


@contextmanager
def outlined(outline: Outline) -> Iterator[None]:
    """Within it, `attention` calls `outline` in the place of a back end.

    The plan traces programs so: it works out the costs of attention apart.
    """
    before = _OUTLINE.set(outline)
    try:
        yield
    finally:
        _OUTLINE.reset(before)


def attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t K H"],
    value: Float[Array, "B t K W"],
    segment_ids: Int[Array, "B t"],
    mesh: MeshConfig = ONE_DEVICE,
    scope: Scope = EVERYTHING,
) -> Float[Array, "B t N W"]:
    """Softmax attention scaled by 1/sqrt(H); each of the K key heads serves N/K neighbouring query
    heads.

    With several context shards, the sum of all devices' losses is what it can be differentiated
    for. Each back end gives its result, with what its backward pass needs besides, the name
    "attention".

    Args:
        query: this context shard's queries; N is a multiple of K.
        key: its keys.
        value: its values.
        segment_ids: the segment of each of its tokens.
        mesh: resolved sizes; with several context shards the call is inside a `shard_map` over it.
        scope: what a query's softmax runs over.

    Returns:
        The attended values, in the type of `query`.
    """
    platform, compute_capability = traced_for()
    request = Request(
        platform=platform,
        dtype=query.dtype,
        sequence_length=query.shape[1] * mesh.context,
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        context_shards=mesh.context,
        ring=mesh.context > 1 and mesh.context_attention == "ring",
        window=scope.window,
        sinks=scope.sinks is not None,
        compute_capability=compute_capability,
    )
    if outline := _OUTLINE.get():
        return outline(request, (query, key, value, segment_ids), mesh, scope)
    return select(request).run(query, key, value, segment_ids, mesh, scope)


@functools.cache
def select(request: Request) -> Backend:
    """The first back end that supports the request; the choice is logged once for each distinct
    request.
    """
    backend, passed_over = choose(request)
    over = f" over {request.context_shards} shards" if request.context_shards > 1 else ""
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    logger.info(
        "attention over %s tokens: %s%s%s", request.sequence_length, backend.name, over, because
    )
    return backend


def choose(request: Request) -> tuple[Backend, list[str]]:
    """The first back end that supports the request, and why those before it do not."""
    passed_over: list[str] = []
    for backend in (RING,) if request.ring else BACKENDS:
        reason = backend.why_not(request)
        if reason is None:
            return backend, passed_over
        passed_over.append(f"not {backend.name}: {reason}")
    raise NotImplementedError("; ".join(passed_over))
