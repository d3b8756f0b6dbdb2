"""Distillation in chunks of tokens against whole distributions in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import Distillation, Execution, ModelConfig, Precision
from braeburn.errors import UserError
from braeburn.layers.spec import initialize
from braeburn.models import decoder
from braeburn.objectives import distillation as module
from braeburn.objectives import vocabulary
from braeburn.objectives.cross_entropy import Targets, cross_entropy
from braeburn.objectives.cross_entropy import loss as loss_of_text
from braeburn.objectives.distillation import Labels, top_k_labels
from braeburn.objectives.vocabulary import Projection

FLOAT32 = Execution(precision=Precision(compute="float32"))
VOCAB, K, Z_LOSS = 301, 5, 1e-2
# Kind of target, temperature, and weight of the teacher.
KINDS = [
    ("label", 2.0, 0.9),
    ("label", 1.0, 1.0),
    ("top_k", 1.0, 0.9),
    ("top_k", 2.0, 1.0),
    ("distribution", 1.0, 1.0),
    ("distribution", 2.0, 0.9),
]


def distillation_loss(hidden, head, targets, weights, teacher, settings, z_loss):
    student, text = Projection(hidden, head), Targets(targets, weights)
    return module.distillation_loss(student, text, teacher, settings, z_loss, FLOAT32)


def inputs(seed=0, batch=3, length=37, width=24, teacher_width=40):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    hidden, head = normal(batch, length, width), normal(VOCAB, width, scale=width**-0.5)
    targets = jnp.asarray(rng.integers(0, VOCAB, (batch, length)), jnp.int32)
    weights = rng.random((batch, length)).astype(np.float32)
    teacher = Projection(
        normal(batch, length, teacher_width),
        normal(VOCAB, teacher_width, scale=teacher_width**-0.5),
    )
    return hidden, head, targets, jnp.asarray(weights / weights.sum()), teacher


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def logits_of(hidden, head):
    return np.einsum("btd,vd->btv", np.asarray(hidden, np.float64), np.asarray(head, np.float64))


def probabilities(teacher_targets, distillation, vocab=VOCAB):
    """The targets, [B, T, V] in float64."""
    if distillation.target == "distribution":
        return np.exp(log_softmax(logits_of(*teacher_targets) / distillation.temperature))
    k, temperature = (
        (1, 1) if distillation.target == "label" else (distillation.top_k, distillation.temperature)
    )
    ids, log_probs = (np.asarray(array)[..., :k] for array in teacher_targets)
    found = np.zeros((*ids.shape[:2], vocab))
    np.put_along_axis(
        found, ids, np.exp(log_softmax(log_probs.astype(np.float64) / temperature)), -1
    )
    return found


def plain(hidden, head, targets, weights, teacher_targets, distillation, z_loss):
    """(total, nll, distillation), (gradient for hidden, for head), written out."""
    temperature = 1.0 if distillation.target == "label" else distillation.temperature
    teacher_probs, teacher_weight = (
        probabilities(teacher_targets, distillation),
        distillation.weight,
    )
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = logits_of(hidden, head)
    log_q, log_q_tempered = log_softmax(logits), log_softmax(logits / temperature)
    log_z = (logits - log_q)[..., 0]
    true = np.eye(VOCAB)[np.asarray(targets)]
    nll = np.sum(weights * -np.sum(true * log_q, -1))
    distilled = temperature**2 * np.sum(weights * -np.sum(teacher_probs * log_q_tempered, -1))
    total = (
        teacher_weight * distilled
        + (1 - teacher_weight) * nll
        + z_loss * np.sum(weights * log_z**2)
    )
    logit_gradient = (1 - teacher_weight) * (np.exp(log_q) - true)
    logit_gradient += 2 * z_loss * log_z[..., None] * np.exp(log_q)
    logit_gradient += teacher_weight * temperature * (np.exp(log_q_tempered) - teacher_probs)
    logit_gradient *= weights[..., None]
    return (total, nll, distilled), (
        np.einsum("btv,vd->btd", logit_gradient, head),
        np.einsum("btv,btd->vd", logit_gradient, hidden),
    )


def targets_by(teacher, kind, k=K):
    return (
        teacher if kind == "distribution" else jax.jit(top_k_labels, static_argnums=2)(*teacher, k)
    )


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary, "chunk_length", lambda batch, length, vocab: 8)


@pytest.mark.parametrize(("kind", "temperature", "teacher_weight"), KINDS)
def test_values_and_gradients_are_those_of_whole_distributions(kind, temperature, teacher_weight):
    hidden, head, targets, weights, teacher = inputs()
    settings = Distillation(target=kind, weight=teacher_weight, temperature=temperature, top_k=K)
    teacher_targets = targets_by(teacher, kind, K + 2)  # more than asked for

    def chunked(hidden, head):
        return distillation_loss(hidden, head, targets, weights, teacher_targets, settings, Z_LOSS)

    (total, parts), gradients = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(
        hidden, head
    )
    expected, expected_gradients = plain(
        hidden, head, targets, weights, teacher_targets, settings, Z_LOSS
    )
    np.testing.assert_allclose(
        [total, parts["loss"], parts["distillation_loss"]], expected, rtol=1e-6
    )
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", ["top_k", "distribution"])
def test_the_gradient_is_that_of_the_value(kind):
    hidden, head, targets, weights, teacher = inputs(1)
    settings = Distillation(target=kind, weight=0.7, temperature=1.5, top_k=K)
    teacher_targets = targets_by(teacher, kind)
    _, (gradient, _) = plain(hidden, head, targets, weights, teacher_targets, settings, Z_LOSS)
    direction = np.asarray(gradient / np.linalg.norm(gradient))
    step = 1e-4

    # The gradient written out in float64, to which others are compared.
    def written_out(sign):
        return plain(np.asarray(hidden, np.float64) + sign * step * direction, head, *rest)[0][0]

    rest = (targets, weights, teacher_targets, settings, Z_LOSS)
    assert (written_out(1) - written_out(-1)) / (2 * step) == pytest.approx(
        np.linalg.norm(gradient), rel=1e-6
    )

    # Ours, in steps that float32 can tell apart.
    ours = jax.jit(jax.value_and_grad(lambda h: distillation_loss(h, head, *rest)[0]))
    (above, _), (below, _), (_, gradient) = (
        ours(hidden + sign * 0.2 * direction) for sign in (1, -1, 0)
    )
    assert float(above - below) / 0.4 == pytest.approx(
        float(np.sum(gradient * direction)), rel=1e-3
    )


@pytest.mark.parametrize("teacher_weight", [0.9, 1.0])
def test_a_teacher_whose_labels_are_the_true_tokens_is_plain_training(teacher_weight):
    hidden, head, targets, weights, _ = inputs(2)
    teacher_targets = Labels(targets[..., None], jnp.full((*targets.shape, 1), -0.3))
    settings = Distillation(weight=teacher_weight, temperature=3.0)

    def distilled(hidden, head):
        return distillation_loss(hidden, head, targets, weights, teacher_targets, settings, Z_LOSS)

    def text_alone(hidden, head):
        return cross_entropy(Projection(hidden, head), Targets(targets, weights), Z_LOSS, FLOAT32)

    (total, parts), ours = jax.jit(jax.value_and_grad(distilled, (0, 1), has_aux=True))(
        hidden, head
    )
    (expected, plain_parts), theirs = jax.jit(jax.value_and_grad(text_alone, (0, 1), has_aux=True))(
        hidden, head
    )
    nll = plain_parts["loss"]
    np.testing.assert_allclose(
        [total, parts["loss"], parts["distillation_loss"]], [expected, nll, nll], rtol=5e-7
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)


def test_gradients_scale_with_what_comes_from_above_and_none_reaches_the_teacher():
    hidden, head, targets, weights, teacher = inputs(3)
    settings = Distillation(target="distribution", weight=0.5)

    def squared(hidden, teacher):
        return (
            3.0
            * distillation_loss(hidden, head, targets, weights, teacher, settings, Z_LOSS)[0] ** 2
        )

    ours, teachers = jax.jit(jax.grad(squared, (0, 1)))(hidden, teacher)
    (total, _, _), (gradient, _) = plain(hidden, head, targets, weights, teacher, settings, Z_LOSS)
    np.testing.assert_allclose(ours, 6 * total * gradient, atol=1e-5)
    assert not any(np.any(array) for array in teachers)


@pytest.mark.parametrize("kind", ["top_k", "distribution"])
def test_half_precision_keeps_sums_in_float32_and_large_logits_do_not_overflow(kind):
    hidden, head, targets, weights, teacher = inputs(4)
    teacher, settings = (
        teacher._replace(head=30 * teacher.head),
        Distillation(target=kind, temperature=2.0, top_k=K),
    )
    half = Projection(teacher.hidden.astype(jnp.bfloat16), teacher.head)

    def chunked(hidden, head):
        return distillation_loss(
            hidden, head, targets, weights, targets_by(half, kind), settings, 0.0
        )

    (total, _), gradients = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(
        hidden.astype(jnp.bfloat16), 30 * head
    )
    rounded = Projection(half.hidden, half.head.astype(jnp.bfloat16))
    expected, expected_gradients = plain(
        hidden.astype(jnp.bfloat16), (30 * head).astype(jnp.bfloat16), targets, weights,
        targets_by(rounded, kind), settings, 0.0,
    )  # fmt: skip
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    assert float(total) == pytest.approx(expected[0], rel=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) < 6e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_top_k_labels_are_those_of_the_whole_distribution(k):
    *_, teacher = inputs(5)
    ids, log_probs = jax.jit(top_k_labels, static_argnums=2)(*teacher, k)
    expected = log_softmax(logits_of(*teacher))
    assert ids.dtype == jnp.int32 and log_probs.dtype == jnp.float32
    assert ids.shape == log_probs.shape == (3, 37, k)
    top = np.take_along_axis(expected, np.asarray(ids), -1)
    np.testing.assert_allclose(top, -np.sort(-expected, -1)[..., :k], atol=1e-5)
    assert all(len(set(row)) == k for row in np.asarray(ids).reshape(-1, k))
    # Half a unit in the last place of float16, and float16 holds them.
    np.testing.assert_allclose(log_probs, top, rtol=2**-11 + 1e-5)
    np.testing.assert_array_equal(
        log_probs, np.asarray(log_probs).astype(np.float16).astype(np.float32)
    )


def test_of_equals_the_lower_token_is_first():
    hidden, head = jnp.ones((1, 3, 4)), jnp.ones((VOCAB, 4)).at[7].set(2.0)
    np.testing.assert_array_equal(top_k_labels(hidden, head, 4).ids[0, 2], [7, 0, 1, 2])


def test_more_tokens_than_there_are_are_refused():
    *_, teacher = inputs()
    with pytest.raises(
        UserError, match=r"distillation.top_k=302 is more than .* 301 tokens; set .* to at most 301"
    ):
        top_k_labels(*teacher, VOCAB + 1)


def test_a_cache_of_too_few_tokens_is_refused():
    hidden, head, targets, weights, teacher = inputs()
    teacher_targets, settings = (
        targets_by(teacher, "top_k", 2),
        Distillation(target="top_k", top_k=3),
    )
    with pytest.raises(
        UserError,
        match=r"top_k=3, .* holds 2 tokens a position; set distillation.top_k to at most 2",
    ):
        distillation_loss(hidden, head, targets, weights, teacher_targets, settings, Z_LOSS)


STUDENT = ModelConfig(
    vocab_size=1024, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=32
)
TEACHER = STUDENT.model_copy(
    update={"d_model": 32, "num_layers": 2, "num_heads": 4, "tied_embeddings": False}
)


def batch_of(batch=4, length=32):
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, STUDENT.vocab_size, (batch, length + 1), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segment_ids": np.ones((batch, length), np.int32),
        "weights": np.full((batch, length), 1 / (batch * length), np.float32),
    }


@functools.cache
def student_and_teacher():
    return jax.jit(
        lambda: [initialize(decoder.param_specs(model), 1) for model in (STUDENT, TEACHER)]
    )()


def minimised(params, batch, teacher, settings):
    online = None if teacher is None else (TEACHER, teacher)
    return module.loss(params, batch, online, STUDENT, settings, FLOAT32)


@pytest.mark.parametrize("kind", ["label", "top_k", "distribution"])
def test_online_and_cached_labels_give_the_same_loss(kind):
    settings, batch, (params, teacher) = (
        Distillation(target=kind, top_k=3),
        batch_of(),
        student_and_teacher(),
    )

    def by_hand(params, batch, teacher):
        inputs = tuple(batch[name] for name in ("inputs", "positions", "segment_ids"))
        teacher_targets = Projection(
            decoder.forward(teacher, inputs, TEACHER, FLOAT32), teacher["head"]
        )
        if kind != "distribution":
            teacher_targets = top_k_labels(*teacher_targets, 3)
        hidden, tokens = (
            decoder.forward(params, inputs, STUDENT, FLOAT32),
            (batch["targets"], batch["weights"]),
        )
        total, _ = distillation_loss(
            hidden, params["embedding"], *tokens, teacher_targets, settings, STUDENT.z_loss
        )
        return (total, loss_of_text(params, batch, STUDENT, FLOAT32)[1]["loss"], teacher_targets)

    online, parts = jax.jit(minimised, static_argnums=3)(params, batch, teacher, settings)
    total, nll, teacher_targets = jax.jit(by_hand)(params, batch, teacher)
    np.testing.assert_allclose([online, parts["loss"]], [total, nll], rtol=1e-6)
    if kind != "distribution":
        batch = batch | {
            "teacher_ids": teacher_targets.ids,
            "teacher_log_probs": teacher_targets.log_probs,
        }
        cached, same = jax.jit(minimised, static_argnums=3)(params, batch, None, settings)
        np.testing.assert_allclose([cached, *same.values()], [online, *parts.values()], rtol=1e-6)


@pytest.mark.parametrize("kind", ["top_k", "distribution"])
def test_whole_logits_of_neither_exist(kind):
    settings, batch, (params, teacher) = (
        Distillation(target=kind, top_k=3),
        batch_of(),
        student_and_teacher(),
    )
    gradient = jax.jit(jax.grad(minimised, has_aux=True), static_argnums=3)
    text = gradient.lower(params, batch, teacher, settings).compile().as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\b(?:f32|bf16|s32)\[([\d,]+)\]", text)
    ]
    assert max(sizes) < batch["inputs"].size * STUDENT.vocab_size
