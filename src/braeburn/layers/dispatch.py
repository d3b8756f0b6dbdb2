"""How tokens reach their experts, and results their tokens.

Assignments are sorted by expert, so that those of each expert stand together. Where the mesh axis
`expert` splits the experts, tokens travel along it in one of two ways (`mesh.expert_dispatch`):

* gather: each device gathers the tokens of all expert shards with their routing, works through the
  assignments to its own experts, and the sums over experts are scattered back to the tokens.
* all_to_all: each device sends each expert shard the tokens of its assignments there, and gets the
  results back.

Arrays have sizes that are known when a program is compiled, and how many assignments a shard gets
is not. So there is a first round with room for `mesh.expert_room` times an even share, and as many
further ones, in a loop, as the fullest shard needs. No assignment is lost; one round more takes the
time of one more, and all rounds take the memory of one.

Shapes are named by letters: S tokens of this device, E experts, k experts of a token, A = S k
assignments, P expert shards, e = E / P experts of one, C assignments of a round, D columns.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from braeburn.config import MeshConfig
from braeburn.parallel.collectives import EXPERT, all_gather, all_to_all, axis_index, reduce_scatter

# (matrices of experts, rows [M, D] sorted by expert, rows of each expert) -> [M, D]; rows behind
# those of the last expert give zeros.
Compute = Callable[[Any, Float[Array, "M D"], Int[Array, " e"]], Float[Array, "M D"]]
# The name of the loop of further rounds in a profile and in a program. The plan does not count what
# it does: it takes the fullest shard to fill the room of the first round, and no more.
FURTHER_ROUNDS = "further_rounds"
# A round's room is rounded up to so many parts per expert shard of the tokens of a device.
ROOM_PARTS = 16


class Assigned(NamedTuple):
    """Tokens and where they go.

    Attributes:
        tokens: hidden states, [S, D].
        weights: of each token's experts, [S, k].
        experts: of each token, int32 [S, k].
    """

    tokens: Float[Array, "S D"]
    weights: Float[Array, "S k"]
    experts: Int[Array, "S k"]


class Order(NamedTuple):
    """Assignments sorted by expert, those of one expert in the order of the tokens.

    Attributes:
        of_sorted: the number of the assignment at each place, int32 [A]; assignment s k + i is the
            i-th of token s.
        place: the place of each assignment, int32 [A].
        sizes: assignments of each expert, int32 [E].
    """

    of_sorted: Int[Array, " A"]
    place: Int[Array, " A"]
    sizes: Int[Array, " E"]


def ordered(experts: Int[Array, "*A"], num_experts: int) -> Order:
    """The order of all assignments; those to experts beyond the last come behind all others."""
    numbers = experts.reshape(-1)
    of_sorted = jnp.argsort(numbers, stable=True)
    places = jnp.arange(numbers.size, dtype=of_sorted.dtype)
    place = jnp.zeros_like(of_sorted).at[of_sorted].set(places, unique_indices=True)
    return Order(of_sorted, place, jnp.bincount(numbers, length=num_experts).astype(jnp.int32))


@jax.custom_vjp
def permuted(rows: Float[Array, "A D"], source: Array, place: Array) -> Float[Array, "A D"]:
    """Rows in another order: those of `source`, whose inverse is `place`.

    The transpose of a gather adds into its source row by row. That of a permutation is the inverse
    one, which is a gather as well.
    """
    return rows[source]


def _permuted_forward(rows: Array, source: Array, place: Array) -> tuple[Array, Array]:
    return rows[source], place


def _permuted_backward(place: Array, cotangent: Array) -> tuple[Array, None, None]:
    return cotangent[place], None, None


permuted.defvjp(_permuted_forward, _permuted_backward)


@jax.custom_vjp
def partly_permuted(rows: Float[Array, "A D"], source: Array, place: Array) -> Float[Array, "B D"]:
    """Some rows in another order, each at one place at most, and zeros between them.

    Args:
        rows: all of them.
        source: which of them each row of the result is, int32 [B]; -1 for zeros.
        place: where each of `rows` is in the result, int32 [A]; -1 for nowhere.
    """
    return _rows_or_zeros(rows, source)


def _rows_or_zeros(rows: Array, source: Array) -> Array:
    return jnp.where((source >= 0)[:, None], rows[jnp.maximum(source, 0)], 0)


def _partly_permuted_forward(rows: Array, source: Array, place: Array) -> tuple[Array, Array]:
    return _rows_or_zeros(rows, source), place


def _partly_permuted_backward(place: Array, cotangent: Array) -> tuple[Array, None, None]:
    return _rows_or_zeros(cotangent, place), None, None


partly_permuted.defvjp(_partly_permuted_forward, _partly_permuted_backward)


@jax.custom_vjp
def weighted(rows: Float[Array, "C D"], weights: Float[Array, "C 1"]) -> Float[Array, "C D"]:
    """Rows times their weights.

    The gradient of the rows is not there before that of the weights is. Nothing waits for the
    latter, so that XLA would work it out when memory is at its fullest, and hold all rows and their
    cotangents until then.
    """
    return rows * weights


def _weighted_forward(rows: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return rows * weights, (rows, weights)


def _weighted_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    rows, weights = kept
    of_weights = jnp.sum(cotangent * rows, axis=1, keepdims=True)
    return lax.optimization_barrier((cotangent * weights, of_weights))


weighted.defvjp(_weighted_forward, _weighted_backward)


def sum_over_experts(
    assigned: Assigned, matrices: Any, compute: Compute, num_experts: int, mesh: MeshConfig
) -> Float[Array, "S D"]:
    """The weighted sum over each token's experts of what these make of it.

    Args:
        assigned: this device's tokens.
        matrices: of the experts that this device has; a tree of arrays [e, ...].
        compute: what an expert does.
        num_experts: E, those of all devices.
        mesh: resolved sizes, and how tokens travel.
    """
    if mesh.expert == 1:
        return _locally(assigned, matrices, compute, num_experts)
    travel = _by_all_to_all if mesh.expert_dispatch == "all_to_all" else _by_gather
    with jax.named_scope(mesh.expert_dispatch):
        return travel(assigned, matrices, compute, num_experts, mesh)


def _locally(
    assigned: Assigned, matrices: Any, compute: Compute, num_experts: int
) -> Float[Array, "S D"]:
    x_SD, weights_SK, experts_SK = assigned
    order = ordered(experts_SK, num_experts)
    repeated = jnp.repeat(x_SD, experts_SK.shape[1], axis=0)
    x_AD = permuted(repeated, order.of_sorted, order.place)
    y_AD = permuted(compute(matrices, x_AD, order.sizes), order.place, order.of_sorted)
    y_SKD = y_AD.reshape(*experts_SK.shape, -1)
    return jnp.einsum("SKD,SK->SD", y_SKD, weights_SK.astype(y_SKD.dtype))


def _by_gather(
    assigned: Assigned, matrices: Any, compute: Compute, num_experts: int, mesh: MeshConfig
) -> Float[Array, "S D"]:
    tokens, chosen = assigned.experts.shape
    own = num_experts // mesh.expert
    x_SD, weights_SK, experts_SK = (all_gather(each, EXPERT, 0, mesh) for each in assigned)
    local = experts_SK - axis_index(EXPERT, mesh) * own
    order = ordered(jnp.where((local >= 0) & (local < own), local, own), own)
    most = mesh.expert * tokens * min(chosen, own)
    room = _room(tokens, float(chosen), most, mesh)

    def one_round(number: Array | int, indices: Any, values: Any) -> Float[Array, "S D"]:
        """The sums over the experts at `room` places of the order."""
        of_sorted, sizes = indices
        matrices, x_SD, weights_SK = values
        ends = jnp.clip(jnp.cumsum(sizes) - number * room, 0, room)
        places = number * room + jnp.arange(room)
        source = of_sorted[jnp.minimum(places, of_sorted.size - 1)]
        token, inside = source // chosen, (jnp.arange(room) < ends[-1])[:, None]
        x_CD = jnp.where(inside, x_SD[token], 0)
        y_CD = compute(matrices, x_CD, jnp.diff(ends, prepend=0))
        y_CD = weighted(y_CD, weights_SK.reshape(-1)[source].astype(y_CD.dtype)[:, None])
        return jnp.zeros_like(x_SD).at[token].add(jnp.where(inside, y_CD, 0))

    count = -(-jnp.sum(order.sizes) // room) if room < most else None
    indices, values = (order.of_sorted, order.sizes), (matrices, x_SD, weights_SK)
    return reduce_scatter(_over_rounds(one_round, count, indices, values), EXPERT, 0, mesh)


def _by_all_to_all(
    assigned: Assigned, matrices: Any, compute: Compute, num_experts: int, mesh: MeshConfig
) -> Float[Array, "S D"]:
    tokens, chosen = assigned.experts.shape
    own = num_experts // mesh.expert
    order = ordered(assigned.experts, num_experts)
    most = tokens * min(chosen, own)
    # For each expert shard.
    room = _room(tokens, chosen / mesh.expert, most, mesh)

    def one_round(number: Array | int, indices: Any, values: Any) -> Float[Array, "S D"]:
        """The sums over the experts of `room` assignments to each shard."""
        numbers, (of_sorted, place, sizes) = indices
        matrices, x_SD, weights_SK = values
        shards = sizes.reshape(-1, own).sum(-1)
        starts = jnp.cumsum(shards) - shards
        slots = number * room + jnp.arange(room)
        sorted_at = jnp.minimum(starts[:, None] + slots, of_sorted.size - 1)
        inside = slots < shards[:, None]
        source = jnp.where(inside, of_sorted[sorted_at], -1).reshape(-1)
        shard = numbers // own
        slot = place - starts[shard] - number * room
        target = jnp.where((slot >= 0) & (slot < room), shard * room + slot, -1)

        def sent(rows: Array) -> Array:
            return all_to_all(rows, EXPERT, 0, 0, mesh)

        x_CD = sent(partly_permuted(jnp.repeat(x_SD, chosen, axis=0), source, target))
        weights = sent(partly_permuted(weights_SK.reshape(-1, 1), source, target))
        # What fills up a buffer belongs to no expert.
        expert = sent(jnp.where(source >= 0, numbers[source] % own, own))
        here = ordered(expert, own)
        y_CD = compute(matrices, permuted(x_CD, here.of_sorted, here.place), here.sizes)
        # Weighted here, so that the backward pass needs no results sent once more.
        y_CD = permuted(y_CD, here.place, here.of_sorted)
        y_CD = weighted(y_CD, weights.astype(y_CD.dtype))
        y_AD = partly_permuted(sent(y_CD), target, source)
        return y_AD.reshape(-1, chosen, y_AD.shape[-1]).sum(1)

    count = None
    if room < most:
        fullest = jnp.max(order.sizes.reshape(-1, own).sum(-1))
        # Every device goes round equally often, for its collectives.
        everywhere = tuple(axis for axis, size in mesh.sizes.items() if size > 1)
        count = lax.pmax(-(-fullest // room), everywhere)
    indices = (assigned.experts.reshape(-1), order)
    return _over_rounds(one_round, count, indices, (matrices, *assigned[:2]))


def _room(tokens: int, even: float, most: int, mesh: MeshConfig) -> int:
    """How many assignments a round has room for.

    Args:
        tokens: S.
        even: assignments to one shard for each of these, where all shards get equally many.
        most: assignments that there can be.
        mesh: how much more room than that there is to be.

    Returns:
        Where S has factors of two, a multiple of a small part of S, so that it grows with S, as
        the plan takes it to.
    """
    part = tokens // math.gcd(tokens, ROOM_PARTS * mesh.expert)
    # Less what a sum of rounding errors may have added.
    parts = math.ceil(mesh.expert_room * even * tokens / part - 1e-6)
    return min(part * max(1, parts), most)


def _over_rounds(term: Callable, count: Array | None, indices: Any, values: Any) -> Array:
    """The sum of `term(number, indices, values)` over the numbers of rounds.

    Args:
        term: differentiable in `values`, a tree of float arrays.
        count: of rounds, int32; None where there is never more than one.
        indices: a tree of integer arrays.
        values: see `term`.
    """
    if count is None:
        return term(0, indices, values)
    further, values = _further(term, count, indices, values)
    return term(0, indices, values) + further


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(term: Callable, count: Array, indices: Any, values: Any) -> tuple[Array, Any]:
    """The sum over all rounds but the first, and the values, which the first round takes from here.

    Nothing of further rounds is kept for the backward pass, which computes each of them once more.
    It adds what they give to the gradients of the first round, and so begins when nothing of that
    round is needed any more: all rounds take the memory of one.
    """
    result = jax.eval_shape(term, count, indices, values)

    def add(number: Array, total: Array) -> Array:
        return total + term(number, indices, values)

    with jax.named_scope(FURTHER_ROUNDS):
        return lax.fori_loop(1, count, add, jnp.zeros(result.shape, result.dtype)), values


def _further_forward(
    term: Callable, count: Array, indices: Any, values: Any
) -> tuple[tuple[Array, Any], Any]:
    return _further(term, count, indices, values), (count, indices, values)


def _further_backward(
    term: Callable, kept: Any, cotangents: tuple[Array, Any]
) -> tuple[None, None, Any]:
    count, indices, values = kept
    of_result, of_first = cotangents

    def add(number: Array, total: Any) -> Any:
        _, transposed = jax.vjp(lambda given: term(number, indices, given), values)
        return jax.tree.map(jnp.add, total, transposed(of_result)[0])

    with jax.named_scope(FURTHER_ROUNDS):
        return None, None, lax.fori_loop(1, count, add, of_first)


_further.defvjp(_further_forward, _further_backward)
