"""Soft-Top-K on a task with a known answer: find the units of a teacher's FFN among several times
as many distractors.

The teacher is a random SwiGLU FFN. The student holds the teacher's hidden units, each a little off,
at random indices among distractors drawn from the same distribution, whose output is only in the
way. Scores start at zero, so that nothing tells the two apart, and are learned jointly with the
weights from the teacher's outputs while the temperature falls, as in a stage that prunes. Beside it
stands what the norms of the student's first weights would keep.

Masks are also checked by themselves: their sums at each temperature, and their gradients against
finite differences of a float64 bisection.
"""

import argparse
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from braeburn.config import Pruning
from braeburn.transforms.soft_top_k import soft_top_k, top_k_indices

SEEDS = (0, 1, 2)
RECOVERED = 0.95
SUM_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
TEMPERATURES = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 0.0)
# The planted units as the student starts with them are off by this share of their weights.
NOISE = 0.1

Weights = dict[str, Array]


def ffn(weights: Weights, x: Array, masks: Array | float = 1.0) -> Array:
    """The FFN of the transformer, [B, D] -> [B, D], with a mask on what reads its hidden units."""
    hidden = jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])
    return hidden @ (weights["down"] * jnp.asarray(masks)[..., None])


def units(key: Array, width: int, count: int) -> Weights:
    """Random hidden units."""
    gate, up, down = jax.random.split(key, 3)
    return {
        "gate": jax.random.normal(gate, (width, count)) * width**-0.5,
        "up": jax.random.normal(up, (width, count)) * width**-0.5,
        "down": jax.random.normal(down, (count, width)) * count**-0.5,
    }


def student(key: Array, teacher: Weights, distractors: int) -> tuple[Weights, Array]:
    """The teacher's units, a little off, at random indices among distractors; and their indices,
    ascending.
    """
    width, planted = teacher["gate"].shape
    other, noise, order = jax.random.split(key, 3)
    others = units(other, width, distractors)
    # As large as those of the planted units: norms must not tell which is which.
    others["down"] *= (distractors / planted) ** 0.5
    off = units(noise, width, planted)
    indices = jax.random.permutation(order, planted + distractors)

    def placed(name: str) -> Array:
        axis = 0 if name == "down" else 1
        own = (teacher[name] + NOISE * off[name]) / (1 + NOISE**2) ** 0.5
        return jnp.take(jnp.concatenate([own, others[name]], axis), indices, axis)

    return {name: placed(name) for name in teacher}, jnp.flatnonzero(indices < planted)


def learned(
    key: Array, teacher: Weights, weights: Weights, k: int, pruning: Pruning, steps: int, batch: int
) -> tuple[Array, Array, Array]:
    """The scores after training, and the losses of all steps and the masks' deviations from the sum
    k.
    """
    width, count = weights["gate"].shape
    optimizer = optax.multi_transform(
        {"scores": optax.adam(pruning.learning_rate), "weights": optax.adam(1e-3)},
        {"scores": "scores", "weights": "weights"},
    )
    values = {"scores": jnp.zeros(count), "weights": weights}
    variance = jnp.mean(
        jnp.square(ffn(teacher, jax.random.normal(jax.random.fold_in(key, steps), (4096, width))))
    )

    def loss(values: Any, x: Array, temperature: Array) -> tuple[Array, Array]:
        masks = soft_top_k(values["scores"], k, temperature)
        error = ffn(values["weights"], x, masks) - ffn(teacher, x)
        return jnp.mean(jnp.square(error)) / variance, jnp.abs(jnp.sum(masks) / k - 1)

    def step(carry: Any, number: Array) -> tuple[Any, tuple[Array, Array]]:
        values, state = carry
        progress = number / (steps * (1 - pruning.exact))
        falling = (
            pruning.temperature * (pruning.final_temperature / pruning.temperature) ** progress
        )
        temperature = jnp.where(progress < 1, falling, 0.0)
        x = jax.random.normal(jax.random.fold_in(key, number), (batch, width))
        (value, deviation), gradient = jax.value_and_grad(loss, has_aux=True)(
            values, x, temperature
        )
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(values, updates), state), (value, deviation)

    train = jax.jit(
        lambda values: jax.lax.scan(step, (values, optimizer.init(values)), jnp.arange(steps))
    )
    (values, _), (losses, deviations) = train(values)
    return values["scores"], losses, deviations


def magnitude(weights: Weights) -> Array:
    """The L2 norm of all weights of each unit."""
    squares = jnp.sum(weights["gate"] ** 2 + weights["up"] ** 2, axis=0) + jnp.sum(
        weights["down"] ** 2, axis=1
    )
    return jnp.sqrt(squares)


def recovery(seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The shares of the planted units that are found, and how training went."""
    keys = jax.random.split(jax.random.key(seed), 3)
    teacher = units(keys[0], arguments.width, arguments.planted)
    weights, planted = student(keys[1], teacher, arguments.units - arguments.planted)
    k = arguments.planted
    pruning = Pruning(keep={"ffn": k})
    scores, losses, deviations = learned(
        keys[2], teacher, weights, k, pruning, arguments.steps, arguments.batch
    )

    def found(scores: Array) -> float:
        return float(jnp.isin(planted, top_k_indices(scores, k)).mean())

    return {
        "seed": seed,
        "recovered": found(scores),
        "recovered_by_magnitude": found(magnitude(weights)),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-50:].mean()),
        "largest_sum_deviation": float(deviations.max()),
    }


def sum_deviations(count: int, k: int) -> dict[str, float]:
    """The largest deviation of the masks' sums from k, relative, at each temperature, over scores
    of three spreads.
    """
    rng = np.random.default_rng(0)
    scores = np.concatenate(
        [spread * rng.normal(size=(8, count)) for spread in (0.1, 1.0, 1000.0)]
    ).astype(np.float32)
    program = jax.jit(soft_top_k, static_argnums=1)
    return {
        f"{temperature:g}": float(
            np.abs(np.asarray(program(scores, k, temperature), np.float64).sum(1) / k - 1).max()
        )
        for temperature in TEMPERATURES
    }


def bisected(scores: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """The mask by bisection in float64."""
    scaled = scores / temperature
    low, high = -scaled.max() - 50.0, -scaled.min() + 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.exp(np.minimum(scaled + middle, 0)).sum() < k else (low, middle)
        )
    return np.exp(np.minimum(scaled + high, 0))


def gradient_deviation(count: int, k: int) -> float:
    """The largest difference from finite differences, relative to the largest entry, over
    temperatures and draws.
    """
    program = jax.jit(
        jax.grad(
            lambda scores, weights, temperature: jnp.sum(
                weights * soft_top_k(scores, k, temperature)
            )
        )
    )
    worst, rng = 0.0, np.random.default_rng(0)
    for temperature in (1.0, 0.3, 0.1, 0.03):
        for _ in range(3):
            scores, weights = rng.normal(size=(2, count)).astype(np.float32)
            step, wide = 1e-5 * temperature, np.float64(scores)
            expected = np.array(
                [
                    weights
                    @ (
                        bisected(wide + move, k, temperature)
                        - bisected(wide - move, k, temperature)
                    )
                    for move in step * np.eye(count)
                ]
            ) / (2 * step)
            ours = np.asarray(program(scores, weights, np.float32(temperature)), np.float64)
            worst = max(worst, float(np.abs(ours - expected).max() / np.abs(expected).max()))
    return worst


def main() -> int:
    """Runs all three checks; returns 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=32, help="of the FFN's input and output")
    parser.add_argument(
        "--planted", type=int, default=32, help="hidden units of the teacher, and units kept"
    )
    parser.add_argument("--units", type=int, default=128, help="hidden units of the student")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()

    start = time.perf_counter()
    seeds = [recovery(seed, arguments) for seed in SEEDS]
    sums = sum_deviations(arguments.units, arguments.planted)
    deviation = gradient_deviation(64, 20)
    result = {
        "planted": arguments.planted,
        "units": arguments.units,
        "seeds": seeds,
        "sum_deviation": sums,
        "gradient_deviation": deviation,
        "seconds": time.perf_counter() - start,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    largest = max(*sums.values(), *(row["largest_sum_deviation"] for row in seeds))
    good = (
        min(row["recovered"] for row in seeds) >= RECOVERED
        and largest <= SUM_TOLERANCE
        and deviation <= GRADIENT_TOLERANCE
    )
    if arguments.json:
        print(json.dumps(result))
        return 0 if good else 1
    print(
        f"{arguments.planted} planted units among {arguments.units}, {arguments.steps} steps; "
        f"share recovered:"
    )
    print("  seed  Soft-Top-K  magnitude  loss, first and last (of the teacher's variance)")
    for row in seeds:
        print(
            f"  {row['seed']:>4}  {row['recovered']:>10.1%}  {row['recovered_by_magnitude']:>9.1%} "
            f" {row['first_loss']:.3f} {row['last_loss']:.2e}"
        )
    print(
        f"  (wanted: at least {RECOVERED:.0%} with each seed; chance is "
        f"{arguments.planted / arguments.units:.1%})"
    )
    print("largest relative deviation of a mask's sum from k, by temperature:")
    print("  " + "  ".join(f"{temperature}: {value:.1e}" for temperature, value in sums.items()))
    print(
        f"  in training: {max(row['largest_sum_deviation'] for row in seeds):.1e}  (allowed: "
        f"{SUM_TOLERANCE:g})"
    )
    print(
        f"gradient against finite differences in float64: {deviation:.1e}  (allowed: "
        f"{GRADIENT_TOLERANCE:g})"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
