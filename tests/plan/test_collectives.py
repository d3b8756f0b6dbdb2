"""The collectives read out of HLO text: of programs compiled here, counted by hand, and of forms
that others write.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from braeburn.errors import UserError
from braeburn.plan.collectives import collectives, traffic

MESH = {"data": 2, "model": 4}


def compiled(function, *arguments):
    mesh = jax.make_mesh(
        tuple(MESH.values()), tuple(MESH), devices=jax.devices()[: math.prod(MESH.values())]
    )
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def times(count, function):
    """A function of x applied `count` times, in a loop."""
    return lambda x: lax.scan(lambda x, _: (function(x), None), x, None, length=count)[0]


def gather_and_scatter(axis):
    def function(x):
        whole = lax.all_gather(x, axis, axis=0, tiled=True)
        return lax.psum_scatter(jnp.sin(whole), axis, scatter_dimension=0, tiled=True)

    return function


def test_bytes_are_those_of_the_loops_around_them():
    layers, steps, size = 3, 5, 16 * 24 * 4

    def step(x):
        x = times(layers, gather_and_scatter("model"))(x)
        return lax.ppermute(x, "data", [(0, 1), (1, 0)])

    text = compiled(
        lambda x: lax.psum(times(steps, step)(x), ("data", "model")), jnp.ones((16, 24))
    )
    assert traffic(collectives(text, MESH)) == {
        ("all-gather", ("model",)): layers * steps * 4 * size,
        ("reduce-scatter", ("model",)): layers * steps * 4 * size,
        ("collective-permute", ("data",)): steps * size,
        ("all-reduce", ("data", "model")): size,
    }
    # The constant in a loop's condition says the same.
    bare = text.replace('"known_trip_count"', '"unknown"')
    assert collectives(bare, MESH) == collectives(text, MESH)


def test_combined_arrays_count_each():
    def function(x):
        small = x[:2].astype(jnp.int32)
        return (
            lax.psum((x, small), "data"),
            lax.pmax(x, "model"),
            lax.all_to_all(x, "model", 0, 1, tiled=True),
        )

    found = collectives(compiled(function, jnp.ones((8, 6))), MESH)
    size = 8 * 6 * 4
    assert traffic(found) == {
        ("all-reduce", ("data",)): size + 2 * 6 * 4,
        ("all-reduce", ("model",)): size,
        ("all-to-all", ("model",)): size,
    }
    assert {c.dtype for c in found} == {"f32", "s32"}


def test_branches_count_and_are_told_apart():
    def function(x):
        x = lax.cond(
            jnp.sum(x) > 0,
            lambda x: lax.psum(x, "data"),
            times(7, lambda x: lax.psum(x, "model")),
            x,
        )
        return lax.pmax(x, "data")

    found = collectives(compiled(function, jnp.ones((4, 4))), MESH)
    assert sorted((c.axes, c.times, c.conditional) for c in found) == [
        (("data",), 1, False),
        (("data",), 1, True),
        (("model",), 7, True),
    ]


def test_a_loop_of_unknown_length_is_refused_if_it_has_a_collective():
    def function(x, collective):
        return lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: collective(x) + 1, x)

    assert collectives(compiled(lambda x: function(x, jnp.sin), jnp.ones(4)), MESH) == []
    text = compiled(lambda x: function(x, lambda x: lax.psum(x, "data")), jnp.ones(4))
    with pytest.raises(UserError, match="length"):
        collectives(text, MESH)


def module(instruction, *more):
    return "\n\n".join(
        [
            "HloModule test, entry_computation_layout={(f32[4]{0})->f32[4]{0}}",
            *more,
            f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %p = f32[4]{{0}} parameter(0)\n  "
            f"{instruction}\n}}\n",
        ]
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("model",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "model")),
        ("{}", ("data", "model")),
        ("[2,4]<=[8]", ("model",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "model")),
        ("mesh['a'=2,'b'=4] {'b'}", ("model",)),
        ("mesh['a'=2,'b'=4]{'a'}", ("data",)),
        ("mesh['x'=2,'y'=2,'z'=2] {'y','z'}", ("model",)),
        ("mesh['x'=2,'y'=2,'z'=2] {'y'}", None),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("model",)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c','a'}", ("data", "model")),
        ("[4,2]<=[8]", None),
        ("{{0,5},{1,4},{2,7},{3,6}}", None),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ],
)
def test_axes_of_each_form_of_groups(groups, axes):
    text = module(
        f"ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, "
        f"to_apply=%add"
    )
    (found,) = collectives(text, MESH)
    assert (found.axes, found.shape, found.bytes) == (axes, (4,), 16)


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(UserError, match="unknown form"):
        collectives(
            module("ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=star{1}, to_apply=%add"),
            MESH,
        )


GROUPS = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("instruction", "kind", "shape"),
    [
        (
            f"%s = (f32[4]{{0}}, f32[16]{{0}}) all-gather-start(f32[4]{{0}} %p), {GROUPS}, "
            f"dimensions={{0}}",
            "all-gather",
            (16,),
        ),
        (
            f"%s = ((f32[16,2]{{1,0}}), f32[4,2]{{1,0}}) reduce-scatter-start(%p), {GROUPS}, "
            f"dimensions={{0}}",
            "reduce-scatter",
            (16, 2),
        ),
        (
            f"%s = f32[3,4,2]{{2,1,0:T(8,128)S(1)}} reduce-scatter(%p), {GROUPS}, dimensions={{1}}",
            "reduce-scatter",
            (3, 16, 2),
        ),
        (f"%s = f32[4]{{0}} all-reduce-start(%p), {GROUPS}, to_apply=%add", "all-reduce", (4,)),
        (
            "%s = (f32[4]{0:T(128)}, f32[4]{0:T(128)}, u32[]{:S(2)}, u32[]) "
            "collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
            "collective-permute",
            (4,),
        ),
    ],
)
def test_what_starts_and_ends_apart_counts_once(instruction, kind, shape):
    opcode = instruction.partition("-start")[0].split()[-1]
    done = f"\n  ROOT %done = f32[4]{{0}} {opcode}-done(%s)" if "-start" in instruction else ""
    (found,) = collectives(module(instruction + done), MESH)
    assert (found.kind, found.shape, found.axes) == (kind, shape, ("model",))


def test_what_is_hidden_in_other_computations_is_found():
    fusion = (
        f"%all-reduce-scatter.2 (q: f32[16]) -> f32[4] {{\n  %q = f32[16]{{0}} parameter(0)\n "
        f" %sum = f32[16]{{0}} all-reduce(%q), {GROUPS}, to_apply=%add\n  ROOT %part = "
        f"f32[4]{{0}} dynamic-slice(%sum, %i), dynamic_slice_sizes={{4}}\n}}"
    )
    wrapped = (
        f"%wrapped (q: f32[4]) -> f32[16] {{\n  ROOT %g = f32[16]{{0}} all-gather(%q), "
        f'{GROUPS}, dimensions={{0}}\n}}, execution_thread="other"'
    )
    text = module(
        "%s = ((f32[4]{0}), f32[16]{0}, u32[]) async-start(%p), calls=%wrapped\n"
        "  %d = f32[16]{0} async-done(%s), calls=%wrapped\n"
        "  ROOT %f = f32[4]{0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.2",
        fusion,
        wrapped,
    )
    assert [(c.kind, c.bytes) for c in collectives(text, MESH)] == [
        ("all-gather", 64),
        ("reduce-scatter", 64),
    ]


def test_what_kernels_write_into_the_text_does_not_end_it():
    kernel = (
        '%k = f32[4]{0} custom-call(%p), custom_call_target="tpu", '
        "frontend_attributes={kernel_metadata={\n}\n},"
        ' backend_config={"body":"} \\" {\n}\n%fake = f32[9] all-reduce(%p), '
        'replica_groups={}\n"}\n  '
    )
    text = module(f"{kernel}ROOT %r = f32[4]{{0}} all-reduce(%k), {GROUPS}, to_apply=%add")
    assert [c.name for c in collectives(text, MESH)] == ["r"]


def test_half_a_module_is_refused():
    text = module(f"ROOT %r = f32[4]{{0}} all-reduce(%p), {GROUPS}, to_apply=%add")
    for part in (text[: text.index("all-reduce") + 12], text[: text.index("ENTRY")], ""):
        with pytest.raises(UserError, match=r"brackets|ENTRY"):
            collectives(part, MESH)
