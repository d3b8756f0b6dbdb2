"""Goodput: the formula against simulated runs and Daly's published examples, its limits, and the
best interval.
"""

import dataclasses
import math

import pytest

from braeburn.errors import UserError
from braeburn.plan.goodput import (
    FAILURES_PER_CHIP_HOUR,
    Interruptions,
    daly_interval,
    expected_seconds,
    goodput,
)

DAY = 86_400.0


@pytest.mark.parametrize(
    ("mean", "checkpoint", "restart"),
    [
        (86_400, 5, 780),  # rare
        (3600, 10, 780),  # frequent
        (3600, 1200, 100),  # a checkpoint that is expensive
        (600, 30, 900),  # a restart that fails more often than not
        (600, 1500, 60),  # a checkpoint longer than failures let live
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_simulation_agrees_with_the_formula(mean, checkpoint, restart, seed):
    chips, productive = 100, 20_000.0 * mean
    # So many failures that the standard error is a sixth of what is allowed, or less.
    interruptions = Interruptions(3600 / mean / chips, checkpoint, restart)
    result = goodput(chips, productive, 1e9, interruptions, seed)
    assert result.simulated == pytest.approx(result.expected, rel=0.01)
    assert result.simulated != result.expected
    assert result.wall_seconds == pytest.approx(productive / result.expected)
    assert result.days == pytest.approx(result.wall_seconds / DAY)


def test_the_interval_is_that_of_dalys_examples():
    # Figures 3 to 5 of the paper: checkpoints of 5 minutes, failures every 24 h, 6 h and 15 min;
    # the third in tenths.
    assert round(daly_interval(5, 24 * 60)) == 117
    assert round(daly_interval(5, 6 * 60)) == 57
    assert round(daly_interval(5, 15), 1) == 9.1


@pytest.mark.parametrize("checkpoint", [1.0, 10.0, 100.0, 1000.0, 5000.0])
def test_no_other_interval_is_better(checkpoint):
    mean, restart, productive = 3600.0, 780.0, 1000 * DAY
    chosen = goodput(1, productive, 0, Interruptions(1.0, checkpoint, restart))

    def wall(interval):
        return expected_seconds(productive, interval, checkpoint, restart, mean)

    assert chosen.wall_seconds == pytest.approx(wall(chosen.interval_seconds), rel=1e-12)
    best = min(wall(chosen.interval_seconds * 1.001**i) for i in range(-3000, 3000))
    # Daly's estimate is a series in the checkpoint's part of the time between failures.
    assert chosen.wall_seconds <= best * (1 + (1e-6 if checkpoint <= 100 else 2e-3))
    for factor in (0.8, 1.25):
        assert wall(chosen.interval_seconds * factor) > chosen.wall_seconds


def test_a_run_is_cut_into_equal_parts():
    result = goodput(8192, 3 * DAY, 2e9)
    parts = 3 * DAY / result.interval_seconds
    assert parts == pytest.approx(round(parts), rel=1e-12)
    # The number of parts above the best interval's, or below it, whichever is better.
    interval = daly_interval(60, 3600)
    for length, parts in ((1.1, 1), (1.9, 2), (2.1, 2), (2.9, 3)):
        result = goodput(1, length * interval, 0, Interruptions(1.0, 60))
        assert result.interval_seconds == pytest.approx(length * interval / parts)
    # No interval is longer than the run.
    assert goodput(1, 60.0, 2e9).interval_seconds == 60


def test_without_failures_only_the_checkpoint_is_lost():
    result = goodput(8192, 1000.0, 2e9, Interruptions(failures_per_chip_hour=0))
    assert result.interval_seconds == 1000
    assert result.checkpoint_seconds == pytest.approx(5 + 0.2)
    assert result.expected == result.simulated == pytest.approx(1000 / 1005.2)
    # The limit, from the other side.
    hardly_any = goodput(1, 1000.0, 2e9, Interruptions(1e-12))
    assert hardly_any.expected == pytest.approx(result.expected, rel=1e-9)


def test_more_failures_and_longer_restarts_cost_more():
    usual = goodput(8192, 30 * DAY, 2e9)
    assert 0.9 < usual.expected < 1
    assert (
        usual.failures_per_chip_hour == FAILURES_PER_CHIP_HOUR == pytest.approx(1.973e-5, rel=1e-3)
    )
    for worse in (
        goodput(16_384, 30 * DAY, 2e9),
        goodput(8192, 30 * DAY, 2e10),
        goodput(8192, 30 * DAY, 2e9, Interruptions(restart_seconds=3600)),
        goodput(8192, 30 * DAY, 2e9, Interruptions(failures_per_chip_hour=1e-4)),
    ):
        assert worse.expected < usual.expected
        assert worse.simulated < usual.simulated
        assert worse.days > usual.days


def test_llama_3s_training_time_is_within_reach():
    # Its report: failures about every three hours, and over 90% of the time effective, in spite of
    # them.
    result = goodput(16_384, 54 * DAY, 5e9)
    assert 16_384 * result.failures_per_chip_hour == pytest.approx(419 / (54 * 24))
    assert 0.85 < result.expected < 0.95


def test_the_seed_decides():
    first, again, other = (goodput(8192, 30 * DAY, 2e9, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.simulated != other.simulated
    assert dataclasses.replace(first, simulated=0) == dataclasses.replace(other, simulated=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chips", 0),
        ("chips", -1),
        ("productive_seconds", 0.0),
        ("productive_seconds", math.inf),
        ("state_bytes_per_chip", -1.0),
        ("state_bytes_per_chip", math.nan),
        ("failures_per_chip_hour", -1e-5),
        ("failures_per_chip_hour", math.nan),
        ("checkpoint_seconds", 0.0),
        ("checkpoint_seconds", -5.0),
        ("restart_seconds", -1.0),
        ("restart_seconds", math.inf),
    ],
)
def test_what_is_out_of_range_is_refused(field, value):
    arguments = {"chips": 8, "productive_seconds": DAY, "state_bytes_per_chip": 1e9}
    interruptions = {}
    (arguments if field in arguments else interruptions)[field] = value
    with pytest.raises(UserError, match=f"^{field}: {value} must be a number "):
        goodput(**arguments, interruptions=Interruptions(**interruptions))


@pytest.mark.parametrize("rate", [1.0, 1e-2, 1e300])
def test_a_run_that_hardly_advances_is_refused(rate):
    with pytest.raises(UserError, match=r"^failures_per_chip_hour: .* hardly advances; lower it"):
        goodput(8192, 300 * DAY, 2e9, Interruptions(failures_per_chip_hour=rate))
