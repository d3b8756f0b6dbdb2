"""Memory of ring attention for each device of 2, 4, 8 and 16 that share one long sequence: it must
fall as 1/n.

The program is the value and the gradient of ring attention alone. It is compiled for simulated
devices and not run; the figures are XLA's own account of the compiled program.
"""

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from braeburn.config import MeshConfig
from braeburn.layers.attention.ring import ring_attention

SHARDS = (2, 4, 8, 16)
TOLERANCE = 0.15


def bytes_per_device(
    shards: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """Arguments, results and temporaries of one of `shards` devices, for a bfloat16 sequence."""
    mesh = MeshConfig(fsdp=1, context=shards, context_attention="ring")

    def total(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        return jnp.sum(ring_attention(query, key, value, segment_ids, mesh).astype(jnp.float32))

    split = P(None, "context")
    program = jax.shard_map(
        lambda *arrays: jax.tree.map(
            lambda x: x[None], jax.value_and_grad(total, argnums=(0, 1, 2))(*arrays)
        ),
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:shards]), ("context",)),
        in_specs=split,
        out_specs=P("context"),
        check_vma=False,
    )
    query = jax.ShapeDtypeStruct((1, length, num_heads, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, length, num_kv_heads, head_dim), jnp.bfloat16)
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    analysis = jax.jit(program).lower(query, key, key, segment_ids).compile().memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def main() -> int:
    """Prints the memory for each number of devices; returns 1 if it does not fall as their number
    grows.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequence-length", type=int, default=32_768)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(SHARDS))
    sizes = (
        arguments.sequence_length,
        arguments.num_heads,
        arguments.num_kv_heads,
        arguments.head_dim,
    )
    rows = []
    for shards in SHARDS:
        start = time.perf_counter()
        size = bytes_per_device(shards, *sizes)
        rows.append(
            {
                "shards": shards,
                "bytes": size,
                "compile_seconds": round(time.perf_counter() - start, 1),
            }
        )
        # 1 where memory falls exactly as the number of devices grows.
        rows[-1]["ratio"] = size * shards / (rows[0]["bytes"] * SHARDS[0])
    good = all(abs(row["ratio"] - 1) <= TOLERANCE for row in rows)
    if arguments.json:
        print(
            json.dumps(
                {
                    "sequence_length": sizes[0],
                    "tolerance": TOLERANCE,
                    "rows": rows,
                    "jax": jax.__version__,
                }
            )
        )
        return 0 if good else 1
    print(f"memory of ring attention over {sizes[0]:,} tokens, value and gradient, per device:")
    for row in rows:
        print(
            f"  {row['shards']:>3} devices {row['bytes'] / 2**20:>9,.1f} MiB   {row['ratio']:.3f} "
            f"of 1/n"
            f"   compiled in {row['compile_seconds']} s"
        )
    print(f"wanted: within {TOLERANCE:.0%} of 1/n, from {SHARDS[0]} devices on")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
