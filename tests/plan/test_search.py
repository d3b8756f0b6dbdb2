"""The layouts that are found: they divide the model, reproduce when set, and cross slices with
replicas alone.
"""

import math
from itertools import pairwise, product

import pytest

from braeburn.config import MeshConfig, Precision, override
from braeburn.hardware.links import Links
from braeburn.hardware.targets import parse_target
from braeburn.plan.blocks import Split, shapes_of
from braeburn.plan.cost import estimate, estimate_work, work_of
from braeburn.plan.forward import accelerator_of
from braeburn.plan.ranking import why_nothing_fits
from braeburn.plan.search import REMATS, _fastest, candidates, larger_targets, meshes
from braeburn.recipes import load
from braeburn.train.resolved import sizes_of


@pytest.mark.parametrize("stage", ["core", "continued", "context"])
def test_only_replicas_cross_slices(stage: str) -> None:
    target = parse_target("v4:8x1024")
    best = candidates(load("afm-server"), stage, target)[0]
    assert best.estimate.fits
    assert best.sizes.replica == 8
    assert {e.axis for e, link, _ in best.estimate.collectives if link == "DCN"} == {"replica"}


@pytest.mark.parametrize(
    ("recipe", "stage", "target"),
    [
        ("afm-server", "core", "v4:2x128"),
        ("llama2-7b", "pretrain", "h100:64"),
        ("qwen3-8b", "context", "v6e:64"),
    ],
)
def test_layouts_are_what_they_say(recipe: str, stage: str, target: str) -> None:
    run, on = load(recipe), parse_target(target)
    found = candidates(run, stage, on)
    assert len({str(c.sizes.sizes) for c in found}) == len(found) > 10
    fitting = [c for c in found if c.estimate.fits]
    assert found[: len(fitting)] == fitting
    for one, other in pairwise(fitting):
        assert one.estimate.step <= other.estimate.step
    for candidate in found[:10]:
        changed = override(run, candidate.assignments)
        sizes = sizes_of(changed, stage, on.chips)  # the same refusals as in training
        assert sizes.sizes == candidate.sizes.sizes
        assert estimate(changed, stage, on).step == pytest.approx(candidate.estimate.step)
        assert math.prod(sizes.sizes.values()) == on.chips


def test_no_layout_of_the_search_is_better_than_the_first() -> None:
    run, target = load("llama2-7b"), parse_target("v5p:64")
    best = candidates(run, "pretrain", target)[0].estimate
    for mesh in (
        {"fsdp": 64},
        {"data": 8, "fsdp": 8},
        {"fsdp": 16, "tensor": 4},
        {"fsdp": 32, "context": 2},
    ):
        for policy in ("full", "save_named"):
            changes = {f"mesh.{axis}": mesh.get(axis, 1) for axis in run.mesh.sizes} | {
                "remat.policy": policy
            }
            for steps in (1, 4):
                changes["stages.pretrain.accumulation_steps"] = steps
                other = estimate(override(run, changes), "pretrain", target)
                assert not other.fits or other.step >= best.step


def test_meshes_are_those_that_divide() -> None:
    run, target = load("llama2-7b"), parse_target("h100:16")
    found = list(meshes([run.model], run.stages["pretrain"], target))
    assert MeshConfig(replica=1, data=2, fsdp=1, context=1, tensor=8) in found
    assert all(mesh.tensor <= 8 for mesh in found)  # a node
    assert len(found) == len(set(map(str, found)))


def test_what_cannot_fit_is_told_with_what_would() -> None:
    run, target = load("llama2-7b"), parse_target("v5e:1")
    found = candidates(run, "pretrain", target)
    assert not any(c.estimate.fits for c in found)
    more, layout = next(larger_targets(run, "pretrain", target))
    assert more.chips > 2  # of which there is no slice
    assert layout.estimate.fits
    sentence = why_nothing_fits(run, "pretrain", target, found)
    assert "needs " in sentence
    assert "15.8 are there" in sentence
    assert f"{more} has room" in sentence
    half = parse_target(f"v5e:{more.chips // 2}")
    assert all(
        c.estimate.total_gib > 0.9 * c.estimate.usable_gib
        for c in candidates(run, "pretrain", half)
    )


def test_a_number_of_chips_that_divides_nothing_is_told() -> None:
    run = override(
        load("llama2-7b"),
        {"stages.pretrain.batch_tokens": 4096 * 3, "stages.pretrain.tokens": 10**9},
    )
    target = parse_target("h100:40")
    assert "no mesh of 40 chips divides" in why_nothing_fits(run, "pretrain", target, [])


def test_unknown_networks_leave_the_end_of_the_interval_unknown() -> None:
    best = candidates(load("llama2-7b"), "pretrain", parse_target("s4000:64"))[0]
    assert best.estimate.serial is None
    assert any(seconds is None for _, _, seconds in best.estimate.collectives)
    assert best.estimate.confidence == "M"


def test_a_torus_that_is_set_is_used() -> None:
    target = parse_target("v4:64")
    torus = {"fsdp": (4, 4, 1), "tensor": (1, 1, 4)}
    assert Links(target, MeshConfig(fsdp=16, tensor=4, torus=torus)).torus == torus


def test_experts_are_split_where_a_model_has_some() -> None:
    fields = {"kind": "experts", "num_experts": 4, "experts_per_token": 1}
    sparse = override(
        load("afm-tiny"),
        {f"model.pattern.0.feed_forward.{name}": value for name, value in fields.items()}
        | {"mesh.expert_room": 2.0},
    )
    target = parse_target("h100:4")
    split = [c for c in candidates(sparse, "core", target) if c.sizes.expert > 1]
    assert {c.sizes.expert for c in split} == {2, 4}
    # Over two shards a gather moves no more bytes than tokens that are sent with this room.
    assert {c.sizes.expert_dispatch for c in split if c.sizes.expert == 2} == {"gather"}
    for candidate in split:
        assert candidate.sizes.expert_room == 2.0
        changed = override(sparse, candidate.assignments)
        assert sizes_of(changed, "core", 4).sizes == candidate.sizes.sizes
        again = estimate(changed, "core", target)
        assert again.step == pytest.approx(candidate.estimate.step)
    dense = load("afm-tiny")
    assert all(m.expert == 1 for m in meshes([dense.model], dense.stages["core"], target))


def test_a_model_whose_sizes_have_all_small_primes_is_planned_on_wide_tensor_meshes() -> None:
    # Of the primes up to 500 / 64, 7 divides d_model, 5 the vocabulary, 3 the layers and 2 all.
    shapes = shapes_of(load("deepseek-v3").model, Precision(), split=Split(tensor=64))
    assert shapes.marker == 11


@pytest.mark.parametrize(
    ("recipe", "stage", "target", "sizes", "offered"),
    [
        ("llama2-7b", "pretrain", "h100:64", {"fsdp": 16, "tensor": 4}, range(7)),
        ("llama2-70b", "pretrain", "v5p:64", {"fsdp": 8, "pipeline": 8}, range(3, 10)),
        ("qwen3-30b-a3b", "general", "v5p:64", {"fsdp": 8, "expert": 8}, range(5)),
    ],
)
def test_what_is_passed_over_is_not_faster(
    recipe: str, stage: str, target: str, sizes: dict[str, int], offered: range
) -> None:
    """The fastest of a mesh, beside all that there are."""
    run, on = load(recipe), parse_target(target)
    work = work_of(run, stage, MeshConfig(**sizes), accelerator_of(on.facts))
    links = Links(on, work.mesh)
    found = _fastest(work, work.mesh, on, links)
    assert found and found[1].fits
    every = []
    each_has = (1, 2) if work.mesh.pipeline > 1 else (1,)
    for power, remat, each in product(offered, REMATS, each_has):
        mesh = work.mesh.model_copy(update={"stages_per_device": each})
        changes = {"accumulation_steps": 2**power, "remat": remat, "mesh": mesh}
        if each > 1 and 2**power % mesh.pipeline:
            continue
        one = work.varied(stage=work.stage.model_copy(update=changes), mesh=mesh)
        if one.memory_gib <= found[1].usable_gib:
            every.append(estimate_work(one, on, links).step)
    assert len(every) > 10
    assert found[1].step == pytest.approx(min(every), rel=1e-12)


def test_sizes_that_small_primes_divide_are_planned() -> None:
    """With `tensor=64` few tokens are traced, and 2, 3, 5 and 7 each divide a size of the model."""
    run = override(load("llama3-70b"), {"mesh.fsdp": 4, "mesh.tensor": 64})
    found = estimate(run, next(iter(run.stages)), parse_target("v6e:256"))
    other = override(run, {"mesh.fsdp": 8, "mesh.tensor": 32})
    half = estimate(other, next(iter(run.stages)), parse_target("v6e:256"))
    assert found.seconds["matrix"] == pytest.approx(half.seconds["matrix"], rel=0.1)
