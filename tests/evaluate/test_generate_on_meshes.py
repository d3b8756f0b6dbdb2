"""Generation on several devices: what one device writes, in the memory that is told."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.config import Execution, MeshConfig, ModelConfig, Precision, RopeScaling
from braeburn.errors import UserError
from braeburn.evaluate.decoding import (
    Draws,
    Prompts,
    abstract_params,
    abstract_prompts,
    abstract_rows,
    cache_bytes,
    inference_layout,
    programs,
    weight_bytes,
)
from braeburn.evaluate.generate import Generation, Ready, collected, continuations, generate, ready
from braeburn.evaluate.sampling import Sampling
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.models import decoder
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build
from braeburn.recipes import load

FLOAT32 = Precision(compute="float32")
SIZES: dict[str, Any] = {
    "vocab_size": 104,
    "d_model": 48,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 64,
}
GEMMA = {"attention": {"kind": "sliding", "window": 24, "rope_base": 1e4}, "norms": "both"}
MODELS = {
    "qwen3": ModelConfig(**SIZES),
    "llama": ModelConfig(
        **SIZES,
        qk_norm=False,
        tied_embeddings=False,
        rope_scaling=RopeScaling(original_max_position_embeddings=32),
    ),
    "gemma": ModelConfig.model_validate(
        {**SIZES, "scaled_embedding": True, "pattern": (GEMMA, GEMMA, {"norms": "both"})}
    ),
    "olmo": ModelConfig.model_validate(
        {
            **SIZES,
            "pattern": ({"attention": {"kind": "full", "qk_norm": "width"}, "norms": "after"},),
        }
    ),
    "afm": ModelConfig(
        **SIZES,
        pattern=load("afm-on-device-2025").model.pattern,
        tail_pattern=load("afm-on-device-2025").model.tail_pattern,
        tail_layers=1,
    ),
    "experts": ModelConfig.model_validate(
        {
            **SIZES,
            "pattern": ({"feed_forward": {"kind": "experts", "expert_dim": 24, "shared_dim": 16}},),
        }
    ),
}
TEXTS = [[5, 17, 3], [42], list(range(1, 71)), [9] * 12, [7, 8] * 15]
# Tokens that some of the rows below meet, and others do not.
STOPS = (11, 15, 61)
DRAWN = Sampling(temperature=0.9, top_k=50, top_p=0.95)


@functools.cache
def params_of(name: str) -> Tree:
    """Random weights, large enough in the layers for text that does not repeat itself."""
    generator = np.random.default_rng(0)

    def draw(_: str, spec: ParamSpec) -> np.ndarray:
        if spec.role == "norm":
            return generator.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        scale = spec.shape[-1] ** -0.5 if spec.role == "embedding" else 0.4
        return (generator.standard_normal(spec.shape) * scale).astype(np.float32)

    return map_specs(draw, decoder.param_specs(MODELS[name]))


def layout_of(name: str, precision: Precision = FLOAT32, **sizes: Any) -> Layout:
    mesh = MeshConfig.model_validate({"fsdp": 1, **sizes})
    devices = build(mesh, jax.devices()[: math.prod(mesh.sizes.values())])
    return Layout(Execution(mesh, precision=precision), devices, decoder.param_specs(MODELS[name]))


def on_mesh(name: str, precision: Precision = FLOAT32, **sizes: Any) -> Ready:
    layout = layout_of(name, precision, **sizes)
    placed = jax.device_put(params_of(name), layout.parameters())
    return ready(placed, MODELS[name], layout, consume=True)


def assert_writes_the_same(name: str, sampling: Sampling, sizes: dict[str, Any]) -> None:
    generation = Generation(40, sampling, seed=3, stop_ids=STOPS)
    expected = generate(params_of(name), TEXTS, MODELS[name], FLOAT32, generation)
    found = continuations(on_mesh(name, **sizes), TEXTS, generation, steps=7)
    assert collected(found, len(TEXTS)) == expected


MESHES: list[tuple[str, Sampling, dict[str, Any]]] = [
    ("llama", DRAWN, {"fsdp": 2, "tensor": 2}),
    ("experts", DRAWN, {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("experts", Sampling(0.0), {"expert": 4, "expert_dispatch": "all_to_all"}),
    ("gemma", Sampling(0.0), {"tensor": 4}),
]
NUCLEUS = Sampling(1.1, None, 0.7)
OTHERS = [
    pytest.param(name, sampling, sizes, marks=pytest.mark.deep)
    for name, sampling, sizes in (
        ("qwen3", NUCLEUS, {"tensor": 8}),
        ("llama", Sampling(0.0), {"fsdp": 8}),
        ("gemma", NUCLEUS, {"fsdp": 2, "tensor": 4}),
        ("gemma", DRAWN, {"replica": 2, "data": 2, "fsdp": 2}),
        ("olmo", Sampling(0.0), {"tensor": 8}),
        ("olmo", DRAWN, {"data": 2, "tensor": 4}),
        ("afm", DRAWN, {"tensor": 8}),
        ("afm", Sampling(0.0), {"fsdp": 4, "tensor": 2}),
    )
]


@pytest.mark.parametrize(("name", "sampling", "sizes"), [*MESHES, *OTHERS])
def test_a_mesh_writes_what_one_device_writes(
    name: str, sampling: Sampling, sizes: dict[str, Any]
) -> None:
    assert_writes_the_same(name, sampling, sizes)


def test_rows_end_at_different_lengths() -> None:
    """Otherwise the tests above would show nothing of stops."""
    generation = Generation(40, DRAWN, seed=3, stop_ids=STOPS)
    texts = generate(params_of("llama"), TEXTS, MODELS["llama"], FLOAT32, generation)
    assert len({len(text) for text in texts}) > 2


def live_bytes(tree: Any, device: Any) -> int:
    """Bytes that arrays take on a device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize(
    ("name", "sizes", "precision"),
    [("gemma", {"data": 2, "tensor": 4}, FLOAT32), ("afm", {"fsdp": 2, "tensor": 2}, Precision())],
)
def test_memory_is_as_said(name: str, sizes: dict[str, int], precision: Precision) -> None:
    """Of the cache and the weights on each device, for arrays that are there."""
    at_hand = on_mesh(name, precision, **sizes)
    model, layout = MODELS[name], at_hand.layout
    prompts, draws = abstract_prompts(6, 64, layout)
    assert draws.stop_ids.shape == (8,)
    tokens = jax.device_put(np.ones((6, 64), np.int32), prompts.tokens.sharding)
    lengths, number = (
        jax.device_put(values, prompts.lengths.sharding)
        for values in (np.full(6, 60, np.int32), np.arange(6, dtype=np.int32))
    )
    own = jax.device_put(Draws(jax.random.key(0), np.full(8, -1, np.int32)), layout.everywhere())
    run = programs(model, layout.execution, layout.mesh, Sampling(0.0))
    with layout.compiling():
        rows, _ = run.begin(at_hand.params, Prompts(tokens, lengths, number), own, 64)
    for device in layout.mesh.devices.flat:
        assert live_bytes(rows.cache, device) == cache_bytes(model, 6, 128, layout.execution)
        assert live_bytes(at_hand.params, device) == weight_bytes(model, layout)
    said = abstract_rows(model, 6, 64, 64, layout)
    for there, told in zip(jax.tree.leaves(rows), jax.tree.leaves(said), strict=True):
        assert (there.shape, there.dtype) == (told.shape, told.dtype)
        assert there.sharding.is_equivalent_to(told.sharding, there.ndim)


@pytest.mark.optimized
@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"fsdp": 2}])
def test_weights_are_widened_one_layer_at_a_time(sizes: dict[str, int]) -> None:
    """XLA for CPUs would widen the bfloat16 weights of all layers before it computes anything, and
    before the first of the tokens that it draws.
    """
    wide = {"d_model": 256, "num_layers": 12, "ffn_dim": 1024}
    model = ModelConfig.model_validate({**SIZES, **wide})
    mesh = MeshConfig.model_validate({"fsdp": 1, **sizes})
    devices = build(mesh, jax.devices()[: math.prod(mesh.sizes.values())])
    layout = inference_layout(model, Layout(Execution(mesh), devices, decoder.param_specs(model)))
    params = abstract_params(model, layout)
    assert {leaf.dtype for leaf in jax.tree.leaves(params["layers"][0]["up"])} == {
        np.dtype(np.uint16)
    }
    run = programs(model, layout.execution, layout.mesh, Sampling(0.0))
    prompts, draws = abstract_prompts(2, 16, layout)
    rows = abstract_rows(model, 2, 16, 16, layout)
    until = jax.ShapeDtypeStruct((), np.int32, sharding=layout.everywhere())
    begin = run.begin.lower(params, prompts, draws, 16)
    with layout.compiling():
        for program in (begin, run.go_on.lower(params, rows, draws, until)):
            temporaries = program.compile().memory_analysis().temp_size_in_bytes
            # All in float32 would be twice what they are in bfloat16.
            assert temporaries < weight_bytes(model, layout)


def test_a_window_keeps_no_more_than_it_sees() -> None:
    model, execution = (
        MODELS["gemma"],
        inference_layout(MODELS["gemma"], layout_of("gemma")).execution,
    )
    grown = cache_bytes(model, 1, 4096, execution) - cache_bytes(model, 1, 1024, execution)
    # Of three layers two see 24 tokens, of which each has 2 heads of 8 numbers for key and value.
    assert grown == 3072 * 2 * 2 * 8 * 4


def test_it_lowers_without_values() -> None:
    model = MODELS["gemma"]
    layout = inference_layout(model, layout_of("gemma", fsdp=4, tensor=2))
    run = programs(model, layout.execution, layout.mesh, Sampling(0.0))
    params = abstract_params(model, layout)
    prompts, draws = abstract_prompts(8, 64, layout)
    assert "all_gather" in run.begin.lower(params, prompts, draws, 64).as_text()
    rows = abstract_rows(model, 8, 64, 64, layout)
    until = jax.ShapeDtypeStruct((), np.int32, sharding=layout.everywhere())
    assert "all_reduce" in run.go_on.lower(params, rows, draws, until).as_text()


def test_sequences_are_not_split() -> None:
    with pytest.raises(UserError, match="context=2 splits sequences") as error:
        inference_layout(MODELS["llama"], layout_of("llama", context=2))
    assert "data=2" in str(error.value)
    inference_layout(MODELS["llama"], layout_of("llama", data=2))
