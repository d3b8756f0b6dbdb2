"""What holds of every model, whatever its layers: for the tests of a family."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import Execution, MeshConfig, ModelConfig, Precision, Pruning, Remat
from braeburn.layers.spec import ParamSpec, Tree, initialize, map_specs, walk
from braeburn.models import cached, decoder
from braeburn.objectives import cross_entropy
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build
from braeburn.transforms.pruning import kept, masked, masks, score_specs, sliced

FLOAT32 = Execution(precision=Precision(compute="float32"))
BATCH, LENGTH = 4, 64
MESHES: dict[str, dict[str, Any]] = {
    "fsdp x tensor": {"fsdp": 2, "tensor": 4},
    "ring": {"context": 4, "context_attention": "ring", "tensor": 2},
    "gathered context": {"context": 4, "data": 2},
}
# Their names, as parameters of a test.
LAYOUTS = [
    pytest.param(name, marks=() if name == "fsdp x tensor" else pytest.mark.deep) for name in MESHES
]


@functools.cache
def params_of(model: ModelConfig) -> Tree:
    """Initial values with norms that are not all one, nor biases all zero, which would not show
    which is where.
    """
    generator = np.random.default_rng(1)
    drawn = dict(walk(jax.jit(lambda: initialize(decoder.param_specs(model), 0))()))

    def one(path: str, spec: ParamSpec) -> jax.Array:
        if spec.role not in ("norm", "bias"):
            return drawn[path]
        least = 0.5 if spec.role == "norm" else -0.5
        return jnp.asarray(generator.uniform(least, least + 1, spec.shape), jnp.float32)

    return map_specs(one, decoder.param_specs(model))


def batch_of(model: ModelConfig) -> dict[str, np.ndarray]:
    """Packed documents of random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
    segments = 1 + np.cumsum(rng.random((BATCH, LENGTH)) < 0.03, axis=1, dtype=np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "segment_ids": segments,
        "weights": np.full((BATCH, LENGTH), 1 / (BATCH * LENGTH), np.float32),
    }


def assert_a_cache_gives_the_same(model: ModelConfig) -> None:
    """Generation sees what training sees."""
    batch, params = batch_of(model), params_of(model)
    tokens, positions = batch["inputs"], batch["positions"]
    whole = jax.jit(decoder.forward, static_argnums=(2, 3))(
        params, (tokens, positions, np.ones_like(tokens)), model, FLOAT32
    )
    cache = cached.empty_cache(model, BATCH, LENGTH, FLOAT32, stacked=True)
    run = jax.jit(cached.forward_cached, static_argnums=(3, 4))
    parts = []
    for start, stop in ((0, 40), (40, 41), (41, LENGTH)):
        new = (tokens[:, start:stop], positions[:, start:stop])
        hidden, cache = run(params, new, cache, model, FLOAT32)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


def assert_ways_agree(model: ModelConfig, *, scan: bool, remat: str) -> None:
    """Scanning layers and forming activations again change no number."""

    def result(model: ModelConfig, execution: Execution) -> Any:
        function = jax.value_and_grad(cross_entropy.loss, has_aux=True)
        compiled = jax.jit(function, static_argnums=(2, 3))
        return compiled(params_of(model), batch_of(model), model, execution)

    (expected, _), expected_gradients = result(model, FLOAT32)
    other = model.model_copy(update={"scan_layers": scan})
    execution = dataclasses.replace(FLOAT32, remat=Remat.model_validate({"policy": remat}))
    (found, _), gradients = result(other, execution)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for path, gradient in walk(gradients):
        wanted = dict(walk(expected_gradients))[path]
        np.testing.assert_allclose(gradient, wanted, atol=1e-6, err_msg=path)


def _on(model: ModelConfig, mesh: MeshConfig) -> tuple[Tree, Any]:
    """Gradients and sums over a batch on a mesh."""
    execution = Execution(mesh, precision=Precision(compute="float32"))
    devices = build(mesh, jax.devices()[: math.prod(mesh.sizes.values())])
    layout = Layout(execution, devices, decoder.param_specs(model))

    def gradient(params: Any, batch: Any) -> Any:
        (_, sums), found = jax.value_and_grad(
            lambda p: cross_entropy.loss(p, batch, model, execution), has_aux=True
        )(params)
        return found, sums

    placed = jax.device_put(params_of(model), layout.parameters())
    own = layout.place(batch_of(model), range(BATCH), BATCH)
    with layout.compiling():
        return jax.device_get(jax.jit(layout.gradient(gradient))(placed, own))


def assert_layouts_agree(model: ModelConfig, sizes: Mapping[str, Any]) -> None:
    """The loss and all gradients on a mesh are those of one device."""
    expected_gradients, expected = _on(model, MeshConfig(fsdp=1))
    gradients, found = _on(model, MeshConfig.model_validate({"fsdp": 1, **sizes}))
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    wanted = dict(walk(expected_gradients))
    for path, gradient in walk(gradients):
        np.testing.assert_allclose(gradient, wanted[path], atol=2e-6, err_msg=path)


def assert_pruned_is_masked(model: ModelConfig, keep: Mapping[str, int]) -> None:
    """A pruned model gives the logits of the masked one."""
    rng = np.random.default_rng(3)
    scores = jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32),
        score_specs(model, keep),
        is_leaf=lambda node: isinstance(node, ParamSpec),
    )
    small = Pruning.model_validate({"keep": dict(keep)}).left(model)
    params, batch = params_of(model), batch_of(model)
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    soft = masked(params, masks(scores, keep, model, 0.0), model)
    hard = sliced(params, kept(scores, keep, model), decoder.param_specs(model))

    @functools.partial(jax.jit, static_argnums=1)
    def logits(params: Tree, model: ModelConfig) -> jax.Array:
        hidden = decoder.forward(params, inputs, model, FLOAT32)
        return hidden @ decoder.head_matrix(params).T

    np.testing.assert_allclose(logits(hard, small), logits(soft, model), atol=2e-5)
