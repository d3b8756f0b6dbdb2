"""Whether `verify` passes what is right and fails what is wrong, on a few of its layouts."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from braeburn.config import (
    ONE_DEVICE,
    Distillation,
    MeshConfig,
    ModelConfig,
    Pruning,
    Quantization,
    Run,
    Schedule,
    ShardingRules,
    Stage,
    override,
    validate,
)
from braeburn.data.loader import Batches
from braeburn.data.prepare import Prepared, prepare
from braeburn.errors import UserError
from braeburn.hardware.targets import parse_target
from braeburn.models.decoder import has_experts
from braeburn.recipes import BUILT_IN, load
from braeburn.verify import checks as verify
from braeburn.verify.shrink import ENVIRONMENT, STAND_IN, scale_down, shrink
from support import braeburn

# One stage is enough, and a mesh of its own.
RECIPE = """
from braeburn.config import MeshConfig, override
from braeburn.recipes import load

def small():
    run = load("afm-tiny")
    run = run.model_copy(update={"stages": {"core": run.stages["core"]}})
    return override(run, {"model.num_layers": 1, "mesh.fsdp": 4, "mesh.tensor": 2})
"""
WRONG_RULE = """
from braeburn.config import Placement, ShardingRules
usual, wrong = ShardingRules.of, Placement(activations=("replica", "data"))
ShardingRules.of = lambda rules, axis, role="": (
    wrong if axis == "batch" else usual(rules, axis, role)
)
"""
WRONG_POSITION = """
from braeburn.train import feed
prefetch = feed.prefetch
feed.prefetch = lambda batches, start, *rest: prefetch(batches, start - 1 if start else 0, *rest)
"""


@pytest.fixture(scope="module", autouse=True)
def fast_compilation() -> Iterator[None]:
    """What the command sets for JAX as it starts."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a recipe in a file whose import does more."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(more: str = "") -> str:
        path = folder / f"recipe{len(list(folder.iterdir()))}.py"
        path.write_text(RECIPE + more)
        return f"{path}:small"

    return write


@pytest.fixture(scope="module")
def run(recipe: Callable[[str], str]) -> Run:
    return shrink(load(recipe("")), 8)


@pytest.fixture(scope="module")
def prepared(run: Run) -> Prepared:
    return prepare(run, lambda line: None)


@pytest.fixture(scope="module")
def killed(
    run: Run, recipe: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a run that was killed; not to be changed."""
    folder = tmp_path_factory.mktemp("killed")
    verify.train_and_kill(run, recipe(""), folder)
    return folder


class Done:
    """A future whose result is there."""

    def result(self) -> None: ...


def compare(run: Run, prepared: Prepared, *names: str) -> list[verify.Check]:
    runs = verify.layouts(run, parse_target("cpu:8"))
    one = verify.on_mesh(run, ONE_DEVICE)
    return verify.compare(one, {name: runs[name] for name in names}, prepared, lambda line: None)


@pytest.mark.deep
def test_layouts_compare_with_one_device(run: Run, prepared: Prepared) -> None:
    same, skipped = compare(run, prepared, "fsdp 4 x tensor 2", "tensor 8")
    assert (same.verdict, same.steps, same.reason) == ("same", 20, "")
    assert same.difference is not None and same.difference < same.tolerance == 1e-4
    assert skipped.verdict == "skipped" and skipped.passed
    assert "the 4 of 'heads' cannot be split into 8 equal parts" in skipped.reason


def test_layouts_that_are_all_refused_are_no_success(run: Run, prepared: Prepared) -> None:
    (check,) = compare(run, prepared, "tensor 8")
    assert check.verdict == "failed" and not check.passed


def test_a_wrong_rule_is_found(
    run: Run, prepared: Prepared, recipe: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardingRules, "of", ShardingRules.of)  # put back at the end
    load(recipe(WRONG_RULE))
    (check,) = compare(run, prepared, "fsdp 4 x tensor 2")
    assert check.verdict == "different" and not check.passed
    assert check.reason.startswith("step 1 loss is ")


def chained(run: Run, **stages: dict[str, Any]) -> Run:
    """The run with stages that are its core but for some fields."""
    core = run.stages["core"]
    changed = {name: core.model_copy(update=fields) for name, fields in stages.items()}
    return validate(run.model_copy(update={"stages": changed}).model_dump())


@pytest.mark.deep
def test_all_stages_compare_with_one_device(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"tokens": 4 * run.stages["core"].batch_tokens, "schedule": Schedule(warmup_steps=1)}
    chain = chained(
        override(run, {"mesh.fsdp": 2}),
        pruned=short | {"pruning": Pruning(keep={"ffn": 80}, calibration_tokens=1024)},
        distilled=short | {"teacher": "pruned", "distillation": Distillation(cached=True)},
        rounded=short | {"quantization": Quantization(kind="int4")},
    )
    assert verify.compresses(chain) and not verify.compresses(run)
    chain = chain.model_copy(
        update={"data": chain.data.model_copy(update={"cache": str(tmp_path / "data")})}
    )
    monkeypatch.setattr(verify, "all_stages_split", lambda run, num_devices: [chain])
    said: list[str] = []
    (check,) = verify.compare_stages(chain, 8, tmp_path, said.append)
    assert (check.check, check.layout, check.verdict, check.steps) == (
        "stages",
        "fsdp 2 x tensor 2",
        "same",
        12,
    ), check
    assert check.tolerance == 1e-4 and said[0].startswith("stages fsdp 2 x tensor 2: same (")


def test_stages_that_differ_are_found(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout is judged by every stage's figures, refused ones are skipped, and broken ones fail
    alone.
    """
    due = [("step 1 loss", 6.0), ("step 21 loss", 5.0), ("held-out code after step 28", 5.5)]

    def followed(run: Run, reference: Path, start: int, figures: Any) -> verify.Curve:
        assert reference == tmp_path / "one device, all stages" and start == 20
        if run.mesh.fsdp == 4:
            raise ValueError("no such thing")
        return [due[0], ("step 21 loss", 5.1), due[2]] if run.mesh.fsdp == 2 else due

    monkeypatch.setattr(verify, "_train", lambda run, out: due)
    monkeypatch.setattr(verify, "followed_curve", followed)
    three_heads = override(
        run, {"model.num_heads": 6, "model.num_kv_heads": 3, "mesh.fsdp": 8, "mesh.tensor": 1}
    )
    checks = verify.compare_stages(three_heads, 8, tmp_path, lambda line: None)
    assert [(check.layout, check.verdict) for check in checks] == [
        ("fsdp 4", "failed"),
        ("tensor 4", "skipped"),
        ("fsdp 2 x tensor 2", "skipped"),
        ("pipeline 2 (1f1b)", "skipped"),  # the model has one layer
    ]
    checks = verify.compare_stages(
        override(run, {"mesh.fsdp": 2, "mesh.tensor": 4}), 8, tmp_path, lambda line: None
    )
    *_, both, _ = checks
    assert (both.layout, both.verdict) == ("fsdp 2 x tensor 2", "different")
    assert both.reason == "step 21 loss is 5.1 instead of 5"
    assert both.difference == pytest.approx(0.02)


@pytest.mark.deep
def test_killed_resumed_and_resharded(run: Run, killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    said: list[str] = []
    check = verify.resume(run, folder, Done(), said.append)  # type: ignore[arg-type]
    assert (check.verdict, check.steps, check.difference, check.tolerance) == (
        "same",
        20,
        0.0,
        0.0,
    ), check
    assert check.layout.startswith("fsdp 4 x tensor 2, killed, resumed from step ")
    check = verify.reshard(
        run, verify.on_mesh(run, MeshConfig(data=4, fsdp=1)), folder, said.append
    )
    assert (check.verdict, check.steps) == ("same", 20), check
    assert check.layout == "data 4 -> fsdp 4 x tensor 2 -> one device"
    assert len(said) == 2


def test_a_run_that_begins_again_has_not_resumed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_train", lambda *arguments: [("step 1 loss", 2.0)])
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "events.jsonl").write_text('{"event": "start"}\n{"event": "che')
    check = verify.resume(run, tmp_path, Done(), lambda line: None)  # type: ignore[arg-type]
    assert (check.verdict, check.reason) == (
        "failed",
        "after the kill it began again instead of resuming",
    )


def test_a_shuffled_position_is_found_by_the_command(
    recipe: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from braeburn.train import feed

    monkeypatch.setattr(feed, "prefetch", feed.prefetch)
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    answer = braeburn("verify", recipe(WRONG_POSITION), "--on", "cpu:1", "--json")
    assert answer.code == 1, answer.err
    result = json.loads(answer.out)
    (check,) = result["checks"]
    assert (result["passed"], check["check"], check["verdict"]) == (False, "resume", "different")
    first = int(check["layout"].rpartition(" ")[2]) + 1
    assert check["reason"].startswith(f"step {first} loss is ")
    assert "resume one device" in answer.err


def test_the_table_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        verify.Check("layout", "fsdp 8", 20, 1.5e-7, 1e-5, "same"),
        verify.Check("layout", "tensor 8", 0, None, 1e-5, "skipped", "too few heads"),
        verify.Check("resume", "fsdp 8, killed, resumed from step 4", 36, 0.0, 0.0, "same"),
    ]
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setattr(verify, "verify", lambda *arguments: checks)
    answer = braeburn("verify", "afm-tiny")
    assert answer.code == 0
    assert [line.split() for line in answer.out.splitlines()][:3] == [
        ["check", "layout", "steps", "difference", "tolerance", "verdict"],
        ["layout", "fsdp", "8", "20", "1.5e-07", "1e-05", "same"],
        ["layout", "tensor", "8", "0", "-", "1e-05", "skipped", "too", "few", "heads"],
    ]
    assert answer.out.splitlines()[3].split()[-3:] == ["0", "0", "same"]  # bit for bit
    assert answer.out.endswith("\n3 checks: 2 passed, 1 skipped, 0 failed\n")


def test_mistakes_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    assert "did you mean" in braeburn("verify", "afm-tny").error
    assert "--on 'h100'" in braeburn("verify", "afm-tiny", "--on", "h100").error


@pytest.mark.parametrize("name", BUILT_IN)
def test_shrinking_keeps_the_structure(name: str) -> None:
    large, small = load(name), shrink(load(name), 8)
    before, after = large.model, small.model
    for field in ("vocab_size", "d_model", "num_heads", "num_kv_heads", "ffn_dim"):
        assert getattr(after, field) <= getattr(before, field)
        assert math.gcd(getattr(after, field), 8) == math.gcd(getattr(before, field), 8), field
    assert (after.num_kv_heads < after.num_heads) == (before.num_kv_heads < before.num_heads)
    same = set(ModelConfig.model_fields) - {
        "vocab_size",
        "d_model",
        "num_layers",
        "num_heads",
        "num_kv_heads",
    }
    for field in same - {"head_dim", "ffn_dim", "pattern", "tail_pattern", "tail_layers"}:
        assert getattr(after, field) == getattr(before, field)
    # Every kind of layer is there still; windows are shorter, as sequences are.
    kinds = [
        {(layer.attention.kind, layer.feed_forward.kind) for layer in model.layer_configs}
        for model in (before, after)
    ]
    assert kinds[0] == kinds[1]
    assert (small.remat, small.offload) == (large.remat, large.offload)
    same = large.optimizer
    if has_experts(before):
        # Updates that hang on rounding would send tokens to other experts on other layouts.
        same = same.model_copy(update=same.steady)
        layer = after.layer_configs[-1].feed_forward
        assert layer.experts_per_token < layer.num_experts
    assert small.optimizer == same
    assert small.precision.compute == "float32"
    lengths = [stage.sequence_length for stage in small.stages.values()]
    assert lengths == sorted(lengths) and lengths[0] == 64 and lengths[-1] <= 256
    for stage, other in zip(small.stages.values(), large.stages.values(), strict=True):
        assert (stage.mixture, stage.rope_base) == (other.mixture, other.rope_base)
        assert (stage.schedule.decay, stage.schedule.floor) == (
            other.schedule.decay,
            other.schedule.floor,
        )
        assert bool(stage.schedule.warmup_steps) == bool(other.schedule.warmup_steps)
        assert stage.batch_size // stage.accumulation_steps % 8 == 0
    paths = [path for source in small.data.sources.values() for path in source.paths]
    assert len(set(paths)) == len(paths) and {
        source.format for source in small.data.sources.values()
    } == {"python-code"}


def test_shrinking_what_stages_cut_teach_and_round() -> None:
    large = load("llama3-8b")
    core = next(iter(large.stages.values()))

    def stages(**changes: dict[str, Any]) -> dict[str, Stage]:
        return {name: core.model_copy(update=fields) for name, fields in changes.items()}

    chain = stages(
        larger={},
        pruned={"pruning": Pruning(keep={"ffn": 7168})},
        narrow={"pruning": Pruning(keep={"heads": 16, "embed": 3072}, method="activation")},
        distilled={
            "teacher": "larger",
            "distillation": Distillation(target="top_k", top_k=1000, cached=True),
        },
        rounded={"quantization": Quantization(kind="int4", group_size=128)},
    )
    small = shrink(validate(large.model_copy(update={"stages": chain}).model_dump()), 8)
    assert list(small.stages) == list(chain)
    assert small.stages["pruned"].pruning == Pruning(
        keep={"ffn": 112}, calibration_tokens=2048
    )  # of 224
    assert small.stages["narrow"].pruning is not None
    assert small.stages["narrow"].pruning.keep == {
        "heads": 8,
        "embed": 48,
    }  # of 16 and 64; key heads are 8
    assert small.stages["narrow"].pruning.method == "activation"
    distilled = small.stages["distilled"]
    assert (distilled.teacher, distilled.distillation.cached, distilled.distillation.top_k) == (
        "larger",
        True,
        512,
    )
    assert small.stages["rounded"].quantization == Quantization(kind="int4", group_size=16)


def test_a_teacher_on_disk_is_replaced_by_a_stage() -> None:
    run = load("afm-tiny")
    both = {
        "stages.core.teacher": "/models/large",
        "stages.context.teacher": "core",
        "stages.core.tokens": 65_536,
    }
    small = shrink(override(run, both), 8)
    assert list(small.stages) == [STAND_IN, *run.stages]
    stand_in, core = small.stages[STAND_IN], small.stages["core"]
    assert (
        stand_in.teacher is None
        and core.teacher == STAND_IN
        and small.stages["context"].teacher == "core"
    )
    assert (stand_in.steps, core.steps) == (20, 8)
    assert list(shrink(run, 8).stages) == list(run.stages)


def test_shrinking_meshes_and_accumulation() -> None:
    fields: dict[str, Any] = {
        "mesh.replica": 8,
        "mesh.tensor": 8,
        "stages.core.accumulation_steps": 16,
    }
    fields |= {"stages.context.mesh": {"fsdp": -1, "context": 4, "context_attention": "ring"}}
    run = shrink(override(load("afm-tiny"), fields), 8)
    assert run.mesh == MeshConfig(replica=2, fsdp=2, tensor=2)
    assert run.stages["context"].mesh == MeshConfig(fsdp=4, context=2, context_attention="ring")
    assert (run.stages["core"].accumulation_steps, run.stages["core"].batch_size) == (4, 32)
    names = list(verify.layouts(run, parse_target("cpu:8")))
    assert names[:2] == ["replica 2 x fsdp 2 x tensor 2", "fsdp 4 x context 2 (ring)"]
    assert not [name for name in names if "accumulated" in name]  # it does all along
    assert scale_down(MeshConfig(fsdp=2, tensor=3), 8) == MeshConfig(fsdp=2, tensor=2)
    assert scale_down(MeshConfig(), 2) == MeshConfig(fsdp=2)
    with pytest.raises(UserError, match="stages of the run 'afm-tiny' is empty"):
        shrink(load("afm-tiny").model_copy(update={"stages": {}}), 8)


@pytest.mark.parametrize(
    ("target", "some", "size"),
    [
        (
            "cpu:8",
            {
                "fsdp 8",
                "tensor 8",
                "context 8 (ring)",
                "context 8 (all-gather)",
                "fsdp 8, 2 accumulated",
            },
            8,
        ),
        ("v5e:256", {"data 2 x fsdp 2 x tensor 2", "fsdp 2 x context 4 (ring)"}, 8),
        (
            "v4:8x1024",
            {
                "replica 2 x fsdp 4",
                "replica 2 x context 2 x tensor 2 (ring)",
                "replica 8",
                "fsdp 8",
            },
            8,
        ),
        ("h100:4", {"fsdp 2 x tensor 2", "data 4"}, 4),
        ("cpu:3", {"tensor 2"}, 2),
        ("cpu:2x1", {"replica 2"}, 2),
        ("cpu:1", set(), 1),
    ],
)
def test_the_target_decides_the_layouts(target: str, some: set[str], size: int) -> None:
    runs = verify.layouts(shrink(load("afm-tiny"), size), parse_target(target))
    assert some <= set(runs) and bool(some) == bool(runs)
    assert all(math.prod(run.mesh.sizes.values()) == size for run in runs.values())
    assert ("replica" in str(list(runs))) == ("x" in target)


def test_experts_are_split_in_layouts_of_models_that_have_some() -> None:
    run = override(load("afm-tiny"), {"model.pattern.0.feed_forward.kind": "experts"})
    names = set(verify.layouts(shrink(run, 8), parse_target("cpu:8")))
    assert names >= {"expert 8 (gather)", "fsdp 2 x expert 4 (all-to-all)"}
    assert names >= {"expert 4 x context 2 (ring, gather)", "expert 4 x tensor 2 (all-to-all)"}
    dense = verify.layouts(shrink(load("afm-tiny"), 8), parse_target("cpu:8"))
    assert not [name for name in dense if "expert" in name]


def test_a_run_whose_loss_hangs_on_microbatches_is_resharded_with_them() -> None:
    """A pipeline has two at least, and then another balance of experts."""
    dense = shrink(load("afm-tiny"), 8)
    sparse = override(dense, {"model.pattern.0.feed_forward.kind": "experts"})
    for run, steps in ((dense, {1, 2}), (sparse, {1})):
        runs = list(verify.layouts(run, parse_target("cpu:8")).values())
        found = verify.elsewhere(run, runs)
        assert {each.stages["core"].accumulation_steps for each in found} == steps
        assert all(each.mesh != run.mesh for each in found)


@pytest.mark.parametrize(("kind", "epsilon"), [("afm", 1e-8), ("adamw", 1e-4), ("muon", 1e-4)])
def test_updates_hang_on_no_rounding_where_routers_would_show_it(kind: str, epsilon: float) -> None:
    """Unless the recipe has steadier ones already, or no router."""
    dense = override(load("afm-tiny"), {"optimizer.kind": kind})
    sparse = override(dense, {"model.pattern.0.feed_forward.kind": "experts"})
    steadier = override(sparse, {"optimizer.epsilon": 0.5})
    found = [shrink(run, 8).optimizer for run in (dense, sparse, steadier)]
    assert [each.epsilon for each in found] == [dense.optimizer.epsilon, epsilon, 0.5]
    assert [each.model_copy(update={"epsilon": 1.0}) for each in found] == [
        dense.optimizer.model_copy(update={"epsilon": 1.0})
    ] * 3


def test_curves_are_compared_point_by_point() -> None:
    def judge(*found: float) -> verify.Check:
        curve = [(f"step {step} loss", value) for step, value in enumerate(found, 1)]
        return verify._judge(
            "layout", "", curve, [("step 1 loss", 2.0), ("step 2 loss", 4.0)], 1e-2
        )

    assert judge(2.0, 4.01).verdict == "same"
    assert (judge(2.0, 4.4).difference, judge(2.0, 4.4).reason) == (
        pytest.approx(0.1),
        "step 2 loss is 4.4 instead of 4",
    )
    assert judge(math.nan, 4.0).verdict == "different" and judge(math.nan, 4.0).difference is None
    said: list[str] = []
    verify._tell(judge(2.0, 4.01), said.append)
    assert said == ["layout : same (2.5e-03, tolerance 0.01)"]
    assert judge(2.0).reason == "nothing where step 2 loss was due"
    assert judge(2.0, 4.0, 5.0).reason == "step 3 loss where nothing was due"


def test_batches_are_a_function_of_the_step(run: Run, prepared: Prepared) -> None:
    """What makes equal curves mean that every sample was seen once: no two steps have the same
    batch.
    """
    batches = Batches(run.stages["core"], "core", run.seed, prepared.train)
    assert len({batches[step]["inputs"].tobytes() for step in range(len(batches))}) == len(batches)


def test_weights_of_the_large_model_are_left_out() -> None:
    run = override(load("quickstart"), {"initial_weights": "/nowhere"})
    assert shrink(run, 8).initial_weights is None


def test_what_sets_the_environment_of_jax_does_not_import_it() -> None:
    # JAX would have started with one device for all layouts.
    program = "import sys, braeburn.verify.shrink; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
