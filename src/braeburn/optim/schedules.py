"""Multipliers of the learning rate over one stage."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.config import Schedule


def multiplier(schedule: Schedule, total_steps: int, step: Int[Array, ""]) -> Float[Array, ""]:
    """The schedule's value, float32, at the 1-based `step` of a stage of `total_steps`.

    Linear from 0 to 1 over the warm-up, then down to `floor` at the last step: from the end of the
    warm-up on, or, with "wsd", in the last steps alone.
    """
    step = step.astype(jnp.float32)
    warmup = jnp.minimum(step / max(schedule.warmup_steps, 1), 1.0)
    wsd = schedule.decay == "wsd"
    first = total_steps - schedule.decay_steps(total_steps) if wsd else schedule.warmup_steps
    progress = jnp.clip((step - first) / (total_steps - first), 0.0, 1.0)
    if schedule.decay == "cosine":
        remaining = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    elif schedule.decay in ("linear", "wsd"):
        remaining = 1 - progress
    else:
        return warmup
    return jnp.where(
        step < schedule.warmup_steps, warmup, schedule.floor + (1 - schedule.floor) * remaining
    )
