"""Every back end against attention written out in float64 NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import export
from jax.sharding import PartitionSpec as P

from braeburn.config import MeshConfig
from braeburn.layers import attention as A
from braeburn.layers.attention import blocked, splash
from braeburn.layers.attention.select import choose
from braeburn.layers.platform import PORTABLE, portable, traced_for


def inputs(seed, batch, length, num_heads, num_kv_heads, head_dim, value_dim=None):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, length, num_heads, head_dim)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, length, num_kv_heads, head_dim)).astype(np.float32)
    value = value[..., :value_dim]
    starts = rng.random((batch, length)) < 3 / length
    segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
    return tuple(map(jnp.asarray, (query, key, value, segments)))


def reference(query, key, value, segments):
    query, key, value, segments = map(np.asarray, (query, key, value, segments))
    _, length, num_heads, head_dim = query.shape
    group = num_heads // key.shape[2]
    key, value = (np.repeat(x.astype(np.float64), group, axis=2) for x in (key, value))
    scores = np.einsum("bqnh,bsnh->bnqs", query.astype(np.float64), key) / head_dim**0.5
    visible = np.tril(np.ones((length, length), bool)) & (
        segments[:, :, None] == segments[:, None, :]
    )
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqs,bsnh->bqnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "value_dim"),
    [(1, 2, 1, 8, 8), (100, 6, 2, 16, 12), (128, 7, 7, 10, 10), (300, 9, 3, 8, 6)],
)
def test_blocked_attention_equals_the_reference(length, heads, kv_heads, head_dim, value_dim):
    arrays = inputs(0, 2, length, heads, kv_heads, head_dim, value_dim)
    np.testing.assert_allclose(jax.jit(A.blocked_attention)(*arrays), reference(*arrays), atol=2e-6)


def test_recomputing_blocks_changes_no_gradient(monkeypatch):
    arrays = inputs(1, 1, 1500, 4, 2, 8, 6)

    def gradients():
        def loss(query, key, value):
            return jnp.sum(A.blocked_attention(query, key, value, arrays[3]) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays[:3])

    kept = gradients()
    monkeypatch.setattr(blocked, "LONG_SEQUENCE", 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, gradients())


def test_a_long_sequence_needs_memory_in_proportion_to_its_length():
    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def gradient(q, k, v, ids):
            return jax.grad(lambda q: jnp.sum(A.blocked_attention(q, k, v, ids)))(q)

        return (
            jax.jit(gradient)
            .lower(shape, shape, shape, ids)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    # Whole scores would grow by 16.
    assert temporary_bytes(16_384) < 8 * temporary_bytes(4096)


def test_padding_gives_no_nan():
    query, key, value, segments = inputs(2, 1, 64, 2, 2, 8)
    segments = segments.at[:, 40:].set(0)
    assert np.isfinite(A.blocked_attention(query, key, value, segments)).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(2, 2, 128, 128), (4, 1, 128, 128), (2, 1, 64, 64), (2, 2, 192, 128), (2, 2, 48, 80)],
)
def test_splash_attention_equals_the_reference_in_interpret_mode(
    monkeypatch, heads, kv_heads, head_dim, value_dim
):
    monkeypatch.setattr(splash, "INTERPRET", True)
    arrays = inputs(3, 2, 256, heads, kv_heads, head_dim, value_dim)
    output = A.splash_attention(*arrays)
    np.testing.assert_allclose(output, reference(*arrays), atol=2e-5)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(128, 128), (64, 64), (192, 128)])
def test_splash_attention_gradients_equal_those_of_blocked_attention_in_interpret_mode(
    monkeypatch, head_dim, value_dim
):
    monkeypatch.setattr(splash, "INTERPRET", True)
    query, key, value, segments = inputs(4, 1, 128, 2, 1, head_dim, value_dim)

    def gradients(run):
        def loss(query, key, value):
            return jnp.sum(jnp.sin(run(query, key, value, segments)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    found, expected = gradients(A.splash_attention), gradients(A.blocked_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), found, expected)


@pytest.mark.parametrize("context", [1, 2])
def test_splash_attention_lowers_for_a_tpu_that_is_absent(context):
    wide = jax.ShapeDtypeStruct((2, 512, 8, 128), jnp.bfloat16)
    narrow = jax.ShapeDtypeStruct((2, 512, 2, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    mesh = MeshConfig(fsdp=1, context=context)

    def total(q, k, v, ids):
        return jnp.sum(A.splash_attention(q, k, v, ids, mesh).astype(jnp.float32))

    gradient = jax.grad(total, argnums=(0, 1, 2))
    if context > 1:
        devices, split = (
            jax.sharding.Mesh(jax.devices()[:context], ("context",)),
            P(None, "context"),
        )
        gradient = jax.shard_map(
            gradient, mesh=devices, in_specs=split, out_specs=split, check_vma=False
        )
    exported = export(jax.jit(gradient), platforms=["tpu"])(wide, narrow, narrow, ids)
    assert "tpu_custom_call" in exported.mlir_module()


def request(**changes):
    fields = {
        "platform": "cpu",
        "dtype": jnp.dtype(jnp.bfloat16),
        "sequence_length": 4096,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "value_dim": 128,
    }
    return A.Request(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"platform": "tpu"}, "splash"),
        ({"platform": "tpu", "sequence_length": 100}, "blocked"),
        ({"platform": "tpu", "head_dim": 64, "value_dim": 64}, "splash"),
        ({"platform": "tpu", "head_dim": 192}, "splash"),
        ({"platform": "tpu", "head_dim": 24}, "blocked"),
        ({"platform": "cuda", "value_dim": 64}, "blocked"),
        ({"platform": "cuda"}, "cudnn"),
        ({"platform": "cuda", "compute_capability": (9, 0)}, "cudnn"),
        ({"platform": "cuda", "compute_capability": (8, 9)}, "cudnn-masked"),
        ({"platform": "cuda", "compute_capability": (8, 0), "sequence_length": 16_384}, "blocked"),
        ({"platform": "cuda", "dtype": jnp.dtype(jnp.float32)}, "blocked"),
        ({"platform": "cuda", "head_dim": 256}, "blocked"),
        ({"platform": "cuda", "sequence_length": 2**20}, "blocked"),
        ({"platform": "rocm"}, "blocked"),
        ({"platform": "cpu"}, "blocked"),
    ],
)
def test_the_first_supported_back_end_is_chosen_and_says_why(caplog, changes, chosen):
    A.select.cache_clear()
    with caplog.at_level("INFO"):
        assert A.select(request(**changes)).name == chosen
    assert f": {chosen}" in caplog.text
    for passed_over in [b.name for b in A.BACKENDS][: [b.name for b in A.BACKENDS].index(chosen)]:
        assert re.search(f"not {passed_over}: it (needs|computes|counts|forms)", caplog.text)


class _Gpu:
    """A GPU as JAX describes one that is here."""

    device_kind = "a GPU"
    compute_capability = "9.0"

    def __init__(self, platform_version):
        self.client = self
        self.platform_version = platform_version


@pytest.mark.parametrize(
    ("platform_version", "expected"),
    [("PJRT C API\ncuda 13000", ("cuda", (9, 0))), ("PJRT C API\nrocm 70200", ("rocm", None))],
)
def test_gpus_of_other_makers_are_told_from_nvidias(monkeypatch, platform_version, expected):
    # JAX's platform is "gpu" for both.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [_Gpu(platform_version)])
    assert traced_for() == expected


@pytest.mark.parametrize(
    ("chip", "capability"), [("NVIDIA A100-SXM4-80GB", (8, 0)), ("NVIDIA H100 80GB HBM3", (9, 0))]
)
def test_absent_gpus_have_the_capability_of_the_catalogue(monkeypatch, chip, capability):
    device = jax.sharding.AbstractDevice(device_kind=chip, num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert traced_for() == ("cuda", capability)


@pytest.mark.parametrize("chip", ["MI250", "MI300X", "MI350X", "AMD Instinct MI325X"])
def test_absent_gpus_of_amd_get_no_kernels_of_nvidia(chip, caplog):
    # As XLA describes them, to which JAX says "gpu".
    device = jax.sharding.AbstractDevice(device_kind=chip, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        platform, capability = traced_for()
    assert (platform, capability) == ("rocm", None)
    request = A.Request(platform, jnp.dtype(jnp.bfloat16), 4096, 8, 8, 128, 128)
    backend, passed_over = choose(request)
    assert backend.name == "blocked"
    assert "not cudnn: it needs an NVIDIA GPU" in passed_over


def test_what_is_portable_is_for_no_platform(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [_Gpu("PJRT C API\ncuda 13000")])
    with portable():
        assert traced_for() == (PORTABLE, None)
    assert traced_for() == ("cuda", (9, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ring": True, "platform": "tpu"}, "attention over 4096 tokens: ring over 4 shards"),
        (
            {"platform": "cpu"},
            "attention over 4096 tokens: blocked over 4 shards (not cudnn: it needs an NVIDIA "
            "GPU; ",
        ),
        ({"platform": "tpu"}, "attention over 4096 tokens: splash over 4 shards (not cudnn"),
        # 64 tokens a shard.
        (
            {"platform": "tpu", "context_shards": 64},
            "needs a sequence_length that is a multiple of 8192, not 4096",
        ),
    ],
)
def test_the_choice_for_split_sequences_names_the_shards_once(caplog, changes, message):
    A.select.cache_clear()
    with caplog.at_level("INFO"):
        A.select(request(**({"context_shards": 4} | changes)))
        A.select(request(**({"context_shards": 4} | changes)))
    assert caplog.text.count(message) == 1
