"""Soft-Top-K against a bisection in NumPy float64, finite differences of that, and what holds of
any solution.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.transforms.soft_top_k import soft_top_k, top_k_indices

N = 12  # one length for all, so that few programs are compiled
SCORES = st.lists(st.floats(-1000, 1000, width=32), min_size=N, max_size=N).map(
    lambda x: np.array(x, np.float32)
)
SMALL = st.lists(st.integers(-40, 40), min_size=N, max_size=N).map(
    lambda x: np.array(x, np.float32) / 16
)
KEPT = st.sampled_from([1, 5, 11, 12])
TEMPERATURES = st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e6])
quick = settings(max_examples=60, deadline=None, derandomize=True)

compiled = functools.partial(jax.jit, static_argnums=1)(soft_top_k)


@functools.partial(jax.jit, static_argnums=1)
def gradient(scores, k, temperature, weights):
    return jax.grad(lambda s: jnp.sum(weights * soft_top_k(s, k, temperature)))(scores)


def bisected(scores, k, temperature):
    """The mask, from the `a` at which it sums to k, in float64."""
    scaled = np.asarray(scores, np.float64) / temperature
    low, high = -scaled.max() - 60.0, -scaled.min() + 60.0
    for _ in range(90):
        middle = (low + high) / 2
        total = np.exp(np.minimum(scaled + middle, 0)).sum()
        low, high = (middle, high) if total < k else (low, middle)
    return np.exp(np.minimum(scaled + high, 0))


def hard(scores, k):
    mask = np.zeros(len(scores), np.float32)
    mask[sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]] = 1
    return mask


@quick
@given(SCORES, KEPT, TEMPERATURES)
def test_masks_sum_to_k_are_ordered_as_the_scores_and_agree_with_bisection(scores, k, temperature):
    mask = np.asarray(compiled(scores, k, temperature), np.float64)
    assert abs(mask.sum() - k) <= 1e-5 * k
    assert (mask >= 0).all()
    assert (mask <= 1).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(mask[order]) >= 0).all()
    np.testing.assert_allclose(mask, bisected(scores, k, temperature), atol=2e-6)


@quick
@given(
    SMALL, KEPT, st.sampled_from([0.02, 0.3, 5.0]), st.integers(0, N - 1), st.integers(-512, 512)
)
def test_a_higher_score_is_never_worse_and_a_shift_changes_nothing(
    scores, k, temperature, unit, shift
):
    mask = np.asarray(compiled(scores, k, temperature))
    raised = scores.copy()
    raised[unit] += 0.25
    assert compiled(raised, k, temperature)[unit] >= mask[unit] - 1e-6
    # Sixteenths: the shift itself rounds nothing.
    np.testing.assert_allclose(
        compiled(scores + np.float32(shift), k, temperature), mask, atol=1e-6
    )


@quick
@given(SMALL, KEPT)
def test_the_limits_are_the_hard_choice_and_no_choice(scores, k):
    np.testing.assert_array_equal(compiled(scores, k, 0.0), hard(scores, k))
    np.testing.assert_array_equal(np.flatnonzero(hard(scores, k)), top_k_indices(scores, k))
    assert top_k_indices(scores, k).dtype == jnp.int32
    np.testing.assert_allclose(compiled(scores, k, 1e9), k / N, atol=1e-6)
    distinct = scores + np.arange(N, dtype=np.float32) / 1024
    np.testing.assert_allclose(compiled(distinct, k, 1e-5), hard(distinct, k), atol=1e-6)


@quick
@given(SMALL, KEPT, st.sampled_from([0.05, 0.3, 1.0, 20.0]), st.integers(0, 1000))
def test_the_gradient_is_that_of_finite_differences(scores, k, temperature, seed):
    rng = np.random.default_rng(seed)
    # Apart, for no two units to reach 1 at the same place: there, the mask has no gradient.
    scores = (scores + rng.normal(size=N) * 1e-2).astype(np.float32)
    temperature, weights = float(np.float32(temperature)), rng.normal(size=N).astype(np.float32)
    step = 1e-5 * temperature
    expected = np.zeros(N)
    for unit in range(N):
        ahead, behind = np.float64(scores).copy(), np.float64(scores).copy()
        ahead[unit] += step
        behind[unit] -= step
        change = bisected(ahead, k, temperature) - bisected(behind, k, temperature)
        expected[unit] = (weights * change).sum() / (2 * step)
    np.testing.assert_allclose(
        gradient(scores, k, temperature, weights), expected, atol=1e-4 * (1 + abs(expected).max())
    )


def test_no_other_mask_is_better():
    """The objective, scores . mask + temperature * entropy, of the mask and of ways to move weight
    between units.
    """
    rng, temperature = np.random.default_rng(0), 0.4
    scores = rng.normal(size=N)
    mask = np.asarray(compiled(scores, 5, temperature), np.float64)

    def objective(mask):
        # The paper's entropy: its gradient is -log(mask), up to a constant that a fixed sum makes
        # idle.
        return scores @ mask - temperature * np.sum(mask * np.log(np.maximum(mask, 1e-300)))

    for _ in range(500):
        one, other = rng.choice(N, 2, replace=False)
        amount = min(rng.random() * 0.05, mask[one], 1 - mask[other])
        moved = mask.copy()
        moved[one] -= amount
        moved[other] += amount
        assert objective(moved) <= objective(mask) + 1e-6


def test_gradients_vanish_at_temperature_zero_and_for_units_held_to_one():
    scores, weights = np.array([3, 1, 1, 1, 0, -5], np.float32), np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(gradient(scores, 2, 0.0, weights), 0)
    soft = np.asarray(gradient(scores, 2, 0.3, weights))
    assert soft[0] == 0  # held to 1
    assert np.abs(soft[1:]).min() > 0
    assert soft.sum() == pytest.approx(0, abs=1e-6)  # a shift changes nothing
    temperature_gradient = jax.grad(lambda t: jnp.sum(weights * compiled(scores, 2, t)))(0.3)
    assert float(temperature_gradient) == 0


def test_rows_are_apart_and_types_kept():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(2, 3, N)), jnp.bfloat16)
    together = compiled(scores, 5, 0.5)
    assert together.dtype == jnp.float32
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(together[i, j], compiled(scores[i, j], 5, 0.5), atol=1e-7)
    assert gradient(scores, 5, 0.5, np.ones((2, 3, N), np.float32)).dtype == jnp.bfloat16
    # Under vmap too, and where the scores are far apart for the temperature.
    far = 1000 * rng.normal(size=(4, N)).astype(np.float32)
    np.testing.assert_array_equal(
        jax.vmap(lambda s: compiled(s, 5, 1e-3))(far), [hard(row, 5) for row in far]
    )


@pytest.mark.parametrize("k", [0, N + 1])
def test_k_must_be_possible(k):
    with pytest.raises(ValueError, match=f"k={k} is not from 1 to {N}"):
        soft_top_k(jnp.zeros(N), k, 1.0)


def test_many_units_sum_to_k_at_every_temperature():
    scores = np.random.default_rng(0).normal(size=(2, 16_384)).astype(np.float32)
    for temperature in (1e-3, 0.02, 0.3, 1.0, 1e3, 0.0):
        mask = np.asarray(compiled(scores, 6000, temperature), np.float64)
        np.testing.assert_allclose(mask.sum(axis=1), 6000, rtol=1e-5)
