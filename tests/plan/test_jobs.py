"""The plan of evaluation, generation and export: against what real programs hold and move on
simulated devices, against cases worked out by hand, and from the command line.
"""

import gc
import json
import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.cli.resolve import parse_mesh
from braeburn.config import MeshConfig, ModelConfig, Run, override
from braeburn.config.sublayers.reused import ReusedAttention
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.errors import UserError
from braeburn.evaluate.generate import Ready, programs, ready
from braeburn.evaluate.sampling import DEFAULT_TEMPERATURE, Sampling
from braeburn.hardware.links import Links
from braeburn.hardware.targets import parse_target
from braeburn.layers.spec import count, initialize
from braeburn.models.decoder import param_specs
from braeburn.parallel.layout import Layout
from braeburn.plan.attention import Accelerator
from braeburn.plan.collectives import collectives, traffic
from braeburn.plan.cost import EFFICIENCY, GIB
from braeburn.plan.device_work import DeviceMemory, DeviceWork, Product, work_of_program
from braeburn.plan.export_cost import PROCESS_BYTES, READING_BYTES, estimate_export
from braeburn.plan.few_layers import sum_of_memory, sum_of_work, terms_of
from braeburn.plan.forward import CollectiveTotal
from braeburn.plan.job_cost import ProgramWork, estimate_job, job_work
from braeburn.plan.job_programs import JobProgram, job_layout, programs_of
from braeburn.plan.job_search import JobCandidate
from braeburn.plan.jobs import Evaluate, Export, Generate, JobOn, job_of
from braeburn.recipes import load
from support import braeburn

CPU = Accelerator("cpu")
SIZES = {"model.d_model": 128, "model.ffn_dim": 320, "model.head_dim": 32, "model.num_layers": 4}
EVALUATE = Evaluate(tokens=8192, sequence_length=128, dtype="float32", read_gb_per_s=1.0)
GENERATE = Generate(
    batch=8, prompt_tokens=64, max_new_tokens=40, dtype="float32", read_gb_per_s=1.0
)
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def laid(run: Run, mesh: dict[str, int], *, real: bool) -> Layout:
    """Where the parameters of a run's model lie on a mesh of simulated devices, or of none."""
    sizes = MeshConfig(**({"fsdp": 1} | mesh))
    devices = jax.devices()[: math.prod(sizes.sizes.values())] if real else None
    return job_layout(run, run.model, sizes, devices)


def own_bytes(tree: Any) -> int:
    """Bytes of arrays on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def live_bytes() -> int:
    """Bytes of all arrays that are there, on the first device."""
    first = jax.devices()[0]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.live_arrays()
        if first in leaf.sharding.device_set
    )


def check_collectives(text: str, mesh: MeshConfig, planned: list[CollectiveTotal]) -> None:
    """By axis, the bytes of a compiled program are those of the plan, but for scalars and
    indices.
    """
    real: dict[str, float] = {}
    for (_, axes), size in traffic(collectives(text, mesh.sizes)).items():
        for axis in axes or ():
            real[axis] = real.get(axis, 0) + size
    for axis, size in real.items():
        found = sum(total.bytes for total in planned if total.axis == axis)
        assert found == pytest.approx(size, rel=0.1, abs=8192), axis


EACH_AXIS = {"fsdp": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    "mesh", [EACH_AXIS, *(pytest.param(mesh, marks=pytest.mark.deep) for mesh in MESHES)], ids=str
)
def test_evaluation_holds_and_moves_what_is_planned(mesh: dict[str, int], tiny: Run) -> None:
    run = override(tiny, SIZES)
    layout = laid(run, mesh, real=True)
    (program,) = programs_of(EVALUATE, run.model, layout)
    compiled = jax.jit(program.function).lower(*program.arguments).compile()
    (planned,) = programs_of(EVALUATE, run.model, laid(run, mesh, real=False))
    work, memory = work_of_program(planned, CPU)
    with layout.compiling():
        params = jax.jit(lambda: initialize(layout.specs, 0), out_shardings=layout.parameters())()
    assert memory.weights == own_bytes(params)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert memory.weights + memory.arguments == pytest.approx(arguments, rel=1e-3)
    check_collectives(compiled.as_text(), layout.sizes, list(work.collectives))


@pytest.mark.parametrize(
    "mesh", [pytest.param(MESHES[0], marks=pytest.mark.deep), MESHES[1]], ids=str
)
def test_generation_holds_what_is_planned(mesh: dict[str, int], tiny: Run) -> None:
    run = override(tiny, SIZES)
    layout = laid(run, mesh, real=True)
    with layout.compiling():
        params = jax.jit(lambda: initialize(layout.specs, 0), out_shardings=layout.parameters())()
    at_hand: Ready = ready(params, run.model, layout)
    prefill, token = programs_of(GENERATE, run.model, layout)
    run_programs = programs(
        run.model, at_hand.layout.execution, layout.mesh, Sampling(DEFAULT_TEMPERATURE)
    )
    prompts, draws = prefill.arguments[1:]
    zeros = jax.tree.map(
        lambda leaf: jax.device_put(
            jax.random.key(0)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else np.ones(leaf.shape, leaf.dtype),
            leaf.sharding,
        ),
        (prompts, draws),
    )
    with layout.compiling():
        rows, _ = run_programs.begin(at_hand.params, *zeros, 64)
    for program, held in zip(
        programs_of(GENERATE, run.model, laid(run, mesh, real=False)),
        ({}, {"cache": own_bytes(rows)}),
        strict=True,
    ):
        work, memory = work_of_program(program, CPU)
        assert memory.weights == own_bytes(at_hand.params)
        assert memory.held == held
    assert program.rounds == GENERATE.max_new_tokens - 1
    # A token reads the weights once, but for the embedding, of which it takes a row; and the cache.
    matrices = sum(each.bytes * each.times for each in work.products)
    layers = own_bytes({k: v for k, v in at_hand.params.items() if k == "layers"})
    assert matrices > layers * (layout.sizes.fsdp if layout.sizes.fsdp > 1 else 1) * 0.9
    compiled = jax.jit(token.function, donate_argnums=1).lower(*token.arguments).compile()
    assert own_bytes(at_hand.params) + own_bytes(rows) == pytest.approx(
        compiled.memory_analysis().argument_size_in_bytes, rel=1e-2
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_layers_are_unstacked_in_the_memory_that_is_planned(
    mesh: dict[str, int], dtype: Any, tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = override(tiny, SIZES | {"precision.compute": dtype})
    layout = laid(run, mesh, real=True)
    gc.collect()
    before = live_bytes()
    # As `load_ready` reads them: in the type that is computed in, but for norms.
    with layout.compiling():
        params = jax.jit(
            lambda: jax.tree.map(
                lambda spec, leaf: leaf.astype(spec.held_in(dtype)),
                layout.specs,
                initialize(layout.specs, 0),
            ),
            out_shardings=layout.parameters(),
        )()
    held: list[int] = []
    wait = jax.block_until_ready

    def watched(made: Any) -> Any:
        found = wait(made)
        held.append(live_bytes() - before)
        return found

    # Called when the layers of a parameter are there, and the parameter still is.
    monkeypatch.setattr(jax, "block_until_ready", watched)
    ready(params, run.model, layout, consume=True)
    on = JobOn(replace(GENERATE, dtype=dtype), run, "", parse_target("h100:8"))
    estimate = estimate_job(
        on, job_work(on, layout.sizes), layout.sizes, Links(on.target, layout.sizes)
    )
    unstack = estimate.programs[0]
    assert (unstack.name, unstack.rounds) == ("unstack", 1)
    # The plan counts norms as they come to lie, whole on each device.
    assert unstack.total_gib * GIB == pytest.approx(max(held), rel=0.02)


def test_what_unstacking_takes_by_hand() -> None:
    run, target = load("llama3-8b"), parse_target("h100:8")
    sizes, model = MeshConfig(fsdp=1, tensor=8), run.model
    on = JobOn(replace(GENERATE, dtype="bfloat16"), run, "pretrain", target)
    unstack, prefill, _ = estimate_job(
        on, job_work(on, sizes), sizes, Links(target, sizes)
    ).programs
    # No float32 copy of the weights is ever there: the largest matrices of all layers are twice.
    ffn = 2 * model.num_layers * model.d_model * model.ffn_dim / 8
    assert unstack.memory == {"weights": prefill.memory["weights"], "results": ffn / GIB}
    moved = target.facts.memory_gb_per_s.value * 1e9 * EFFICIENCY["nvidia"].memory  # type: ignore[union-attr]
    tables = 2 * 2 * model.vocab_size * model.d_model / 8 / GIB
    layers = (prefill.memory["weights"] - tables) * GIB
    assert unstack.seconds == pytest.approx(2 * layers / moved, rel=1e-3)


def test_a_model_is_written_from_where_its_weights_fit_in_half_precision() -> None:
    # Over two chips: in float32 they would take 131.4 GiB of each, of which 95.7 are there.
    asked = ["plan", "llama3-70b", "--on", "v5p:4", "--job", "generate", "--json"]
    (target,) = json.loads(braeburn(*asked).out)["targets"]
    layouts = {layout["mesh_option"]: layout for layout in target["layouts"]}
    assert layouts["data=2,tensor=2"]["fits"]


FULL, LAST = {}, {"attention": SlidingAttention(window=16)}
PATTERNS: dict[str, dict[str, Any]] = {
    "one": {"num_layers": 7},
    "windows": {"num_layers": 11, "pattern": (LAST, LAST, FULL)},
    "reuse": {
        "num_layers": 10,
        "tail_pattern": ({"attention": ReusedAttention()},),
        "tail_layers": 4,
    },
}


@pytest.mark.parametrize(
    "pattern",
    ["windows", *(pytest.param(each, marks=pytest.mark.deep) for each in ("one", "reuse"))],
)
def test_a_few_layers_do_what_all_layers_do(pattern: str, tiny: Run) -> None:
    run = override(tiny, SIZES)
    model = ModelConfig.model_validate(run.model.model_dump() | PATTERNS[pattern])
    sizes = MeshConfig(fsdp=2, tensor=2)

    def each(of: ModelConfig) -> list[tuple[DeviceWork, DeviceMemory]]:
        found = programs_of(GENERATE, of, job_layout(run, of, sizes, None))
        return [work_of_program(program, CPU) for program in found]

    terms = [(term.factor, each(term.model)) for term in terms_of(model)]
    assert len(terms) > 1
    for index, (work, memory) in enumerate(each(model)):
        summed = sum_of_work([(factor, parts[index][0]) for factor, parts in terms])
        assert {(p.flops, p.bytes): p.times for p in summed.products} == {
            (p.flops, p.bytes): p.times for p in work.products
        }
        assert summed.element_wise == pytest.approx(work.element_wise, rel=0.02)
        assert {(c.axis, c.kind, c.what): c.bytes for c in summed.collectives} == {
            (c.axis, c.kind, c.what): c.bytes for c in work.collectives
        }
        held = sum_of_memory([(factor, parts[index][1]) for factor, parts in terms])
        assert (held.weights, held.held, held.results) == (
            memory.weights,
            memory.held,
            memory.results,
        )
        assert held.workspace == pytest.approx(memory.workspace, rel=0.1)


def test_products_of_an_evaluation_are_those_of_its_weights(tiny: Run) -> None:
    run = override(tiny, SIZES | {"model.head_dim": 40})
    (program,) = programs_of(EVALUATE, run.model, laid(run, {"fsdp": 1}, real=False))
    work, _ = work_of_program(program, Accelerator("tpu"))
    rows, length = program.arguments[1]["inputs"].shape
    assert (length, rows * length * program.calls) == (128, 8192)
    specs = param_specs(run.model)
    head = run.model.vocab_size * run.model.d_model
    weights = count(specs, ("matrix",)) + head
    # Heads of 40 are not for the TPU's kernel: attention in plain XLA is among the products.
    flops = sum(product.flops * product.times for product in work.products)
    assert 2 * weights * rows * length < flops < 2.5 * weights * rows * length
    large = override(run, {"model.head_dim": 128})
    (program,) = programs_of(EVALUATE, large.model, laid(large, {"fsdp": 1}, real=False))
    work, _ = work_of_program(program, Accelerator("tpu"))
    weights = count(param_specs(large.model), ("matrix",)) + head
    flops = sum(product.flops * product.times for product in work.products)
    assert flops == pytest.approx(2 * weights * rows * length)
    (kernel,) = work.kernels
    # Two products, of the half that causality leaves.
    each = 2 * large.model.num_layers * large.model.num_heads * 128 * rows * length * length
    assert kernel.flops(0) == pytest.approx(each)


def timed_by_hand(work: DeviceWork, on: str) -> Any:
    """What is predicted of a program that does some work."""
    memory = DeviceMemory(2.0 * GIB, {"cache": 1.0 * GIB}, 0.0, 0.0, 0.5 * GIB)
    program = JobProgram("token", lambda: None, (), rounds=10)
    target, sizes = parse_target(on), MeshConfig(fsdp=1, tensor=8)
    placed = JobOn(EVALUATE, load("llama3-8b"), "pretrain", target)
    return estimate_job(placed, [ProgramWork(program, work, memory)], sizes, Links(target, sizes))


def test_seconds_by_hand() -> None:
    chip, fraction = parse_target("h100:8").facts, EFFICIENCY["nvidia"]
    peak = chip.bf16_tflops.value * 1e12 * fraction.matrix  # type: ignore[union-attr]
    moved = chip.memory_gb_per_s.value * 1e9 * fraction.memory  # type: ignore[union-attr]
    # One product waits for its FLOPs, the other three for their bytes.
    work = DeviceWork((Product(peak, moved / 2, 1), Product(peak / 4, moved, 3)), (), moved, ())
    found = timed_by_hand(work, "h100:8")
    (program,) = found.programs
    assert program.compute == pytest.approx(
        {"matrix": 1 + 3 / 4, "attention": 0.0, "memory_bound": 3 * (3 / 4) + 1}
    )
    assert found.working == pytest.approx(10 * 5)
    assert found.total_gib == 3.5 and found.fits
    # The hosts share out a checkpoint in float32: here there is one.
    assert found.reading == pytest.approx(4 * count(param_specs(load("llama3-8b").model)) / 1e9)
    # Of what moves tokens a fifth is hidden.
    across = CollectiveTotal("tensor", "all-reduce", 1e9, 10, "tokens")
    spent = 10 * Links(parse_target("h100:8"), MeshConfig(fsdp=1, tensor=8)).seconds(
        "all-reduce", 1e8, ("tensor",)
    )  # type: ignore[operator]
    found = timed_by_hand(replace(work, collectives=(across,)), "h100:8")
    assert found.programs[0].seconds == pytest.approx(5 + 0.8 * spent)


def test_an_export_by_hand() -> None:
    model = load("llama3-70b").model
    job = Export("hf", "bfloat16", 64.0, 2.0, 0.5)
    found = estimate_export(job, model)
    parameters = count(param_specs(model))
    table, down = 128_256 * 8192, 28_672 * 8192
    # The head comes first, and its bfloat16 values are given up when the table has been read.
    around = PROCESS_BYTES + READING_BYTES
    assert found.tensor == "model.embed_tokens.weight"
    assert found.peak == around + 2 * table + 6 * table and found.fits
    assert found.seconds == pytest.approx(4 * parameters / 2e9 + 2 * parameters / 0.5e9)
    # As they are on disk, tables are not copied: the matrix behind the table is the fullest.
    plain = estimate_export(replace(job, type="float32"), model)
    assert plain.peak == around + 8 * table  # both tables, of which one is given up then
    # A checkpoint in bfloat16 is read so, and copied to float32.
    half = estimate_export(job, model, "bfloat16")
    assert half.peak == found.peak and half.read == parameters * 2
    narrow = model.replace(vocab_size=1024)
    assert estimate_export(replace(job, type="float32"), narrow).peak == around + 12 * down
    # Of 32 values each q8_0 has a scale of two bytes, q4_0 half the bits.
    eight, four = (
        estimate_export(replace(job, format="gguf", type=type_), model).written
        for type_ in ("q8_0", "q4_0")
    )
    assert (eight, four) == pytest.approx((parameters * 34 / 32, parameters * 18 / 32))
    # Gate and up of all experts are one tensor, made beside each of them; their bias comes before.
    mixture = estimate_export(job, load("gpt-oss-120b").model)
    gate, bias = 128 * 2880 * 2880, 128 * 2880
    assert mixture.peak == around + 8 * gate + 4 * gate + 2 * bias
    assert estimate_export(replace(job, host_memory_gb=None), model).fits is None
    assert estimate_export(replace(job, host_memory_gb=8.0), model).fits is False


def test_settings_that_are_not_given(tiny: Run) -> None:
    run = load("afm-server")
    found = job_of("evaluate", run, "context", {"dtype": "bf16"})
    # As many as the run itself evaluates on, of each of its four sources.
    assert found == Evaluate(4 * run.evaluation.tokens, 32_768, "bfloat16", 1.0)
    assert job_of("evaluate", run, "core", {}) == Evaluate(2**20, 4096, "float32", 1.0)
    assert job_of("export", run, "core", {"format": "gguf"}) == Export(
        "gguf", "f16", None, 1.0, 1.0
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--job", "evalute"], "--job 'evalute' is no job; did you mean 'evaluate'"),
        (
            ["--job", "export", "--batch", "3"],
            "--batch is of --job generate; leave it out, or add --job generate in place of "
            "--job export",
        ),
        (["--tokens", "3"], "--tokens is of --job evaluate; leave it out, or add --job evaluate"),
        (
            ["--job", "evaluate", "--verify", "2"],
            "--verify is of training alone; leave it out of --job evaluate",
        ),
        (["--job", "generate", "--dtype", "fp16"], "use --dtype fp32 or --dtype bf16"),
        (["--job", "export", "--type", "f16"], "--type f16 is one of --format gguf"),
        (
            ["--job", "export", "--format", "onnx"],
            "use --format hf, --format gguf or --format stablehlo",
        ),
        (["--job", "evaluate", "--stage", "cor"], "--stage 'cor' is no stage of afm-85m"),
        (["--job", "export", "--host-memory-gb", "0.3"], "run it on a host of 1 GB or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], sentence: str) -> None:
    assert sentence in braeburn("plan", "afm-85m", "--on", "v5e:8", *arguments).error


def test_what_does_not_fit_is_told_with_what_would() -> None:
    asked = ["plan", "llama3-8b", "--job", "evaluate", "--sequence-length", "1024"]
    error = braeburn(*asked, "--on", "v5e:1").error
    assert "evaluate needs" in error and "15.8 are there" in error
    assert "--dtype bf16" not in error  # 16 GB of weights are too many as well
    assert "v5e:4 has room (" in error
    answer = braeburn(*asked, "--on", "v5e:4", "--json")
    assert answer.code == 0
    error = braeburn(*asked, "--on", "a100:1", "--set", "model.num_layers=96").error
    assert "--dtype bf16 has room (fsdp=1, " in error
    answer = braeburn(
        *asked, "--on", "a100:1", "--set", "model.num_layers=96", "--dtype", "bf16", "--json"
    )
    best = json.loads(answer.out)["targets"][0]["layouts"][0]
    assert best["fits"] and f"{best['total_gib']['value']:.1f} GiB" in error


def test_a_plan_of_each_job_in_rows_and_as_data() -> None:
    for job, chips in (("evaluate", 2), ("generate", 1), ("export", 2)):
        asked = ["plan", "afm-85m", "--on", f"h100:{chips}", "sohu:8", "--job", job]
        plan = json.loads(braeburn(*asked, "--json").out)
        found, refused = plan["targets"]
        text = braeburn(*asked).out
        for name, value in plan["settings"].items():
            option = "--dtype" if name == "type" else "--" + name.replace("_", "-")
            shown = f"{value:,}" if isinstance(value, int) else str(value or "unknown")
            assert any(line.split() == [option, shown] for line in text.splitlines())
        hours = found["total"]["seconds"]["value"] / 3600
        assert found["total"]["chip_hours"]["value"] == pytest.approx(hours * chips)
        assert found["total"]["cost_usd"]["value"] == pytest.approx(hours * chips * 6.88)
        assert found["total"]["energy_mwh"]["value"] == pytest.approx(hours * chips * 700e-6)
        # What disks give is assumed.
        assert found["total"]["seconds"]["confidence"] == "M"
        if job == "export":
            assert not refused["refused"]  # it runs on a host
            continue
        assert "inference only" in refused["refused"] and "refused: sohu:8" in text
        layouts = found["layouts"]
        assert [layout["fits"] for layout in layouts] == [True] * len(layouts)
        times = [layout["working_seconds"]["value"] for layout in layouts]
        assert times == sorted(times)
        best = layouts[0]
        assert f"braeburn {job} DIR --mesh {best['mesh_option']}" in text
        spent = sum(each["seconds"]["value"] * each["rounds"] for each in best["programs"])
        assert best["working_seconds"]["value"] == pytest.approx(spent)
        fullest = max(sum(each["memory_gib"].values()) for each in best["programs"])
        assert best["total_gib"]["value"] == pytest.approx(fullest)
        if job == "evaluate":
            speed = plan["settings"]["tokens"] / spent
        else:
            unstack, prefill, token = best["programs"]
            assert best["first_token_seconds"]["value"] == prefill["seconds"]["value"]
            assert (unstack["rounds"], token["rounds"]) == (1, 255)
            speed = 8 / token["seconds"]["value"]
        assert best["tokens_per_second"]["value"] == pytest.approx(speed)


def test_weights_in_bfloat16_take_half() -> None:
    run, target = load("llama3-8b"), parse_target("h100:8")
    sizes = MeshConfig(fsdp=1, tensor=8)
    whole, half = (
        job_work(JobOn(replace(EVALUATE, dtype=dtype), run, "pretrain", target), sizes)[
            0
        ].memory.weights
        for dtype in ("float32", "bfloat16")
    )
    assert half == pytest.approx(whole / 2, rel=1e-3)  # norms stay float32


@pytest.mark.parametrize(
    "option", ["fsdp=1", "fsdp=2,tensor=4", "expert=4", "expert=4,expert_dispatch=all_to_all"]
)
def test_a_mesh_is_named_as_its_option_takes_it(option: str) -> None:
    sizes = parse_mesh(option)
    assert JobCandidate(sizes, estimate=Any).mesh_option == option  # type: ignore[arg-type]


def test_a_mesh_that_splits_sequences_cannot_generate(tiny: Run) -> None:
    with pytest.raises(UserError, match="splits sequences"):
        programs_of(GENERATE, tiny.model, laid(tiny, {"context": 2}, real=False))


def test_weights_that_are_copied_into_another_order(tiny: Run) -> None:
    run = override(tiny, SIZES)
    model = run.model

    def relaid(job: Any, mesh: dict[str, int], platform: str) -> float:
        *_, program = programs_of(job, model, laid(run, mesh, real=False))
        return work_of_program(program, Accelerator(platform))[1].relaid

    # On GPUs what is gathered along its last dimension: outputs of attention and FFN, and the head,
    # block by block.
    heads = model.num_heads * model.head_dim
    rows = model.num_layers * (heads + model.ffn_dim) + model.vocab_size
    stacks = 4 * rows * model.d_model / 2
    assert relaid(EVALUATE, {"fsdp": 2}, "cuda") == stacks
    assert relaid(EVALUATE, {"fsdp": 2}, "tpu") == relaid(EVALUATE, {"tensor": 2}, "cuda") == 0
    # On TPUs keys and values, where a device works with one head of those that it has.
    assert (model.num_kv_heads, model.num_heads) == (2, 4)
    whole = 2 * 4 * model.num_layers * model.d_model * model.num_kv_heads * model.head_dim
    assert relaid(GENERATE, {"tensor": 4}, "tpu") == whole
    assert relaid(GENERATE, {"tensor": 2}, "tpu") == relaid(GENERATE, {"tensor": 4}, "cuda") == 0
