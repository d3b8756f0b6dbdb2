"""Gemma 3 beyond its logits, which tests/interop compares with transformers: windows, patterns that
are cut short, layouts, pruning, generation and the size of the published models.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import Execution, MeshConfig, ModelConfig, Precision, Pruning, Remat, Run
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.layers.spec import count, initialize, walk
from braeburn.models import decoder
from braeburn.models.families import family_of, gemma3
from braeburn.objectives import cross_entropy
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build
from braeburn.recipes import load
from braeburn.transforms.pruning import kept, masked, masks, score_specs, sliced
from braeburn.verify.shrink import shrink

# Three sliding layers and one that sees all, then two sliding ones.
LOCAL, ALL = gemma3.layers(12)
MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    pattern=(LOCAL, LOCAL, LOCAL, ALL),
    scaled_embedding=True,
)
FLOAT32 = Execution(precision=Precision(compute="float32"))
BATCH, LENGTH = 4, 64


@pytest.fixture(scope="module")
def params() -> Any:
    drawn = initialize(decoder.param_specs(MODEL), 0)
    key = jax.random.key(1)
    # Norms that are all one would not show which of them is where.
    return jax.tree.map(
        lambda leaf, spec: (
            leaf * jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
            if spec.role == "norm"
            else leaf
        ),
        drawn,
        decoder.param_specs(MODEL),
    )


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (BATCH, LENGTH + 1), dtype=np.int32)
    segments = 1 + np.cumsum(rng.random((BATCH, LENGTH)) < 0.03, axis=1, dtype=np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "segment_ids": segments,
        "weights": np.full((BATCH, LENGTH), 1 / (BATCH * LENGTH), np.float32),
    }


def test_a_token_beyond_the_windows_of_all_layers_changes_nothing(params: Any) -> None:
    model = MODEL.model_copy(update={"num_layers": 3})
    assert [layer.attention.kind for layer in model.layer_configs] == ["sliding"] * 3
    specs = decoder.param_specs(model)
    own = initialize(specs, 0)
    tokens = np.random.default_rng(0).integers(0, 96, (1, LENGTH), dtype=np.int32)
    other = tokens.copy()
    other[0, 10] += 1
    positions, segments = np.arange(LENGTH)[None], np.ones((1, LENGTH), np.int32)
    forward = jax.jit(
        lambda tokens: decoder.forward(own, (tokens, positions, segments), model, FLOAT32)
    )
    differs = np.abs(np.asarray(forward(tokens) - forward(other))[0]).max(axis=-1) > 0
    # Each of three layers hands on what it saw of the last twelve tokens.
    assert differs[10:44].all() and not differs[:10].any() and not differs[44:].any()


def test_a_cache_gives_the_hidden_states_of_the_whole_sequence(params: Any) -> None:
    tokens = batch()["inputs"]
    positions = batch()["positions"]
    whole = jax.jit(decoder.forward, static_argnums=(2, 3))(
        params, (tokens, positions, np.ones_like(tokens)), MODEL, FLOAT32
    )
    cache = decoder.empty_cache(MODEL, BATCH, LENGTH, FLOAT32)
    cached = jax.jit(decoder.forward_cached, static_argnums=(3, 4))
    parts = []
    for start, stop in ((0, 40), (40, 41), (41, LENGTH)):
        new = (tokens[:, start:stop], positions[:, start:stop])
        hidden, cache = cached(params, new, cache, MODEL, FLOAT32)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


@pytest.mark.parametrize(
    "changes", [{"scan_layers": False}, {"remat": Remat(policy="full")}], ids=str
)
def test_how_it_is_computed_changes_no_number(changes: dict[str, Any], params: Any) -> None:
    remat = changes.pop("remat", FLOAT32.remat)
    model = MODEL.model_copy(update=changes)

    def result(model: ModelConfig, execution: Execution) -> Any:
        function = jax.value_and_grad(cross_entropy.loss, has_aux=True)
        return jax.jit(function, static_argnums=(2, 3))(params, batch(), model, execution)

    (expected, _), expected_gradients = result(MODEL, FLOAT32)
    (found, _), gradients = result(model, dataclasses.replace(FLOAT32, remat=remat))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for path, gradient in walk(gradients):
        np.testing.assert_allclose(gradient, dict(walk(expected_gradients))[path], atol=1e-6)


MESHES = {
    "fsdp x tensor": {"fsdp": 2, "tensor": 4},
    "ring": {"context": 4, "context_attention": "ring", "tensor": 2},
    "gathered context": {"context": 4, "data": 2},
}


@pytest.mark.parametrize("name", MESHES)
def test_layouts_give_the_same_loss_and_gradients(name: str, params: Any) -> None:
    mesh = MeshConfig(**{"fsdp": 1} | MESHES[name])

    def results(mesh: MeshConfig) -> Any:
        execution = Execution(mesh, precision=Precision(compute="float32"))
        devices = build(mesh, jax.devices()[: int(np.prod(list(mesh.sizes.values())))])
        layout = Layout(execution, devices, decoder.param_specs(MODEL))

        def gradient(params: Any, batch: Any) -> Any:
            (_, sums), found = jax.value_and_grad(
                lambda p: cross_entropy.loss(p, batch, MODEL, execution), has_aux=True
            )(params)
            return found, sums

        placed = jax.device_put(params, layout.parameters())
        own = layout.place(batch(), range(BATCH), BATCH)
        with layout.compiling():
            return jax.jit(layout.gradient(gradient))(placed, own)

    expected_gradients, expected = results(MeshConfig(fsdp=1))
    gradients, found = results(mesh)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    wanted = dict(walk(jax.device_get(expected_gradients)))
    for path, gradient in walk(jax.device_get(gradients)):
        np.testing.assert_allclose(gradient, wanted[path], atol=2e-6, err_msg=path)


def test_a_pruned_model_gives_the_logits_of_the_masked_one(params: Any) -> None:
    keep = {"ffn": 20, "heads": 2}
    rng = np.random.default_rng(3)
    scores = jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32),
        score_specs(MODEL, keep),
        is_leaf=lambda node: hasattr(node, "role"),
    )
    small = Pruning(keep=keep).pruned(MODEL)
    specs = decoder.param_specs(MODEL)
    tokens = batch()["inputs"][:2, :32]
    inputs = (tokens, batch()["positions"][:2, :32], np.ones_like(tokens))
    soft = masked(params, masks(scores, keep, MODEL, 0.0), MODEL)
    hard = sliced(params, kept(scores, keep, MODEL), specs)
    forward = jax.jit(decoder.forward, static_argnums=(2, 3))
    np.testing.assert_allclose(
        forward(hard, inputs, small, FLOAT32), forward(soft, inputs, MODEL, FLOAT32), atol=2e-5
    )


def test_sizes_are_as_published() -> None:
    """Without the embedding 698M and 3,209M (arXiv 2503.19786, table 1: 698M, 3,209M)."""
    for model, embedding, others in (
        (gemma3.gemma3_1b(), 302e6, 698e6),
        (gemma3.gemma3_4b(), 675e6, 3209e6),
    ):
        size = model.vocab_size * model.d_model
        assert size == pytest.approx(embedding, rel=6e-3)
        assert count(decoder.param_specs(model)) - size == pytest.approx(others, rel=1e-3)
        assert family_of(model) is gemma3.FAMILY


def test_a_shrunken_recipe_keeps_its_kinds_of_layers() -> None:
    run: Run = shrink(load("gemma3-1b"), 8)
    kinds = [layer.attention.kind for layer in run.model.layer_configs]
    assert kinds == ["sliding"] * 5 + ["full"] + ["sliding"] * 2
    window = run.model.layer_configs[0].attention
    assert isinstance(window, SlidingAttention) and window.window == 16
