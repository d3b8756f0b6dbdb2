"""Attention sinks in every back end beside the softmax written out in float64, values and
gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_cudnn as emulated
from jax.export import export
from jax.sharding import PartitionSpec as P

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers import attention
from braeburn.layers.attention import Scope, blocked, cudnn, ring, splash
from braeburn.parallel.sequence import zigzag

HEADS, KV_HEADS = 4, 2
# (query, key, value, segments, scope) -> attended values.
Run = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Scope], jax.Array]


@functools.cache
def inputs(length: int, head_dim: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values, segments, sinks that matter, and the result's cotangent."""
    rng = np.random.default_rng(0)
    query, cotangent = rng.normal(size=(2, 2, length, HEADS, head_dim))
    key, value = rng.normal(size=(2, 2, length, KV_HEADS, head_dim))
    segments = 1 + np.cumsum(rng.random((2, length)) < 3 / length, axis=1, dtype=np.int32)
    return query, key, value, segments, np.array([-2.0, 0.5, 3.0, 1.0]), cotangent


def plain(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, scope: Scope
) -> jax.Array:
    """The softmax over the keys that a query sees and its head's sink, which has no value."""
    assert scope.sinks is not None
    length, group = query.shape[1], HEADS // KV_HEADS
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("bqnh,bsnh->bnqs", query, key) / query.shape[3] ** 0.5
    behind = jnp.arange(length)[:, None] - jnp.arange(length)
    visible = (behind >= 0) & (behind < (scope.window or length))
    visible = visible & (segments[:, :, None] == segments[:, None])
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(scope.sinks[:, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bnqs,bsnh->bqnh", weights, value)


def results(run: Run, arrays: Any, window: int | None) -> list[np.ndarray]:
    """Values, and the gradients for queries, keys, values and sinks."""
    query, key, value, segments, sinks, cotangent = arrays

    def total(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        output = run(query, key, value, segments, Scope(window, sinks))
        return jnp.sum(output * cotangent), output

    function = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    gradients, output = function(query, key, value, sinks)
    return [np.asarray(each) for each in (output, *gradients)]


@functools.cache
def expected(length: int, head_dim: int, window: int | None) -> list[np.ndarray]:
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, inputs(length, head_dim))
        return results(plain, arrays, window)


def assert_as_written_out(
    run: Run, length: int = 64, head_dim: int = 8, window: int | None = None
) -> None:
    *others, segments, sinks, cotangent = inputs(length, head_dim)
    arrays = [jnp.asarray(x, jnp.float32) for x in (*others, sinks, cotangent)]
    arrays.insert(3, jnp.asarray(segments))
    found = results(run, arrays, window)
    for one, wanted in zip(found, expected(length, head_dim, window), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("long", [0, 2048])
def test_blocked(monkeypatch: pytest.MonkeyPatch, long: int, window: int | None) -> None:
    monkeypatch.setattr(blocked, "LONG_SEQUENCE", long)

    def run(*arguments: Any) -> jax.Array:
        return attention.blocked_attention(*arguments[:4], ONE_DEVICE, arguments[4])

    assert_as_written_out(run, 200, window=window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_splash(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    monkeypatch.setattr(splash, "INTERPRET", True)

    def run(*arguments: Any) -> jax.Array:
        return attention.splash_attention(*arguments[:4], ONE_DEVICE, arguments[4])

    assert_as_written_out(run, 128, head_dim, window=40)


def test_splash_lowers_for_a_tpu_that_is_absent() -> None:
    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    sinks = jax.ShapeDtypeStruct((4,), jnp.float32)

    def total(query: Any, key: Any, value: Any, sinks: Any, ids: Any) -> jax.Array:
        scope = Scope(128, sinks)
        found = attention.splash_attention(query, key, value, ids, ONE_DEVICE, scope)
        return jnp.sum(found.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
    exported = export(gradient, platforms=["tpu"])(*shapes, sinks, ids)
    assert "tpu_custom_call" in exported.mlir_module()
    assert exported.out_avals[3].dtype == jnp.float32


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what the calls of cuDNN compute in their place."""

    def scores(heads: Any, visible: Any) -> Any:
        key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in heads[1:])
        found = jnp.einsum("bqnh,bsnh->bnqs", heads.query, key) * key.shape[3] ** -0.5
        return jnp.where(visible[:, None], found, -jnp.inf), key, value

    def masked_forward(heads: Any, visible: Any) -> Any:
        found, _, value = scores(heads, visible)
        log_z = jax.nn.logsumexp(found, axis=-1)
        weights = jnp.exp(found - log_z[..., None])
        return jnp.einsum("bnqs,bsnh->bqnh", weights, value), log_z

    def masked_backward(heads: Any, visible: Any, log_z: Any, output: Any, above: Any) -> Any:
        found, key, value = scores(heads, visible)
        weights = jnp.exp(found - log_z[..., None])
        mean = jnp.einsum("bqnh,bqnh->bnq", output, above)
        of_scores = jnp.einsum("bqnh,bsnh->bnqs", above, value) - mean[..., None]
        of_scores = weights * of_scores * key.shape[3] ** -0.5

        def grouped(x: Any) -> Any:
            return x.reshape(*x.shape[:2], KV_HEADS, -1, x.shape[3]).sum(3)

        return (
            jnp.einsum("bnqs,bsnh->bqnh", of_scores, key),
            grouped(jnp.einsum("bnqs,bqnh->bsnh", of_scores, heads.query)),
            grouped(jnp.einsum("bnqs,bqnh->bsnh", weights, above)),
        )

    monkeypatch.setattr(cudnn, "SPANS", 4)
    monkeypatch.setattr(cudnn, "forward_call", emulated.forward_call)
    monkeypatch.setattr(cudnn, "backward_call", emulated.backward_call)
    monkeypatch.setattr(cudnn, "masked_forward_call", masked_forward)
    monkeypatch.setattr(cudnn, "masked_backward_call", masked_backward)


def split_over(mesh: MeshConfig, back_end: Callable[..., jax.Array]) -> Run:
    """A back end over sequences that devices share out; gradients of sinks are summed over them."""
    devices = jax.sharding.Mesh(jax.devices()[: mesh.context], ("context",))
    along, whole = P(None, "context"), P()

    def run(*arguments: Any) -> jax.Array:
        *arrays, scope = arguments
        order = zigzag(arrays[0].shape[1], mesh.context)

        def own(*arrays: Any) -> jax.Array:
            return back_end(*arrays[:4], mesh, Scope(scope.window, arrays[4]))

        mapped = jax.shard_map(
            own,
            mesh=devices,
            in_specs=(along, along, along, along, whole),
            out_specs=along,
            check_vma=False,
        )
        return mapped(*(x[:, order] for x in arrays), scope.sinks)[:, np.argsort(order)]

    return run


@pytest.mark.parametrize("context", [1, 4])
def test_cudnn(monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    emulate(monkeypatch)
    mesh = MeshConfig(fsdp=1, context=context)
    assert_as_written_out(split_over(mesh, attention.cudnn_attention))


@pytest.mark.parametrize("window", [None, 20])
def test_cudnn_masked(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    emulate(monkeypatch)
    mesh = MeshConfig(fsdp=1, context=2)
    run = split_over(mesh, attention.cudnn_masked_attention)
    assert_as_written_out(run, window=window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("way", ["ring", "all_gather"])
def test_split_sequences(monkeypatch: pytest.MonkeyPatch, way: Any, window: int | None) -> None:
    monkeypatch.setattr(ring, "BLOCK", 8)
    mesh = MeshConfig(fsdp=1, context=4, context_attention=way)
    assert_as_written_out(split_over(mesh, attention.attention), window=window)


def test_a_cache() -> None:
    length = 30
    query, key, value, _, sinks, _ = inputs(length, 8)
    positions = jnp.tile(jnp.arange(length), (2, 1))
    found = attention.cached_attention(
        jnp.asarray(query, jnp.float32),
        *(jnp.asarray(x.swapaxes(1, 2), jnp.float32) for x in (key, value)),
        positions,
        Scope(10, jnp.asarray(sinks, jnp.float32)),
    )
    with jax.enable_x64(True):
        wanted = plain(query, key, value, np.zeros((2, length)), Scope(10, jnp.asarray(sinks)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
