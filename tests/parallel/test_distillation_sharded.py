"""Distillation over meshes of simulated devices against that of one device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from braeburn.config import Distillation, Execution, MeshConfig, ModelConfig, Precision
from braeburn.layers.spec import initialize
from braeburn.models import decoder
from braeburn.objectives import distillation as module
from braeburn.objectives import vocabulary
from braeburn.objectives.cross_entropy import Targets
from braeburn.objectives.distillation import distillation_loss, top_k_labels
from braeburn.objectives.vocabulary import Projection
from braeburn.parallel.collectives import gather_tokens
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, K, Z_LOSS = 8, 16, 16, 24, 4, 1e-2
BATCH_AXES = ("replica", "data", "fsdp")
HIDDEN, HEAD, TOKENS = (
    P(BATCH_AXES, ("context", "tensor")),
    P("tensor", "fsdp"),
    P(BATCH_AXES, "context"),
)
TEACHER = Projection(HIDDEN, HEAD)

# Mesh sizes and a vocabulary that they divide; blocks and chunks need not divide it.
LAYOUTS = [
    pytest.param({"tensor": 2}, 302, marks=pytest.mark.deep),
    pytest.param({"fsdp": 2}, 303, marks=pytest.mark.deep),
    ({"fsdp": 8}, 5),
    ({"fsdp": 2, "tensor": 2}, 302),
    ({"fsdp": 2, "context": 2, "tensor": 2}, 306),
]
layouts = pytest.mark.parametrize(
    ("sizes", "vocab"), LAYOUTS, ids=lambda x: str(x).strip("{}").replace("'", "")
)
kinds = pytest.mark.parametrize(("kind", "temperature"), [("top_k", 2.0), ("distribution", 1.5)])


@pytest.fixture(autouse=True)
def many_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", 2**12)
    monkeypatch.setattr(vocabulary, "chunk_length", lambda batch, length, vocab: 3)


@functools.cache
def inputs(vocab):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    hidden, head = normal(BATCH, LENGTH, WIDTH), normal(vocab, WIDTH)
    targets = jnp.asarray(rng.integers(0, vocab, (BATCH, LENGTH)), jnp.int32)
    weights = rng.random((BATCH, LENGTH)).astype(np.float32)
    teacher = Projection(normal(BATCH, LENGTH, TEACHER_WIDTH), 0.5 * normal(vocab, TEACHER_WIDTH))
    return hidden, head, targets, jnp.asarray(weights / weights.sum()), teacher


def mesh_of(sizes):
    return MeshConfig(**{"fsdp": 1} | sizes)


def shard_mapped(function, mesh, in_specs, out_specs):
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


def local_loss(hidden, head, ids, weights, teacher, settings, mesh):
    """This device's local loss, with an online teacher."""
    targets = Projection(gather_tokens(teacher.hidden, mesh), teacher.head)
    if settings.target != "distribution":
        targets = top_k_labels(*targets, K, mesh)
    student = Projection(gather_tokens(hidden, mesh), head)
    text = Targets(ids, weights)
    return distillation_loss(student, text, targets, settings, Z_LOSS, Execution(mesh))


def differentiated(mesh, settings):
    """(sums, gradients) of whole arrays, as the train step works them out."""

    def local(*arguments):
        sums, (d_hidden, d_head) = jax.value_and_grad(local_loss, (0, 1), has_aux=True)(
            *arguments, settings, mesh
        )
        return lax.psum(sums, tuple(mesh.sizes)), (
            d_hidden,
            lax.psum(d_head, ("replica", "data", "context")),
        )

    return shard_mapped(local, mesh, (HIDDEN, HEAD, TOKENS, TOKENS, TEACHER), (P(), (HIDDEN, HEAD)))


def settings_of(kind, temperature):
    return Distillation(target=kind, temperature=temperature, top_k=K)


@functools.cache
def alone(vocab, kind, temperature):
    function = jax.jit(jax.value_and_grad(local_loss, (0, 1), has_aux=True), static_argnums=(5, 6))
    return function(*inputs(vocab), settings_of(kind, temperature), mesh_of({}))


def distance(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@layouts
@kinds
def test_values_and_gradients_are_those_of_one_device(sizes, vocab, kind, temperature):
    ours = differentiated(mesh_of(sizes), settings_of(kind, temperature))(*inputs(vocab))
    theirs = alone(vocab, kind, temperature)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 1e-5


@layouts
def test_each_device_names_the_same_tokens(sizes, vocab):
    mesh, (*_, teacher) = mesh_of(sizes), inputs(vocab)
    # Two equal rows in blocks and shards that are not the same: the lower comes first.
    teacher = teacher._replace(
        head=teacher.head.at[vocab - 1].set(3 * teacher.head[1]).at[1].mul(3)
    )
    # Each tensor shard's answer apart, side by side along the batch.
    out = P((*BATCH_AXES, "tensor"), "context")
    k = min(K, vocab)
    function = shard_mapped(
        lambda h, w: top_k_labels(gather_tokens(h, mesh), w, k, mesh), mesh, tuple(TEACHER), out
    )
    ids, log_probs = function(*teacher)
    expected, expected_log_probs = top_k_labels(*teacher, k)
    assert np.any(np.asarray(expected)[..., 0] == 1) and not np.any(
        np.asarray(expected)[..., 0] == vocab - 1
    )
    shards = BATCH // (mesh.replica * mesh.data * mesh.fsdp)
    for i in range(mesh.tensor):
        own, own_log_probs = (
            np.asarray(x)
            .reshape(-1, mesh.tensor, shards, LENGTH, k)[:, i]
            .reshape(BATCH, LENGTH, k)
            for x in (ids, log_probs)
        )
        np.testing.assert_array_equal(own, expected)
        # Sums in another order may round to the next number of float16.
        np.testing.assert_allclose(own_log_probs, expected_log_probs, rtol=2**-10, atol=1e-6)


@kinds
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"fsdp": 4}])
def test_whole_logits_of_neither_exist(sizes, kind, temperature):
    mesh, vocab = mesh_of(sizes), 2048
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs(vocab))
    text = (
        differentiated(mesh, settings_of(kind, temperature)).lower(*arguments).compile().as_text()
    )
    sizes = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16|s32)\[([\d,]+)\]", text)
    ]
    assert max(sizes) < vocab // mesh.tensor * LENGTH * BATCH // mesh.fsdp
    if mesh.fsdp > 1:  # the shards, kept in blocks, are the most that there is of the heads
        assert max(sizes) < vocab // mesh.tensor * WIDTH


STUDENT = ModelConfig(
    vocab_size=96, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=32
)
TEACHING = STUDENT.model_copy(
    update={"d_model": 32, "num_layers": 2, "num_heads": 4, "tied_embeddings": False}
)


@functools.cache
def both():
    return jax.jit(
        lambda: [initialize(decoder.param_specs(model), 3) for model in (STUDENT, TEACHING)]
    )()


@pytest.mark.parametrize("kind", ["label", "distribution"])
def test_a_student_and_its_teacher_share_a_mesh(kind):
    mesh, settings = mesh_of({"fsdp": 2, "tensor": 2}), settings_of(kind, 1.0)
    params, teacher = both()
    tokens = np.random.default_rng(1).integers(0, STUDENT.vocab_size, (BATCH, LENGTH + 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "segment_ids": np.ones((BATCH, LENGTH), np.int32),
        "weights": np.full((BATCH, LENGTH), 1 / tokens.size, np.float32),
    }

    def minimised(params, batch, teacher, mesh):
        execution = Execution(mesh, precision=Precision(compute="float32"))
        return module.loss(params, batch, (TEACHING, teacher), STUDENT, settings, execution)

    def local(params, batch, teacher):
        return lax.psum(minimised(params, batch, teacher, mesh), tuple(mesh.sizes))

    devices = build(mesh, jax.devices()[:4])
    partitions = [
        Layout(Execution(mesh), devices, decoder.param_specs(model)).partitions
        for model in (STUDENT, TEACHING)
    ]
    ours = shard_mapped(local, mesh, (partitions[0], TOKENS, partitions[1]), P())(
        params, batch, teacher
    )
    theirs = jax.jit(functools.partial(minimised, mesh=mesh_of({})))(params, batch, teacher)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-5)
