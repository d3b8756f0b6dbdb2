"""One optimizer step, as a pure function of state and batch.

It knows no model, no axis of a mesh, no optimizer and no transform of weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from braeburn.data.packing import Batch
from braeburn.train.state import TrainState

# (weights, batch, ...) -> (what is minimised, metrics); both are weighted sums over tokens, by
# `weights` of the batch.
LossFunction = Callable[..., tuple[Array, dict[str, Array]]]
# (weights, batch, ...) -> (gradients with respect to the weights, metrics), both summed over the
# batch.
Gradients = Callable[..., tuple[Any, dict[str, Array]]]
# (parameters, steps of the stage) -> the effective weights, which the loss is given.
EffectiveWeights = Callable[[Any, Any], Any]


def train_step(
    state: TrainState,
    batch: Batch,
    *fixed: Any,
    gradients: Gradients,
    optimizer: optax.GradientTransformation,
    effective: EffectiveWeights | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Makes a step.

    Args:
        state: before the step.
        batch: its `weights` are those of the tokens, of any scale.
        fixed: what the loss takes besides, such as a teacher's weights.
        gradients: of the loss; see `accumulated`.
        optimizer: turns gradients into updates of the parameters.
        effective: gives the effective weights, through which gradients of the parameters are taken;
            None where the loss is computed with the stored weights.

    Returns:
        The next state and the step's metrics: float32 scalars, means over the batch's tokens.
    """
    batch = batch | {"weights": batch["weights"] / jnp.sum(batch["weights"])}
    weights, back = state.params, None
    if effective:
        weights, back = jax.vjp(lambda p: effective(p, state.optimizer.stage_steps), state.params)
    found, metrics = gradients(weights, batch, *fixed)
    found = back(found)[0] if back else found

    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(found, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

    metrics = metrics | {
        "grad_norm": optimizer_state.grad_norm,
        "learning_rate": optimizer_state.learning_rate,
        "skipped": optimizer_state.skipped,
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def accumulated(loss: LossFunction, accumulation_steps: int) -> Gradients:
    """The gradients of a loss over a batch, worked through in `accumulation_steps` A microbatches
    of B / A sequences each: the result is that of the whole batch.
    """

    def gradients(weights: Any, batch: Batch, *fixed: Any) -> tuple[Any, dict[str, Array]]:
        def of_microbatch(weights: Any, microbatch: Batch) -> Any:
            return loss(weights, microbatch, *fixed)

        return _summed(of_microbatch, weights, batch, accumulation_steps)

    return gradients


def in_microbatches(batch: Batch, accumulation_steps: int) -> Batch:
    """A batch as microbatches along a new first dimension.

    Microbatch i takes the sequences i, i + A, ...: which they are does not depend on the number of
    devices.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1), batch
    )


def _summed(
    loss: LossFunction, weights: Any, batch: Batch, accumulation_steps: int
) -> tuple[Any, dict[str, Array]]:
    differentiate = jax.value_and_grad(loss, has_aux=True)
    if accumulation_steps == 1:
        (_, metrics), gradients = differentiate(weights, batch)
        return gradients, metrics

    microbatches = in_microbatches(batch, accumulation_steps)

    def accumulate(sums: Any, microbatch: Batch) -> tuple[Any, None]:
        (_, metrics), gradients = differentiate(weights, microbatch)
        return jax.tree.map(jnp.add, sums, (gradients, metrics)), None

    (_, metrics), gradients = jax.eval_shape(
        differentiate, weights, jax.tree.map(lambda x: x[0], microbatches)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, metrics))
    return jax.lax.scan(accumulate, zeros, microbatches)[0]
