import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import braeburn
from braeburn.config import AdamW, Execution, ModelConfig, Precision, Schedule, Stage
from braeburn.layers.spec import initialize
from braeburn.models import decoder
from braeburn.objectives import cross_entropy
from braeburn.optim.build import build_optimizer
from braeburn.optim.guard import OptimizerState
from braeburn.train.state import new_state
from braeburn.train.step import accumulated, train_step

SOURCE = Path(braeburn.__file__).parent
MODEL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24
)
STAGE = Stage(
    tokens=1280,
    sequence_length=16,
    batch_tokens=128,
    mixture={"text": 1},
    learning_rate=1e-2,
    schedule=Schedule(floor=0.1),
)


EXECUTION = Execution(precision=Precision(compute="float32"))


def batch(weights: np.ndarray) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(64, size=(8, 17), dtype=np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
        "segment_ids": np.ones((8, 16), np.int32),
    }


OPTIMIZER = build_optimizer(AdamW(), STAGE, decoder.param_specs(MODEL), MODEL)


@functools.cache
def compiled_step(accumulation_steps: int) -> Any:

    def loss(params: Any, part: Any) -> Any:
        return cross_entropy.loss(params, part, MODEL, EXECUTION)

    @jax.jit
    def step(state: Any, whole: Any) -> Any:
        return train_step(
            state, whole, gradients=accumulated(loss, accumulation_steps), optimizer=OPTIMIZER
        )

    return step


def after_two_steps(weights: np.ndarray, accumulation_steps: int) -> tuple[Any, dict[str, float]]:
    state = new_state(initialize(decoder.param_specs(MODEL), 0), OPTIMIZER)
    for _ in range(2):
        state, metrics = compiled_step(accumulation_steps)(state, batch(weights))
    assert int(state.step) == 2
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("even", [True, False])
def test_accumulation_gives_the_step_of_the_whole_batch(even: bool) -> None:
    weights = np.ones((8, 16), np.float32)
    if not even:
        weights = np.random.default_rng(1).uniform(size=weights.shape).astype(np.float32)
        weights[3] = 0
        weights[6, 4:] = 0
    params, metrics = after_two_steps(weights, 1)
    for accumulation_steps in (2, 4):
        other_params, other_metrics = after_two_steps(weights, accumulation_steps)
        assert other_metrics == pytest.approx(metrics, abs=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, other_params)


def test_step_knows_no_model() -> None:
    target = jnp.array([1.0, -2.0, 3.0])

    def loss(params: Any, part: Any) -> Any:
        value = jnp.sum(
            part["weights"] * jnp.sum(jnp.square(params["w"] * part["x"] - target * part["x"]), -1)
        )
        return value, {"loss": value}

    def update(gradients: Any, state: OptimizerState, params: Any) -> Any:
        norm = optax.global_norm(gradients)
        return jax.tree.map(lambda g: -0.1 * g, gradients), state._replace(grad_norm=norm)

    zero = jnp.zeros(())
    optimizer = optax.GradientTransformation(
        lambda _: OptimizerState(zero, zero, zero, zero + 0.1, ()), update
    )
    state = new_state({"w": jnp.zeros(3)}, optimizer)
    data = {"x": jnp.ones((4, 3)), "weights": jnp.array([1.0, 1.0, 1.0, 5.0])}
    state, metrics = train_step(state, data, gradients=accumulated(loss, 2), optimizer=optimizer)
    np.testing.assert_allclose(state.params["w"], 0.2 * target, rtol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(14.0)
    assert float(metrics["grad_norm"]) == pytest.approx(2 * 14**0.5)
    for _ in range(60):
        state, metrics = train_step(
            state, data, gradients=accumulated(loss, 1), optimizer=optimizer
        )
    np.testing.assert_allclose(state.params["w"], target, atol=1e-4)
    assert int(state.step) == 61


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_step_stays_short() -> None:
    step = lines(SOURCE / "train" / "step.py")
    first = next(i for i, line in enumerate(step) if line.startswith("def train_step"))
    last = next(
        (i for i, line in enumerate(step[first + 1 :], first + 1) if line.startswith("def ")),
        len(step),
    )
    assert last - first < 80
