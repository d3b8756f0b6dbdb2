"""How often each instruction of a compiled program runs and how long, in every form that compilers
write.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from braeburn.errors import UserError
from braeburn.hardware.catalogue import catalogue
from braeburn.plan import hlo
from braeburn.plan.collectives import collectives, transfers
from braeburn.plan.cost import EFFICIENCY
from braeburn.plan.hlo import parse
from braeburn.plan.kernels import computing

V5P, H100 = catalogue()["v5p"], catalogue()["h100"]
CLOCK, PEAK = 1.75e9, 459e12
SIZES = {"fsdp": 2, "tensor": 2}


def module(main, *computations):
    """A module of several computations, the entry last; each is its lines, the first its head."""
    bodies = []
    for head, *lines in (*computations, main):
        bodies.append(head + " {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n")
    return "HloModule jit_train_step, is_scheduled=true, num_partitions=4\n\n" + "\n".join(bodies)


def loop(
    condition,
    *,
    begin="%constant.1, %x, %constant.5",
    after="%add.2, %y, %gte.4",
    name="while.7",
    trips="",
):
    """A program whose loop holds 1,000 cycles."""
    state = "(s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)})"
    body = (
        f"%body (param.1: (s32[], f32[8], s32[])) -> {state}",
        f"%param.1 = {state} parameter(0)",
        "%gte.2 = s32[]{:T(128)} get-tuple-element(%param.1), index=0",
        "%gte.3 = f32[8]{0:T(128)} get-tuple-element(%param.1), index=1",
        "%gte.4 = s32[]{:T(128)} get-tuple-element(%param.1), index=2",
        "%one = s32[]{:T(128)} constant(1)",
        "%add.2 = s32[]{:T(128)} add(%gte.2, %one)",
        "%y = f32[8]{0:T(128)} fusion(%gte.3), kind=kLoop, calls=%fused, "
        'backend_config={"estimated_cycles":"1000"}',
        f"ROOT %tuple.2 = {state} tuple({after})",
    )
    entry = (
        "ENTRY %main.52_spmd (x: f32[8]) -> f32[8]",
        "%x = f32[8]{0:T(128)} parameter(0)",
        "%constant.1 = s32[]{:T(128)} constant(0)",
        "%constant.3 = s32[]{:T(128)} constant(3)",
        "%constant.5 = s32[]{:T(128)} constant(5)",
        f"%tuple.1 = {state} tuple({begin})",
        f"%{name} = {state} while(%tuple.1), condition=%cond, body=%body{trips}",
        f"ROOT %result = f32[8]{{0:T(128)}} get-tuple-element(%{name}), index=1",
    )
    fused = ("%fused (p: f32[8]) -> f32[8]", "ROOT %p = f32[8]{0:T(128)} parameter(0)")
    compared = (
        "%fused_compare (a: s32[], b: s32[]) -> pred[]",
        "%a = s32[]{:T(128)} parameter(0)",
        "%b = s32[]{:T(128)} parameter(1)",
        "ROOT %lt.1 = pred[]{:T(512)} compare(%b, %a), direction=LT",
    )
    head = "%cond (param.2: (s32[], f32[8], s32[])) -> pred[]"
    return module(
        entry,
        fused,
        compared,
        body,
        (
            head,
            f"%param.2 = {state} parameter(0)",
            "%gte.5 = s32[]{:T(128)} get-tuple-element(%param.2), index=0",
            "%gte.6 = s32[]{:T(128)} get-tuple-element(%param.2), index=2",
            "%limit = s32[]{:T(128)} constant(32)",
            *condition,
        ),
    )


HERE = ["ROOT %lt = pred[]{:T(512)} compare(%gte.5, %limit), direction=LT"]
CARRIED = ["ROOT %lt = pred[]{:T(512)} compare(%gte.5, %gte.6), direction=LT"]
FUSED = [
    "%copy = s32[]{:T(128)} copy(%gte.5)",
    "ROOT %f = pred[] fusion(%limit, %copy), calls=%fused_compare",
]


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(HERE), 32),
        (loop(CARRIED), 5),
        (loop(FUSED), 32),
        (loop(HERE, begin="%constant.3, %x, %constant.5"), 29),
        (loop(CARRIED, begin="%constant.5, %x, %constant.3"), 0),
        (
            loop(
                CARRIED,
                trips=", "
                'backend_config={"known_trip_count":{"n":"31"},"known_init_step":{"init":"0"}}',
            ),
            31,
        ),
    ],
    ids=[
        "constant",
        "carried through the tuple",
        "in a fusion",
        "not from 0",
        "never",
        "known_trip_count",
    ],
)
def test_length_of_a_loop(text, trips):
    times = [run.times for run in parse(text).walk() if run.instruction.cycles]
    assert times == [trips]
    assert computing(parse(text), V5P).seconds == pytest.approx(1000 * trips / CLOCK)


def test_calls_for_further_documents_are_not_counted():
    """They are as many as the data ask for: none where a sequence is one document."""
    source = "jit(train_step)/shard_map/jvp()/while/body/attention/further_documents/while"
    text = loop(CARRIED, after="%add.2, %y, %add.2", trips=f', metadata={{op_name="{source}"}}')
    assert computing(parse(text), V5P).seconds == 0


@pytest.mark.parametrize(
    "text",
    [
        loop(CARRIED, after="%add.2, %y, %add.2"),
        loop(["ROOT %ge = pred[]{:T(512)} compare(%gte.5, %limit), direction=GE"]),
        loop(
            [
                "%sum = s32[] multiply(%gte.5, %gte.6)",
                "ROOT %lt = pred[] compare(%sum, %limit), direction=LT",
            ]
        ),
    ],
    ids=["limit changes", "other comparison", "computed"],
)
def test_a_loop_of_unknown_length_is_named(text):
    with pytest.raises(
        UserError, match=r"in the loop while\.7, whose length cannot be told; compile"
    ):
        computing(parse(text), V5P)


def test_a_loop_that_is_told_when_to_stop_counts_one_round():
    """As where tokens are written; a loop within another is none of these."""
    text = loop(CARRIED, after="%add.2, %y, %add.2")
    one_round = dataclasses.replace(parse(text), one_round=True)
    assert computing(one_round, V5P).seconds == pytest.approx(1000 / CLOCK)
    within = dataclasses.replace(parse(called(text)), one_round=True)
    with pytest.raises(UserError, match=r"whose length cannot be told"):
        computing(within, V5P)


def called(text):
    """The same program with its loop in a computation that a call runs, as XLA's CPU compiler has
    it from JAX 0.12.
    """
    state = "(s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)})"
    before, entry = text.split("ENTRY ")
    (line,) = (line for line in entry.splitlines() if " while(" in line)
    moved = line.replace("%tuple.1)", "%arg)").replace("  %while.7", "  ROOT %while.7")
    wrapped = (
        f"%wrapped (arg: {state}) -> {state} {{\n  %arg = {state} parameter(0)\n{moved}\n}}\n\n"
    )
    call = f"  %while.8 = {state} call(%tuple.1), to_apply=%wrapped"
    return (
        before + wrapped + "ENTRY " + entry.replace(line, call).replace("(%while.7)", "(%while.8)")
    )


@pytest.mark.parametrize("condition", [HERE, CARRIED, FUSED], ids=["constant", "carried", "fused"])
def test_length_of_a_loop_in_a_called_computation(condition):
    found = [run for run in parse(called(loop(condition))).walk() if run.instruction.cycles]
    assert [(run.times, run.endless) for run in found] == [(5 if condition is CARRIED else 32, "")]


def test_a_called_loop_that_is_called_twice_has_two_lengths():
    text = called(loop(CARRIED))
    twice = text.replace(
        "  ROOT %result",
        "  %constant.9 = s32[] constant(9)\n  %tuple.9 = (s32[], f32[8], s32[]) "
        "tuple(%constant.1, %x, %constant.9)\n"
        "  %while.9 = (s32[], f32[8], s32[]) call(%tuple.9), to_apply=%wrapped\n  ROOT %result",
    )
    assert [run.times for run in parse(twice).walk() if run.instruction.cycles] == [5, 9]


def test_loops_compiled_here():
    def step(x, _):
        return lax.fori_loop(2, 9, lambda i, x: jnp.sin(x) * i, x), None

    text = (
        jax.jit(lambda x: lax.scan(step, x, None, length=3)[0])
        .lower(jnp.ones((512, 512)))
        .compile()
        .as_text()
    )
    for written in (text, text.replace('"known_trip_count"', '"unknown"')):
        sines = [run for run in parse(written).walk() if run.instruction.opcode == "sine"]
        assert [run.times for run in sines] == [21] and not sines[0].endless


# As libtpu writes it: the kernel's metadata holds line breaks, and a line that begins with braces.
SPLASH = """%splash_mha_fwd_segmented_residuals.1 = (bf16[2,32,4096,128]{3,2,1,0:T(8,128)(2,1)}, f32[2,32,4096,128]{3,2,1,0:T(8,128)}) custom-call(%mask, %q, %k, %v, /*index=5*/%ids), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, bf16[2,32,4096,128]{3,2,1,0}, bf16[2,8,4096,128]{3,2,1,0}, bf16[2,8,4096,128]{3,2,1,0}, s32[2,4096,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"q_layout\\": 1}"
}}, metadata={op_name="jit(train_step)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvUg{"}}"""  # noqa: E501
DQ = SPLASH.replace("fwd_segmented_residuals.1", "dq_segmented_no_residuals.7")
OTHER = SPLASH.replace("splash_mha_fwd_segmented_residuals", "ragged_dot")


def straight(*lines):
    return module(("ENTRY %main (p: f32[8]) -> f32[8]", *lines, "ROOT %p = f32[8]{0} parameter(0)"))


def test_kernels_of_tpus_by_their_flops():
    found = computing(parse(straight(SPLASH, DQ)), V5P)
    once = 2 * 32 * 4096 * 4096 * 128 / (PEAK * 0.55)  # causality leaves half of 2 FLOPs each
    assert [(k.name, k.calls) for k in found.kernels] == [
        ("splash_mha_fwd", 1),
        ("splash_mha_dq", 1),
    ]
    assert [k.seconds for k in found.kernels] == pytest.approx([2 * once, 3 * once])
    assert found.seconds == pytest.approx(5 * once) and not found.untimed
    # One sequence a chip: no batch dimension. Keys of other context shards as well.
    single = SPLASH.replace("bf16[2,32,4096,128]{3,2,1,0}", "bf16[32,1024,128]{2,1,0}")
    single = single.replace("bf16[2,8,4096,128]{3,2,1,0}", "bf16[8,4096,128]{2,1,0}")
    single = single.replace("s8[1,8,8]", "s8[1,2,8]")
    assert computing(parse(straight(single)), V5P).seconds == pytest.approx(2 * once / 8)


def test_kernels_with_a_window_multiply_less():
    # A window of 1024 tokens: of 8 blocks of keys each block of queries sees 3 at most.
    forward, gradients = SPLASH, DQ.replace("dq", "dkv")
    whole = [k.seconds for k in computing(parse(straight(forward, gradients)), V5P).kernels]
    forward = forward.replace("s8[1,8,8]", "s8[1,8,3]")
    gradients = gradients.replace("s8[1,8,8]", "s8[1,3,8]")
    found = computing(parse(straight(forward, gradients)), V5P)
    part = 3 / 8 * (2 - 3 / 8)
    assert [k.seconds for k in found.kernels] == pytest.approx([part * each for each in whole])


def test_what_has_no_time_is_told():
    lines = [
        '%copy.1 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}',
        '%copy.2 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"3500"}',
        "%copy.3 = f32[8]{0} copy(%p)",
        OTHER,
    ]
    found = computing(parse(straight(*lines)), V5P)
    assert found.untimed == ["copy.1", "ragged_dot"]
    assert found.seconds == pytest.approx(2e-6)


def test_a_lost_instruction_is_noticed(monkeypatch):
    text = loop(HERE)
    assert sum(len(body) for body in parse(text).computations.values()) == len(
        re.findall(r"^  .* = ", text, re.M)
    )
    for lost, what in (("gte.3", "instructions"), ("y", "instructions|cycles")):
        real = hlo._instruction

        def lose(line, lost=lost, real=real):
            found = real(line)
            return dataclasses.replace(found, name="") if found.name == lost else found

        monkeypatch.setattr(hlo, "_instruction", lose)
        with pytest.raises(UserError, match=what):
            parse(text)
        monkeypatch.undo()
    # A parser that takes the kernel's braces for the end of a computation loses what follows them.
    broken = (
        straight(SPLASH)
        .replace('"xprof_metadata":"{', '"xprof_metadata":{"')
        .replace('1}"\n}}', '1"}\n}}')
    )
    parse(broken)
    with pytest.raises(UserError, match="instructions"):
        hlo.check(broken, dataclasses.replace(parse(broken), computations={"main": {}}))


# The runtime that joins slices: what is sent and received meets by name, with a type.
def megascale(number, kind, sent, received, source=""):
    attributes = (
        "is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_host_transfer_rendezvous="psum.{number}_0",_xla_megascale_target="{{1,2}}x{{0:3}}",'
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    return [
        f'%grad.{number} = {sent} copy(%p), metadata={{op_name="{source}"}}',
        f"%after-all.{number} = token[] after-all()",
        f"%recv.{number} = ({received}, u32[]{{:S(2)}}, token[]) recv(%after-all.{number}), "
        f"{attributes}",
        f"%send.{number} = ({sent}, u32[]{{:S(2)}}, token[]) send(%grad.{number}, "
        f"%after-all.{number}), {attributes}",
        f"%recv-done.{number} = ({received}, token[]) recv-done(%recv.{number}), "
        f"is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
        f"%send-done.{number} = token[] send-done(%send.{number}), is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
    ]


def test_transfers_between_slices_count_once():
    lines = [
        *megascale(
            1, "ALL_REDUCE", "f32[16,8,128]{2,1,0}", "f32[16,8,128]{2,1,0}", "transpose(jvp())/psum"
        ),
        *megascale(2, "ALL_GATHER", "bf16[4,128]{1,0}", "bf16[8,128]{1,0}", "jvp()/all_gather"),
        *megascale(3, "REDUCE_SCATTER", "f32[8,128]{1,0}", "f32[4,128]{1,0}"),
    ]
    found = transfers(parse(straight(*lines)), ("replica",))
    assert [(t.kind, t.bytes, t.axes, t.source) for t in found] == [
        ("all-reduce", 16 * 8 * 128 * 4, ("replica",), "transpose(jvp())/psum"),
        ("all-gather", 8 * 128 * 2, ("replica",), "jvp()/all_gather"),
        ("reduce-scatter", 8 * 128 * 4, ("replica",), "psum.3_0"),
    ]
    with pytest.raises(UserError, match="leaves the slice in an unknown way"):
        unknown = straight(*lines).replace('_xla_megascale_transfer_type="ALL_REDUCE"', "a=1")
        transfers(parse(unknown), ("replica",))


def test_what_goes_on_beside_several_fusions_counts_once():
    groups = "replica_groups=mesh['fsdp'=2,'tensor'=2] {'fsdp'}, dimensions={0}"

    def piece(name, chain):
        gather = (
            f"%g.{name} = bf16[8]{{0}} all-gather(%q), {groups}, "
            f'frontend_attributes={{chain_id="{chain}"}}'
        )
        return f"%{name} (q: bf16[4]) -> bf16[8]", "%q = bf16[4]{0} parameter(0)", f"ROOT {gather}"

    names = [
        ("start.1", 0),
        ("async_collective_fusion.2", 0),
        ("done.3", 0),
        ("start.4", 1),
        ("done.5", 1),
    ]
    calls = [
        f"%f.{i} = bf16[8]{{0}} fusion(%p), calls=%{name}" for i, (name, _) in enumerate(names)
    ]
    main = (
        "ENTRY %main (p: bf16[4]) -> bf16[4]",
        "%p = bf16[4]{0} parameter(0)",
        *calls,
        "ROOT %r = bf16[4]{0} copy(%p)",
    )
    found = collectives(module(main, *(piece(*name) for name in names)), SIZES)
    assert [(c.name, c.kind, c.axes, c.bytes) for c in found] == [
        ("g.start.1", "all-gather", ("fsdp",), 16),
        ("g.start.4", "all-gather", ("fsdp",), 16),
    ]


def test_a_collective_of_gpus_counts_once():
    groups = "replica_groups=mesh['fsdp'=2,'tensor'=2] {'fsdp'}"
    along = f"{groups}, dimensions={{0}}"
    lines = [
        f"%ar = ((f32[6]{{0}}), f32[6]{{0}}) all-reduce-start(%p), {groups}, to_apply=%add",
        "%ar.done = f32[6]{0} all-reduce-done(%ar)",
        f"%ag = ((bf16[4]{{0}}, s32[2]{{0}}), (bf16[8]{{0}}, s32[4]{{0}})) all-gather-start(%p), "
        f"{along}",
        "%ag.done = (bf16[8]{0}, s32[4]{0}) all-gather-done(%ag)",
        f"%rs = ((f32[8]{{0}}, f32[4]{{0}}), (f32[4]{{0}}, f32[2]{{0}})) "
        f"reduce-scatter-start(%p), {along}",
        "%rs.done = (f32[4]{0}, f32[2]{0}) reduce-scatter-done(%rs)",
        f"%aa = ((bf16[2,4]{{1,0}}), bf16[2,4]{{1,0}}) all-to-all-start(%p), {along}",
        "%aa.done = bf16[2,4]{1,0} all-to-all-done(%aa)",
    ]
    found = collectives(straight(*lines), SIZES)
    assert [(c.kind, c.dtype, c.shape) for c in found] == [
        ("all-reduce", "f32", (6,)),
        ("all-gather", "bf16", (8,)),
        ("all-gather", "s32", (4,)),
        ("reduce-scatter", "f32", (8,)),
        ("reduce-scatter", "f32", (4,)),
        ("all-to-all", "bf16", (2, 4)),
    ]


def test_permutes_of_a_windowed_einsum():
    pairs = "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"
    text = loop(HERE)
    permute = (
        f"%cp = (f32[8]{{0:T(128)}}, f32[8]{{0:T(128)}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) "
        f"collective-permute-start(%gte.3), {pairs}\n  %cp.done = f32[8]{{0:T(128)}} "
        f"collective-permute-done(%cp)\n  "
    )
    (found,) = collectives(text.replace("%y = ", permute + "%y = "), SIZES)
    assert (found.kind, found.axes, found.times, found.bytes) == (
        "collective-permute",
        ("tensor",),
        32,
        32,
    )


def cost(sol):
    other = '{"end_to_end_cycles":153682.1,"exec_time_us":7e7,"compute_time_us":3.5,"name":""}'
    one = (
        f'{{"end_to_end_cycles":0,"exec_time_us":{sol},"compute_time_us":0,'
        f'"memory_access_time_us":0,"name":"sol"}}'
    )
    return (
        f'backend_config={{"reification_cost":[{other},{one}],"device_type":"DEVICE_TYPE_INVALID"}}'
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_groups_share_out_the_rows_of_a_grouped_product(gradient):
    # 16384 rows of 4096 columns, by 8 matrices to 2048 columns; and the gradient of the matrices.
    right, result = ("16384,2048", "8,4096,2048") if gradient else ("8,4096,2048", "16384,2048")
    summed, groups = ("0", "[]") if gradient else ("1", '["0"]')
    main = (
        f"ENTRY %main (a: bf16[16384,4096], b: bf16[{right}], n: s32[8]) -> bf16[{result}]",
        "%a = bf16[16384,4096]{1,0} parameter(0)",
        f"%b = bf16[{right}]{{1,0}} parameter(1)",
        "%n = s32[8]{0} parameter(2)",
        f"%c = (bf16[{result}]{{1,0}}, s8[64]{{0}}) custom-call(%a, %b, %n), "
        'custom_call_target="__cublas$lt$groupedMatmul", backend_config='
        f'{{"lhs_contracting_dimensions":["{summed}"],"rhs_group_dimensions":{groups}}}',
        f"ROOT %r = bf16[{result}]{{1,0}} get-tuple-element(%c), index=0",
    )
    chip = catalogue()["mi300x"]
    rate = chip.peak_flops * EFFICIENCY["amd"].matrix
    seconds = computing(parse(module(main)), chip).seconds
    assert seconds == pytest.approx(2 * 16384 * 4096 * 2048 / rate)


def test_time_on_gpus_that_the_compiler_has_no_model_of():
    # 1 MiB is read of a stack of 64 and scaled, and 1 MiB written into another stack.
    fused = (
        "%fused (a: f32[64,512,512], b: f32[64,512,512], i: s32[]) -> f32[64,512,512]",
        "%a = f32[64,512,512]{2,1,0} parameter(0)",
        "%b = f32[64,512,512]{2,1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        "%z = s32[] constant(0)",
        "%s = f32[1,512,512]{2,1,0} dynamic-slice(%a, %i, %z, %z), dynamic_slice_sizes={1,512,512}",
        "%m = f32[1,512,512]{2,1,0} multiply(%s, %s)",
        "ROOT %u = f32[64,512,512]{2,1,0} dynamic-update-slice(%b, %m, %i, %z, %z)",
    )
    main = (
        "ENTRY %main (p: f32[64,512,512], q: f32[64,512,512], n: s32[]) -> f32[64,512,512]",
        "%p = f32[64,512,512]{2,1,0} parameter(0)",
        "%q = f32[64,512,512]{2,1,0} parameter(1)",
        "%n = s32[] parameter(2)",
        "ROOT %f = f32[64,512,512]{2,1,0} fusion(%p, %q, %n), kind=kLoop, calls=%fused",
    )
    # Of one of the two dies of a module.
    seconds = computing(parse(module(main, fused)), catalogue()["mi250x"]).seconds
    assert seconds == pytest.approx((2 * 2**20 + 4 * 3) / (3277e9 / 2), rel=1e-3)


def test_time_on_gpus():
    fused = (
        "%fused_dot (a: bf16[64,32], b: bf16[32,16]) -> f32[64,16]",
        "%a = bf16[64,32]{1,0} parameter(0)",
        "%b = bf16[32,16]{1,0} parameter(1)",
        "ROOT %dot.1 = f32[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}",
    )
    fmha = (
        'custom_call_target="__cudnn$fmhaScaleBiasSoftmax", '
        "operand_layout_constraints={bf16[4,4096,32,128]{3,2,1,0}}, "
        'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": '
        '{"element_type": "BF16", '
        '"dimensions": ["4", "32", "4096", "4096"], "tuple_shapes": []}, "mask_type": "CAUSAL"}}'
    )
    backward = fmha.replace("Softmax", "SoftmaxBackward")
    main = (
        "ENTRY %main (p: bf16[64,32], w: bf16[32,16]) -> f32[64,16]",
        "%p = bf16[64,32]{1,0} parameter(0)",
        "%w = bf16[32,16]{1,0} parameter(1)",
        f"%e = bf16[64,32]{{1,0}} fusion(%p), kind=kLoop, calls=%other, {cost(77.5)}",
        # The model takes a bf16 product with a float32 result for one of float32: 64 times too
        # long.
        f"%d = f32[64,16]{{1,0}} fusion(%e, %w), kind=kCustom, calls=%fused_dot, {cost(121198.08)}",
        "%c = (f32[64,16]{1,0}, s8[64]{0}) custom-call(%e, %w), "
        'custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"]}}}',
        f"%fmha.1 = (bf16[4,32,4096,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%e), {fmha}",
        f"%fmha.2 = (bf16[4,32,4096,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%e), {backward}",
        'ROOT %s = f32[64,16]{1,0} copy(%d), backend_config={"reification_cost":[]}',
    )
    other = ("%other (q: bf16[64,32]) -> bf16[64,32]", "ROOT %q = bf16[64,32]{1,0} parameter(0)")
    found = computing(parse(module(main, fused, other)), H100)
    peak, pairs = 989e12, 4 * 32 * 4096 * 4096 * 128
    # So small products wait for their bytes: operands of bf16, a result of float32.
    moved = 2 * (64 * 32 + 32 * 16) + 4 * 64 * 16
    products, attention = (
        2 * max(2 * 64 * 16 * 32 / (peak * 0.72), moved / (3350e9 * 0.5)),
        [2 * pairs / (peak * 0.5), 5 * pairs / (peak * 0.5)],
    )
    assert [k.seconds for k in found.kernels] == pytest.approx(attention)
    assert found.seconds == pytest.approx(77.5e-6 + products + sum(attention), rel=1e-9)


@pytest.mark.parametrize(
    ("types", "target", "faster"),
    [
        (("f8e5m2", "f8e4m3fn"), "__cublas$lt$matmul$f8", 1979 / 989),
        (("s8", "s8"), "__cublas$lt$matmul", 1979 / 989),
        (("bf16", "bf16"), "__cublas$lt$matmul", 1.0),
    ],
)
def test_products_in_8_bits_have_their_own_peak(types, target, faster):
    size = 8192  # so large that no product waits for its bytes
    one, other = (f"{name}[{size},{size}]" for name in types)
    main = (
        f"ENTRY %main (p: {one}, w: {other}) -> f32[{size},{size}]",
        f"%p = {one}{{1,0}} parameter(0)",
        f"%w = {other}{{1,0}} parameter(1)",
        f"%c = (f32[{size},{size}]{{1,0}}, s8[64]{{0}}) custom-call(%p, %w), "
        f'custom_call_target="{target}", backend_config={{"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        f"ROOT %g = f32[{size},{size}]{{1,0}} get-tuple-element(%c), index=0",
    )
    found = computing(parse(module(main)), H100).seconds
    assert found == pytest.approx(2 * size**3 / (989e12 * faster * 0.72), rel=1e-9)


def test_kernels_for_experts_count_their_products():
    scalars = "s32[9]{0}, s32[9]{0}, s32[9]{0}"

    def call(name, kernel, result, operands):
        return (
            f'{name} = {result}{{0}} custom-call(%e), custom_call_target="__gpu$xla.gpu.triton", '
            f"operand_layout_constraints={{{operands}}}, "
            f'metadata={{op_name="jit(f)/ffn/{kernel}/pallas_call"}}, '
            'backend_config={ir = "\\22(]{", name = "x"}'
        )

    rows, matrices = "bf16[65536,4096]{1,0}", "bf16[8,4096,14336]{2,1,0}"
    results = "bf16[65536,14336]{1,0}"
    main = (
        "ENTRY %main (e: bf16[4]) -> bf16[4]",
        "%e = bf16[4]{0} parameter(0)",
        call("%pallas_call.1", "grouped_products", results[:-5], f"{scalars}, {rows}, {matrices}"),
        call(
            "%pallas_call.2",
            "grouped_outer_products",
            matrices[:-7],
            f"s32[8]{{0}}, s32[8]{{0}}, {rows}, {results}",
        ),
        call("%pallas_call.3", "another", "bf16[4]", "bf16[4]{0}"),
        "ROOT %s = bf16[4]{0} copy(%e)",
    )
    found = computing(parse(module(main)), H100)
    # Of the last block of each group half is empty.
    once = 2 * (65536 + 8 * 64) * 4096 * 14336 / (989e12 * 0.72)
    seconds = {kernel.name: kernel.seconds for kernel in found.kernels}
    assert seconds["grouped_products"] == pytest.approx(once)
    assert seconds["grouped_outer_products"] == pytest.approx(once)
    assert found.untimed == ["pallas_call.3"]
    assert found.seconds == pytest.approx(2 * once)
