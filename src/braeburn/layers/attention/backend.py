"""What a back end of attention is, and what all of them share."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool

from braeburn.config import MeshConfig
from braeburn.layers.platform import Size

# Finite, so that a query whose keys are all masked gives a mean instead of NaN; merged with others
# it weighs nothing.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
BLOCK = 128
# The name by which a rematerialisation policy keeps the result.
ATTENTION = "attention"


@dataclass(frozen=True)
class Request:
    """What is known about a call when it is traced.

    Attributes:
        platform: "cpu", "tpu", "cuda" or "rocm"; or `platform.PORTABLE`.
        dtype: of queries, keys and values.
        sequence_length: tokens of the whole sequence.
        num_heads: of the queries on this device.
        num_kv_heads: of its keys and values.
        head_dim: of each head of queries and keys.
        value_dim: of each head of values.
        context_shards: devices that share out a sequence.
        ring: whether keys travel from shard to shard; otherwise they are gathered.
        window: positions that a query sees, its own among them; None for all earlier ones.
        compute_capability: of an NVIDIA GPU, as (9, 0); None where it is unknown.
    """

    platform: str
    dtype: jnp.dtype
    sequence_length: Size
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    context_shards: int = 1
    ring: bool = False
    window: int | None = None
    compute_capability: tuple[int, int] | None = None


def is_visible(queries: Array, keys: Array, window: int | None) -> Bool[Array, "..."]:
    """Whether queries at some positions see keys at others, which broadcast against them."""
    earlier = queries >= keys
    return earlier if window is None else earlier & (queries - keys < window)


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: for the log.
        why_not: the reason that a request is not supported, or None.
        run: (query, key, value, segments, mesh, window) -> attended values.
        kernel: of a fused kernel, the bytes that it needs for a batch of so many sequences beside
            queries, keys, values, its result and a number per query; None of attention in plain
            XLA.
        skips: whether a kernel passes over the tiles of queries and keys in which no query sees a
            key.
        lanes: of a kernel: heads whose numbers are no multiple of it are filled up to one, in
            memory and in products.
    """

    name: str
    why_not: Callable[[Request], str | None]
    run: Callable[[Array, Array, Array, Array, MeshConfig, int | None], Array]
    kernel: Callable[[Request, int], int] | None = None
    skips: bool = True
    lanes: int = 1

    def filled(self, size: int) -> int:
        """The numbers of a head of some size, filled up to whole lanes."""
        return -(-size // self.lanes) * self.lanes

    def is_supported(self, request: Request) -> bool:
        """Whether this back end can answer the request."""
        return self.why_not(request) is None


def nothing(request: Request, batch: int) -> int:
    """The bytes of a kernel that keeps no more than a tile of queries and keys at hand."""
    return 0
