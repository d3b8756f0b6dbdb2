"""One optimizer step, as a pure function of state and batch that knows no model and no mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from braeburn.data.packing import Batch
from braeburn.train.state import TrainState
from braeburn.transforms.definition import EffectiveWeights

# (params, batch, ...) -> (what is minimised, metrics); both are weighted sums over tokens, by
# `weights` of the batch.
LossFunction = Callable[..., tuple[Array, dict[str, Array]]]
# A function of each device's parts of parameters and batch made one of the whole; see
# `Layout.gradient`.
Spread = Callable[[Callable[..., tuple[Any, Any]]], Callable[..., tuple[Any, Any]]]


def train_step(
    state: TrainState,
    batch: Batch,
    *fixed: Any,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    accumulation_steps: int,
    spread: Spread = lambda function: function,
    use: EffectiveWeights | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The next state and the step's metrics: float32 scalars, means over the batch's tokens.

    With `accumulation_steps` A, the batch of B sequences is worked through in A parts of B / A,
    whose gradients are summed before the one update: the result is that of the whole batch. Devices
    sum theirs once, after all parts.

    The loss also takes what is `fixed`, such as a teacher's weights. Where weights are used
    otherwise than they are stored, `use` tells how, and the gradient is taken through it.
    """
    batch = batch | {"weights": batch["weights"] / jnp.sum(batch["weights"])}
    params, back = (
        jax.vjp(lambda p: use(p, state.optimizer.stage_steps), state.params)
        if use
        else (state.params, None)
    )

    def local(params: Any, own: Batch, *fixed: Any) -> tuple[Any, dict[str, Array]]:
        return gradient(lambda p, part: loss(p, part, *fixed), params, own, accumulation_steps)

    gradients, metrics = spread(local)(params, batch, *fixed)
    gradients = back(gradients)[0] if back else gradients

    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

    metrics = metrics | {
        "grad_norm": optimizer_state.grad_norm,
        "learning_rate": optimizer_state.learning_rate,
        "skipped": optimizer_state.skipped,
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def gradient(
    loss: LossFunction, params: Any, batch: Batch, accumulation_steps: int
) -> tuple[Any, dict[str, Array]]:
    """The gradient of `loss` over a batch, worked through in parts, and the metrics, both summed
    over the parts.
    """
    differentiate = jax.value_and_grad(loss, has_aux=True)
    if accumulation_steps == 1:
        (_, metrics), gradients = differentiate(params, batch)
        return gradients, metrics

    # Part i takes the sequences i, i + A, ...: which they are does not depend on the number of
    # devices.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def accumulate(sums: Any, part: Batch) -> tuple[Any, None]:
        (_, metrics), gradients = differentiate(params, part)
        return jax.tree.map(jnp.add, sums, (gradients, metrics)), None

    (_, metrics), gradients = jax.eval_shape(
        differentiate, params, jax.tree.map(lambda x: x[0], parts)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, metrics))
    return jax.lax.scan(accumulate, zeros, parts)[0]
