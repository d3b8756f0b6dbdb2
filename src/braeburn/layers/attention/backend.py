"""What a back end of attention is, and what all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
        sinks: whether each query head has a sink.
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
    sinks: bool = False
    compute_capability: tuple[int, int] | None = None


class Scope(NamedTuple):
    """What the softmax of a query runs over, of the earlier tokens of its segment and beside them.

    Attributes:
        window: positions that a query sees, its own among them; None for all earlier ones.
        sinks: a logit for each of this device's query heads, float32 [N], that adds to the sum of
            every softmax and has no value (gpt-oss); None for none.
    """

    window: int | None = None
    sinks: Float[Array, " N"] | None = None


EVERYTHING = Scope()


def with_sinks(
    output: Float[Array, "*shape H"], log_z: Float[Array, "*shape"], sinks: Float[Array, "..."]
) -> tuple[Float[Array, "*shape H"], Float[Array, "*shape"]]:
    """Attention that has sinks, from that without: for kernels that know of none.

    The gradients of queries, keys and values are what such a kernel makes of these two in place of
    its own. It forms the weights again by the log-sum-exp, and subtracts from their gradients the
    mean of these, which is the sum of the output times its gradient. A sink adds nothing to that
    sum, since it has no value.

    Args:
        output: of the attention without.
        log_z: the log-sum-exp of each query's scores, float32.
        sinks: float32, in a shape that broadcasts to that of `log_z`.

    Returns:
        The output, in its type, and the log-sum-exp, a sink's logit among its terms.
    """
    joint = jnp.logaddexp(log_z, sinks)
    return (output * jnp.exp(log_z - joint)[..., None]).astype(output.dtype), joint


def sink_gradients(
    sinks: Float[Array, "..."], log_z: Float[Array, "*shape"], mean: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """What each query adds to the gradient of its head's sink.

    Args:
        sinks: float32, in a shape that broadcasts to that of `log_z`.
        log_z: of `with_sinks`.
        mean: the sum over head_dim of the output of `with_sinks` times its gradient, float32.
    """
    return -jnp.exp(sinks - log_z) * mean


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
        run: (query, key, value, segments, mesh, scope) -> attended values.
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
    run: Callable[[Array, Array, Array, Array, MeshConfig, Scope], Array]
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
