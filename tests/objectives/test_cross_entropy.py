"""The loss in chunks of tokens against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Execution
from braeburn.objectives import cross_entropy as loss
from braeburn.objectives import vocabulary
from braeburn.objectives.vocabulary import Projection


def plain(hidden, head, targets, weights, z_loss):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * log_z**2))


def cross_entropy(hidden, head, targets, weights, z_loss):
    model, tokens = Projection(hidden, head), loss.Targets(targets, weights)
    return loss.cross_entropy(model, tokens, z_loss, Execution())


def inputs(seed, batch, length, width, vocab):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocab, width)) / width**0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = rng.random((batch, length)).astype(np.float32)
    return hidden, head, targets, jnp.asarray(weights / weights.sum())


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("batch", "length", "tokens_per_chunk"), [(2, 64, 1024), (3, 37, 24), (1, 50, 7), (4, 16, 1)]
)
def test_value_and_gradients_equal_the_plain_loss(
    monkeypatch, batch, length, tokens_per_chunk, z_loss
):
    monkeypatch.setattr(
        vocabulary, "chunk_length", lambda batch, length, vocab: max(1, tokens_per_chunk // batch)
    )
    hidden, head, targets, weights = inputs(0, batch, length, 48, 301)
    chunked = jax.value_and_grad(
        lambda h, w: cross_entropy(h, w, targets, weights, z_loss)[0], argnums=(0, 1)
    )
    value, gradients = jax.jit(chunked)(hidden, head)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(
        hidden, head, targets, weights, z_loss
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)


def test_gradient_scales_with_what_comes_from_above():
    hidden, head, targets, weights = inputs(1, 2, 20, 16, 50)

    def chunked(h):
        return 3.0 * cross_entropy(h, head, targets, weights, 1e-3)[0] ** 2

    def whole(h):
        return 3.0 * plain(h, head, targets, weights, 1e-3) ** 2

    np.testing.assert_allclose(jax.grad(chunked)(hidden), jax.grad(whole)(hidden), atol=1e-6)


def test_undifferentiated_value_is_that_of_the_differentiated_one():
    hidden, head, targets, weights = inputs(2, 2, 33, 16, 50)
    alone, metrics = cross_entropy(hidden, head, targets, weights, 1e-3)
    (differentiated, same), _ = jax.value_and_grad(
        lambda h: cross_entropy(h, head, targets, weights, 1e-3), has_aux=True
    )(hidden)
    np.testing.assert_allclose([alone, metrics["loss"]], [differentiated, same["loss"]], rtol=1e-6)


def test_half_precision_keeps_the_sums_in_float32():
    hidden, head, targets, weights = inputs(3, 2, 64, 32, 200)
    half = hidden.astype(jnp.bfloat16)
    value, gradient = jax.value_and_grad(
        lambda w: cross_entropy(half, w, targets, weights, 0.0)[0]
    )(head)
    assert value.dtype == gradient.dtype == jnp.float32
    assert float(value) == pytest.approx(
        float(plain(hidden, head, targets, weights, 0.0)), rel=5e-3
    )


def test_token_losses_and_accuracy():
    hidden, head, targets, _ = inputs(4, 3, 29, 16, 40)
    nll, log_z, correct = loss.token_losses(hidden, head, targets)
    logits = np.einsum("btd,vd->btv", np.asarray(hidden, np.float64), np.asarray(head, np.float64))
    expected_log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(log_z, expected_log_z, atol=1e-5)
    expected = (
        expected_log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(nll, expected, atol=1e-5)
    np.testing.assert_array_equal(correct, logits.argmax(-1) == np.asarray(targets))


@given(st.integers(1, 4096), st.integers(1, 32768), st.integers(1, 300_000))
@settings(max_examples=200)
def test_a_chunk_is_small_and_never_empty(batch, length, vocab):
    chunk = vocabulary.chunk_length(batch, length, vocab)
    assert 1 <= chunk <= length
    assert chunk == 1 or batch * chunk <= 4096
    assert chunk == 1 or batch * chunk * vocab <= max(2**26, batch * length * vocab / 16)
