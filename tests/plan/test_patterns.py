"""The plan of models whose layers differ, and of runs whose rules are not the usual ones."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_cost import NAMES, SIZES, check_collectives

from braeburn.config import LayerConfig, MeshConfig, Run, override
from braeburn.config.sublayers.reused import ReusedAttention
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.hardware.targets import parse_target
from braeburn.layers.attention.backend import BLOCK, Request
from braeburn.layers.spec import count
from braeburn.models.decoder import param_specs
from braeburn.models.families import gemma3, gpt_oss
from braeburn.plan import blocks
from braeburn.plan.attention import Accelerator, attention_of
from braeburn.plan.cost import Estimate, estimate, work_of
from braeburn.plan.forward import accelerator_of
from braeburn.plan.graph import Amount
from braeburn.plan.search import candidates
from braeburn.plan.totals import Kernels
from braeburn.recipes import load
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage

TPU = accelerator_of(parse_target("v5p:64").facts)


@pytest.mark.parametrize("window", [1, 16, 17, 40, 128, 500, None])
@pytest.mark.parametrize("tile", [16, 32, 128])
def test_tiles_are_those_with_a_visible_pair(window: int | None, tile: int) -> None:
    length = 128
    queries, keys = np.arange(length)[:, None], np.arange(length)
    seen = (queries >= keys) & (queries - keys < (window or length))
    tiles = seen.reshape(length // tile, tile, length // tile, tile).any(axis=(1, 3)).sum()
    once = Kernels(Amount(), 2, 1, window, skips=True)
    assert once.keys(length, tile) == pytest.approx(2 * tiles * tile**2 / length)
    assert Kernels(Amount(), 2, 1, window, skips=False).keys(length, tile) == 2 * length


def test_each_layer_of_gemma_multiplies_the_keys_in_its_reach() -> None:
    run, mesh = load("gemma3-1b"), MeshConfig(fsdp=64)
    work = work_of(run, "pretrain", mesh, TPU)
    model, stage, length = work.model, work.stage, work.stage.sequence_length
    tile, products = 512, 2 + 7
    expected = 0
    for layer in model.layer_configs:
        window = getattr(layer.attention, "window", length)
        starts = np.arange(0, length, tile)
        tiles = (starts - np.maximum(0, starts - window + 1) // tile * tile) // tile + 1
        pairs = tiles.sum() * tile**2 * stage.batch_tokens // length
        expected += products * 2 * model.num_heads * model.head_dim * pairs // 64
    assert [kernels.window for kernels in work.totals.kernels].count(512) == 1
    assert work.attention_flops(tile, 7) == pytest.approx(expected, rel=1e-12)


def test_layers_that_reuse_keys_have_none_to_make_or_to_gather() -> None:
    run, mesh = load("afm-on-device-2025"), MeshConfig(fsdp=128)
    run = override(run, {"remat.policy": "none"})
    work = work_of(run, "core", mesh, TPU)
    model = work.model
    heads, keys = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    makes, reuses = model.num_layers - model.tail_layers, model.tail_layers
    layer = model.d_model * (2 * heads + 3 * model.ffn_dim)
    weights = (makes + reuses) * layer + makes * model.d_model * 2 * keys
    assert work.at(work.totals.flops) == 6 * weights * work.tokens
    # The logits are formed a second time, block by block of the vocabulary.
    assert work.at(work.around.flops) == 8 * model.vocab_size * model.d_model * work.tokens
    gathered = sum(
        total.bytes
        for total in work.collective_totals()
        if (total.kind, total.what) == ("all-gather", "weights")
    )
    # bfloat16, before the forward and before the backward pass; and the norms in float32, once.
    assert gathered == pytest.approx(2 * 2 * (weights + model.vocab_size * model.d_model), rel=1e-3)
    assert work.totals.weights[0] == pytest.approx(2 * (layer + model.d_model * 2 * keys))


def test_memory_is_that_of_one_layer_of_a_pattern_at_a_time() -> None:
    run, mesh = load("gemma3-1b"), MeshConfig(fsdp=64)
    alone = run.model.replace(pattern=run.model.pattern[-1:])
    same = run.model_copy(update={"model": alone})
    pattern, one = (work_of(each, "pretrain", mesh, TPU) for each in (run, same))
    assert pattern.at(pattern.totals.kept) == pytest.approx(one.at(one.totals.kept))
    assert pattern.totals.weights == one.totals.weights
    assert pattern.matrix_flops == pytest.approx(one.matrix_flops)


def test_a_layer_of_a_pattern_holds_what_it_holds_alone() -> None:
    run, mesh = load("gemma3-1b"), MeshConfig(fsdp=64)
    alone = run.model.replace(pattern=run.model.pattern[-1:])
    same = run.model_copy(update={"model": alone})
    pattern, one = (work_of(each, "pretrain", mesh, TPU) for each in (run, same))
    assert max(map(pattern.at, pattern.totals.live)) == pytest.approx(
        max(map(one.at, one.totals.live))
    )


def test_attention_without_a_kernel_multiplies_what_its_spans_reach() -> None:
    length, window = 1024, 200
    request = Request("cpu", jnp.dtype(jnp.float32), length, 1, 1, 32, 32, window=window)
    found, _ = attention_of(Accelerator("cpu"), request)
    keys = sum(
        BLOCK * (start + BLOCK - max(0, start - window + 1)) for start in range(0, length, BLOCK)
    )
    assert found.forward.flops == 2 * 2 * 32 * keys
    whole, _ = attention_of(Accelerator("cpu"), Request("cpu", request.dtype, length, 1, 1, 32, 32))
    assert found.live < whole.live


@pytest.mark.parametrize("ring", [False, True])
def test_attention_with_sinks_costs_what_it_does_without(ring: bool) -> None:
    def asked(sinks: bool) -> Any:
        shards = 4 if ring else 1
        heads = (2, 1, 32, 32, shards, ring)
        request = Request("cpu", jnp.dtype(jnp.float32), 1024, *heads, sinks=sinks)
        return attention_of(Accelerator("cpu"), request)[0]

    found, without = asked(True), asked(False)
    assert found.forward.flops == without.forward.flops
    assert found.backward.flops == without.backward.flops
    assert found.backward.collectives == without.backward.collectives
    assert found.forward.element_wise > without.forward.element_wise


def test_layers_differ_by_window_where_a_back_end_has_none() -> None:
    # cuDNN takes the layers that see all tokens, and for want of a window not the others.
    run, mesh = load("gemma3-1b"), MeshConfig(fsdp=8)
    model = run.model.replace(head_dim=128)
    stage = run.stages["pretrain"].model_copy(update={"sequence_length": 4096})
    run = run.model_copy(update={"model": model, "stages": {"pretrain": stage}})
    work = work_of(run, "pretrain", mesh, Accelerator("cuda", (9, 0)))
    kinds = {each.window: each.skips for each in work.totals.kernels}
    assert kinds == {512: False, None: True}


MODELS: dict[str, dict[str, Any]] = {
    "windows": {"pattern": gemma3.pattern(16)[-3:], "num_layers": 8, "scaled_embedding": True},
    "reuse": {
        "tail_pattern": (LayerConfig(attention=ReusedAttention()),),
        "tail_layers": 3,
        "num_layers": 7,
    },
    "sinks and biases": {
        "pattern": gpt_oss.layers(16, num_experts=4, experts_per_token=2, expert_dim=64),
        "num_layers": 4,
        "qk_norm": False,
    },
}


def small(tiny: Run, mesh: dict[str, int], policy: str, changes: dict[str, Any]) -> Run:
    """The tiny run on eight devices."""
    common: dict[str, Any] = {"mesh.fsdp": 1, "remat.policy": policy, "remat.names": NAMES}
    common |= {"stages.core.batch_tokens": 4096, "stages.core.tokens": 40_960}
    return override(
        tiny, SIZES | common | changes | {f"mesh.{axis}": size for axis, size in mesh.items()}
    )


@pytest.mark.parametrize(
    ("model", "mesh", "policy"),
    [
        pytest.param("windows", {"fsdp": 4, "tensor": 2}, "save_named", marks=pytest.mark.deep),
        pytest.param("windows", {"fsdp": 2, "context": 4}, "full", marks=pytest.mark.deep),
        ("reuse", {"fsdp": 4, "tensor": 2}, "save_named"),
        pytest.param("reuse", {"fsdp": 2, "context": 4}, "full", marks=pytest.mark.deep),
        pytest.param(
            "sinks and biases", {"fsdp": 4, "tensor": 2}, "save_named", marks=pytest.mark.deep
        ),
        pytest.param("sinks and biases", {"fsdp": 2, "expert": 4}, "full", marks=pytest.mark.deep),
    ],
)
def test_collectives_of_layers_that_differ_are_those_of_the_compiled_step(
    model: str, mesh: dict[str, int], policy: str, tiny: Run
) -> None:
    run = small(tiny, mesh, policy, {})
    run = run.model_copy(update={"model": run.model.replace(**MODELS[model])})
    stage = resolve_stage(run, "core")
    layout = stage.layout
    compiled: Any = compile_stage(stage).step
    check_collectives(compiled, work_of(run, "core", layout.sizes), 0.1)


# Optimizer state split where parameters are not (ZeRO-1), or further than they are.
RULES: list[Any] = [
    ({"fsdp": 8}, {"rules.embed.parameters": []}),
    ({"data": 2, "fsdp": 4}, {"rules.embed.optimizer": ["fsdp", "data"]}),
    pytest.param(
        {"fsdp": 8},
        {"rules.embed.parameters": [], "rules.embed.optimizer": []},
        marks=pytest.mark.deep,
    ),
]


@pytest.mark.parametrize(("mesh", "rules"), RULES, ids=str)
def test_memory_and_collectives_follow_the_rules(
    mesh: dict[str, int], rules: dict[str, Any], tiny: Run
) -> None:
    run = small(tiny, mesh, "full", rules)
    stage = resolve_stage(run, "core")
    layout = stage.layout
    compiled: Any = compile_stage(stage).step
    work = work_of(run, "core", layout.sizes)
    check_collectives(compiled, work, 0.02)
    stored = 4 * work.shard + work.optimizer_bytes
    arguments = compiled.memory_analysis().argument_size_in_bytes - 5 * 4 * work.tokens
    assert arguments == pytest.approx(stored, abs=1024)
    usual = work_of(small(tiny, mesh, "full", {}), "core", layout.sizes)
    assert 4 * usual.shard + usual.optimizer_bytes != pytest.approx(stored, rel=0.02)


def test_rules_reach_the_programs_that_are_traced() -> None:
    run, target = load("llama2-7b"), parse_target("v5p:256")
    run = override(run, {"mesh.data": 1, "mesh.fsdp": 256})
    whole = override(run, {"rules.embed.parameters": [], "rules.embed.optimizer": []})
    usual, kept = (estimate(each, "pretrain", target) for each in (run, whole))
    assert kept.memory["parameters"] > 100 * usual.memory["parameters"]

    def moved(found: Estimate) -> float:
        return sum(
            total.bytes
            for total, _, _ in found.collectives
            if total.what in ("weights", "gradients") and total.axis == "fsdp"
        )

    # Of matrices: gathered in both passes in bfloat16, and gradients summed in float32; or these
    # alone.
    weights = count(param_specs(run.model), ("matrix",))
    assert 8 * weights < moved(usual) < 8.5 * weights
    assert 4 * weights < moved(kept) < 4.5 * weights
    best = candidates(whole, "pretrain", parse_target("v5p:64"))[0]
    assert best.estimate.memory["parameters"] == pytest.approx(
        work_of(whole, "pretrain", best.sizes).memory()["parameters"]
    )


def test_layouts_that_the_rules_do_not_allow_are_left_out() -> None:
    run = override(load("llama2-7b"), {"rules.ffn.parameters": ["tensor", "data"]})
    # 11,008 hidden units are 43 times 256.
    assert all(
        11_008 % (found.sizes.tensor * found.sizes.data) == 0
        for found in candidates(run, "pretrain", parse_target("v5p:512"))
    )


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = 0
    differentiate = blocks.differentiate

    def counting(*arguments: Any) -> Any:
        nonlocal traced
        traced += 1
        return differentiate(*arguments)

    monkeypatch.setattr(blocks, "differentiate", counting)
    run = load("gemma3-1b")
    model = blocks.sized(run.model.replace(norm_epsilon=2e-6))  # that no other test has traced
    found = blocks.programs(blocks.shapes_of(model, run.precision))
    # Two kinds of layer in the pattern, one in what is left of it, and what is around them.
    assert traced == 3 + 1
    assert [block.repeats for block in found.blocks] == [20, 4, 2]
    assert sum(isinstance(each.attention, SlidingAttention) for each in model.layer_configs) == 22


@pytest.mark.deep
def test_the_largest_plan_traces_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[blocks.Shapes] = []
    whole = blocks.programs.__wrapped__

    def counting(shapes: blocks.Shapes) -> Any:
        if shapes not in traced:
            traced.append(shapes)
        return programs(shapes)

    programs = blocks.cache(whole)
    for module in ("blocks", "layers"):
        monkeypatch.setattr(f"braeburn.plan.{module}.programs", counting)
    run = load("afm-server")
    run = run.model_copy(update={"model": run.model.replace(norm_epsilon=2e-6)})
    for name in run.stages:
        candidates(run, name, parse_target("v4:8x1024"))
    # Each number of devices along tensor, with and without weights that are split further: with a
    # pipeline they need not be.
    assert len(traced) <= 10
