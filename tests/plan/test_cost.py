"""Predicted memory, traffic and time, against what compilers and publications say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from braeburn.config import (
    Distillation,
    MeshConfig,
    Pruning,
    Quantization,
    Run,
    Stage,
    override,
    validate,
)
from braeburn.errors import UserError
from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.links import Links
from braeburn.hardware.targets import parse_target
from braeburn.layers.spec import count
from braeburn.models.decoder import param_specs
from braeburn.plan.collectives import collectives, traffic
from braeburn.plan.cost import (
    Work,
    divided_work,
    estimate,
    estimate_work,
    labelling_seconds,
    work_of,
)
from braeburn.plan.search import candidates
from braeburn.recipes import load
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage

ROOT = Path(__file__).parents[2]
NAMES = ["query", "key", "value", "attention", "ffn_gate", "ffn_up"]

# Peak GiB on a chip that libtpu 0.0.52 gives for the compiled step, or says is lacking
# (docs/log/plan.md).
FIVE = ["value", "attention", "attention_output", "ffn_gate", "ffn_up"]
FULL = {"remat.policy": "full", "precision.reduce": "float32"}
WHOLE = {"mesh.data": 1, "mesh.fsdp": -1}
DEVICE = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 2, "remat.names": NAMES}
COMPILED: list[tuple[str, str, str, dict[str, Any], float]] = [
    ("afm-server", "core", "v4:8x1024", {"mesh.replica": 8} | FULL, 5.17),
    ("afm-server", "core", "v4:8x1024", {"mesh.replica": 8, "remat.names": NAMES}, 28.13),
    ("afm-server", "core", "v4:8x1024", {"mesh.replica": 8, "remat.names": FIVE}, 27.73),
    (
        "afm-server",
        "context",
        "v4:8x1024",
        {
            "stages.context.mesh.replica": 8,
            "stages.context.remat.policy": "full",
            "precision.reduce": "float32",
        },
        8.63,
    ),
    ("afm-on-device-scratch", "core", "v5p:2048", DEVICE, 6.19),
    (
        "afm-on-device-scratch",
        "core",
        "v5p:2048",
        {"mesh.data": 16, "mesh.fsdp": 128, "remat.policy": "none"},
        26.71,
    ),
    ("afm-on-device-scratch", "context", "v5p:2048", {"remat.names": NAMES}, 6.30),
    ("llama2-7b", "pretrain", "v5p:256", {}, 49.72),
    ("llama2-7b", "pretrain", "v5p:256", WHOLE | {"remat.names": NAMES}, 45.0),
    ("llama2-7b", "pretrain", "v5p:256", {"remat.names": NAMES}, 46.25),
    ("llama2-7b", "pretrain", "v5p:256", WHOLE | {"remat.policy": "none"}, 146.5),
    ("llama2-70b", "pretrain", "v5p:512", {}, 90.17),
    ("llama2-70b", "pretrain", "v5p:512", WHOLE | {"remat.names": NAMES}, 109.9),
    (
        "llama2-70b",
        "pretrain",
        "v5p:512",
        WHOLE
        | {"remat.names": [*NAMES, "attention_output"], "stages.pretrain.accumulation_steps": 2},
        61.66,
    ),
    ("llama3-8b", "pretrain", "v6e:256", {"remat.names": NAMES}, 91.0),
]


@pytest.mark.parametrize(("recipe", "stage", "target", "changes", "compiled"), COMPILED)
def test_memory_is_what_the_compiler_needs(
    recipe: str, stage: str, target: str, changes: dict[str, Any], compiled: float
) -> None:
    found = estimate(override(load(recipe), changes), stage, parse_target(target))
    assert 0.95 * compiled < found.total_gib < 1.25 * compiled
    assert found.fits == (found.total_gib <= found.usable_gib)


# Of mixtures of experts (libtpu 0.0.50.1, jax-cuda13-pjrt 0.12.0.1).
SPLIT = {"mesh.expert": 8}
BY_ALL_TO_ALL = SPLIT | {"mesh.expert_dispatch": "all_to_all"}
PARTS = {"stages.general.accumulation_steps": 4}
MIXTURES: list[tuple[str, str, dict[str, Any], float]] = [
    ("qwen3-30b-a3b", "v5p:64", {}, 36.25),
    ("qwen3-30b-a3b", "v5p:64", SPLIT, 40.15),
    ("qwen3-30b-a3b", "v5p:64", SPLIT | PARTS, 18.30),
    ("qwen3-30b-a3b", "v5p:64", BY_ALL_TO_ALL, 39.65),
    ("qwen3-30b-a3b", "v5p:64", BY_ALL_TO_ALL | PARTS, 17.98),
    ("qwen3-30b-a3b", "h100:64", {}, 34.82),
    ("qwen3-30b-a3b", "h100:64", SPLIT, 40.57),
    ("qwen3-30b-a3b", "h100:64", BY_ALL_TO_ALL, 39.79),
    ("qwen3-235b-a22b", "v5p:256", BY_ALL_TO_ALL | {"mesh.expert": 16}, 37.88),
    (
        "qwen3-30b-a3b",
        "h100:64",
        BY_ALL_TO_ALL
        | PARTS
        | {"mesh.expert": 4, "remat.policy": "save_named", "remat.names": ["attention"]},
        24.86,
    ),
    (
        "qwen3-30b-a3b",
        "v5p:64",
        {"mesh.pipeline": 4, "stages.general.accumulation_steps": 16},
        23.52,
    ),
    (
        "qwen3-30b-a3b",
        "v5p:64",
        {"mesh.pipeline": 4, "mesh.expert": 4, "stages.general.accumulation_steps": 16},
        26.53,
    ),
]


@pytest.mark.parametrize(("recipe", "target", "changes", "compiled"), MIXTURES)
def test_memory_of_experts_is_what_the_compiler_needs(
    recipe: str, target: str, changes: dict[str, Any], compiled: float
) -> None:
    run = override(load(recipe), {"remat.policy": "full"} | changes)
    found = estimate(run, "general", parse_target(target))
    assert found.total_gib == pytest.approx(compiled, rel=0.1)


def test_the_plan_counts_the_products_of_the_back_end() -> None:
    """On NVIDIA's GPUs half of the last block of each expert is empty; without kernels there are
    as many blocks as there can be at most, each with a copy of its matrix.
    """
    run = override(load("qwen3-30b-a3b"), {"remat.policy": "full"})
    on = [parse_target(f"{chip}:64") for chip in ("v5p", "h100")]
    tpu, gpu = (divided_work(run, "general", target) for target in on)
    # Forward, once more, and both gradients.
    products = 3 + 3 + 6
    once = 2 * 128 * 2048 * 768 * run.model.num_layers
    assert gpu.matrix_flops - tpu.matrix_flops == pytest.approx(products * once * 64, rel=1e-6)
    precise = override(run, {"precision.compute": "float32"})
    loop, kernel = (divided_work(precise, "general", target) for target in reversed(on))
    assert loop.matrix_flops - kernel.matrix_flops == pytest.approx(products * once * 256, rel=1e-6)
    blocks = (8 * loop.tokens / 256 + 128) * run.model.num_layers
    # At least a matrix copied and read for each block of the nine products of rows.
    copied = 9 * blocks * 3 * 4 * 2048 * 768
    assert loop.memory_bytes - kernel.memory_bytes > copied
    assert loop.memory_gib > kernel.memory_gib


@pytest.mark.parametrize(
    ("target", "mesh", "kinds"),
    [
        ("v5p:64", {"fsdp": 64}, {"all-reduce"}),
        ("v5p:128", {"data": 2, "fsdp": 64}, {"all-gather", "reduce-scatter"}),
        ("v6e:64", {"fsdp": 64}, {"all-gather", "all-reduce"}),
        ("v5p:512", {"data": 2, "fsdp": 256}, {"all-gather", "all-reduce"}),
        ("h100:64", {"fsdp": 64}, {"all-gather", "reduce-scatter"}),
    ],
)
def test_sums_over_whole_slices_are_planned_as_libtpu_writes_them(
    target: str, mesh: dict[str, int], kinds: set[str]
) -> None:
    run, on = load("llama2-7b"), parse_target(target)
    work = work_of(run, "pretrain", MeshConfig(**mesh))
    found = estimate_work(work, on, Links(on, work.mesh)).collectives
    own = {each.kind for each, _, _ in found if each.axis == "fsdp" and each.what == "weights"}
    assert own == kinds


def test_experts_joined_with_fsdp_over_a_whole_slice_are_sums() -> None:
    run, on = override(load("qwen3-30b-a3b"), {"mesh.expert": 8}), parse_target("v5p:64")
    kinds: dict[str, set[str]] = {}
    for each, _, _ in estimate(run, "general", on).collectives:
        if each.what == "weights":
            kinds.setdefault(each.axis, set()).add(each.kind)
    assert kinds == {"fsdp": {"all-gather", "reduce-scatter"}, "fsdp x expert": {"all-reduce"}}


LAYOUTS: list[Any] = [
    pytest.param({"fsdp": 8}, "save_named", marks=pytest.mark.deep),
    pytest.param({"data": 2, "fsdp": 4}, "full", marks=pytest.mark.deep),
    ({"replica": 2, "fsdp": 4}, "save_named"),
    pytest.param({"fsdp": 4, "tensor": 2}, "full", marks=pytest.mark.deep),
    ({"fsdp": 4, "tensor": 2}, "save_named"),
    ({"fsdp": 2, "context": 4}, "full"),
    pytest.param({"context": 8, "context_attention": "ring"}, "full", marks=pytest.mark.deep),
    ({"context": 8, "context_attention": "ring"}, "save_named"),
]
SIZES = {"model.d_model": 128, "model.ffn_dim": 320, "model.head_dim": 32, "model.num_layers": 4}


@pytest.mark.parametrize(("mesh", "policy"), LAYOUTS, ids=str)
def test_collectives_are_those_of_the_compiled_step(
    mesh: dict[str, Any], policy: str, tiny: Run
) -> None:
    changes: dict[str, Any] = {"mesh.fsdp": 1, "remat.policy": policy, "remat.names": NAMES}
    changes |= {"stages.core.batch_tokens": 4096, "stages.core.tokens": 40_960}
    run = override(tiny, SIZES | changes | {f"mesh.{axis}": size for axis, size in mesh.items()})
    stage = resolve_stage(run, "core")
    compiled: Any = compile_stage(stage).step
    check_collectives(compiled, work_of(run, "core", stage.layout.sizes), 0.1)


def check_collectives(compiled: Any, work: Work, tolerance: float) -> None:
    """By axis, they are as many bytes in the compiled step as in the plan."""
    real: dict[str, float] = {}
    for (_, axes), size in traffic(collectives(compiled.as_text(), work.mesh.sizes)).items():
        assert axes is not None
        for axis in axes:
            real[axis] = real.get(axis, 0) + size
    planned: dict[str, float] = {}
    for total in work.collective_totals():
        for axis in total.axes:
            planned[axis] = planned.get(axis, 0) + total.bytes
    assert planned.keys() == real.keys()
    for axis, moved in planned.items():
        assert moved == pytest.approx(real[axis], rel=tolerance), axis


def staged(run: Run, core: Stage, /, **stages: dict[str, Any]) -> Run:
    """The run with other stages, each like `core` but for some fields."""
    changed = {name: core.model_copy(update=fields) for name, fields in stages.items()}
    return validate(run.model_copy(update={"stages": changed}).model_dump())


NARROWER = Pruning(keep={"ffn": 160, "embed": 64, "heads": 2})
DISTILLED: list[Any] = [
    pytest.param({"fsdp": 4, "tensor": 2}, Distillation(), marks=pytest.mark.deep),
    ({"fsdp": 2, "context": 4}, Distillation(target="distribution")),
]


@pytest.mark.parametrize(("mesh", "distillation"), DISTILLED, ids=str)
def test_a_teacher_takes_what_it_does_in_the_compiled_step(
    mesh: dict[str, Any], distillation: Distillation, tiny: Run
) -> None:
    changes: dict[str, Any] = {
        "mesh.fsdp": 1,
        "remat.policy": "full",
        "stages.core.batch_tokens": 4096,
    }
    run = override(
        tiny,
        SIZES
        | changes
        | {"stages.core.tokens": 40_960}
        | {f"mesh.{a}": n for a, n in mesh.items()},
    )
    online = {"teacher": "larger", "distillation": distillation}
    run = staged(run, run.stages["core"], larger={}, cut={"pruning": NARROWER}, distilled=online)
    stage = resolve_stage(run, "distilled")
    work = work_of(run, "distilled", stage.layout.sizes)
    assert stage.teacher == work.teacher
    assert (work.model.d_model, work.teacher and work.teacher.d_model) == (64, 128)
    compiled: Any = compile_stage(stage).step
    check_collectives(compiled, work, 0.05)
    # Parameters, two moments of each and the teacher; and five numbers for each token.
    batch = 5 * 4 * work.tokens
    arguments = compiled.memory_analysis().argument_size_in_bytes - batch
    assert work.teaching is not None
    assert arguments == pytest.approx(4 * (3 * work.shard + work.teaching.shard), rel=0.02)


def test_masked_and_rounded_weights_are_as_large_as_compiled(tiny: Run) -> None:
    # On small models other moments of a step may be the fullest.
    sizes = {
        "model.d_model": 256,
        "model.ffn_dim": 2048,
        "model.head_dim": 32,
        "model.num_layers": 4,
    }
    run = override(tiny, sizes | {"mesh.fsdp": 4, "remat.policy": "full"})
    stages: dict[str, dict[str, Any]] = {
        "plain": {},
        "masked": {"pruning": Pruning(keep={"ffn": 1024})},
        "rounded": {"quantization": Quantization(kind="int4")},
    }
    temporary = {}
    for name, fields in stages.items():
        alone = staged(run, run.stages["core"], **{name: fields})
        stage = resolve_stage(alone, name)
        compiled: Any = compile_stage(stage).step
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
        if fields:
            planned = work_of(alone, name, stage.layout.sizes).memory()["weights_in_use"] * 2**30
            assert temporary[name] - temporary["plain"] == pytest.approx(planned, rel=0.1), name


def test_each_stage_of_a_chain_is_planned_for_the_model_that_it_trains() -> None:
    scratch, target = load("afm-on-device-scratch"), parse_target("v5p:2048")
    core, wide = scratch.stages["core"], scratch.model.model_copy(update={"ffn_dim": 23_296})
    cached = Distillation(target="top_k", cached=True)
    chain = staged(
        scratch.model_copy(update={"model": wide}),
        core,
        larger={},
        prune={"pruning": Pruning(keep={"ffn": 8064})},
        cached={"teacher": "larger", "distillation": cached},
        online={"teacher": "larger"},
        core={},
    )
    found = {name: estimate(chain, name, target) for name in chain.stages}
    assert found["core"] == found["cached"] == estimate(scratch, "core", target)
    assert (
        found["prune"].seconds["matrix"]
        == found["larger"].seconds["matrix"]
        > found["core"].seconds["matrix"]
    )
    # The mask is on the matrices that read the hidden units, one of the FFN's three.
    down = 26 * 23_296 * 3072 * 4 / 64 / 2**30
    assert found["prune"].memory["weights_in_use"] == pytest.approx(down, rel=1e-3)
    assert "weights_in_use" not in found["larger"].memory
    # Forward alone, with what is read of logits beside it, is a third of training but for
    # attention's backward pass.
    mesh = MeshConfig(data=32, fsdp=64)
    online = work_of(chain, "online", mesh)
    multiplied = count(param_specs(wide), ("matrix", "embedding"))
    teaching, tokens = online.teaching, core.batch_tokens / 2048
    assert teaching and teaching.matrix_flops == 2 * multiplied * tokens
    assert teaching.attention_flops(0) == 26 * 2 * 24 * 128 * 4096 * tokens
    assert online.mesh == mesh and online.matrix_flops == work_of(chain, "core", mesh).matrix_flops
    assert found["online"].step > found["core"].step
    added = found["online"].step - found["core"].step
    # Of its top tokens, where the other stage takes the top one alone.
    assert labelling_seconds(chain, "cached", mesh, target) == pytest.approx(
        added * chain.stages["cached"].steps, rel=1e-3
    )
    assert (
        labelling_seconds(chain, "online", mesh, target)
        == labelling_seconds(chain, "core", mesh, target)
        == 0
    )
    # Its weights and, for each of 4,096 tokens, an id with its logarithm.
    shard = count(param_specs(wide)) / 64
    assert found["online"].memory["teacher"] == pytest.approx((4 * shard + 4096 * 8) / 2**30)


def test_meshes_divide_pruned_models_and_teachers() -> None:
    run, target = load("llama2-7b"), parse_target("h100:16")
    stage = run.stages["pretrain"]

    def tensors(changed: Run, name: str) -> set[int]:
        return {candidate.sizes.tensor for candidate in candidates(changed, name, target)}

    assert tensors(run, "pretrain") == {1, 2, 4, 8}
    cut = staged(run, stage, cut={"pruning": Pruning(keep={"ffn": 1026})}, after={})
    assert tensors(cut, "cut") == tensors(cut, "after") == {1, 2}
    odd = staged(
        run,
        stage,
        first={},
        cut={"pruning": Pruning(keep={"ffn": 1026})},
        distilled={"teacher": "cut"},
    )
    assert tensors(odd, "first") == {1, 2, 4, 8}
    with pytest.raises(UserError, match="cannot be split"):
        estimate(override(odd, {"mesh.fsdp": 4, "mesh.tensor": 4}), "distilled", target)


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    run, target = load("llama2-7b"), parse_target("h100:16")
    alone = staged(run, run.stages["pretrain"], pretrain={"teacher": str(tmp_path)})
    with pytest.raises(
        UserError, match=r"stages\.pretrain\.teacher='.*' cannot teach: .* is not a run directory"
    ):
        candidates(alone, "pretrain", target)


def test_a_trained_run_is_a_teacher(finished: Path, tiny: Run) -> None:
    run = staged(tiny, tiny.stages["core"], core={"teacher": str(finished)})
    assert work_of(run, "core", tiny.mesh).teacher == tiny.models()["context"].left


def test_products_are_those_of_the_weights() -> None:
    run = override(load("llama2-7b"), {"remat.policy": "none"})
    stage, model = run.stages["pretrain"], run.model
    work = Work(run, stage, MeshConfig(data=4, fsdp=1), model)
    multiplied = count(param_specs(model), ("matrix",)) + model.vocab_size * model.d_model
    assert work.matrix_flops == 6 * multiplied * stage.batch_tokens // 4
    # Keeping nothing costs the forward pass once more, but for the last product.
    full = replace(
        work, run=run.model_copy(update={"remat": run.remat.model_copy(update={"policy": "full"})})
    )
    layer = (
        count(param_specs(model), ("matrix",)) - model.num_layers * model.ffn_dim * model.d_model
    )
    assert full.matrix_flops - work.matrix_flops == 2 * layer * stage.batch_tokens // 4
    # 7 of the 12 L d S of an attention that is not causal, halved, and the tiles on the diagonal.
    whole = (
        12 * model.num_layers * model.num_heads * model.head_dim * 4096 * stage.batch_tokens // 4
    )
    assert work.attention_flops(0, 5) == whole * 7 // 12


def test_shards_of_a_step_share_its_work() -> None:
    run, target = load("llama2-7b"), parse_target("v5p:256")
    slow = estimate(
        override(run, {"mesh.data": 256, "mesh.fsdp": 1}), "pretrain", parse_target("v5p:256")
    )
    sharded = estimate(run, "pretrain", target)
    assert sharded.memory["parameters"] == pytest.approx(slow.memory["parameters"] / 64)
    split = estimate(override(run, {"mesh.tensor": 4}), "pretrain", target)
    assert split.seconds["matrix"] == pytest.approx(sharded.seconds["matrix"], rel=0.02)
    # Norms are joined along both at once.
    assert {e.axis for e, _, _ in split.collectives} == {"fsdp", "tensor", "fsdp x tensor"}
    assert sharded.overlapped <= sharded.step <= (sharded.serial or 0)


def test_offloading_moves_memory_to_the_host_and_takes_time() -> None:
    run, target = load("llama2-70b"), parse_target("v5p:512")
    here = estimate(override(run, {"remat.policy": "full"}), "pretrain", target)
    there = estimate(
        override(run, {"remat.policy": "full", "offload.optimizer": True}), "pretrain", target
    )
    assert there.memory["optimizer"] == 0
    assert there.total_gib == pytest.approx(here.total_gib - here.memory["optimizer"])
    assert there.step > here.step


def test_published_step_times_are_predicted() -> None:
    program = ROOT / "benchmarks" / "published.py"
    done = subprocess.run(
        [sys.executable, str(program), "--json"], capture_output=True, text=True, check=False
    )
    rows = json.loads(done.stdout)
    held = [row for row in rows if row["limit"]]
    assert len(held) == 18
    assert all(abs(row["error"]) <= row["limit"] for row in held)
    assert done.returncode == 0


def test_estimates_follow_the_catalogue(tmp_path: Path) -> None:
    own = tmp_path / "chips.toml"
    own.write_text("[v5p]\nbf16_tflops = 918\n")
    run = load("llama2-7b")
    once, twice = (
        estimate(run, "pretrain", parse_target("v5p:256", catalogue(x))) for x in (None, own)
    )
    assert twice.seconds["matrix"] == pytest.approx(once.seconds["matrix"] / 2)
    assert (once.confidence, twice.confidence) == ("V", "U")


@pytest.mark.parametrize(("matmul", "products"), [("fp8", 3), ("int8", 2)])
def test_products_in_8_bits_are_planned_at_their_peak(
    tiny: Run, matmul: str, products: int
) -> None:
    """Of the layers' matrices forward, backward and for weights; in int8 not for weights. Half of
    the time of these is saved, and nothing of what else there is.
    """
    sizes = {"mesh.fsdp": 8, "remat.policy": "none"}
    target = parse_target("h100:8")
    before, after = (
        divided_work(override(tiny, sizes | {"precision.matmul": kind}), "core", target)
        for kind in ("compute", matmul)
    )
    matrices = count(param_specs(before.model), ("matrix",))
    assert before.matrix_flops - after.matrix_flops == pytest.approx(
        matrices * 2 * products * before.tokens * (1 - 989 / 1979), rel=1e-6
    )
    estimates = [
        estimate(override(tiny, sizes | {"precision.matmul": kind}), "core", target)
        for kind in ("compute", matmul)
    ]
    # The fraction of the peak stays that of bf16.
    assert estimates[0].mfu * estimates[0].step == pytest.approx(
        estimates[1].mfu * estimates[1].step
    )
    assert estimates[1].seconds["memory_bound"] > estimates[0].seconds["memory_bound"]


def test_a_chip_without_such_products_is_refused() -> None:
    run = override(load("llama2-7b"), {"precision.matmul": "fp8"})
    with pytest.raises(UserError, match=r"TPU v5p.*set precision\.matmul to 'int8' or 'compute'"):
        estimate(run, "pretrain", parse_target("v5p:256"))
    with pytest.raises(UserError, match=r"precision\.matmul='fp8'"):
        candidates(run, "pretrain", parse_target("v5p:256"))
    estimate(override(run, {"precision.matmul": "int8"}), "pretrain", parse_target("v5p:256"))


def test_experts_cost_what_their_tokens_use(tiny: Run) -> None:
    """The matrix products of a dense layer of the width of a token's two experts, beside those of
    the router and of the sum over experts; and the parameters of all.
    """
    sizes = {"mesh.fsdp": 2, "model.ffn_dim": 96}
    kind = {"kind": "experts", "num_experts": 8, "experts_per_token": 2, "expert_dim": 48}
    fields = {f"model.pattern.0.feed_forward.{name}": value for name, value in kind.items()}
    dense, sparse = override(tiny, sizes), override(tiny, sizes | fields)
    found = [work_of(run, "core", MeshConfig(fsdp=2)) for run in (dense, sparse)]
    model, tokens = sparse.model, found[0].tokens
    routing = 6 * model.num_layers * model.d_model * (8 + 2) * tokens
    assert found[1].matrix_flops == pytest.approx(found[0].matrix_flops + routing, rel=1e-6)
    more = model.num_layers * model.d_model * (8 + 3 * 48 * 6)
    assert count(param_specs(model)) == count(param_specs(dense.model)) + more


@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 2},
        {"fsdp": 2, "tensor": 2},
        {"fsdp": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2, "expert_dispatch": "all_to_all"},
    ],
    ids=str,
)
def test_collectives_of_experts_are_those_that_are_compiled(
    mesh: dict[str, Any], tiny: Run
) -> None:
    kind = {"kind": "experts", "num_experts": 8, "experts_per_token": 2, "expert_dim": 48}
    fields = {f"model.pattern.0.feed_forward.{name}": value for name, value in kind.items()}
    sizes = {f"mesh.{axis}": size for axis, size in {"fsdp": 1, **mesh}.items()}
    run = override(tiny, {"model.num_heads": 4, "model.num_kv_heads": 2, **sizes, **fields})
    stage = resolve_stage(run, "core")
    compiled: Any = compile_stage(stage).step
    check_collectives(compiled, work_of(run, "core", stage.layout.sizes), 0.05)


def split_experts(tiny: Run, **mesh: Any) -> tuple[Run, MeshConfig]:
    """A run of 8 experts of 48 hidden units, 2 for each token, and a mesh."""
    kind = {"kind": "experts", "num_experts": 8, "experts_per_token": 2, "expert_dim": 48}
    fields = {f"model.pattern.0.feed_forward.{name}": value for name, value in kind.items()}
    return override(tiny, {"remat.policy": "full", **fields}), MeshConfig(**{"fsdp": 1, **mesh})


def over_experts(work: Work) -> dict[str, float]:
    """Bytes by kind of what is sent along `expert` alone."""
    found = [total for total in work.collective_totals() if total.axis == "expert"]
    assert {total.what for total in found} == {"tokens"}
    return {total.kind: total.bytes for total in found}


@pytest.mark.parametrize("shards", [2, 8])
def test_traffic_of_tokens_to_their_experts_follows_formulas(shards: int, tiny: Run) -> None:
    """Hidden states in float32, of all layers, with the weights of each token's experts."""
    run, mesh = split_experts(tiny, fsdp=2, expert=shards)
    work = work_of(run, "core", mesh)
    layers, width, chosen, tokens = run.model.num_layers, run.model.d_model, 2, work.tokens
    gathered = 4 * layers * shards * tokens
    assert over_experts(work) == {
        # Tokens and weights, forward and once more for the backward pass; gradients of the sums.
        "all-gather": gathered * (3 * width + 2 * chosen),
        # The sums; gradients of tokens and weights.
        "reduce-scatter": gathered * (2 * width + chosen),
    }
    run, mesh = split_experts(tiny, fsdp=2, expert=shards, expert_dispatch="all_to_all")
    # A quarter more than an even share of all assignments, or all there can be.
    rows = min(1.25 * chosen, shards * min(chosen, 8 / shards)) * tokens
    assert over_experts(work_of(run, "core", mesh)) == {
        # Tokens and weights, forward, once more and as gradients; results and their gradients.
        "all-to-all": pytest.approx(4 * layers * rows * (5 * width + 3))
    }


def test_split_experts_are_stored_once_and_gathered_over_the_rest_alone(tiny: Run) -> None:
    run, mesh = split_experts(tiny, fsdp=2, expert=4)
    found = work_of(run, "core", mesh)
    assert found.shard == work_of(run, "core", MeshConfig(fsdp=8)).shard
    experts = 3 * run.model.num_layers * run.model.d_model * 8 * 48
    gathered = {
        total.axis: total.bytes
        for total in found.collective_totals()
        if (total.kind, total.what) == ("all-gather", "weights")
    }
    assert gathered["fsdp"] == 2 * 4 * experts / 4
    # The largest layer is the experts of a shard, where fsdp alone has those of all.
    assert found.totals.weights[0] < work_of(run, "core", MeshConfig(fsdp=8)).totals.weights[0]


def test_the_fullest_expert_shard_is_taken_to_fill_its_room(tiny: Run) -> None:
    """So much more than an even share do products of experts take."""
    flops = {}
    for room in (1.0, 1.25):
        run, mesh = split_experts(tiny, expert=8, expert_room=room)
        flops[room] = work_of(run, "core", mesh).matrix_flops
    model, tokens = run.model, work_of(run, "core", mesh).tokens
    # Three products forward, twice as many backward and the forward ones once more, for two experts
    # of each token.
    products = 4 * 3 * 2 * model.num_layers * model.d_model * 48 * 2 * tokens
    assert flops[1.25] - flops[1.0] == pytest.approx(0.25 * products, rel=1e-6)
