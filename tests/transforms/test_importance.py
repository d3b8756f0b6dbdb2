"""Importance of units against plain NumPy; on meshes against one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from braeburn.config import Execution, MeshConfig, ModelConfig, Precision, Pruning
from braeburn.layers.spec import initialize, map_specs
from braeburn.models import decoder
from braeburn.parallel.layout import Layout, one_device
from braeburn.parallel.mesh import build
from braeburn.transforms import importance
from braeburn.transforms.definition import Found
from braeburn.transforms.pruning import importance_of_units
from braeburn.transforms.units import score_specs

MODEL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24
)
KEEP = {"ffn": 8, "heads": 2, "embed": 8}
FLOAT32 = Precision(compute="float32")
ROWS, LENGTH = 4, 32


@pytest.fixture(autouse=True)
def uncached():
    """Programs for several simulated devices are not kept between runs of the tests: see
    `Layout.compiling`.
    """
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: initialize(decoder.param_specs(MODEL), 0))()


@pytest.fixture(scope="module")
def batch():
    """Rows of two documents each, of which the last ends with padding of very different tokens."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 63, (ROWS, LENGTH)).astype(np.int32)
    segments, weights = np.ones((ROWS, LENGTH), np.int32), np.full((ROWS, LENGTH), 0.25, np.float32)
    segments[:, 13:] = 2
    segments[-1, 20:], weights[-1, 20:], inputs[-1, 20:] = 0, 0, 63
    positions = np.where(segments == 2, np.arange(LENGTH) - 13, np.arange(LENGTH)).astype(np.int32)
    return {
        "inputs": inputs,
        "targets": np.zeros_like(inputs),
        "positions": np.maximum(positions, 0),
        "segment_ids": segments,
        "weights": weights,
    }


def measured(layout, params, batch, keep=KEEP):
    placed = layout.place(batch, range(ROWS), ROWS)
    params = jax.device_put(params, layout.parameters())
    return importance.activation_importance(layout, MODEL, keep)(params, placed)


@pytest.fixture(scope="module")
def alone(params, batch):
    return measured(one_device(decoder.param_specs(MODEL), FLOAT32), params, batch)


def seen(params, row):
    """What an unscanned pass over one row shows to the hook: the axes in turn, and float64
    activations of each.
    """
    axes = []

    @jax.jit
    def shown(params, row):
        found = []

        def activation_hook(axis, activations, state):
            axes.append(axis)
            found.append(activations[0])
            return state

        model = MODEL.model_copy(update={"scan_layers": False})
        tokens = (row["inputs"], row["positions"])
        execution = Execution(precision=FLOAT32)
        memory = decoder.Packed(row["segment_ids"], execution)
        surroundings = decoder.Surroundings(memory, activation_hook=activation_hook)
        decoder.decoder(params, tokens, surroundings, model, execution)
        return found

    found = shown(params, row)
    return axes, [np.asarray(values, np.float64) for values in found]


def test_activations_are_aggregated_as_said(params, batch, alone):
    squares = {axis: np.zeros(spec.shape) for axis, spec in score_specs(MODEL, KEEP).items()}
    for i in range(ROWS):
        # Padding left out altogether.
        real = batch["weights"][i] > 0
        axes, found = seen(
            params, {name: values[i : i + 1, real] for name, values in batch.items()}
        )
        assert axes == ["embed", "heads", "embed", "ffn"] * MODEL.num_layers
        for index, (axis, values) in enumerate(zip(axes, found, strict=True)):
            size = np.sqrt((values**2).sum(axis=-1)) if axis == "heads" else np.abs(values)
            if axis == "embed":
                squares[axis] += size.mean(axis=0) ** 2
            else:
                squares[axis][index // 4] += size.mean(axis=0) ** 2
    scores = importance.activation(alone)
    for axis, expected in squares.items():
        assert scores[axis].dtype == jnp.float32
        np.testing.assert_allclose(scores[axis], np.sqrt(expected), rtol=1e-5)


def test_padding_does_not_count(params, batch, alone):
    other = batch | {"inputs": np.where(batch["segment_ids"] == 0, 5, batch["inputs"])}
    again = measured(one_device(decoder.param_specs(MODEL), FLOAT32), params, other, {"ffn": 8})
    np.testing.assert_allclose(again["ffn"], alone["ffn"], rtol=1e-6)
    real = batch | {
        "segment_ids": np.maximum(batch["segment_ids"], 1),
        "weights": np.ones_like(batch["weights"]),
    }
    counted = measured(one_device(decoder.param_specs(MODEL), FLOAT32), params, real, {"ffn": 8})
    assert np.abs(counted["ffn"] / alone["ffn"] - 1).max() > 1e-3


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"data": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_a_mesh_changes_nothing(sizes, params, batch, alone):
    mesh = MeshConfig(**{"fsdp": 1} | sizes)
    devices = jax.devices()[: math.prod(mesh.sizes.values())]
    ours = measured(
        Layout(
            Execution(mesh, precision=FLOAT32), build(mesh, devices), decoder.param_specs(MODEL)
        ),
        params,
        batch,
    )
    for axis, expected in alone.items():
        np.testing.assert_allclose(ours[axis], expected, rtol=1e-5)


def test_the_hook_costs_nothing(params, batch):
    """Neither the default hook nor one that returns the state unchanged changes the program."""

    def program(**hook):
        def forward(params, tokens, positions, segments):
            execution = Execution(precision=FLOAT32)
            memory = decoder.Packed(segments, execution)
            tokens = (tokens, positions)
            return decoder.decoder(
                params, tokens, decoder.Surroundings(memory, **hook), MODEL, execution
            )

        arguments = (params, batch["inputs"], batch["positions"], batch["segment_ids"])
        return jax.jit(forward).lower(*arguments).as_text()

    assert program() == program(activation_hook=lambda axis, activations, state: state)
    looked = program(activation_hook=lambda axis, activations, state: jnp.sum(activations))
    assert looked != program()


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(params):
    found = importance.magnitude(params, MODEL, KEEP)
    layers = {name: np.asarray(values, np.float64) for name, values in params["layers"].items()}
    for i in range(MODEL.num_layers):
        for unit in (0, 5):
            parts = layers["gate"][i, :, unit], layers["up"][i, :, unit], layers["down"][i, unit]
            assert found["ffn"][i, unit] == pytest.approx(
                np.linalg.norm(np.concatenate(parts)), rel=1e-6
            )
        parts = layers["query"][i, :, 3].ravel(), layers["attention_output"][i, 3].ravel()
        assert found["heads"][i, 3] == pytest.approx(
            np.linalg.norm(np.concatenate(parts)), rel=1e-6
        )
    names = {
        "query": 1,
        "key": 1,
        "value": 1,
        "gate": 1,
        "up": 1,
        "attention_norm": 1,
        "ffn_norm": 1,
    }
    names |= {"attention_output": 3, "down": 2}
    parts = [np.take(layers[name], 7, axis=dim).ravel() for name, dim in names.items()]
    parts += [np.asarray(params["embedding"])[:, 7], np.asarray(params["final_norm"])[7:8]]
    assert found["embed"].shape == (MODEL.d_model,)
    assert found["embed"][7] == pytest.approx(np.linalg.norm(np.concatenate(parts)), rel=1e-6)


def test_random_importance_follows_the_seed():
    one, same, other = (importance.random(MODEL, KEEP, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert jax.tree.map(jnp.shape, one) == map_specs(
        lambda _, spec: spec.shape, score_specs(MODEL, KEEP)
    )
    assert not np.array_equal(one["ffn"], other["ffn"])
    assert not np.array_equal(one["ffn"][0], one["ffn"][1])
    np.testing.assert_array_equal(importance.random(MODEL, {"embed": 8}, 0)["embed"], one["embed"])
    assert min(values.min() for values in one.values()) > 0


def test_standardised_scores_have_no_scale_and_keep_the_order():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=(3, 50)) * [[0.1], [1], [3]] + [[0], [5], [-5]]).astype(
        np.float32
    )
    scores = importance.standardised({"ffn": jnp.asarray(values)})["ffn"]
    np.testing.assert_allclose(scores.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(scores.std(axis=1), 1, rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(scores, axis=1), np.argsort(values, axis=1))
    dead = importance.standardised({"embed": jnp.asarray([0.0, 1.0, 2.0, 3.0])})["embed"]
    assert np.isfinite(dead).all()
    assert np.argmin(dead) == 0
    for equal in (np.full(5, 0.1, np.float32), np.zeros(5, np.float32)):
        np.testing.assert_array_equal(
            importance.standardised({"embed": jnp.asarray(equal)})["embed"], 0
        )


def test_batches_are_read_as_they_are_measured(monkeypatch):
    """Not all at once, which devices would have to hold."""
    slow = jax.jit(lambda x: lax.fori_loop(0, 100, lambda _, y: jnp.tanh(x @ y), x))
    results = []

    def measure(params, batch):
        results.append({"ffn": slow(batch)})
        return results[-1]

    def batches():
        for number in range(5):
            assert all(sums["ffn"].is_ready() for sums in results[: number - 1])
            yield jnp.full((512, 512), 0.01)

    monkeypatch.setattr(importance, "activation_importance", lambda *_: measure)
    layout = one_device(decoder.param_specs(MODEL), FLOAT32)
    pruning = Pruning(keep={"ffn": 8}, method="activation")
    found = importance_of_units(pruning, Found(MODEL, {}, layout, batches(), 0))
    assert len(results) == 5 and found["ffn"].shape == (512, 512)
