"""The pruned model against the masked larger one, for each axis, form of model and optimizer; one
device and many.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from braeburn.config import AdamW, Execution, MeshConfig, ModelConfig, Precision, Pruning, Stage
from braeburn.config.optimizers import KINDS
from braeburn.layers.norm import rms_norm
from braeburn.layers.spec import initialize, map_params_like, map_specs, walk
from braeburn.models import decoder
from braeburn.optim.build import build_optimizer
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build
from braeburn.transforms.units import kept, masked, masks, score_specs, sliced

# Epsilon is all that the two models differ by: see `masked`.
MODEL = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    ffn_dim=48,
    norm_epsilon=1e-9,
)
FLOAT32 = Execution(precision=Precision(compute="float32"))
ALL = {"ffn": 20, "heads": 4, "embed": 24}
KEEPS = [{axis: size} for axis, size in ALL.items()] + [ALL]


@functools.cache
def weights(model):
    """Initial values, with norms that are not all one."""

    @jax.jit
    def drawn():
        values = initialize(decoder.param_specs(model), 0)
        noise = iter(jax.random.split(jax.random.key(1), 20))
        return jax.tree.map(
            lambda x: x * jnp.exp(0.3 * jax.random.normal(next(noise), x.shape)), values
        )

    return drawn()


def scores_of(model, keep, seed=2):
    rng = np.random.default_rng(seed)
    return map_specs(
        lambda _, spec: jnp.asarray(rng.normal(size=spec.shape), jnp.float32),
        score_specs(model, keep),
    )


@functools.partial(jax.jit, static_argnums=1)
def logits(params, model):
    tokens = np.random.default_rng(3).integers(0, model.vocab_size, (2, 24), np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    hidden = decoder.forward(params, (tokens, positions, np.ones_like(tokens)), model, FLOAT32)
    return jnp.einsum("BTD,VD->BTV", hidden, decoder.head_matrix(params))


@pytest.mark.parametrize(
    ("keep", "form"),
    [(keep, {}) for keep in KEEPS]
    + [
        pytest.param(ALL, {"tied_embeddings": False}, marks=pytest.mark.deep),
        pytest.param(ALL, {"qk_norm": False}, marks=pytest.mark.deep),
        (ALL, {"tied_embeddings": False, "qk_norm": False}),
    ],
    ids=str,
)
def test_the_pruned_models_logits_are_those_of_the_masked_one(keep, form):
    model = MODEL.model_copy(update=form)
    small, specs = Pruning(keep=keep).left(model), decoder.param_specs(model)
    params, scores = weights(model), scores_of(model, keep)

    @jax.jit
    def cut(params, scores):
        others = jax.tree.map(jnp.negative, scores)
        pruned, wrong = (
            sliced(params, kept(choice, keep, model), specs) for choice in (scores, others)
        )
        return masked(params, masks(scores, keep, model, 0.0), model), pruned, wrong

    wide, pruned, wrong = cut(params, scores)
    assert jax.tree.map(jnp.shape, pruned) == map_specs(
        lambda _, spec: spec.shape, decoder.param_specs(small)
    )
    expected = logits(wide, model)
    np.testing.assert_allclose(logits(pruned, small), expected, atol=1e-5)
    # Something was cut, and which units they were matters: the comparison can fail.
    assert np.abs(logits(params, model) - expected).max() > 0.1
    assert np.abs(logits(wrong, small) - expected).max() > 0.1


def test_epsilon_moves_a_narrower_model_by_no_more_than_is_said():
    keep, epsilon = {"embed": 8}, 1e-3
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(5, 32)).astype(np.float32), np.ones(32, np.float32)
    x[:, 8:] = 0
    mean_square = np.mean(x[:, :8] ** 2, axis=1, keepdims=True)
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    narrow = rms_norm(x[:, :8], scale[:8], epsilon)
    wide = rms_norm(x, scale * math.sqrt(keep["embed"] / 32), epsilon)[:, :8]
    np.testing.assert_allclose(
        narrow / wide, 1 + 3 * epsilon / (2 * mean_square) * np.ones((1, 8)), rtol=2e-5
    )


def test_every_group_keeps_as_many_heads():
    scores = {
        "heads": jnp.asarray([[9, 8, 7, 6, 1, 2, 3, 4], [0, 0, 0, 0, 5, 5, 6, 5]], jnp.float32)
    }
    found = kept(scores, {"heads": 4}, MODEL)["heads"]
    np.testing.assert_array_equal(found, [[0, 1, 6, 7], [0, 1, 4, 6]])
    assert found.dtype == jnp.int32
    for temperature in (0.0, 0.1, 10.0):
        mask = masks(scores, {"heads": 4}, MODEL, temperature)["heads"]
        np.testing.assert_allclose(mask.reshape(2, 2, 4).sum(axis=-1), 2, rtol=1e-5)


def test_what_is_kept_is_what_the_masks_keep():
    scores = scores_of(MODEL, ALL)
    hard, indices = jax.jit(
        lambda scores: (masks(scores, ALL, MODEL, 0.0), kept(scores, ALL, MODEL))
    )(scores)
    for axis, mask in hard.items():
        assert mask.dtype == jnp.float32
        assert mask.shape == score_specs(MODEL, ALL)[axis].shape
        for row, units in zip(np.atleast_2d(mask), np.atleast_2d(indices[axis]), strict=True):
            np.testing.assert_array_equal(np.flatnonzero(row), units)
            assert set(row) == {0, 1}


def test_masks_are_learned_through_the_weights():
    """The gradient of a function of the masked weights for scores of each axis, against finite
    differences.

    At this temperature no unit is held to 1, where a mask has a kink.
    """
    params, scores, rng = weights(MODEL), scores_of(MODEL, ALL), np.random.default_rng(5)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)

    @jax.jit
    def function(scores):
        soft = masked(params, masks(scores, ALL, MODEL, 10.0), MODEL)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, cotangents, soft)))

    gradient = jax.jit(jax.grad(function))(scores)
    for axis, direction in scores_of(MODEL, ALL, seed=6).items():
        moved = [
            float(function(scores | {axis: scores[axis] + step * direction}))
            for step in (0.2, -0.2)
        ]
        expected = (moved[0] - moved[1]) / 0.4
        assert abs(expected) > 0.01
        assert float(jnp.vdot(gradient[axis], direction)) == pytest.approx(expected, rel=1e-2)


def test_moments_are_sliced_like_parameters_and_counts_are_left_alone():
    specs, small = decoder.param_specs(MODEL), Pruning(keep=ALL).left(MODEL)
    small_specs = decoder.param_specs(small)
    params = weights(MODEL)
    indices = kept(scores_of(MODEL, ALL), ALL, MODEL)
    param_of, cut_of = dict(walk(params)), dict(walk(sliced(params, indices, specs)))
    stage = Stage(
        tokens=64, sequence_length=8, batch_tokens=16, mixture={"none": 1.0}, learning_rate=1e-2
    )
    for kind in KINDS.values():
        optimizer = build_optimizer(kind(), stage, specs, MODEL)
        state = optimizer.init(params)
        # Every moment a known function of the parameter, so that what was kept of it can be told.
        state = map_params_like(
            lambda tree: map_specs(lambda name, x: x + 2 * param_of[name], tree), state, specs
        )
        state = state._replace(stage_steps=state.stage_steps + 3)
        cut = map_params_like(lambda tree: sliced(tree, indices, specs), state, specs)
        expected = build_optimizer(kind(), stage, small_specs, small).init(
            sliced(params, indices, specs)
        )
        assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, expected)
        assert jax.tree.structure(cut) == jax.tree.structure(expected)
        assert int(cut.stage_steps) == 3
        pairs = [value for value in cut.direction if isinstance(value, dict)]
        assert len(pairs) == 2
        for moment in pairs:
            for path, ours in walk(moment):
                np.testing.assert_array_equal(ours, 2 * cut_of[path])


def test_scores_are_added_to_and_taken_from_a_state():
    specs = decoder.param_specs(MODEL)
    scores = scores_of(MODEL, {"ffn": 20})
    stage = Stage(
        tokens=64, sequence_length=8, batch_tokens=16, mixture={"none": 1.0}, learning_rate=1e-2
    )
    state = build_optimizer(AdamW(), stage, specs, MODEL).init(weights(MODEL))
    wider = map_params_like(
        lambda tree: tree | {"masks": jax.tree.map(jnp.zeros_like, scores)}, state, specs
    )
    assert wider.direction.mu.keys() == wider.direction.nu.keys() == {*specs, "masks"}

    def without(tree):
        return {name: child for name, child in tree.items() if name != "masks"}

    again = map_params_like(without, wider, [*specs, "masks"])
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_mesh_changes_nothing():
    specs, keep = decoder.param_specs(MODEL), ALL
    mesh = MeshConfig(fsdp=2, tensor=2)
    devices = build(mesh, jax.devices()[:4])
    layout = Layout(Execution(mesh), devices, specs | {"masks": score_specs(MODEL, keep)})
    small = Layout(Execution(mesh), devices, decoder.param_specs(Pruning(keep=keep).left(MODEL)))
    params, scores = weights(MODEL), scores_of(MODEL, keep)

    def program(tree):
        own = {name: child for name, child in tree.items() if name != "masks"}
        soft = masked(own, masks(tree["masks"], keep, MODEL, 0.3), MODEL)
        return soft, sliced(own, kept(tree["masks"], keep, MODEL), specs)

    expected = jax.jit(program)(params | {"masks": scores})
    placed = jax.device_put(params | {"masks": scores}, layout.parameters())
    shardings = {name: child for name, child in layout.parameters().items() if name != "masks"}
    with layout.compiling():
        soft, cut = jax.jit(program, out_shardings=(shardings, small.parameters()))(placed)
    assert isinstance(cut["layers"]["down"].sharding, NamedSharding)
    assert cut["layers"]["down"].addressable_shards[0].data.shape == (2, 10, 12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), soft, expected[0])
    jax.tree.map(np.testing.assert_array_equal, cut, expected[1])
