"""The decoder: its switches change how it is computed and never what; packed documents do not see
one another.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from braeburn.config import (
    Execution,
    MeshConfig,
    ModelConfig,
    Placement,
    Precision,
    Remat,
    ShardingRules,
)
from braeburn.data.packing import stack
from braeburn.layers import spec
from braeburn.models import cached, decoder
from braeburn.objectives import cross_entropy
from braeburn.objectives.cross_entropy import token_losses
from braeburn.plan.trace import on_each_device

MODEL = ModelConfig(
    vocab_size=97,
    d_model=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=80,
    z_loss=1e-3,
)
FLOAT32 = Execution(precision=Precision(compute="float32"))


@pytest.fixture(scope="module")
def params():
    return spec.initialize(decoder.param_specs(MODEL), 0)


def batch_of(documents, length):
    """Documents (lists of ids, each with one more token than it has predictions) packed into one
    row.
    """
    fields = {
        name: np.zeros(length, np.int32)
        for name in ("inputs", "targets", "positions", "segment_ids")
    }
    weights = np.zeros(length, np.float32)
    start = 0
    for segment, tokens in enumerate(documents, 1):
        stop = start + len(tokens) - 1
        fields["inputs"][start:stop], fields["targets"][start:stop] = tokens[:-1], tokens[1:]
        fields["positions"][start:stop] = np.arange(stop - start)
        fields["segment_ids"][start:stop] = segment
        weights[start:stop] = 1
        start = stop
    return stack([fields | {"weights": weights}])


@jax.jit
def all_losses(params, batch):
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    hidden = decoder.forward(params, inputs, MODEL, FLOAT32)
    return token_losses(hidden, decoder.head_matrix(params), batch["targets"])[0]


def losses(params, batch):
    return np.asarray(all_losses(params, batch))[batch["weights"] > 0]


def test_packed_documents_give_the_losses_of_each_alone(params):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 97, length) for length in (40, 2, 131, 77, 9)]
    packed = losses(params, batch_of(documents, 300))
    alone = np.concatenate([losses(params, batch_of([document], 300)) for document in documents])
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    unseparated = batch_of(documents, 300)
    unseparated["segment_ids"] = np.ones_like(unseparated["segment_ids"])
    assert np.abs(losses(params, unseparated) - alone).max() > 1e-2


def random_batch(seed=1, batch=2, length=150):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 97, (batch, length + 1), dtype=np.int32)
    segments = 1 + np.cumsum(rng.random((batch, length)) < 0.03, axis=1, dtype=np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segment_ids": segments,
        "weights": np.full((batch, length), 1 / (batch * length), np.float32),
    }


value_and_gradient = jax.jit(
    jax.value_and_grad(cross_entropy.loss, has_aux=True), static_argnums=(2, 3)
)


def gradient(params, model=MODEL, execution=FLOAT32):
    return value_and_gradient(params, random_batch(), model, execution)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(
    "remat",
    [
        Remat(policy="none"),
        Remat(policy="full"),
        pytest.param(Remat(policy="save_named"), marks=pytest.mark.deep),
        Remat(policy="save_named", names=("attention",)),
    ],
    ids=["none", "full", "default names", "attention"],
)
def test_scan_and_remat_change_no_number(params, scan_layers, remat):
    (expected, _), expected_gradients = gradient(params)
    model = MODEL.model_copy(update={"scan_layers": scan_layers})
    (value, _), gradients = gradient(params, model, replace(FLOAT32, remat=remat))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, expected_gradients
    )


def test_remat_saves_memory(params):
    def temporary_bytes(remat):
        model = MODEL.model_copy(update={"num_layers": 12})
        shapes = spec.abstract(decoder.param_specs(model))
        batch = random_batch(batch=4, length=256)
        execution = replace(FLOAT32, remat=remat)
        function = jax.jit(jax.grad(lambda p: cross_entropy.loss(p, batch, model, execution)[0]))
        return function.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    none, named, full = (
        temporary_bytes(r)
        for r in (
            Remat(policy="none"),
            Remat(policy="save_named", names=("ffn_gate",)),
            Remat(policy="full"),
        )
    )
    assert full < named < none / 2


def program_of_the_gradient(model, remat):
    execution, shapes = replace(FLOAT32, remat=remat), spec.abstract(decoder.param_specs(model))
    batch = random_batch()
    return str(
        jax.make_jaxpr(jax.grad(lambda p: cross_entropy.loss(p, batch, model, execution)[0]))(
            shapes
        )
    )


def test_what_is_kept_of_normalised_queries_and_keys_saves_their_products():
    names = ("value", "attention", "ffn_gate", "ffn_up")
    less, more = (
        program_of_the_gradient(MODEL, Remat(policy="save_named", names=(*more, *names)))
        for more in ((), ("query", "key"))
    )
    assert less.count("dot_general[") == more.count("dot_general[") + 2
    # Cotangents of the two are arrays before the products that read them.
    assert more.count("optimization_barrier") == 2


def test_layers_in_a_loop_have_no_barriers():
    remat = Remat(policy="full")
    assert "prevent_cse=True" not in program_of_the_gradient(MODEL, remat)
    apart = MODEL.model_copy(update={"scan_layers": False})
    assert "prevent_cse=True" in program_of_the_gradient(apart, remat)


def test_bfloat16_computes_close_to_float32(params):
    (exact, _), _ = gradient(params)
    (half, _), gradients = gradient(params, execution=Execution())
    assert float(half) == pytest.approx(float(exact), rel=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_a_cache_gives_the_hidden_states_of_the_whole_sequence(params):
    batch = random_batch()
    one_document = np.ones_like(batch["segment_ids"])
    inputs = (batch["inputs"], batch["positions"], one_document)
    whole = jax.jit(decoder.forward, static_argnums=(2, 3))(params, inputs, MODEL, FLOAT32)
    cache = cached.empty_cache(MODEL, 2, 160, FLOAT32, stacked=True)
    run = jax.jit(cached.forward_cached, static_argnums=(3, 4))
    parts = []
    for start, stop in ((0, 100), (100, 101), (101, 150)):
        tokens = (batch["inputs"][:, start:stop], batch["positions"][:, start:stop])
        hidden, cache = run(params, tokens, cache, MODEL, FLOAT32)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_untied_and_unnormed_models_have_their_own_parameters():
    plain = decoder.param_specs(
        MODEL.model_copy(update={"tied_embeddings": False, "qk_norm": False})
    )
    paths = {path for path, _ in spec.walk(plain)}
    assert "head" in paths
    assert not any("query_norm" in path for path in paths)
    assert spec.count(plain) - spec.count(decoder.param_specs(MODEL)) == 97 * 48 - 3 * 2 * 8


def test_initial_values_follow_the_path_alone():
    specs = decoder.param_specs(MODEL)
    values = spec.initialize(specs, 0)
    deeper = spec.initialize(decoder.param_specs(MODEL.model_copy(update={"num_layers": 5})), 0)
    wider = spec.initialize(
        {"layers": {"query": specs["layers"]["query"]}, "new": specs["embedding"]}, 0
    )
    np.testing.assert_array_equal(deeper["layers"]["query"][:3], values["layers"]["query"])
    np.testing.assert_array_equal(wider["layers"]["query"], values["layers"]["query"])
    assert not np.array_equal(wider["new"], values["embedding"])
    assert not np.array_equal(values["layers"]["key"], values["layers"]["value"])
    assert not np.array_equal(values["layers"]["query"][0], values["layers"]["query"][1])


def test_initial_values_have_the_spread_of_their_fan_in():
    values = spec.initialize(
        decoder.param_specs(MODEL.model_copy(update={"d_model": 256, "ffn_dim": 512})), 1
    )
    assert values["layers"]["down"].std() == pytest.approx(512**-0.5, rel=0.02)
    assert values["layers"]["attention_output"].std() == pytest.approx(48**-0.5, rel=0.02)
    assert values["embedding"].std() == pytest.approx(256**-0.5, rel=0.02)
    np.testing.assert_array_equal(values["final_norm"], 1)


def test_the_loss_of_an_untrained_model_is_that_of_chance(params):
    (_, metrics), _ = gradient(params)
    assert float(metrics["loss"]) == pytest.approx(np.log(97), abs=0.6)


@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_gathered_weights_are_gathered_again_and_not_kept(axis):
    """Whichever axis the rules store weights along."""
    placement = Placement(parameters=(axis,), optimizer=(axis,))
    mesh = MeshConfig.model_validate({"fsdp": 1} | {axis: 2})
    execution = Execution(mesh, ShardingRules(embed=placement))

    def layer(x, weight):
        return jnp.tanh(x @ jax.lax.all_gather(weight, (axis,), axis=0, tiled=True))

    body = decoder.rematerialized(layer, execution)
    gradient = jax.grad(lambda x, weight: body(x, weight).sum(), argnums=(0, 1))
    program = on_each_device(gradient, mesh, AbstractDevice("", None, "cpu"))
    text = str(jax.make_jaxpr(program)(jnp.ones((3, 8)), jnp.ones((4, 5))))
    assert text.count("all_gather[") == 2
