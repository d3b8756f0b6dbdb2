"""Objectives that this file defines, as anyone may, on meshes, against `jax.grad` of plain ones."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from braeburn.config import Execution, MeshConfig
from braeburn.objectives import vocabulary
from braeburn.objectives.statistics import Expectation, LogSumExp
from braeburn.objectives.vocabulary import (
    LogitBlock,
    Objective,
    Projection,
    Targets,
    vocabulary_loss,
)
from braeburn.parallel.collectives import gather_tokens
from braeburn.parallel.mesh import build

BATCH, LENGTH, WIDTH, VOCAB = 4, 12, 16, 302
HIDDEN, HEAD, TOKENS = P("fsdp", "tensor"), P("tensor", "fsdp"), P("fsdp")
GAMMA, BETA = 2.0, 0.1


@dataclass(frozen=True)
class FocalLoss(Objective[Targets, tuple[LogSumExp, Array]]):
    """(1 - p)^gamma * nll, p being the probability of the target (arXiv 1708.02002)."""

    gamma: float

    def start(self, shape: tuple[int, ...]) -> tuple[LogSumExp, Array]:
        return LogSumExp.empty(shape), jnp.zeros(shape)

    def update(
        self, statistics: tuple[LogSumExp, Array], block: LogitBlock, tokens: Targets
    ) -> tuple[LogSumExp, Array]:
        softmax, target_logit = statistics
        further = block.logits_at(tokens.ids[..., None])[..., 0]
        return softmax.update(block.logits), target_logit + further

    def sums(self, statistics: tuple[LogSumExp, Array], tokens: Targets) -> dict[str, Array]:
        nll = statistics[0].log_z - statistics[1]
        focal = (1 - jnp.exp(-nll)) ** self.gamma * nll
        return {"loss": jnp.sum(tokens.weights * nll), "focal": jnp.sum(tokens.weights * focal)}

    def loss(self, sums: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return sums["focal"], {"loss": sums["loss"]}

    def logit_gradient(
        self, statistics: tuple[LogSumExp, Array], block: LogitBlock, tokens: Targets, dtype: Any
    ) -> Array:
        log_z, nll = statistics[0].log_z, statistics[0].log_z - statistics[1]
        p = jnp.exp(-nll)
        factor = (1 - p) ** self.gamma + self.gamma * p * (1 - p) ** (self.gamma - 1) * nll
        softmax = jnp.exp(block.logits - log_z[..., None])
        one_hot = tokens.ids[..., None] == block.ids
        return ((softmax - one_hot) * (tokens.weights * factor)[..., None]).astype(dtype)


@dataclass(frozen=True)
class ConfidencePenalty(Objective[Targets, tuple[Expectation, Array]]):
    """nll - beta * the entropy of the prediction (arXiv 1701.06548)."""

    beta: float

    def start(self, shape: tuple[int, ...]) -> tuple[Expectation, Array]:
        return Expectation.empty(shape), jnp.zeros(shape)

    def update(
        self, statistics: tuple[Expectation, Array], block: LogitBlock, tokens: Targets
    ) -> tuple[Expectation, Array]:
        softmax, target_logit = statistics
        finite = jnp.where(block.ids >= 0, block.logits, 0)
        further = block.logits_at(tokens.ids[..., None])[..., 0]
        return softmax.update(block.logits, finite), target_logit + further

    def sums(self, statistics: tuple[Expectation, Array], tokens: Targets) -> tuple[Array, Array]:
        softmax, target_logit = statistics
        nll = jnp.sum(tokens.weights * (softmax.log_z - target_logit))
        return nll, jnp.sum(tokens.weights * (softmax.log_z - softmax.mean))

    def loss(self, sums: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
        nll, entropy = sums
        return nll - self.beta * entropy, {"loss": nll}

    def logit_gradient(
        self, statistics: tuple[Expectation, Array], block: LogitBlock, tokens: Targets, dtype: Any
    ) -> Array:
        log_z, mean = (x[..., None] for x in (statistics[0].log_z, statistics[0].mean))
        softmax = jnp.exp(block.logits - log_z)
        finite = jnp.where(block.ids >= 0, block.logits, 0)
        one_hot = tokens.ids[..., None] == block.ids
        gradient = softmax * (1 + self.beta * (finite - mean)) - one_hot
        return (gradient * tokens.weights[..., None]).astype(dtype)


def plain(kind: str, model: Projection, targets: Targets) -> tuple[Array, dict[str, Array]]:
    log_q = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", *model))
    nll = -jnp.take_along_axis(log_q, targets.ids[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    losses = {"focal": (1 - jnp.exp(-nll)) ** GAMMA * nll, "penalty": nll - BETA * entropy}
    return jnp.sum(targets.weights * losses[kind]), {"loss": jnp.sum(targets.weights * nll)}


def inputs() -> tuple[Projection, Targets]:
    rng = np.random.default_rng(0)
    hidden, head = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((BATCH, LENGTH, WIDTH), (VOCAB, WIDTH))
    )
    ids = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    # Half of the targets are likely, without which a focal loss is nearly its nll.
    ids = ids.at[::2].set(jnp.argmax(hidden[::2] @ head.T, axis=-1))
    weights = rng.random((BATCH, LENGTH)).astype(np.float32)
    return Projection(0.5 * hidden, head), Targets(ids, jnp.asarray(weights / weights.sum()))


def differentiated(objective: Objective[Any, Any], mesh: MeshConfig) -> Any:
    def local(model: Projection, targets: Targets) -> Any:
        def minimised(model: Projection) -> Any:
            gathered = model._replace(hidden=gather_tokens(model.hidden, mesh))
            return vocabulary_loss(objective, gathered, None, targets, Execution(mesh))

        results, gradient = jax.value_and_grad(minimised, has_aux=True)(model)
        return lax.psum(results, tuple(mesh.sizes)), gradient

    devices = jax.devices()[: math.prod(mesh.sizes.values())]
    model = Projection(HIDDEN, HEAD)
    return jax.jit(
        jax.shard_map(
            local,
            mesh=build(mesh, devices),
            in_specs=(model, Targets(TOKENS, TOKENS)),
            out_specs=(P(), model),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("kind", ["focal", "penalty"])
@pytest.mark.parametrize(
    "sizes", [{}, {"tensor": 2}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str
)
def test_an_objective_of_one_class_is_that_of_plain_jax(
    monkeypatch: pytest.MonkeyPatch, kind: str, sizes: dict[str, int]
) -> None:
    # Blocks and chunks that do not divide the vocabulary and the sequence.
    monkeypatch.setattr(vocabulary, "MAX_LOGITS", 2**11)
    monkeypatch.setattr(vocabulary, "chunk_length", lambda batch, length, vocab: 5)
    objective = FocalLoss(GAMMA) if kind == "focal" else ConfidencePenalty(BETA)
    ours = differentiated(objective, MeshConfig(**{"fsdp": 1} | sizes))(*inputs())
    written_out = jax.value_and_grad(functools.partial(plain, kind), has_aux=True)
    theirs = jax.jit(written_out)(*inputs())
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        assert np.linalg.norm(one - other) < 2e-6 * np.linalg.norm(other)
