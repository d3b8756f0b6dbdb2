"""The guard around any optax transformation, and what every registered optimizer has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from braeburn.config import ONE_DEVICE, Execution, MeshConfig, ModelConfig
from braeburn.config.optimizers import KINDS
from braeburn.layers.spec import count
from braeburn.models.decoder import param_specs
from braeburn.optim.definition import Parameters, definition_of, state_bytes, update_cost
from braeburn.optim.guard import guarded
from braeburn.train.state import new_state
from braeburn.train.step import accumulated, train_step

FLOAT = 4
MODEL = ModelConfig(
    vocab_size=32, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)
TRUTH = jnp.asarray([1.0, -2.0, 3.0])


def loss(params, batch):
    error = jnp.square(batch["inputs"] @ (params["weights"] - TRUTH))
    total = jnp.sum(error * batch["weights"])
    return total, {"loss": total}


def test_plain_adamw_of_optax_trains_and_skips_bad_steps():
    optimizer = guarded(optax.adamw(0.1), clip_norm=10.0, skip_norm=1e3)
    state = new_state({"weights": jnp.zeros(3)}, optimizer)
    inputs = np.random.default_rng(0).normal(size=(64, 8, 3)).astype(np.float32)
    inputs[10] = np.nan
    losses = []
    for number, one in enumerate(inputs):
        before = state
        batch = {"inputs": one, "weights": jnp.ones(8)}
        state, metrics = train_step(
            state, batch, gradients=accumulated(loss, 1), optimizer=optimizer
        )
        if number == 10:
            old, new = before.optimizer.direction, state.optimizer.direction
            jax.tree.map(np.testing.assert_array_equal, (before.params, old), (state.params, new))
        else:
            losses.append(float(metrics["loss"]))
    assert int(state.optimizer.skipped) == 1 and int(state.optimizer.stage_steps) == 63
    assert losses[-1] < losses[0] / 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_registered_optimizer_is_whole(kind):
    config = KINDS[kind]()
    assert config.kind == kind and config.fine_tuning_rate > 0
    definition = definition_of(config)
    assert definition.no_decay <= {"norm", "bias", "embedding", "matrix"}
    specs = param_specs(MODEL)
    moments = state_bytes(config, Parameters(specs, MODEL))
    assert FLOAT * count(specs) <= moments <= 2 * FLOAT * count(specs)
    alone, split = (
        update_cost(config, Parameters(specs, MODEL, Execution(mesh)))
        for mesh in (ONE_DEVICE, MeshConfig(fsdp=4, tensor=2))
    )
    assert not alone.collectives and split.matrix_flops <= alone.matrix_flops
    assert {collective.axis for collective in split.collectives} <= {"fsdp", "tensor"}
