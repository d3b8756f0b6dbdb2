"""Attention over split sequences against the same attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
    process_mask,
    process_mask_dkv,
)
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from braeburn.config import MeshConfig
from braeburn.layers import attention as A
from braeburn.layers.attention import cudnn, ring, splash
from braeburn.parallel import sequence as C

LENGTH = 96


def mesh_of(context, tensor=1, context_attention="ring"):
    return MeshConfig(fsdp=1, context=context, tensor=tensor, context_attention=context_attention)


def device_mesh(mesh):
    devices = np.array(jax.devices()[: mesh.context * mesh.tensor])
    return jax.sharding.Mesh(devices.reshape(mesh.context, mesh.tensor), ("context", "tensor"))


@functools.cache
def sequences(length=LENGTH, num_heads=8, num_kv_heads=4, head_dim=8):
    """Query, key, value, segments and the output's cotangent; documents end anywhere, and a row
    ends in padding.
    """
    rng = np.random.default_rng(0)
    query, cotangent = rng.normal(size=(2, 2, length, num_heads, head_dim)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, length, num_kv_heads, head_dim)).astype(np.float32)
    starts = rng.random((2, length)) < 4 / length
    segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
    segments[1, -length // 8 :] = 0
    return query, key, value, segments, cotangent


def outputs_and_gradients(run, mesh, arrays):
    """`run` on a mesh, for sequences in their own order, and gradients of <output, cotangent>."""
    shards = device_mesh(mesh)
    order = C.zigzag(arrays[0].shape[1], mesh.context)
    heads, ids = P(None, "context", "tensor"), P(None, "context")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=shards,
        in_specs=(heads, heads, heads, ids, heads),
        out_specs=(heads,) * 4,
        check_vma=False,
    )
    def program(query, key, value, segments, cotangent):
        def loss(query, key, value):
            output = run(query, key, value, segments, mesh)
            return jnp.sum(output.astype(jnp.float32) * cotangent), output

        gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return output, *gradients

    results = program(*(array[:, order] for array in arrays))
    return [np.asarray(result.astype(jnp.float32))[:, np.argsort(order)] for result in results]


@functools.cache
def on_one_device():
    return outputs_and_gradients(A.attention, mesh_of(1), sequences())


def assert_close(results, expected, tolerance):
    for result, wanted in zip(results, expected, strict=True):
        assert np.isfinite(result).all()
        assert np.max(np.abs(result - wanted)) <= tolerance * np.max(np.abs(wanted))


@pytest.mark.parametrize("context_attention", ["ring", "all_gather"])
@pytest.mark.parametrize(
    ("context", "tensor"), [pytest.param(2, 2, marks=pytest.mark.deep), (4, 2), (8, 1)]
)
def test_split_attention_equals_attention_on_one_device(
    monkeypatch, context, tensor, context_attention
):
    # Blocks of 8, 6 and 6 queries: three, two and one of them in each half.
    monkeypatch.setattr(ring, "BLOCK", 8)
    results = outputs_and_gradients(
        A.attention, mesh_of(context, tensor, context_attention), sequences()
    )
    assert_close(results, on_one_device(), 1e-5)


@pytest.mark.parametrize("context_attention", ["ring", "all_gather"])
def test_bfloat16_stays_near_float32(context_attention):
    query, key, value, segments, cotangent = sequences()
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)]
    results = outputs_and_gradients(
        A.attention, mesh_of(4, 1, context_attention), (*narrow, segments, cotangent)
    )
    assert_close(results, on_one_device(), 0.02)


def test_the_mask_for_older_gpus_gives_what_the_others_give(monkeypatch):
    def plain(query, key, value, visible, sinks):
        return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])

    monkeypatch.setattr(cudnn, "masked_attention", plain)
    results = outputs_and_gradients(
        A.cudnn_masked_attention, mesh_of(4, 1, "all_gather"), sequences()
    )
    assert_close(results, on_one_device(), 1e-5)


@given(shards=st.integers(1, 64), chunk=st.integers(1, 8))
def test_zigzag_gives_every_shard_the_same_number_of_visible_pairs(shards, chunk):
    length = 2 * shards * chunk
    order = C.zigzag(length, shards)
    assert sorted(order) == list(range(length))
    parts = order.reshape(shards, -1)
    # A token at position p sees p + 1 keys.
    assert len(set(np.sum(parts + 1, axis=1))) == 1
    for shard, part in enumerate(parts):
        np.testing.assert_array_equal(part, C.token_indices(2 * chunk, shard, shards))


def test_zigzag_names_what_does_not_divide():
    np.testing.assert_array_equal(C.zigzag(5, 1), np.arange(5))
    with pytest.raises(
        ValueError, match="10 tokens do not divide into the 8 chunks of 4 context shards"
    ):
        C.zigzag(10, 4)


@pytest.mark.parametrize(("context", "tensor"), [(1, 2), (2, 2), (4, 1)])
def test_splash_attention_works_on_shards_in_interpret_mode(monkeypatch, context, tensor):
    monkeypatch.setattr(splash, "INTERPRET", True)
    # Chunks of 128 tokens with two context shards; with four, 64 tokens, so that a tile has two of
    # them.
    arrays = sequences(512, 4, 2, 128)
    results = outputs_and_gradients(
        A.splash_attention, mesh_of(context, tensor, "all_gather"), arrays
    )
    assert_close(results, outputs_and_gradients(A.attention, mesh_of(1), arrays), 1e-5)


@pytest.mark.parametrize("shards", [1, 4])
def test_the_splash_mask_of_single_entries_gives_the_kernel_of_whole_tiles(shards):
    order = C.zigzag(2048, shards).astype(np.int32)
    whole = splash_attention_mask.CausalMask((2048, 2048))
    whole.q_sequence = order
    for process in (process_mask, process_mask_dkv):
        ours, theirs = (
            process(
                splash_attention_mask.MultiHeadMask([mask] * 2), (256, 256), q_seq_shards=shards
            )[0]
            for mask in (A.splash_mask(order), whole)
        )
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def total(jaxpr, cost):
    """The cost of a program's operations, those in loops counted as often as they run."""
    result = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("cond", "while"), "how often it runs is not known"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = sum(total(inner, cost) for inner in jaxprs_in_params(equation.params))
        result += cost(equation) + times * inner
    return result


def products(equation):
    """Multiplications and additions of a matrix product."""
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
    return 2 * depth * np.prod(equation.outvars[0].aval.shape)


def ring_steps(equation):
    return equation.primitive.name == "ppermute"


@pytest.mark.parametrize("context_attention", ["ring", "all_gather"])
@pytest.mark.parametrize("context", [2, 8])
def test_each_shard_forms_the_visible_chunks_alone_and_passes_keys_on_once_for_each(
    context, context_attention
):
    mesh = mesh_of(context, 1, context_attention)
    length, heads, head_dim = 512, 4, 16
    wide = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def program(query, key, value, ids):
        return jax.grad(lambda *a: jnp.sum(A.attention(*a, ids, mesh)), argnums=(0, 1, 2))(
            query, key, value
        )

    split = P(None, "context")
    sharded = jax.shard_map(
        program, mesh=device_mesh(mesh), in_specs=split, out_specs=split, check_vma=False
    )
    jaxpr = jax.make_jaxpr(sharded)(wide, wide, wide, ids).jaxpr
    # Two products forward and five backward; of a shard's 2 x 2c pairs of chunks it sees 2c + 1.
    whole = 7 * 2 * heads * head_dim * length**2 / context
    assert total(jaxpr, products) == whole * (2 * context + 1) / (4 * context)
    # Key, value and segments in either pass; the gradients of key and value take one ring step
    # more, back to their own device.
    assert total(jaxpr, ring_steps) == (
        2 * 3 * (context - 1) + 2 * context if context_attention == "ring" else 0
    )
