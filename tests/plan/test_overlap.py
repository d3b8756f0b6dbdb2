"""How much computing stands beside each collective of a program: small programs with known answers,
in every form in which compilers write a collective that goes on beside other work.
"""

import pytest
from test_hlo import CLOCK, H100, HERE, SIZES, V5P, loop, megascale, module

from braeburn.errors import UserError
from braeburn.plan.collectives import collectives, transfers
from braeburn.plan.hlo import parse
from braeburn.plan.overlap import overlaps

K = 1000 / CLOCK
ALONG = "replica_groups=mesh['fsdp'=2,'tensor'=2] {'%s'}, dimensions={0}"
PAIRS = {"+": "{{0,2},{1,3},{4,6},{5,7},{2,4},{3,5},{6,0},{7,1}}"}
PAIRS["-"] = "{{2,0},{3,1},{6,4},{7,5},{4,2},{5,3},{0,6},{1,7}}"


def start(name, axis="fsdp"):
    return f"%{name} = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%p), {ALONG % axis}"


def done(name):
    return f"%{name}.done = f32[8]{{0}} all-gather-done(%{name})"


def cycles(name, count, calls=""):
    return (
        f'%{name} = f32[8]{{0}} fusion(%p){calls}, backend_config={{"estimated_cycles":"{count}"}}'
    )


def permute(name, way):
    return (
        f"%{name} = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%p), "
        f"source_target_pairs={PAIRS[way]}"
    )


def awaited(name):
    return f"%{name}.done = f32[8]{{0}} collective-permute-done(%{name})"


def program(*lines, parts=()):
    body = ("ENTRY %main (p: f32[8]) -> f32[8]", "%p = f32[8]{0} parameter(0)", *lines)
    return module((*body, "ROOT %r = f32[8]{0} copy(%p)"), *parts)


def read(text, own=2 * K, sizes=SIZES, chip=V5P):
    """The overlap of each collective by its name, where each array takes `own` seconds."""
    found = parse(text)
    each = [*collectives(found, sizes), *transfers(found, ("replica",))]
    of_site = overlaps(found, chip, each, lambda one: own)
    return {name: overlap for (_, name), overlap in of_site.items()}


def hidden(text, **settings):
    return {name: pytest.approx(one.hidden / K) for name, one in read(text, **settings).items()}


def test_what_is_one_instruction_hides_nothing():
    lines = [cycles("a", 9000), f"%g = f32[8]{{0}} all-gather(%p), {ALONG % 'fsdp'}"]
    found = read(program(*lines, cycles("b", 9000)))["g"]
    assert not found.asynchronous and found.beside == found.hidden == 0


def test_a_collective_hides_no_more_than_itself_and_the_computing_beside_it():
    lines = [cycles("a", 9000), start("g"), cycles("b", 1000), cycles("c", 500), done("g")]
    found = read(program(*lines, cycles("d", 9000)))["g"]
    assert found.asynchronous and found.beside == pytest.approx(1.5 * K)
    assert found.hidden == pytest.approx(1.5 * K)
    assert read(program(*lines), own=K)["g"].hidden == pytest.approx(K)


def test_computing_is_taken_up_once_on_the_same_links():
    lines = [start("g"), start("h"), cycles("a", 3000), done("h"), done("g")]
    assert hidden(program(*lines)) == {"g": 2, "h": 1}
    lines[1] = start("h", "tensor")
    assert hidden(program(*lines)) == {"g": 2, "h": 2}
    # Of several arrays each takes its time.
    both = start("g").replace("(f32[4]{0}, f32[8]{0})", "((f32[4], s32[4]), (f32[8], s32[8]))")
    assert hidden(program(both, cycles("a", 3000), done("g"))) == {"g": 3}


def test_permutes_the_other_way_have_links_of_their_own():
    lines = [permute("right", "+"), permute("left", "-"), cycles("a", 3000)]
    lines += [awaited("right"), permute("more", "+"), awaited("left"), awaited("more")]
    found = read(program(*lines), sizes={"fsdp": 4, "tensor": 2})
    assert [found[name].hidden / K for name in ("right", "left", "more")] == [2, 2, 0]
    # The third begins beside the second, which has its partner already.
    assert [found[name].shared for name in ("right", "left", "more")] == [True, True, False]


def test_within_a_loop_and_around_one():
    inner = start("g", "tensor").replace("%p", "%gte.3")
    text = (
        loop(HERE)
        .replace("%y = ", f"{inner}\n  %y = ")
        .replace("ROOT %tuple.2", f"{done('g')}\n  ROOT %tuple.2")
    )
    outer = start("around", "tensor").replace("%p", "%x")
    text = text.replace("%while.7 = ", f"{outer}\n  %while.7 = ")
    # 32 rounds of 1,000 cycles, of which the gather within takes up 400.
    head, _, tail = text.rpartition("  ROOT ")
    text = f"{head}  {done('around')}\n  ROOT {tail}"
    found = read(text, own=0.4 * K)
    assert found["g"].beside == pytest.approx(K) and found["g"].hidden == pytest.approx(0.4 * K)
    assert found["around"].beside == pytest.approx(32 * K)
    assert hidden(text, own=30 * K) == {"g": 1, "around": 0}


def test_pieces_in_fusions_hide_from_the_first_to_the_last():
    def piece(name):
        gather = (
            f"ROOT %g.{name} = bf16[8]{{0}} all-gather(%q), {ALONG % 'fsdp'}, "
            'frontend_attributes={chain_id="7"}'
        )
        return f"%{name} (q: bf16[4]) -> bf16[8]", "%q = bf16[4]{0} parameter(0)", gather

    names = ("begin", "along", "end")
    lines = [cycles("a", 5000)]
    lines += [cycles(f"f.{name}", 500, f", calls=%{name}") for name in names]
    text = program(*lines, cycles("b", 5000), parts=[piece(name) for name in names])
    assert hidden(text) == {"g.begin": 1.5}


def test_the_long_form_of_a_start():
    part = (
        "%wrapped (q: f32[8]) -> f32[4]",
        "%q = f32[8]{0} parameter(0)",
        f"ROOT %rs = f32[4]{{0}} reduce-scatter(%q), {ALONG % 'fsdp'}, to_apply=%add",
    )
    form = "((f32[8]{0}), f32[4]{0}, u32[])"
    lines = [
        f"%s = {form} async-start(%p), calls=%wrapped",
        cycles("a", 500),
        f"%u = {form} async-update(%s)",
        cycles("b", 500),
        "%d = f32[4]{0} async-done(%u)",
        "%other = f32[4]{0} copy-done(%p)",
    ]
    assert hidden(program(*lines, parts=[part])) == {"rs": 1}


def test_what_sparse_cores_carry_out_begins_with_its_operands():
    part = (
        "%called (q: f32[4]) -> f32[8]",
        "%q = f32[4]{0} parameter(0)",
        f"ROOT %ag = f32[8]{{0}} all-gather(%q), {ALONG % 'fsdp'}",
    )
    form = "((f32[4]{0}), f32[8]{0})"
    lines = [
        '%s = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", '
        "to_apply=%called",
        cycles("a", 9000),
        f"%u = {form} call-update(%s, %p)",
        cycles("b", 700),
        "%d = f32[8]{0} call-done(%u)",
        cycles("c", 9000),
    ]
    assert hidden(program(*lines, parts=[part])) == {"ag": 0.7}
    with pytest.raises(UserError, match="s in main is started and never awaited"):
        read(program(*lines[:4], parts=[part]))


def test_what_is_sent_to_another_slice_goes_until_it_is_received():
    gradient = "f32[16,8,128]{2,1,0}"
    copied, token, received, sent, *ends = megascale(1, "ALL_REDUCE", gradient, gradient)
    lines = [copied, token, sent, cycles("a", 500), received, cycles("b", 500), *ends]
    assert hidden(program(*lines)) == {"send.1": 1}


def test_a_start_of_gpus_that_waits_hides_nothing():
    waits = start("g") + ', backend_config={"collective_backend_config":{"is_sync":true}}'
    cost = '%s = f32[8]{0} sort(%p), backend_config={"exec_time_us":500,"name":"sol"}'
    for begins, asynchronous in ((waits, False), (start("g"), True)):
        found = read(program(begins, cost, done("g")), chip=H100)["g"]
        assert found.asynchronous == asynchronous
        assert found.beside == pytest.approx(5e-4 if asynchronous else 0)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([start("g"), cycles("a", 9)], "g in main is started and never awaited"),
        ([done("p")], "p.done awaits a collective that p does not start"),
    ],
)
def test_half_of_a_pair_is_refused(lines, reason):
    with pytest.raises(UserError, match=reason):
        read(program(*lines))
