"""The loss over meshes of eight simulated devices against that of one device."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from braeburn.config import Execution, MeshConfig, Precision
from braeburn.objectives import cross_entropy as loss
from braeburn.objectives import vocabulary
from braeburn.objectives.vocabulary import Projection
from braeburn.parallel.collectives import gather_tokens
from braeburn.parallel.mesh import build

BATCH, LENGTH, WIDTH = 8, 16, 16
BATCH_AXES = ("replica", "data", "fsdp")
HIDDEN, HEAD, TOKENS = (
    P(BATCH_AXES, ("context", "tensor")),
    P("tensor", "fsdp"),
    P(BATCH_AXES, "context"),
)

# Mesh sizes and a vocabulary that they divide; blocks and chunks need not divide it.
LAYOUTS = [
    ({"tensor": 2}, 1002),
    pytest.param({"tensor": 4}, 1004, marks=pytest.mark.deep),
    ({"tensor": 8}, 1000),
    pytest.param({"fsdp": 2}, 1003, marks=pytest.mark.deep),
    ({"fsdp": 4}, 1003),
    ({"fsdp": 8}, 1003),
    ({"fsdp": 8}, 5),
    ({"fsdp": 4, "tensor": 2}, 1006),
    ({"fsdp": 2, "tensor": 4}, 1004),
    ({"replica": 2, "data": 2, "context": 2}, 1003),
    pytest.param({"replica": 2, "fsdp": 4}, 1003, marks=pytest.mark.deep),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 1006),
    ({"fsdp": 2, "context": 2, "tensor": 2}, 1006),
]
layouts = pytest.mark.parametrize(
    ("sizes", "vocab"), LAYOUTS, ids=lambda x: str(x).strip("{}").replace("'", "")
)


@pytest.fixture(autouse=True)
def many_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", 2**12)
    monkeypatch.setattr(vocabulary, "chunk_length", lambda batch, length, vocab: 3)


def inputs(vocab, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), dtype)
    head = jnp.asarray(rng.normal(size=(vocab, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (BATCH, LENGTH)), jnp.int32)
    weights = rng.random((BATCH, LENGTH)).astype(np.float32)
    return hidden, head, targets, jnp.asarray(weights / weights.sum())


def mesh_of(sizes):
    return MeshConfig(**{"fsdp": 1} | sizes)


def shard_mapped(function, mesh, out_specs, in_specs=(HIDDEN, HEAD, TOKENS, TOKENS)):
    devices = jax.devices()[: math.prod(mesh.sizes.values())]
    return jax.jit(
        jax.shard_map(
            function,
            mesh=build(mesh, devices),
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )
    )


def differentiated(mesh, z_loss=1e-2, reduce="float32"):
    """(sums, gradients) of whole arrays, as the train step works them out."""

    execution = Execution(mesh, precision=Precision(reduce=reduce))

    def local(hidden, head, targets, weights):
        def local_loss(hidden, head):
            model = Projection(gather_tokens(hidden, mesh), head)
            tokens = loss.Targets(targets, weights)
            return loss.cross_entropy(model, tokens, z_loss, execution)

        results, (d_hidden, d_head) = jax.value_and_grad(local_loss, argnums=(0, 1), has_aux=True)(
            hidden, head
        )
        return lax.psum(results, tuple(mesh.sizes)), (
            d_hidden,
            lax.psum(d_head, ("replica", "data", "context")),
        )

    return shard_mapped(local, mesh, (P(), (HIDDEN, HEAD)))


def alone(hidden, head, targets, weights, z_loss=1e-2):
    def whole(hidden, head):
        tokens = loss.Targets(targets, weights)
        return loss.cross_entropy(Projection(hidden, head), tokens, z_loss, Execution())

    function = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)
    return jax.jit(function)(hidden, head)


def distance(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@layouts
def test_values_and_gradients_are_those_of_one_device(sizes, vocab):
    arguments = inputs(vocab)
    ours, theirs = differentiated(mesh_of(sizes))(*arguments), alone(*arguments)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 1e-6


@layouts
def test_token_losses_are_whole_on_each_shard_of_the_vocabulary(sizes, vocab):
    mesh, (hidden, head, targets, _) = mesh_of(sizes), inputs(vocab)
    # Each tensor shard's answer apart, side by side along the batch.
    out = P((*BATCH_AXES, "tensor"), "context")
    function = shard_mapped(
        lambda h, w, t: loss.token_losses(gather_tokens(h, mesh), w, t, mesh),
        mesh,
        (out,) * 3,
        (HIDDEN, HEAD, TOKENS),
    )
    ours, theirs = function(hidden, head, targets), loss.token_losses(hidden, head, targets)
    shards = BATCH // (mesh.replica * mesh.data * mesh.fsdp)
    for one, other in zip(ours, theirs, strict=True):
        copies = one.reshape(-1, mesh.tensor, shards, LENGTH)
        for i in range(mesh.tensor):
            np.testing.assert_allclose(
                copies[:, i].reshape(BATCH, LENGTH), other, rtol=0, atol=4e-6
            )


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_top_1_tokens_are_found(sizes):
    mesh, (hidden, head, _, _) = mesh_of(sizes), inputs(1004)
    best = jnp.argmax(jnp.einsum("BTD,VD->BTV", hidden, head), axis=-1).astype(jnp.int32)
    targets = best.at[::2].add(1) % 1004
    function = shard_mapped(
        lambda h, w, t: loss.token_losses(gather_tokens(h, mesh), w, t, mesh)[2],
        mesh,
        TOKENS,
        (HIDDEN, HEAD, TOKENS),
    )
    np.testing.assert_array_equal(function(hidden, head, targets), targets == best)


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_half_precision_is_near_and_large_logits_do_not_overflow(sizes):
    hidden, head, targets, weights = inputs(1004, jnp.bfloat16)
    for scale, tolerance in ((1.0, 6e-3), (100.0, 2e-2)):
        (total, _), gradients = differentiated(mesh_of(sizes))(
            hidden, scale * head, targets, weights
        )
        (expected, _), expected_gradients = alone(hidden, scale * head, targets, weights)
        assert distance(total, expected) < 1e-5
        assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert distance(ours, theirs) < tolerance


@pytest.mark.parametrize(("dtype", "name"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_the_heads_gradient_is_summed_in_the_type_asked_for(dtype, name):
    arguments = inputs(1003)
    text = differentiated(mesh_of({"fsdp": 4}), reduce=dtype).lower(*arguments).as_text()
    types = re.findall(r"reduce_scatter.*?\}\) : \(tensor<\d+x\d+x(\w+)>\)", text, re.DOTALL)
    assert types == [name]


@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"fsdp": 4}, {"fsdp": 4, "tensor": 2}])
def test_neither_whole_logits_nor_a_whole_head_exist(sizes):
    mesh, vocab = mesh_of(sizes), 4096
    head_size, logits_size = (
        vocab // mesh.tensor * WIDTH,
        vocab // mesh.tensor * LENGTH * BATCH // mesh.fsdp,
    )
    arguments = inputs(vocab)
    text = differentiated(mesh).lower(*arguments).compile().as_text()
    sizes = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)
    ]
    assert max(sizes) < logits_size
    if mesh.fsdp > 1:  # the shard, kept in blocks, is the most that there is of the head
        assert max(sizes) < head_size


def test_a_block_is_small_and_never_empty():
    for tokens, width, vocab in [
        (1, 1, 1),
        (128, 16, 5),
        (4096, 8192, 150_000),
        (65536, 4096, 153_600),
        (2**27, 64, 9),
    ]:
        rows = vocabulary.block_length(tokens, width, vocab)
        assert 1 <= rows <= vocab
        assert rows == 1 or rows * max(tokens, width) <= vocabulary.MAX_LOGITS
        assert -(-vocab // rows) >= min(5, vocab)
