"""cuDNN's attention without a GPU: what its calls are given, and all that surrounds them, against
float64 NumPy.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import DisabledSafetyCheck, export
from jax.sharding import PartitionSpec as P

from braeburn import recipes
from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers import attention
from braeburn.layers.attention import cudnn
from braeburn.parallel.sequence import zigzag
from braeburn.plan.hlo import parse
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import abstract_batch, abstract_state, stage_step


def span_rows(array, lengths, offsets):
    """Where cuDNN finds the tokens of each span of an array [B, T, N, H]: [spans, T], and which are
    its own.
    """
    length, heads, head_dim = array.shape[1:]
    flat = offsets.reshape(-1)[: lengths.size]
    tokens = flat[:, None] // (heads * head_dim) + jnp.arange(length)
    own = jnp.arange(length) < lengths.reshape(-1)[:, None]
    return tokens, own


def emulated(heads, given, causal):
    """What one call computes, written from the operands alone: each span's output and log-sum-exp,
    in float32.
    """
    query, key, value = heads
    group = query.shape[2] // key.shape[2]
    query_tokens, own = span_rows(query, given.query_lengths, given.query_offsets)
    key_tokens, visible = span_rows(key, given.key_lengths, given.key_offsets)

    def rows(array, tokens):
        flat = array.reshape(-1, *array.shape[2:]).astype(jnp.float32)
        return flat[jnp.clip(tokens, 0, flat.shape[0] - 1)]

    q = rows(query, query_tokens)
    k, v = (jnp.repeat(rows(x, key_tokens), group, axis=2) for x in (key, value))
    mask = own[:, :, None] & visible[:, None, :]
    if causal:
        mask &= jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])
    scores = jnp.einsum("sqnh,sknh->snqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return q, k, v, scores, query_tokens, own, key_tokens, visible, group


def scatter(shape, tokens, own, rows, dtype):
    """Rows of spans where they belong; all else is NaN, as it may be in memory that no call has
    written.
    """
    flat = jnp.full((shape[0] * shape[1] + 1, *shape[2:]), jnp.nan, jnp.float32)
    index = jnp.where(own, tokens, shape[0] * shape[1])
    flat = flat.at[index].set(rows)
    return flat[:-1].reshape(shape).astype(dtype)


def forward_call(heads, given, causal):
    query = heads.query
    _, _, v, scores, tokens, own, *_ = emulated(heads, given, causal)
    log_z = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(log_z), log_z, 0)[..., None])
    output = scatter(
        query.shape, tokens, own, jnp.einsum("snqk,sknh->sqnh", weights, v), query.dtype
    )
    return output, jnp.where(own[:, None], log_z, jnp.nan)


def backward_call(heads, given, causal, statistics, output, output_gradient):
    query, key, value = heads
    q, k, v, scores, tokens, own, key_tokens, visible, group = emulated(heads, given, causal)
    rows = jnp.clip(tokens, 0, query.shape[0] * query.shape[1] - 1)
    o, g = (
        x.reshape(-1, *x.shape[2:]).astype(jnp.float32)[rows] for x in (output, output_gradient)
    )
    weights = jnp.where(jnp.isfinite(scores), jnp.exp(scores - statistics[..., None]), 0)
    logit_gradient = weights * (
        jnp.einsum("sqnh,sknh->snqk", g, v) - jnp.einsum("sqnh,sqnh->snq", g, o)[..., None]
    )
    logit_gradient *= q.shape[-1] ** -0.5

    def grouped(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)

    return (
        scatter(
            query.shape, tokens, own, jnp.einsum("snqk,sknh->sqnh", logit_gradient, k), query.dtype
        ),
        scatter(
            key.shape,
            key_tokens,
            visible,
            grouped(jnp.einsum("snqk,sqnh->sknh", logit_gradient, q)),
            key.dtype,
        ),
        scatter(
            value.shape,
            key_tokens,
            visible,
            grouped(jnp.einsum("snqk,sqnh->sknh", weights, g)),
            value.dtype,
        ),
    )


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.setattr(cudnn, "forward_call", forward_call)
    monkeypatch.setattr(cudnn, "backward_call", backward_call)


def inputs(lengths, heads=4, kv_heads=2, head_dim=8, seed=0):
    """Sequences of documents of these lengths; the last of each may be padding, of segment 0."""
    rng = np.random.default_rng(seed)
    batch, length = len(lengths), sum(lengths[0])
    query = rng.normal(size=(batch, length, heads, head_dim)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, length, kv_heads, head_dim)).astype(np.float32)
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]).astype(
        np.int32
    )
    segments[-1, segments[-1] == segments[-1, -1]] = 0
    return tuple(map(jnp.asarray, (query, key, value, segments)))


def results(run, query, key, value, segments):
    def total(query, key, value):
        output = run(query, key, value, segments)
        return jnp.sum(jnp.sin(3 * output)), output

    gradients, output = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return output, *gradients


FUSED = (
    "fmhaSoftmax",
    "fmhaSoftmaxBackward",
    "fmhaScaleBiasSoftmax",
    "fmhaScaleBiasSoftmaxBackward",
)
DOCUMENTS = {
    "one document": [[64], [64]],
    "different numbers": [[20, 30, 14], [64]],
    "more than one call takes": [[4] * 16, [1, 63]],
    "as many as a call takes": [[16] * 4, [1, 1, 1, 61]],
    "of one token each": [[1] * 64, [64]],
}


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_attention_and_its_gradients_equal_those_of_plain_attention(
    emulation, monkeypatch, lengths
):
    monkeypatch.setattr(cudnn, "SPANS", 4)
    arrays = inputs(lengths)
    found = results(lambda *x: cudnn.packed_attention(*x, ONE_DEVICE), *arrays)
    expected = results(attention.blocked_attention, *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_only_the_calls_for_further_documents_are_as_many_as_the_data_ask_for(emulation):
    """The time of a program can be told as long as every other loop has a known length."""
    arrays = inputs([[16, 16, 32]])

    def total(query, key, value, segments):
        return jnp.sum(cudnn.packed_attention(query, key, value, segments, ONE_DEVICE))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    runs = list(parse(gradient.lower(*arrays).compile().as_text()).walk())
    loops = [run for run in runs if run.instruction.opcode == "while"]
    assert sum("further_documents" in run.instruction.source for run in loops) >= 2
    assert not [run.instruction.name for run in runs if run.endless]


CROSSING = {
    "one document": [[64]],
    "borders within documents": [[20, 30, 14], [3, 10, 51]],
    "documents that begin at borders": [[16, 16, 32], [8, 8, 48]],
    "many": [[1] * 20 + [44], [5] * 12 + [4]],
}


# Four shards have all that two have: chunks in the middle, of which a document covers the whole.
@pytest.mark.parametrize("shards", [pytest.param(2, marks=pytest.mark.deep), 4])
@pytest.mark.parametrize("lengths", CROSSING.values(), ids=CROSSING)
def test_split_sequences_attend_as_whole_ones_do(emulation, monkeypatch, lengths, shards):
    monkeypatch.setattr(cudnn, "SPANS", 4)
    query, key, value, segments = inputs(lengths)
    mesh, order = MeshConfig(fsdp=1, context=shards), zigzag(64, shards)
    devices, split = jax.sharding.Mesh(jax.devices()[:shards], ("context",)), P(None, "context")

    def sharded(*arrays):
        mapped = jax.shard_map(
            lambda *x: cudnn.packed_attention(*x, mesh),
            mesh=devices,
            in_specs=split,
            out_specs=split,
            check_vma=False,
        )
        return mapped(*(x[:, order] for x in arrays))[:, np.argsort(order)]

    found = results(sharded, query, key, value, segments)
    expected = results(attention.blocked_attention, query, key, value, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found, expected)


def test_batches_whose_offsets_would_overflow_are_split(emulation, monkeypatch):
    arrays = inputs([[20, 30, 14], [64], [1, 63]])
    monkeypatch.setattr(cudnn, "MAX_ELEMENTS", 64 * 4 * 8 * 2)
    calls = []

    def counted(heads, *others):
        calls.append(heads.query.shape[0])
        return forward_call(heads, *others)

    monkeypatch.setattr(cudnn, "forward_call", counted)
    output = jax.jit(lambda *x: cudnn.packed_attention(*x, ONE_DEVICE))(*arrays)
    np.testing.assert_allclose(output, jax.jit(attention.blocked_attention)(*arrays), atol=2e-6)
    assert set(calls) == {2, 1}


def test_offsets_count_the_elements_of_each_array_and_the_lengths_add_up():
    query, key = jnp.zeros((2, 10, 4, 8)), jnp.zeros((2, 10, 2, 8))
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    documents = cudnn.find_documents(segments)
    spans = documents.spans(0)
    given = cudnn.operands(query, key, spans, spans)
    lengths = np.zeros((2, cudnn.SPANS), int)
    lengths[0, :3], lengths[1, :2] = [3, 6, 1], [7, 3]
    np.testing.assert_array_equal(given.query_lengths, lengths)
    np.testing.assert_array_equal(given.key_lengths, lengths)
    tokens = np.full((2, cudnn.SPANS), [[10], [20]])
    tokens[0, :3], tokens[1, :2] = [0, 3, 9], [10, 17]
    flat = np.append(tokens, [20, 20]).reshape(2, -1)
    np.testing.assert_array_equal(given.query_offsets, flat * 32)
    np.testing.assert_array_equal(given.key_offsets, flat * 16)
    assert documents.tokens(0).all() and documents.calls == 1


def lowered(run, mesh, heads=(8, 2), length=512):
    """The StableHLO of a back end's gradient, for NVIDIA GPUs that are not here."""
    wide = jax.ShapeDtypeStruct((2, length, heads[0], 128), jnp.bfloat16)
    narrow = jax.ShapeDtypeStruct((2, length, heads[1], 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def total(q, k, v, ids):
        return jnp.sum(run(q, k, v, ids, mesh).astype(jnp.float32))

    gradient = jax.grad(total, argnums=(0, 1, 2))
    if mesh.context > 1:
        devices, split = (
            jax.sharding.Mesh(jax.devices()[: mesh.context], ("context",)),
            P(None, "context"),
        )
        gradient = jax.shard_map(
            gradient, mesh=devices, in_specs=split, out_specs=split, check_vma=False
        )
    allowed = [DisabledSafetyCheck.custom_call(f"__cudnn${name}") for name in FUSED]
    return export(jax.jit(gradient), platforms=["cuda"], disabled_checks=allowed)(
        wide, narrow, narrow, ids
    ).mlir_module()


def calls(text):
    """The custom calls of cuDNN in a program: target, mask, and the types of operands."""
    text = text.replace(r"\22", '"')
    pattern = (
        r"custom_call @__cudnn\$(\w+)\(.*?mask_type\W+(\w+).*?max_seg_per_batch\W+(\d+).*? : "
        r"\((.*?)\) ->"
    )
    return [
        (target, mask, int(spans), re.findall(r"tensor<(.*?)>", operands))
        for target, mask, spans, operands in re.findall(pattern, text)
    ]


@pytest.mark.parametrize("context", [1, 2])
def test_the_calls_take_lengths_and_offsets_and_no_mask(context):
    mesh = MeshConfig(fsdp=1, context=context)
    text = lowered(attention.cudnn_attention, mesh)
    found, own, whole, spans = calls(text), 512 // context, 512, cudnn.SPANS
    layout = [f"2x{spans}xi32"] * 2 + [f"2x{spans + 1}xi32"] * 2
    query, key = f"2x{own}x8x128xbf16", f"2x{own}x2x128xbf16"
    statistics = f"{2 * spans}x8x{own}xf32"
    causal = ("PADDING_CAUSAL", spans)
    assert ("fmhaSoftmax", *causal, [query, key, key, *layout]) in found
    assert (
        "fmhaSoftmaxBackward",
        *causal,
        [query, key, key, statistics, query, query, *layout],
    ) in found
    if context > 1:
        key = f"2x{whole}x2x128xbf16"
        layout = ["2x2xi32"] * 2 + ["2x3xi32"] * 2
        assert ("fmhaSoftmax", "PADDING", 2, [query, key, key, *layout]) in found
        assert (
            "fmhaSoftmaxBackward",
            "PADDING",
            2,
            [query, key, key, f"4x8x{own}xf32", query, query, *layout],
        ) in found
    # Nothing in the program has a dimension of queries and one of keys.
    assert not re.search(rf"\D{own}x(\d+x)?{whole}x(i1|bf16|f32)>", text.replace("x128x", "xHx"))


@pytest.mark.parametrize("context", [1, 2])
def test_the_mask_of_older_gpus_is_that_of_one_sequence_and_has_no_gradient(context):
    own = 512 // context
    found = calls(lowered(attention.cudnn_masked_attention, MeshConfig(fsdp=1, context=context)))
    query, key, bias = f"1x{own}x8x128xbf16", "1x512x2x128xbf16", f"1x1x{own}x512xbf16"
    assert ("fmhaScaleBiasSoftmax", "NO_MASK", 1, [query, key, key, bias]) in found
    operands = [query, key, key, f"1x8x{own}xf32", query, bias, query]
    assert ("fmhaScaleBiasSoftmaxBackward", "NO_MASK", 1, operands) in found


@pytest.mark.parametrize(
    ("flags", "forced"),
    [
        ("", 0),
        ("--xla_gpu_deterministic_ops=true", 1),
        ("--xla_gpu_autotune_level=4 --xla_gpu_exclude_nondeterministic_ops", 1),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", 0),
    ],
)
def test_gradients_are_asked_to_be_the_same_bits_where_xla_is(monkeypatch, flags, forced):
    # XLA's own way of asking cuDNN for that ends in a C++ error as the program begins to run.
    monkeypatch.setenv("XLA_FLAGS", flags)
    text = lowered(attention.cudnn_attention, MeshConfig(fsdp=1)).replace(r"\22", '"')
    backward = [line for line in text.splitlines() if "__cudnn$fmhaSoftmaxBackward(" in line]
    assert backward and text.count('"force_deterministic": true') == forced * len(backward)
    assert all(('"force_deterministic": true' in line) == bool(forced) for line in backward)


def jax_operands(query, key, segments):
    """Lengths and offsets of documents as JAX's own attention hands them to cuDNN."""
    fused = cudnn._fused()
    documents = cudnn.find_documents(segments).spans(0)
    there = documents.length > 0
    lengths = jnp.where(there, documents.length, -1)
    edges = jnp.concatenate(
        [documents.start, documents.start[:, -1:] + documents.length[:, -1:]], 1
    )
    present = jnp.concatenate([there, jnp.zeros_like(there[:, :1])], 1)
    offsets = jnp.where(present, edges, -1)
    return fused._fix_seqlen_offsets(lengths, lengths, offsets, offsets, query, key)


def present(lengths, offsets):
    """The spans that are there, in order: length and offset."""
    lengths, offsets = np.asarray(lengths).ravel(), np.asarray(offsets).ravel()
    return [(int(n), int(offset)) for n, offset in zip(lengths, offsets, strict=False) if n > 0]


@pytest.mark.parametrize("lengths", [DOCUMENTS["one document"], [[20, 30, 14], [3, 60, 1]]])
def test_lengths_and_offsets_are_those_that_jax_hands_to_cudnn(lengths):
    query, key, _, segments = inputs(lengths)
    # Before 0.11.1 JAX counts the elements of keys by the heads of queries: repeated, they agree.
    if tuple(map(int, jax.__version__.split(".")[:3])) < (0, 11, 1):
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    spans = cudnn.find_documents(segments).spans(0)
    own = cudnn.operands(query, key, spans, spans)
    theirs = jax_operands(query, key, segments)
    assert present(own.query_lengths, own.query_offsets) == present(theirs[0], theirs[2])
    assert present(own.key_lengths, own.key_offsets) == present(theirs[1], theirs[3])


def test_a_train_step_for_an_h100_attends_through_cudnn_alone(monkeypatch):
    monkeypatch.setattr(sys.modules[attention.select.__module__], "traced_for", hopper)
    run = recipes.load("afm-tiny")
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    precision = run.precision.model_copy(update={"compute": "bfloat16"})
    model = run.model.model_copy(update=sizes)
    run = run.replace(model=model, precision=precision, mesh=ONE_DEVICE)
    resolved = resolve_stage(run, "core")
    state, batch = abstract_state(resolved), abstract_batch(resolved)
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
    allowed = [DisabledSafetyCheck.custom_call(f"__cudnn${name}") for name in FUSED]
    step = export(jax.jit(stage_step(resolved)), platforms=["cuda"], disabled_checks=allowed)
    found = calls(step(*here).mlir_module())
    stage = run.stages["core"]
    rows, length = stage.batch_size, stage.sequence_length
    query, key = (f"{rows}x{length}x{heads}x64xbf16" for heads in (4, 2))
    layout = [f"{rows}x{cudnn.SPANS}xi32"] * 2 + [f"{rows}x{cudnn.SPANS + 1}xi32"] * 2
    statistics = f"{rows * cudnn.SPANS}x4x{length}xf32"
    backward = [query, key, key, statistics, query, query, *layout]
    expected = {"fmhaSoftmax": [query, key, key, *layout], "fmhaSoftmaxBackward": backward}
    assert {name for name, *_ in found} == expected.keys()
    for name, mask, spans, operands in found:
        assert (mask, spans, operands) == ("PADDING_CAUSAL", cudnn.SPANS, expected[name])


def hopper():
    return "cuda", (9, 0)
