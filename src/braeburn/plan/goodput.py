"""How much of a run's time trains: failures, restarts and checkpoints, by formula and by
simulation.

The model is that of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps" (2006), doi:10.1016/j.future.2004.11.016. Failures come at exponential intervals of
mean M, also during checkpoints and restarts. One throws the run back to its last checkpoint and
costs a restart of R seconds. With a checkpoint of d seconds after every t seconds of training, T
seconds of training are expected to take a wall time of

    M exp(R / M) (exp((t + d) / M) - 1) T / t.
"""

import math
from dataclasses import dataclass

import numpy as np

from braeburn.errors import UserError

# Llama 3 (arXiv:2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 H100.
FAILURES_PER_CHIP_HOUR = 419 / (54 * 24 * 16_384)
# AXLearn (arXiv:2507.05411) on 32,768 chips: 4 minutes until spare chips have taken over, 9 until
# all is restored.
RESTART_SECONDS = 780.0
# Assumed: training stands still while each chip's state goes to its host, and 5 s for all hosts to
# come together; it is written to storage while training goes on.
HOST_BYTES_PER_SECOND = 10e9
CHECKPOINT_FIXED_SECONDS = 5.0
# Runs that are simulated, and failures of one beyond which it would never end.
_RUNS = 16
_MAX_FAILURES = 1e6


@dataclass(frozen=True)
class Interruptions:
    """What keeps a run from training.

    Attributes:
        failures_per_chip_hour: of chips and all that belongs to them.
        checkpoint_seconds: that training stands still for one checkpoint; None for as long as the
            state takes to the host.
        restart_seconds: from a failure until training goes on, restoring included.
    """

    failures_per_chip_hour: float = FAILURES_PER_CHIP_HOUR
    checkpoint_seconds: float | None = None
    restart_seconds: float = RESTART_SECONDS


USUAL = Interruptions()


@dataclass(frozen=True)
class Goodput:
    """What a run loses to failures and checkpoints, with the best time between these.

    Attributes:
        failures_per_chip_hour: as given.
        checkpoint_seconds: that training stands still for one checkpoint.
        restart_seconds: from a failure until training goes on.
        interval_seconds: of training between two checkpoints.
        expected: productive time / wall time, by Daly's equation.
        simulated: the same, of simulated runs.
        days: that the run is expected to take.
        wall_seconds: the same, in seconds.
    """

    failures_per_chip_hour: float
    checkpoint_seconds: float
    restart_seconds: float
    interval_seconds: float
    expected: float
    simulated: float
    days: float
    wall_seconds: float


def goodput(
    chips: int,
    productive_seconds: float,
    state_bytes_per_chip: float,
    interruptions: Interruptions = USUAL,
    seed: int = 0,
) -> Goodput:
    """The best checkpoint interval of a run, and the part of its wall time that trains.

    Args:
        chips: that the run needs: it fails where one of them does.
        productive_seconds: that the run would take without checkpoints and failures.
        state_bytes_per_chip: of parameters and optimizer.
        interruptions: how frequent failures are, and how long they and checkpoints take.
        seed: of the simulation.

    Returns:
        The best interval, and what the run loses with it.

    Raises:
        UserError: a value is out of range, or failures are so frequent that the run hardly
            advances.
    """
    failures_per_chip_hour = interruptions.failures_per_chip_hour
    restart_seconds = interruptions.restart_seconds
    checkpoint_seconds = interruptions.checkpoint_seconds
    if checkpoint_seconds is None:
        checkpoint_seconds = CHECKPOINT_FIXED_SECONDS + state_bytes_per_chip / HOST_BYTES_PER_SECOND
    positive = {
        "chips": chips,
        "productive_seconds": productive_seconds,
        "checkpoint_seconds": checkpoint_seconds,
    }
    given = {"failures_per_chip_hour": failures_per_chip_hour, "restart_seconds": restart_seconds}
    for name, value in ({"state_bytes_per_chip": state_bytes_per_chip} | positive | given).items():
        if not 0 <= value < math.inf or (name in positive and value == 0):
            raise UserError(
                f"{name}: {value} must be a number "
                f"{'above 0' if name in positive else 'of at least 0'}"
            )
    mean = 3600 / (chips * failures_per_chip_hour) if failures_per_chip_hour else math.inf
    best = productive_seconds / daly_interval(checkpoint_seconds, mean)
    # The run is cut into equal parts: a whole number of them, next to the best.
    wall, parts = min(
        (
            expected_seconds(
                productive_seconds,
                productive_seconds / n,
                checkpoint_seconds,
                restart_seconds,
                mean,
            ),
            n,
        )
        for n in (max(1, math.floor(best)), max(1, math.ceil(best)))
    )
    interval = productive_seconds / parts
    if wall / mean > _MAX_FAILURES:
        raise UserError(
            f"failures_per_chip_hour: at {failures_per_chip_hour:.3g}, {chips} chips fail every "
            f"{mean:.3g} s and the run hardly advances; lower it, restart_seconds "
            f"({restart_seconds:.3g}) or the {checkpoint_seconds:.3g} s of a checkpoint"
        )
    generator = np.random.default_rng(seed)
    runs = [
        _simulated(generator, parts, interval + checkpoint_seconds, restart_seconds, mean)
        for _ in range(_RUNS)
    ]
    return Goodput(
        **given,
        checkpoint_seconds=checkpoint_seconds,
        interval_seconds=interval,
        expected=productive_seconds / wall,
        simulated=productive_seconds * _RUNS / math.fsum(runs),
        days=wall / 86_400,
        wall_seconds=wall,
    )


def daly_interval(checkpoint_seconds: float, mean: float) -> float:
    """Daly's higher-order estimate of the best seconds of training between two checkpoints, where
    `mean` seconds pass between two failures.

    Its first factor is that of J. W. Young, "A first order approximation to the optimum checkpoint
    interval" (1974).
    """
    ratio = checkpoint_seconds / (2 * mean)
    if ratio >= 1:
        return mean
    return (
        math.sqrt(2 * checkpoint_seconds * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9)
        - checkpoint_seconds
    )


def expected_seconds(
    productive: float, interval: float, checkpoint: float, restart: float, mean: float
) -> float:
    """The expected wall time by Daly's complete equation, exact where the interval divides the run.

    Args:
        productive: seconds of training in the run.
        interval: seconds of training between two checkpoints.
        checkpoint: seconds that training stands still for one checkpoint.
        restart: seconds from a failure until training goes on.
        mean: seconds between two failures, infinite where there are none.

    Returns:
        Seconds, infinite where the run would hardly advance.
    """
    if mean == math.inf:
        return productive / interval * (interval + checkpoint)
    if (
        restart + interval + checkpoint
    ) / mean > 700:  # Its exponential is beyond floating-point numbers.
        return math.inf
    return (
        mean
        * math.exp(restart / mean)
        * math.expm1((interval + checkpoint) / mean)
        * productive
        / interval
    )


def _simulated(
    generator: np.random.Generator, parts: int, part: float, restart: float, mean: float
) -> float:
    """Wall seconds of one run: between two failures it restarts, then finishes parts, each of
    `part` seconds.
    """
    wall, restarts = 0.0, np.full(4096, restart)
    restarts[0] = 0  # It begins without a restart.
    while True:
        lives = generator.exponential(mean, len(restarts))
        finished = np.cumsum(np.floor(np.maximum(lives - restarts, 0) / part))
        last = int(np.searchsorted(finished, parts))
        if last < len(lives):
            left = parts - (int(finished[last - 1]) if last else 0)
            return wall + float(lives[:last].sum() + restarts[last]) + left * part
        wall += float(lives.sum())
        parts -= int(finished[-1])
        restarts[0] = restart
