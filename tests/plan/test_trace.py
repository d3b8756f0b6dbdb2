"""What the plan reads from traced programs, against JAX's own rematerialisation and closed
formulas.
"""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice

from braeburn.config import LayerConfig, ModelConfig, ObjectiveConfig, Pruning, Remat, override
from braeburn.config.sublayers.reused import ReusedAttention
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.hardware.targets import parse_target
from braeburn.layers.attention.select import outlined
from braeburn.objectives import cross_entropy
from braeburn.plan import blocks, cost, layers
from braeburn.plan.attention import Accelerator
from braeburn.plan.cost import estimate, work_of
from braeburn.plan.graph import flatten, needed, total_collectives, total_flops
from braeburn.plan.search import REMATS
from braeburn.plan.trace import on_each_device
from braeburn.recipes import load

SIZES = {"model.num_layers": 3, "model.d_model": 512, "model.ffn_dim": 1024}
MESHES = [(1, False), (4, True)]


FULL, LAST = LayerConfig(), LayerConfig(attention=SlidingAttention(window=512))
REUSED = LayerConfig(attention=ReusedAttention())
# Patterns of several layers, of several segments, and with layers that reuse keys and values.
PATTERNS: dict[str, dict[str, Any]] = {
    "one": {"num_layers": 3},
    "windows": {"num_layers": 8, "pattern": (LAST, LAST, FULL)},
    "reuse": {"num_layers": 7, "pattern": (FULL,), "tail_pattern": (REUSED,), "tail_layers": 3},
    "reuse in turn": {"num_layers": 4, "pattern": (FULL, REUSED)},
}


def model_of(pattern: str) -> ModelConfig:
    """A model that is large enough for its dimensions to be divided."""
    return override(load("llama3-8b"), SIZES).model.replace(**PATTERNS[pattern])


def shapes(tensor: int, fsdp: bool, pattern: str = "one") -> blocks.Shapes:
    """What the programs of such a model are traced with."""
    precision, stored = load("llama3-8b").precision, ("fsdp",) if fsdp else ()
    split = blocks.Split(tensor, stored)
    return blocks.shapes_of(blocks.sized(model_of(pattern)), precision, split=split)


def whole_gradient(of: blocks.Shapes, remat: Remat) -> Any:
    """The graph of the gradient that JAX makes of a stage's loss under a policy."""
    mesh = of.mesh
    execution = replace(of.execution, remat=remat)
    params, _ = blocks._parameters(of.model, execution)
    integers = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((1, of.tokens), dtype)
        for name, dtype in (integers | {"weights": jnp.float32}).items()
    }

    def loss(params: Any, batch: Any) -> Any:
        return cross_entropy.loss(params, batch, of.model, execution)[0]

    program = on_each_device(jax.grad(loss), mesh, AbstractDevice("", None, "cpu"))
    with outlined(lambda request, arrays, *_: blocks.attention_call(request, *arrays[:3])):
        return flatten(jax.make_jaxpr(program)(params, batch), of.traced)


@pytest.mark.parametrize(
    ("pattern", "remat"),
    [
        *(("one", remat) for remat in (Remat(policy="none"), REMATS[1], REMATS[-2], REMATS[-1])),
        *((pattern, REMATS[-2]) for pattern in PATTERNS if pattern != "one"),
        *(
            pytest.param(pattern, remat, marks=pytest.mark.deep)
            for pattern in PATTERNS
            for remat in (Remat(policy="none"), REMATS[1], REMATS[-1])
            if pattern != "one"
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(("tensor", "fsdp"), MESHES)
def test_products_and_collectives_are_those_of_the_rematerialised_program(
    tensor: int, fsdp: bool, remat: Remat, pattern: str
) -> None:
    of = shapes(tensor, fsdp, pattern)
    graph = whole_gradient(of, remat)
    nodes = needed(graph.nodes, graph.outputs)
    found, around = layers.layers_of(of, remat), layers.around_of(of)
    assert sum(found.flops + around.flops) == pytest.approx(sum(total_flops(nodes)), rel=1e-9)
    planned = {key: moved.bytes for key, moved in found.collectives.items()}
    for key, moved in around.collectives.items():
        planned[key] = planned[key] + moved.bytes if key in planned else moved.bytes
    traced = {key: moved.bytes for key, moved in total_collectives(nodes).items()}
    assert planned.keys() == traced.keys()
    for key, size in traced.items():
        assert sum(planned[key]) == pytest.approx(sum(size), rel=1e-9), key


@pytest.mark.parametrize(("tensor", "fsdp"), MESHES)
def test_layers_multiply_and_keep_what_formulas_say(tensor: int, fsdp: bool) -> None:
    of = shapes(tensor, fsdp)
    model = of.model
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    width = {
        "query": heads,
        "key": kv_heads,
        "value": kv_heads,
        "attention": heads,
        "attention_output": model.d_model,
        "ffn_gate": model.ffn_dim,
        "ffn_up": model.ffn_dim,
    }
    once = 2 * model.d_model * (2 * heads + 2 * kv_heads + 3 * model.ffn_dim)
    last = 2 * model.d_model * model.ffn_dim
    for remat, again in ((REMATS[0], 0), (REMATS[-1], once - last)):
        found = layers.layers_of(of, remat)
        expected = model.num_layers * of.tokens * (3 * once + again) / tensor
        assert found.flops == pytest.approx((0, expected))
        names = remat.names if remat.policy == "save_named" else ()
        for name in names:
            kept = model.num_layers * 2 * width[name] * of.tokens / tensor
            assert found.kept[name] == pytest.approx((0, kept)), name
        # A layer's input, of the tensor shard's own tokens.
        assert sum(found.kept[""]) == model.num_layers * 2 * model.d_model * of.tokens / tensor
        if fsdp:
            weights = once / 2 / tensor
            assert found.weights == pytest.approx((2 * weights, 4 * weights))


def test_sizes_between_two_that_are_traced_are_those_of_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, remat = shapes(4, True), REMATS[1]
    assert blocks.neighbours(of)
    mixed = layers.layers_of(of, remat)
    monkeypatch.setattr(layers, "neighbours", lambda shapes: None)
    layers._layers.cache_clear()
    traced = layers.layers_of(of, remat)
    layers._layers.cache_clear()
    assert mixed.flops == pytest.approx(traced.flops)
    assert mixed.element_wise == pytest.approx(traced.element_wise)
    assert mixed.calls == traced.calls
    assert mixed.weights == pytest.approx(traced.weights)
    for name, size in traced.kept.items():
        assert mixed.kept[name] == pytest.approx(size), name
    # An array may be written over one that is as large for this size of `tensor` alone.
    for one, other in zip(mixed.live, traced.live, strict=True):
        assert one[0] == pytest.approx(other[0], rel=0.1)
    fullest = [max(size.scaled for size, _ in each.live) for each in (mixed, traced)]
    assert fullest[0] == pytest.approx(fullest[1])


def test_nothing_but_attention_crosses_context() -> None:
    run = override(load("llama3-8b"), SIZES)
    assert not blocks.crosses_context(blocks.sized(run.model), run.precision, run.rules)


def test_attention_without_a_kernel_takes_the_memory_that_it_was_compiled_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In plain XLA, as GPUs of AMD take it and TPUs would without Splash, 29.9 GiB by libtpu.
    monkeypatch.setattr(cost, "accelerator_of", lambda _: Accelerator("rocm"))
    found = estimate(load("afm-85m"), "core", parse_target("v6e:1"))
    assert 0.95 * 29.9 < found.total_gib < 1.25 * 29.9
    assert found.memory["workspace"] > 20


def test_heads_that_fill_no_lanes_are_planned_with_their_filling() -> None:
    # 26.1 GiB by libtpu, of which the plan lacks what rotated halves of heads are filled up by.
    found = estimate(load("afm-85m"), "core", parse_target("v6e:1"))
    assert 0.8 * 26.1 < found.total_gib < 26.1
    kept = found.memory["activations"] * 2**30
    batch, model = load("afm-85m").stages["core"].batch_tokens, load("afm-85m").model
    residual, filled = 2 * model.d_model, 2 * model.num_heads * 128
    assert kept > batch * model.num_layers * (residual + filled)


def test_masks_on_several_axes_keep_what_comes_between() -> None:
    run = load("afm-tiny")
    name, stage = next(iter(run.stages.items()))
    ffn = run.model.ffn_dim // 2

    def transformed(**keep: int) -> int:
        stages = {name: stage.model_copy(update={"pruning": Pruning(keep=keep)})}
        changed = run.model_copy(update={"stages": stages})
        return work_of(changed, name, run.mesh).transformed

    down = run.model.num_layers * run.model.ffn_dim * run.model.d_model
    one, both = transformed(ffn=ffn), transformed(ffn=ffn, embed=run.model.d_model // 2)
    assert one == pytest.approx(down, rel=0.05)
    # The matrix that both axes mask is kept between the two masks as well.
    assert both >= one + down


class Costly(ObjectiveConfig):
    """An objective that is not Braeburn's own."""

    kind: str = "costly"


@dataclass(frozen=True)
class CostlyCrossEntropy(cross_entropy.CrossEntropy):
    """Cross-entropy with one more matrix product, of the logits and a square of the vocabulary."""

    def logit_gradient(self, statistics: Any, block: Any, tokens: Any, dtype: Any) -> Any:
        gradient = super().logit_gradient(statistics, block, tokens, dtype)
        square = jnp.outer(block.logits[0, 0], block.logits[0, 0])
        return gradient + (block.logits @ square).astype(dtype)


def test_the_objective_of_a_stage_is_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(DEFINITION=lambda config, model: CostlyCrossEntropy(model.z_loss))
    monkeypatch.setitem(sys.modules, "braeburn.objectives.costly", module)
    usual = shapes(1, False)
    costly = blocks.shapes_of(usual.model, usual.precision, learns=Costly())
    more = sum(layers.around_of(costly).flops) - sum(layers.around_of(usual).flops)
    assert costly.tokens == usual.tokens
    product = 2 * usual.tokens * usual.model.vocab_size**2
    assert more >= product and more == pytest.approx(product, rel=0.01)


def test_the_plan_takes_the_objective_of_the_stage() -> None:
    run = load("llama3-8b")
    name = next(iter(run.stages))
    work = work_of(run, name, run.mesh.replace(fsdp=16))
    assert work.shapes.learns == run.stages[name].objective
