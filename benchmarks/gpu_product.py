"""The rate of one product of square bfloat16 matrices, 8192 wide, of random numbers: what a train
step's share of the chip is measured against.

    python benchmarks/gpu_product.py [--width 8192]
"""

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

PRODUCTS, REPEATS = 20, 10


def main() -> int:
    """Prints one line of JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=8192)
    width = parser.parse_args().width
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in keys)

    right = right * width**-0.5  # so that the numbers stay as large as they are

    @jax.jit
    def products(left: jax.Array, right: jax.Array) -> jax.Array:
        # Each needs the one before it.
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ right, left)

    products(left, right).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        products(left, right).block_until_ready()
        seconds.append((time.perf_counter() - began) / PRODUCTS)
    rate = 2 * width**3 / statistics.median(seconds)
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "width": width,
        "flops_per_second": rate,
        "flops_per_second_best": 2 * width**3 / min(seconds),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
