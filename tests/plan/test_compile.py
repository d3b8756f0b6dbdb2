"""`braeburn compile` without a compiler: what it refuses, how it watches its child, and what it
makes of an answer.
"""

import json
import sys

import pytest
from test_hlo import megascale, module, straight

from braeburn.config import override
from braeburn.errors import UserError
from braeburn.hardware.targets import parse_target
from braeburn.plan import child as child_process
from braeburn.plan import program
from braeburn.recipes import load
from support import braeburn

MIB = 2**20


def ask(tmp_path, program, memory_gb=5.0):
    """What a child answers that runs a few lines of Python with the request as `request`."""
    lines = f"import json, sys, time\nrequest = json.load(sys.stdin)\n{program}"
    return child_process._ask(
        [sys.executable, "-c", lines], {"stage": "core"}, tmp_path / "child.log", memory_gb
    )


def test_the_last_line_is_the_answer(tmp_path):
    program = (
        "print('libtpu says something')\nprint(json.dumps({'stage': request['stage'], "
        "'cached': True}))"
    )
    assert ask(tmp_path, program) == {"stage": "core", "cached": True}


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (
            "print(json.dumps({'error': 'mesh.fsdp=3 does not divide'}))",
            "^mesh.fsdp=3 does not divide$",
        ),
        (
            "raise RuntimeError('no such topology')",
            r"ended with code 1 \(RuntimeError: no such topology\).*child.log",
        ),
        ("import os\nos.abort()", "ended with code -6"),
        ("sys.stdin.close()", r"ended with code 0 \(it said nothing\)"),
        (
            "import os\nos.close(0)\nsys.stderr.write('a\\n\\n b  c\\n')\nos._exit(3)",
            r"code 3 \(b c\).*make extra-compile",
        ),
    ],
)
def test_a_child_that_fails_is_one_sentence(tmp_path, program, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        ask(tmp_path, program)
    assert "\n" not in str(error.value)


def test_a_child_that_takes_too_much_memory_is_ended(tmp_path):
    program = (
        "block = bytearray(400_000_000)\nfor i in range(0, len(block), 4096): block[i] = "
        "1\ntime.sleep(600)"
    )
    with pytest.raises(UserError, match=r"more than 0\.2 GB .* --memory-limit 0\.4"):
        ask(tmp_path, program, memory_gb=0.2)


def test_what_cannot_be_compiled_for_is_refused(monkeypatch):
    monkeypatch.setattr(child_process, "find_spec", lambda name: None)
    answer = braeburn("compile", "llama2-7b", "--on", "v5p:256")
    assert (
        "the compiler for TPU v5p is not installed; run `make extra-compile` in a clone"
        in answer.error
    )
    gpu = ("compile", "llama2-7b", "--on", "h100:256")
    monkeypatch.setattr(child_process.sys, "version_info", (3, 12, 1))
    assert "the compiler for NVIDIA H100 SXM is not installed" in braeburn(*gpu).error
    monkeypatch.setattr(child_process.sys, "version_info", (3, 11, 9))
    assert "compiling for NVIDIA H100 SXM needs Python 3.12 or later" in braeburn(*gpu).error
    amd = ("compile", "llama2-7b", "--on", "mi300x:64")
    assert "compiling for AMD Instinct MI300X needs Python 3.12 or later" in braeburn(*amd).error
    monkeypatch.setattr(child_process.sys, "version_info", (3, 12, 1))
    for on in ("mi300x:64", "mi250x:64"):  # the latter's chips are two devices each
        error = braeburn("compile", "llama2-7b", "--on", on).error
        assert "is not installed; run `make extra-compile` in a clone" in error
    answer = braeburn("compile", "llama2-7b", "--on", "gaudi2:64")
    assert (
        "no compiler for Intel Gaudi 2 works without one; see what `braeburn plan` says"
        in answer.error
    )
    assert (
        "each TPU7x is 2 devices to its compiler"
        in braeburn("compile", "llama2-7b", "--on", "tpu7x:64").error
    )
    assert "--on 'groq-lpu:8'" in braeburn("compile", "llama2-7b", "--on", "groq-lpu:8").error
    assert (
        "--stage 'middle' is no stage"
        in braeburn("compile", "llama2-7b", "--on", "v5p:256", "--stage", "middle").error
    )
    assert "fdsp" in braeburn("compile", "llama2-7b", "--on", "v5p:256", "--mesh", "fdsp=256").error
    monkeypatch.setattr(child_process.platform, "machine", lambda: "arm64")
    assert "Linux on x86-64 alone" in braeburn("compile", "llama2-7b", "--on", "v5p:256").error


def answered(tmp_path, text, mesh, **more):
    """The answer of a child that compiled the text."""
    program = tmp_path / "program.hlo"
    program.write_text(text)
    memory = {"peak": 20.0, "arguments": 1.0, "temporaries": 19.0, "program": 0.1, "host": 0.0}
    effort = {
        "seconds": 3.0,
        "cpu_seconds": 2.0,
        "resident_gib": 1.0,
        "cached": False,
        "fingerprint": "0" * 32,
    }
    sizes = {"replica": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
    counted = text.count("\n  ") - text.count("\n  }")
    return effort | {
        "program": str(program),
        "instructions": counted,
        "memory": memory,
        "mesh": sizes,
        "flags": {},
        "versions": {},
        "stubs": [],
        "gradient_bytes": 40 * MIB,
        "padded_gradient_bytes": 41 * MIB,
        **more,
    }


SLICED = override(load("llama2-7b"), {"mesh.replica": 2})
SUM = "f32[10240,8,128]{2,1,0}"  # 40 MiB
GRADIENT = megascale(1, "ALL_REDUCE", SUM, SUM, "transpose(jvp())/psum")
SCALARS = megascale(2, "ALL_REDUCE", "f32[1,1,128]{2,1,0}", "f32[1,1,128]{2,1,0}")
GATHER = megascale(3, "ALL_GATHER", "bf16[4,128]{1,0}", "bf16[8,128]{1,0}", "jvp()/all_gather")
PADDED = megascale(4, "ALL_REDUCE", SUM, SUM, "jvp()/all_gather")
UNTOLD = megascale(5, "ALL_REDUCE", SUM, SUM)


@pytest.mark.parametrize(
    ("lines", "offenders"),
    [
        (GRADIENT + SCALARS, []),
        (GRADIENT + GATHER, ["send.3"]),
        # A gather written as a sum with zeros, told by its bytes; which it is, by its operation
        # where that is known.
        (GRADIENT + PADDED, ["send.4"]),
        (
            SCALARS + megascale(4, "ALL_REDUCE", "f32[64]{0}", "f32[64]{0}", "jvp()/all_gather"),
            ["send.4"],
        ),
        (GRADIENT + UNTOLD, ["send.5"]),
        (UNTOLD + megascale(6, "ALL_REDUCE", SUM, SUM), ["send.5", "send.6"]),
        ([], []),
    ],
)
def test_slice_proof(tmp_path, lines, offenders):
    answer = answered(tmp_path, straight(*lines), {"replica": 2, "fsdp": 64})
    found = program.Compilation(SLICED, "pretrain", parse_target("v4:2x64"), answer)
    assert [t.name for t in found.offenders] == offenders
    summary = found.summary()
    assert (summary["slices"] or {"holds": True})["holds"] == (not offenders)
    across = [row for row in found.traffic if row.link == "DCN"]
    assert sum(row.bytes for row in across) == sum(t.bytes for t in found.transfers)
    assert all(row.axes == ("replica",) and row.seconds for row in across)


def test_traffic_within_a_slice_and_across(tmp_path):
    # fsdp crosses the slices: its part within one is 32.
    groups = "replica_groups=mesh['fsdp'=32,'tensor'=2] {'fsdp'}, dimensions={0}"
    lines = [f"%g = bf16[64,{MIB}]{{1,0}} all-gather(%p), {groups}", *GATHER]
    answer = answered(tmp_path, straight(*lines), {"fsdp": 64, "tensor": 2})
    run = override(load("llama2-7b"), {"mesh.tensor": 2})
    found = program.Compilation(run, "pretrain", parse_target("v4:2x64"), answer)
    assert [(row.kind, row.axes, row.link, row.bytes) for row in found.traffic] == [
        ("all-gather", ("fsdp",), "ICI", 128 * MIB),
        ("all-gather", ("fsdp",), "DCN", 2048),
    ]
    communication = sum(row.seconds for row in found.traffic)
    assert found.interval == (communication, found.computing.seconds + communication)


def test_what_the_schedule_hides_is_in_the_step(tmp_path):
    groups = "replica_groups=mesh['fsdp'=32,'tensor'=2] {'fsdp'}, dimensions={0}"
    form = f"(bf16[2,{MIB}]{{1,0}}, bf16[64,{MIB}]{{1,0}})"
    lines = [
        f"%g = {form} all-gather-start(%p), {groups}",
        '%f = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"105000"}',
        f"%d = bf16[64,{MIB}]{{1,0}} all-gather-done(%g)",
        '%h = f32[8]{0} fusion(%d), backend_config={"estimated_cycles":"1050000"}',
        f"%w = bf16[32,{MIB}]{{1,0}} all-gather(%p), {groups.replace('fsdp', 'tensor')}",
    ]
    answer = answered(tmp_path, straight(*lines), {"fsdp": 32, "tensor": 2})
    found = program.Compilation(load("llama2-7b"), "pretrain", parse_target("v4:64"), answer)
    # 0.1 ms of a v4's cycles beside a gather that takes longer.
    rows = {row.axes: row for row in found.traffic if row.axes != ()}
    assert rows["fsdp",].asynchronous == 1 and rows["tensor",].asynchronous == 0
    assert rows["fsdp",].hidden_seconds == pytest.approx(1e-4)
    assert rows["fsdp",].seconds > 2e-4
    assert found.scheduled == pytest.approx(found.interval[1] - 1e-4)
    facts = found.summary()
    by_axes = {tuple(row["axes"]): row for row in facts["axes"]}
    assert by_axes["fsdp",]["hidden_seconds"] == rows["fsdp",].hidden_seconds
    assert sum(row["seconds"] for row in facts["axes"]) == pytest.approx(
        facts["serial"] - facts["compute_seconds"]
    )


def test_two_that_go_opposite_ways_take_the_time_of_one(tmp_path):
    # A ring of four over a mesh of 16 x 4.
    ring = [(4 * i + k, 4 * i + (k + 1) % 4) for i in range(16) for k in range(4)]
    form = f"(bf16[{MIB}]{{0}}, bf16[{MIB}]{{0}}, u32[], u32[])"
    seconds = []
    for pairs in ([ring], [ring, [(b, a) for a, b in ring]], [ring, ring]):
        written = [",".join(f"{{{a},{b}}}" for a, b in one) for one in pairs]
        lines = [
            f"%cp.{i} = {form} collective-permute-start(%p), source_target_pairs={{{one}}}"
            for i, one in enumerate(written)
        ]
        lines += [
            f"%d.{i} = bf16[8]{{0}} collective-permute-done(%cp.{i})" for i in range(len(pairs))
        ]
        answer = answered(tmp_path, straight(*lines), {"fsdp": 16, "tensor": 4})
        target = parse_target("v4:64")
        found = program.Compilation(load("llama2-7b"), "pretrain", target, answer)
        seconds.append(sum(row.seconds for row in found.traffic))
    one, both_ways, one_way = seconds
    assert both_ways == pytest.approx(one) and one_way == pytest.approx(2 * one)


def test_a_teacher_computes_a_third_of_training(tmp_path):
    answer = answered(tmp_path, straight(), {"fsdp": 128})
    run = load("llama2-7b")
    stage = run.stages["pretrain"]
    stages = {"first": stage, "distilled": stage.model_copy(update={"teacher": "first"})}
    run = run.model_copy(update={"stages": stages})
    alone, distilled = (
        program.Compilation(run, name, parse_target("v4:128"), answer).flop_bound
        for name in ("first", "distilled")
    )
    assert distilled == pytest.approx(alone * 4 / 3)


def test_a_text_that_lacks_instructions_is_noticed(tmp_path):
    answer = answered(tmp_path, straight(*GRADIENT), {"replica": 2, "fsdp": 64})
    more = answer | {"instructions": answer["instructions"] + 1}
    with pytest.raises(UserError, match="instructions"):
        program.Compilation(SLICED, "pretrain", parse_target("v4:2x64"), more).summary()


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Answers in place of the child process, for each call the next; what it was asked."""
    answers, asked = [], []

    def ask(command, request, log, memory_gb):
        asked.append(request)
        return answers[min(len(asked), len(answers)) - 1]

    monkeypatch.setattr(child_process, "check_compiler", lambda target: None)
    monkeypatch.setattr(child_process, "_ask", ask)
    return answers, asked


def test_the_command_prints_what_the_compiler_says(child, tmp_path):
    answers, asked = child
    answers.append(answered(tmp_path, straight(*GRADIENT, *GATHER), {"replica": 2, "fsdp": 64}))
    answer = braeburn("compile", "llama2-7b", "--on", "v4:2x64", "--json")
    assert answer.code == 1  # something else than gradients leaves a slice
    facts = json.loads(answer.out)
    assert facts["fits"] and not facts["slices"]["holds"] and facts["plan"]["step_seconds"] > 0
    assert [t["kind"] for t in facts["slices"]["transfers"] if t["offends"]] == ["all-gather"]
    assert asked[0]["run"]["mesh"]["replica"] == 2  # one for each slice, unless it is said
    text = braeburn("compile", "llama2-7b", "--on", "v4:2x64", "--mesh", "replica=1,fsdp=128")
    assert asked[1]["run"]["mesh"]["replica"] == 1 and asked[1]["run"]["mesh"]["fsdp"] == 128
    assert "fits: 20.00 GiB of 30.75" in text.out
    assert "with the overlap that the schedule shows" in text.out
    assert "1 transfers that are not the sum of gradients leave a slice" in text.out


def test_libraries_that_stubs_stand_in_for_are_told(child, tmp_path):
    found = answered(tmp_path, straight(), {"fsdp": 64})
    child[0].append(found | {"stubs": ["librccl.so.1", "libMIOpen.so.1"]})
    answer = braeburn("compile", "llama2-7b", "--on", "mi300x:64")
    assert answer.code == 0, answer.err
    assert "fits: 20.00 GiB of 186.00" in answer.out
    assert (
        "libraries that are not installed here, which compiling goes without: librccl.so.1, "
        "libMIOpen.so.1" in answer.out
    )


def test_what_would_fit_is_named_and_compiled(child, tmp_path):
    answers, asked = child
    known = answered(tmp_path, straight(), {"fsdp": 256})
    del known["memory"], known["program"]
    lacking = known | {"required_gib": 108.4, "available_gib": 95.73}
    fitting = answered(tmp_path, straight(), {"fsdp": 256})
    answers += [lacking]
    sets = ["--set", "stages.pretrain.batch_tokens=67108864"]
    answer = braeburn("compile", "llama2-70b", "--on", "v5p:256", *sets)
    assert answer.code == 1 and "does not fit: 108.40 GiB of 95.73 on each device" in answer.out
    assert (
        "would fit on v5p:256" in answer.out and "(not compiled)" in answer.out and len(asked) == 1
    )
    answers += [lacking, lacking, fitting]
    answer = braeburn("compile", "llama2-70b", "--on", "v5p:256", "--fix", "--json", *sets)
    changes = json.loads(answer.out)["changes"]
    assert [change["verified"] for change in changes] == [False, True, None] and len(asked) == 4
    assert asked[2]["run"]["mesh"]["fsdp"] == changes[0]["assignments"]["mesh.fsdp"]


def test_too_few_chips(child, tmp_path):
    answers, _ = child
    known = answered(tmp_path, straight(), {"fsdp": 4})
    del known["memory"], known["program"]
    answers.append(known | {"required_gib": 342.0, "available_gib": 15.75})
    answer = braeburn("compile", "llama3-8b", "--on", "v5e:4")
    assert answer.code == 1 and "would fit on v5e:" in answer.out


def loop_of_tokens(*lines):
    """A program that is one loop, of a length that nothing tells."""
    body = (
        "%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128])",
        "%p = (s32[], bf16[8,128]) parameter(0)",
        "%i = s32[] get-tuple-element(%p), index=0",
        "%x = bf16[8,128]{1,0} get-tuple-element(%p), index=1",
        *lines,
        "ROOT %t = (s32[], bf16[8,128]) tuple(%i, %x)",
    )
    condition = (
        "%condition (p.1: (s32[], bf16[8,128])) -> pred[]",
        "%p.1 = (s32[], bf16[8,128]) parameter(0)",
        "ROOT %go = pred[] custom-call(%p.1)",
    )
    entry = (
        "ENTRY %main (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128])",
        "%s = (s32[], bf16[8,128]) parameter(0)",
        "ROOT %w = (s32[], bf16[8,128]) while(%s), condition=%condition, body=%body",
    )
    return module(entry, body, condition)


def test_the_programs_of_a_job_are_compiled_one_by_one(child, tmp_path):
    answers, asked = child
    gather = (
        "%g = bf16[8,1024]{1,0} all-gather(%x), replica_groups=mesh['tensor'=8] {'tensor'}, "
        "dimensions={1}"
    )
    folders = [tmp_path / "prefill", tmp_path / "token"]
    for folder in folders:
        folder.mkdir()
    answers.append(answered(folders[0], straight(gather.replace("%x", "%p")), {"tensor": 8}))
    answers.append(answered(folders[1], loop_of_tokens(gather), {"tensor": 8}))
    sizes = ["--mesh", "tensor=8", "--batch", "4", "--dtype", "bf16"]
    on = ["compile", "llama3-8b", "--on", "h100:8", "--job", "generate", *sizes]
    answer = braeburn(*on, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["fits"] and facts["mesh_option"] == "tensor=8"
    assert [program["name"] for program in facts["programs"]] == ["prefill", "token"]
    assert [each["program"] for each in asked] == ["prefill", "token"]
    for each in asked:
        assert each["job"] == "generate" and each["mesh"]["tensor"] == 8
        assert each["settings"]["batch"] == 4 and each["settings"]["dtype"] == "bfloat16"
    # One round of the loop, as the plan has it.
    token = facts["programs"][1]
    assert token["rounds"] == 255 and token["bytes"] == {"tensor": 2 * 8 * 1024}
    assert token["plan"]["memory_gib"] > 0 and token["plan"]["bytes"]["tensor"] > 0
    text = braeburn(*on).out
    assert "token, which runs 255 times, fits: 20.00 GiB of 74.00 on each device" in text
    assert "unstack, which is not compiled, fits: by the plan 2.31 GiB of 74.00" in text
    assert [part["name"] for part in facts["planned_alone"]] == ["unstack"]


def test_a_job_does_not_fit_where_what_is_not_compiled_does_not(child, tmp_path):
    for name in ("prefill", "token"):
        (tmp_path / name).mkdir()
        child[0].append(answered(tmp_path / name, straight(), {"tensor": 1}))
    on = ["compile", "llama3-8b", "--on", "h100:1", "--job", "generate", "--mesh", "fsdp=1"]
    # Its weights of 69 GiB would fit, if none of them were there twice for a while.
    answer = braeburn(*on, "--set", "model.num_layers=165", "--json")
    facts = json.loads(answer.out)
    assert answer.code == 1 and not facts["fits"]
    assert [program["fits"] for program in facts["programs"]] == [True, True]


def test_a_job_that_does_not_fit_is_told_with_what_would(child, tmp_path):
    answers, _ = child
    known = answered(tmp_path, straight(), {"fsdp": 8})
    del known["memory"], known["program"]
    answers.append(known | {"required_gib": 80.0, "available_gib": 74.0})
    on = ["compile", "llama3-8b", "--on", "h100:8", "--job", "evaluate", "--mesh", "fsdp=8"]
    answer = braeburn(*on)
    assert answer.code == 1 and "batch, which runs 4 times, does not fit: 80.00 GiB" in answer.out
    assert "would fit on h100:8" in answer.out and "\n--mesh fsdp=" in answer.out


def test_an_export_has_nothing_to_compile():
    answer = braeburn("compile", "afm-server", "--on", "v4:1024", "--job", "export")
    assert answer.code == 0 and "runs no program on v4:1024" in answer.out
    facts = json.loads(
        braeburn("compile", "afm-server", "--on", "v4:1024", "--job", "export", "--json").out
    )
    assert facts["fits"] and facts["programs"] == []


def test_what_is_wrong_with_a_job_is_said_before_compiling(child):
    on = ["compile", "llama3-8b", "--on", "h100:8"]
    error = braeburn(*on, "--job", "generate", "--mesh", "context=8").error
    assert "--mesh context=8 splits sequences" in error
    error = braeburn(*on, "--job", "evaluate", "--mesh", "fsdp=3").error
    assert "cannot be split into 3 equal parts" in error
    assert "--batch is of --job generate" in braeburn(*on, "--batch", "3").error
    assert not child[1]
