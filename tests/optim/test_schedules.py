"""Multipliers of the learning rate, by exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import Schedule, override
from braeburn.errors import UserError
from braeburn.optim.schedules import multiplier
from braeburn.recipes import load
from braeburn.verify.shrink import shrink

WSD = {"stages.core.schedule.decay": "wsd", "stages.core.schedule.decay_fraction": 0.2}


def values(schedule: Schedule, total_steps: int) -> list[float]:
    steps = jnp.arange(1, total_steps + 1)
    found = jax.jit(jax.vmap(lambda step: multiplier(schedule, total_steps, step)))(steps)
    return [float(value) for value in found]


SCHEDULES: list[tuple[Schedule, list[float]]] = [
    (
        Schedule(warmup_steps=2, decay="wsd", decay_fraction=0.5, floor=0.2),
        [0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2],
    ),
    (Schedule(decay="wsd", decay_fraction=0.01), [1.0, 1.0, 1.0, 0.0]),
    (Schedule(decay="wsd", decay_fraction=1.0), [0.75, 0.5, 0.25, 0.0]),
    (Schedule(warmup_steps=2, decay="linear", floor=0.5), [0.5, 1.0, 0.75, 0.5]),
    (Schedule(warmup_steps=2, decay="constant"), [0.5, 1.0, 1.0, 1.0]),
    (Schedule(warmup_steps=1, floor=0.1), [1.0, 0.775, 0.325, 0.1]),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES, ids=lambda value: str(value)[:60])
def test_values_are_exact(schedule: Schedule, expected: list[float]) -> None:
    np.testing.assert_allclose(values(schedule, len(expected)), expected, atol=1e-6)


def test_wsd_needs_its_fraction_and_nothing_else_has_one() -> None:
    run = load("quickstart")
    assert override(run, WSD).stages["core"].schedule.decay_fraction == 0.2
    with pytest.raises(UserError, match=r"decay='wsd' needs decay_fraction.*set decay_fraction to"):
        override(run, {"stages.core.schedule.decay": "wsd"})
    with pytest.raises(UserError, match=r"decay_fraction=0.2 is of decay='wsd', and decay is 'cos"):
        override(run, {"stages.core.schedule.decay_fraction": 0.2})


def test_wsd_does_not_decay_within_the_warmup() -> None:
    changes = WSD | {"stages.core.schedule.decay_fraction": 0.95}
    run = load("quickstart")
    with pytest.raises(UserError, match=r"warmup_steps=60; set schedule.warmup_steps to 47 or"):
        override(run, changes)
    assert override(run, changes | {"stages.core.schedule.warmup_steps": 47})


def test_a_shrunk_run_keeps_wsd() -> None:
    changes = WSD | {"stages.core.schedule.decay_fraction": 0.9, "stages.core.schedule.floor": 0}
    small = shrink(override(load("quickstart"), changes), 8)
    schedule = small.stages["core"].schedule
    assert (schedule.decay, schedule.decay_fraction, schedule.warmup_steps) == ("wsd", 0.9, 1)
