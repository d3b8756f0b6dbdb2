"""Statistics of each token that are accumulated over the vocabulary, one block of logits at a time.

The statistics of an objective are a tree of these kinds, each with leading dimensions [B, T]:

* `LogSumExp`: the running log-sum-exp of the logits;
* `Expectation`: the mean of values under the softmax of the logits;
* `TopK`: the k largest logits and their vocabulary ids;
* a plain float32 array: a sum over the vocabulary, such as the logit of the target, which is added
  by the one block that has it.

`join` completes them over the shards of the mesh axis `tensor`, which share the vocabulary out:
whatever the tree, one maximum and one sum cross devices, and the top-k where there is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from braeburn.config import MeshConfig
from braeburn.parallel.collectives import TENSOR, all_gather, all_max, all_sum

Statistics = TypeVar("Statistics")
Shape = tuple[int, ...]


class LogSumExp(NamedTuple):
    """The running log-sum-exp of the logits met so far (the online softmax of arXiv 1805.02867).

    Attributes:
        largest: the largest logit, float32; minus infinity before any logit is met.
        total: sum of exp(logit - largest), float32.
    """

    largest: Float[Array, "B T"]
    total: Float[Array, "B T"]

    @classmethod
    def empty(cls, shape: Shape) -> "LogSumExp":
        """That of tokens of a shape [B, T] which have met no logits."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(zeros - jnp.inf, zeros)

    def update(self, logits: Float[Array, "B T R"]) -> "LogSumExp":
        """Takes further logits in."""
        moved = self.rescale(jnp.maximum(self.largest, jnp.max(logits, axis=-1)))
        further = jnp.sum(jnp.exp(logits - moved.largest[..., None]), axis=-1)
        return LogSumExp(moved.largest, moved.total + further)

    def rescale(self, largest: Float[Array, "B T"]) -> "LogSumExp":
        """The same sum, of exponentials of the distance to another logit, which is no smaller."""
        return LogSumExp(largest, self.total * jnp.exp(self.largest - largest))

    @property
    def log_z(self) -> Float[Array, "B T"]:
        """The log-sum-exp: the logarithm of the softmax's denominator Z."""
        return self.largest + jnp.log(self.total)


class Expectation(NamedTuple):
    """The running mean of values under the softmax of the logits met so far.

    Attributes:
        largest: as in `LogSumExp`.
        total: as in `LogSumExp`.
        weighted: sum of exp(logit - largest) times the value, float32.
    """

    largest: Float[Array, "B T"]
    total: Float[Array, "B T"]
    weighted: Float[Array, "B T"]

    @classmethod
    def empty(cls, shape: Shape) -> "Expectation":
        """That of tokens of a shape [B, T] which have met no logits."""
        return cls(*LogSumExp.empty(shape), jnp.zeros(shape))

    def update(self, logits: Float[Array, "B T R"], values: Float[Array, "B T R"]) -> "Expectation":
        """Takes further logits in, and the value of each, which is finite."""
        largest, total = LogSumExp(self.largest, self.total).update(logits)
        further = jnp.sum(jnp.exp(logits - largest[..., None]) * values, axis=-1)
        return Expectation(
            largest, total, self.weighted * jnp.exp(self.largest - largest) + further
        )

    def rescale(self, largest: Float[Array, "B T"]) -> "Expectation":
        """The same sums, of exponentials of the distance to another logit, which is no smaller."""
        scale = jnp.exp(self.largest - largest)
        return Expectation(largest, self.total * scale, self.weighted * scale)

    @property
    def log_z(self) -> Float[Array, "B T"]:
        """The log-sum-exp of the logits."""
        return self.largest + jnp.log(self.total)

    @property
    def mean(self) -> Float[Array, "B T"]:
        """The mean of the values under the softmax of the logits."""
        return self.weighted / self.total


class TopK(NamedTuple):
    """The k largest logits met so far, in falling order, the lower vocabulary id of equals first.

    Attributes:
        ids: vocabulary ids, int32; -1 where fewer than k logits have been met.
        logits: float32; minus infinity where fewer than k logits have been met.
    """

    ids: Int[Array, "B T K"]
    logits: Float[Array, "B T K"]

    @classmethod
    def empty(cls, shape: Shape, k: int) -> "TopK":
        """That of tokens of a shape [B, T] which have met no logits."""
        return cls(jnp.full((*shape, k), -1), jnp.full((*shape, k), -jnp.inf))

    def update(self, logits: Float[Array, "B T R"], ids: Int[Array, " R"]) -> "TopK":
        """Takes further logits in, at vocabulary ids that are higher than all met so far."""
        k = self.ids.shape[-1]
        found, indices = jax.lax.top_k(logits, min(k, ids.size))
        return TopK(
            jnp.concatenate([self.ids, ids[indices]], -1), jnp.concatenate([self.logits, found], -1)
        )._first(k)

    def join(self, mesh: MeshConfig) -> "TopK":
        """Those of the whole vocabulary, from those of all shards of `tensor`."""
        k = self.ids.shape[-1]
        gathered = [all_gather(array, TENSOR, 2, mesh) for array in self]
        return TopK(*gathered)._first(k)

    def _first(self, k: int) -> "TopK":
        logits, indices = jax.lax.top_k(self.logits, k)
        return TopK(jnp.take_along_axis(self.ids, indices, axis=-1), logits)


def join(statistics: Statistics, mesh: MeshConfig) -> Statistics:
    """Statistics of the whole vocabulary, from those of each tensor shard's rows.

    Args:
        statistics: a tree of `LogSumExp`, `Expectation`, `TopK` and float32 sums.
        mesh: resolved sizes.

    Returns:
        The same tree, equal on all shards of `tensor`.
    """
    if mesh.tensor == 1:
        return statistics
    kinds, structure = jax.tree.flatten(
        statistics, is_leaf=lambda node: isinstance(node, LogSumExp | Expectation | TopK)
    )

    def largest_of(kind: Any) -> Array | None:
        return kind.largest if isinstance(kind, LogSumExp | Expectation) else None

    def rescaled(kind: Any, largest: Array | None) -> Any:
        return kind if largest is None else kind.rescale(largest)

    def sums_of(kind: Any) -> tuple[Array, ...]:
        if isinstance(kind, TopK):
            return ()
        return kind[1:] if isinstance(kind, LogSumExp | Expectation) else (kind,)

    def joined(kind: Any, sums: tuple[Array, ...]) -> Any:
        if isinstance(kind, TopK):
            return kind.join(mesh)
        if isinstance(kind, LogSumExp | Expectation):
            return type(kind)(kind.largest, *sums)
        return sums[0]

    largest = _in_one(all_max, [largest_of(kind) for kind in kinds], mesh)
    kinds = [rescaled(kind, most) for kind, most in zip(kinds, largest, strict=True)]
    sums = _in_one(all_sum, [sums_of(kind) for kind in kinds], mesh)
    whole = [joined(kind, own) for kind, own in zip(kinds, sums, strict=True)]
    return jax.tree.unflatten(structure, whole)


def _in_one(
    collective: Callable[[Array, str, MeshConfig], Array], tree: Any, mesh: MeshConfig
) -> Any:
    """A collective over `tensor` of all arrays of a tree, laid end to end."""
    if not jax.tree.leaves(tree):
        return tree
    numbers, restore = ravel_pytree(tree)
    return restore(collective(numbers, TENSOR, mesh))
