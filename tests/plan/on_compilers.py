"""The real compilers of hardware that is not here, on the recipes of the project: `make
test-compile`.
"""

import json
import re
from pathlib import Path

import pytest

from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.targets import parse_target
from braeburn.plan.child import check_compiler
from braeburn.plan.collectives import KINDS
from support import process

SERVER, DEVICE = ("afm-server", "v4:8x1024"), ("afm-on-device-scratch", "v5p:2048")


@pytest.fixture(scope="session", autouse=True)
def compilers():
    """All must be there: nothing is skipped."""
    for on in ("v5p:8", "h100:8", "mi300x:8"):
        check_compiler(parse_target(on))


def compiled(recipe, on, *arguments, code=0):
    """The summary of a compilation, which is printed as well."""
    answer = process("compile", recipe, "--on", on, "--json", *arguments, timeout=1800)
    assert answer.code == code, answer.err
    facts = json.loads(answer.out)
    shown = (
        "fits",
        "memory_gib",
        "compute_seconds",
        "flop_bound_seconds",
        "overlapped",
        "scheduled",
        "serial",
        "bytes",
        "compiler",
    )
    print(recipe, on, *arguments, json.dumps({key: facts.get(key) for key in shown}))
    return facts


def check(facts, resident_gib=5):
    """What holds of every step that fits, compiled in so much of this machine's memory."""
    assert facts["fits"] and facts["memory_gib"]["required"] > 0
    assert facts["compute_seconds"] >= facts["flop_bound_seconds"]
    assert facts["overlapped"] <= facts["scheduled"] <= facts["serial"]
    # Each start was paired with its end, or reading the program had been refused.
    text = Path(facts["program"]).read_text(encoding="utf-8")
    for kind in KINDS:
        assert text.count(f" {kind}-start(") == text.count(f" {kind}-done(")
    # SparseCores look up a number for each token, which libtpu gives no time for.
    assert all(name.startswith("gather_offload") for name in facts["untimed"])
    assert all(row["axes"] for row in facts["collectives"])
    assert facts["compiler"]["resident_gib"] < resident_gib


def check_bytes(facts):
    """By axis they are those of the plan."""
    for axis, planned in facts["plan"]["bytes"].items():
        assert facts["bytes"][axis] == pytest.approx(planned, rel=0.1), axis


def test_server_fits_and_only_gradients_leave_a_slice():
    facts = compiled(*SERVER)
    check(facts)
    check_bytes(facts)
    assert facts["slices"]["holds"] and {t["kind"] for t in facts["slices"]["transfers"]} == {
        "all-reduce"
    }
    again = compiled(*SERVER)
    assert again["compiler"]["cached"] and again["slices"] == facts["slices"]


def test_weights_sharded_across_slices_are_named():
    facts = compiled(*SERVER, "--mesh", "replica=1,fsdp=2048,tensor=4", code=1)
    offenders = [t for t in facts["slices"]["transfers"] if t["offends"]]
    assert {t["kind"] for t in offenders} >= {"all-gather", "reduce-scatter"}
    assert any("all_gather" in t["source"] or "dynamic_slice" in t["source"] for t in offenders)


# 5.03 GiB, more than it may take unless it is allowed to.
ROOM = ["--memory-limit", "8"]


@pytest.mark.parametrize(
    ("recipe", "on", "arguments"),
    [
        ("llama2-7b", "v5p:256", []),
        ("llama2-70b", "v5p:512", []),
        (*DEVICE, []),
        ("llama3-8b", "v6e:256", []),
        ("llama2-7b", "h100:256", []),
        ("gemma3-1b", "v5p:64", ROOM),
        ("olmo2-7b", "v5p:128", []),
        ("afm-on-device-2025", "v5p:128", []),
    ],
)
def test_steps_that_fit(recipe, on, arguments):
    facts = compiled(recipe, on, *arguments)
    check(facts, 6 if arguments else 5)
    check_bytes(facts)
    planned = facts["plan"]["memory_gib"]
    assert facts["memory_gib"]["required"] == pytest.approx(planned, rel=0.1)
    kernel = "cudnn" if on.startswith("h100") else "splash"
    assert facts["kernels"] and all(
        k["name"].startswith(kernel) and k["seconds"] for k in facts["kernels"]
    )


# An MI250X is two devices, of which neither has room for the recipe's step.
@pytest.mark.parametrize(("on", "fits"), [("mi300x:64", True), ("mi250x:64", False)])
def test_steps_on_gpus_of_amd(on, fits):
    names = ["query", "key", "value", "attention", "ffn_gate", "ffn_up"]
    layout = ["--mesh", "data=1,fsdp=-1", "--set", f"remat.names={json.dumps(names)}"]
    facts = compiled("llama2-7b", on, *layout, code=0 if fits else 1)
    assert facts["fits"] == fits
    planned = facts["plan"]["memory_gib"]
    assert facts["memory_gib"]["required"] == pytest.approx(planned, rel=0.05)
    assert facts["compute_seconds"] >= facts["flop_bound_seconds"]
    # Attention is plain XLA; weights are gathered more often than is planned.
    assert not facts["kernels"] and not facts["untimed"]
    assert facts["bytes"]["fsdp"] == pytest.approx(facts["plan"]["bytes"]["fsdp"], rel=0.3)
    assert facts["compiler"]["resident_gib"] < 5


def test_experts_have_kernels_on_gpus_of_nvidia():
    facts = compiled("qwen3-30b-a3b", "h100:64", "--stage", "general", "--set", "remat.policy=full")
    check(facts)
    check_bytes(facts)
    plan = facts["plan"]
    assert facts["memory_gib"]["required"] == pytest.approx(plan["memory_gib"], rel=0.1)
    assert facts["compute_seconds"] == pytest.approx(plan["compute_seconds"], rel=0.3)
    names = {kernel["name"] for kernel in facts["kernels"]}
    assert names >= {"grouped_products", "grouped_outer_products"}


# Seven matrices of a layer forward and for both gradients; in int8 not for those of weights.
@pytest.mark.parametrize(
    ("recipe", "on", "matmul", "written", "least"),
    [
        ("llama3-8b", "h100:8", "fp8", r'custom_call_target="__cublas\$lt\$matmul\$f8"', 21),
        ("llama2-7b", "v5p:64", "int8", r"= s32\[\S+ (?:dot|convolution)\(", 14),
    ],
)
def test_products_in_8_bits_are_those_of_the_chip(recipe, on, matmul, written, least):
    facts = compiled(
        recipe, on, "--set", f"precision.matmul={matmul}", "--set", "model.num_layers=2"
    )
    check(facts)
    check_bytes(facts)
    program = Path(facts["program"]).read_text(encoding="utf-8")
    assert len(re.findall(written, program)) >= least
    # None of them in bfloat16.
    assert not re.search(r'__cublas\$lt\$matmul", [^\n]*/eight_bits/', program)


def test_what_cannot_fit_is_told_with_what_would():
    facts = compiled("llama3-70b", "v5e:16", code=1)
    assert facts["memory_gib"]["required"] > facts["memory_gib"]["usable"] == 15.75
    assert facts["changes"] and all(
        parse_target(c["target"], catalogue()).chips > 16 for c in facts["changes"]
    )


def test_a_layout_that_would_fit_is_compiled():
    facts = compiled("llama3-8b", "v6e:256", "--set", "remat.policy=none", "--fix", code=1)
    verified = [change["verified"] for change in facts["changes"]]
    assert True in verified and None not in verified[: verified.index(True)]


@pytest.mark.parametrize("stage", ["continued", "context"])
@pytest.mark.parametrize("where", [SERVER, DEVICE], ids=lambda where: where[0])
def test_other_stages(where, stage):
    facts = compiled(*where, "--stage", stage)
    check(facts)
    assert facts["slices"] is None or facts["slices"]["holds"]


@pytest.mark.parametrize(
    "arguments", [["prune"], ["core", "--set", "stages.core.distillation.cached=false"]]
)
def test_masks_and_a_teacher_take_what_is_planned(arguments):
    facts = compiled("afm-on-device", DEVICE[1], "--stage", *arguments)
    check(facts)
    check_bytes(facts)
    assert facts["memory_gib"]["required"] == pytest.approx(facts["plan"]["memory_gib"], rel=0.2)


JOBS = [("afm-server", "v4:1024"), ("llama3-70b", "h100:8")]


@pytest.mark.parametrize(("recipe", "on"), JOBS)
@pytest.mark.parametrize("job", ["evaluate", "generate"])
def test_jobs_after_training_fit_as_planned(recipe, on, job):
    # Layers are written out where tokens are generated, which takes more than 5 GB to compile.
    asked = ["compile", recipe, "--on", on, "--job", job, "--memory-limit", "8", "--json"]
    answer = process(*asked, timeout=1800)
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["fits"]
    names = ["batch"] if job == "evaluate" else ["prefill", "token"]
    assert [program["name"] for program in facts["programs"]] == names
    for program in facts["programs"]:
        memory, plan = program["memory_gib"], program["plan"]
        print(recipe, on, program["name"], json.dumps({"memory": memory, "plan": plan}))
        assert memory["required"] == pytest.approx(plan["memory_gib"], rel=0.1)
        assert not program["untimed"] and all(row["axes"] for row in program["collectives"])
        for axis, planned in plan["bytes"].items():
            assert program["bytes"][axis] == pytest.approx(planned, rel=0.1, abs=2**20), axis
        assert program["compiler"]["resident_gib"] < 7
