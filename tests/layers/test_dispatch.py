"""Tokens reach the experts of other devices, and results and gradients come back: beside one device
that has all experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from braeburn.config import MeshConfig
from braeburn.layers import dispatch
from braeburn.layers.dispatch import Assigned, sum_over_experts
from braeburn.layers.grouped import grouped_product, grouped_vectors
from braeburn.parallel.mesh import build

EXPERTS, CHOSEN, TOKENS, WIDTH = 8, 2, 48, 6
RANDOM = np.random.default_rng(0)


def compute(matrices: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    matrix, bias = matrices
    found = grouped_product(rows, matrix, sizes)
    return jnp.tanh(found + grouped_vectors(bias, sizes, rows.shape[0]))


def even() -> np.ndarray:
    """Two experts of each token, all experts equally often."""
    first = np.arange(TOKENS) % EXPERTS
    return np.stack([first, (first + 3) % EXPERTS], axis=1).astype(np.int32)


def drawn() -> np.ndarray:
    """Two experts of each token at random."""
    return np.stack([RANDOM.permutation(EXPERTS)[:CHOSEN] for _ in range(TOKENS)]).astype(np.int32)


def crowded() -> np.ndarray:
    """All tokens to the two experts of one shard."""
    return np.tile(np.array([[5, 4]], np.int32), (TOKENS, 1))


ROUTINGS = {"even": even(), "drawn": drawn(), "crowded": crowded()}


def loss_and_gradients(mesh: MeshConfig, experts: np.ndarray) -> Any:
    """Of the same values on any mesh: a weighted sum of all results, and its gradients."""
    generator = np.random.default_rng(1)
    tokens = jnp.asarray(generator.standard_normal((TOKENS, WIDTH), np.float32))
    weights = jnp.asarray(generator.random((TOKENS, CHOSEN), np.float32))
    matrices = tuple(
        jnp.asarray(generator.standard_normal((EXPERTS, *sizes), np.float32))
        for sizes in ((WIDTH, WIDTH), (WIDTH,))
    )
    shares = jnp.asarray(generator.standard_normal((TOKENS, WIDTH), np.float32))
    rows = PartitionSpec(("fsdp", "expert"))

    def of_device(tokens: Any, weights: Any, matrices: Any, experts: Any, shares: Any) -> Any:
        def local(tokens: Any, weights: Any, matrices: Any) -> jax.Array:
            assigned = Assigned(tokens, weights, experts)
            return jnp.sum(shares * sum_over_experts(assigned, matrices, compute, EXPERTS, mesh))

        loss, gradients = jax.value_and_grad(local, (0, 1, 2))(tokens, weights, matrices)
        loss = jax.lax.psum(loss, ("fsdp", "expert"))
        of_matrices = jax.lax.psum(gradients[2], "fsdp")
        return loss, (*gradients[:2], of_matrices)

    split = PartitionSpec("expert")
    devices = jax.devices()[: mesh.fsdp * mesh.expert]
    mapped = jax.shard_map(
        of_device,
        mesh=build(mesh, devices),
        in_specs=(rows, rows, split, rows, rows),
        out_specs=(PartitionSpec(), (rows, rows, split)),
        check_vma=False,
    )
    return jax.device_get(jax.jit(mapped)(tokens, weights, matrices, jnp.asarray(experts), shares))


def differences(found: Any, expected: Any) -> float:
    return max(
        float(np.max(np.abs(one - other)) / np.max(np.abs(other)))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("how", ["gather", "all_to_all"])
@pytest.mark.parametrize(
    "sizes", [{"expert": 4}, {"expert": 8}, {"fsdp": 2, "expert": 2, "expert_room": 1.0}], ids=str
)
def test_results_and_gradients_are_those_of_one_device(
    sizes: dict[str, Any], how: str, routing: str
) -> None:
    mesh = MeshConfig.model_validate({"fsdp": 1, "expert_dispatch": how, **sizes})
    expected = loss_and_gradients(MeshConfig(fsdp=1), ROUTINGS[routing])
    found = loss_and_gradients(mesh, ROUTINGS[routing])
    assert differences(found, expected) < 1e-5


@pytest.mark.parametrize("how", ["gather", "all_to_all"])
def test_assignments_beyond_the_first_round_are_missed_without_further_ones(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above would find a fault in these; even routing has but one round."""
    mesh = MeshConfig.model_validate({"fsdp": 1, "expert": 4, "expert_dispatch": how})
    monkeypatch.setattr(dispatch, "_further", lambda term, count, indices, values: (0, values))
    for routing, same in (("even", True), ("crowded", False)):
        expected = loss_and_gradients(MeshConfig(fsdp=1), ROUTINGS[routing])
        found = loss_and_gradients(mesh, ROUTINGS[routing])
        assert (differences(found, expected) < 1e-5) is same, routing


@pytest.mark.parametrize("how", ["gather", "all_to_all"])
def test_a_fault_in_the_order_is_found(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = dispatch.ordered

    def turned(experts: Any, num_experts: int) -> Any:
        order = ordered(experts, num_experts)
        return order._replace(of_sorted=jnp.roll(order.of_sorted, 1))

    expected = loss_and_gradients(MeshConfig(fsdp=1), ROUTINGS["drawn"])
    monkeypatch.setattr(dispatch, "ordered", turned)
    mesh = MeshConfig.model_validate({"fsdp": 1, "expert": 4, "expert_dispatch": how})
    assert differences(loss_and_gradients(mesh, ROUTINGS["drawn"]), expected) > 1e-2


def test_a_round_has_room_for_a_quarter_more_than_an_even_share() -> None:
    mesh = MeshConfig(fsdp=1, expert=8)
    # 4,096 tokens to 8 of 128 experts, 16 of them on each device.
    assert dispatch._room(4096, 8.0, 10**9, mesh) == 1.25 * 4096 * 8
    assert dispatch._room(4096, 8 / 8, 10**9, mesh) == 1.25 * 4096
    # Never more than there can be, and never none.
    assert dispatch._room(1, 8.0, 8, mesh) == 8
    assert dispatch._room(1, 0.25, 8, mesh) == 1
    # It grows with the tokens.
    assert dispatch._room(3 * 64, 2 / 8, 10**9, mesh) == 3 * dispatch._room(64, 2 / 8, 10**9, mesh)


def test_further_rounds_add_to_what_the_first_one_gives() -> None:
    """And so begin when nothing of it is needed any more: with zeros to begin with, XLA runs them
    while all of the first round is still held.
    """

    def term(number: Any, indices: Any, values: jax.Array) -> jax.Array:
        return jnp.sin(values) * (number + 1.0)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(dispatch._over_rounds(term, jnp.int32(3), (), values))

    values = jnp.arange(4.0)
    np.testing.assert_allclose(jax.grad(total)(values), 6 * jnp.cos(values), rtol=1e-6)
    program = jax.make_jaxpr(jax.grad(total))(values).jaxpr
    backward = [eqn for eqn in program.eqns if eqn.primitive.name == "while"][-1]
    zeros = {
        var
        for eqn in program.eqns
        if eqn.primitive.name == "broadcast_in_dim"
        for var in eqn.outvars
    }
    first = backward.invars[-1]
    made_by = {var: eqn for eqn in program.eqns for var in eqn.outvars}
    assert first not in zeros
    assert made_by[first].primitive.name == "mul"  # of the cosine, the gradient of the first round


def test_weights_have_their_gradient_before_rows_have_theirs() -> None:
    rows, weights = jnp.asarray(RANDOM.random((6, 4))), jnp.asarray(RANDOM.random((6, 1)))
    cotangent = jnp.asarray(RANDOM.random((6, 4)))
    found, back = jax.vjp(dispatch.weighted, rows, weights)
    expected, plain = jax.vjp(lambda r, w: r * w, rows, weights)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(back(cotangent), plain(cotangent), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    program = jax.make_jaxpr(lambda r, w: jax.vjp(dispatch.weighted, r, w)[1](cotangent))
    assert "optimization_barrier" in str(program(rows, weights))
