"""The time that saving and checking a checkpoint takes, with and without checksums.

    python benchmarks/checkpoint_saving.py [--gigabytes 0.0324 0.2] [--repeat 3] [--folder DIR]

Each size is that of the checkpoint in GB: parameters and two moments in float32, so the 2.7M
parameters of the quickstart are 0.0324 GB. 10 GB are asked for with `--gigabytes 10`, which takes
21 GB of memory; where there is no more, with `--checksums with` and `--checksums without` in two
calls. For each it prints how long a step would wait for `save` to return, the time until the
checkpoint is complete (which training does not wait for), and the time to compare it with its
record and restore it. Without checksums, the record holds no files.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from braeburn.config import Checkpoint
from braeburn.recipes import load
from braeburn.train import record
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.quiet import quieten_orbax
from braeburn.train.state import TrainState, new_state

OPTIMIZER = optax.adamw(1e-3)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.0324, 0.2])
    parser.add_argument(
        "--checksums", nargs="+", choices=("without", "with"), default=["without", "with"]
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write; the system's temporary folder without it"
    )
    options = parser.parse_args()
    quieten_orbax()
    print(
        f"{'GB':>8}  {'checksums':9}  {'save returns':>12}  {'complete':>8}  {'restored':>8}   (s)"
    )
    for gigabytes in options.gigabytes:
        state = state_of(gigabytes)
        for checksums in (has == "with" for has in options.checksums):
            times = [measure(state, checksums, options.folder) for _ in range(options.repeat)]
            returned, complete, restored = map(statistics.median, zip(*times, strict=True))
            has = "with" if checksums else "without"
            print(
                f"{gigabytes:8.4g}  {has:9}  {returned:12.3f}  {complete:8.3f}  {restored:8.3f}",
                flush=True,
            )


def state_of(gigabytes: float) -> TrainState:
    """A state of eight matrices whose checkpoint has that size, of numbers that do not compress."""
    width = int((gigabytes * 1e9 / 12 / 8) ** 0.5)
    keys = jax.random.split(jax.random.key(0), 8)
    return new_state(
        {f"matrix{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)},
        OPTIMIZER,
    )


def measure(state: TrainState, checksums: bool, parent: Path | None) -> tuple[float, float, float]:
    """Seconds until `save` returns, until the checkpoint is complete, and for reading it."""
    none = {"hash_files": lambda *_, **__: {}, "list_files": lambda _: {}}
    without = contextlib.nullcontext() if checksums else mock.patch.multiple(record, **none)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    with tempfile.TemporaryDirectory(dir=parent) as folder, without:
        checkpoints = Checkpoints(Path(folder), Checkpoint())
        jax.block_until_ready(state)
        began = time.perf_counter()
        checkpoints.save(1, state._replace(step=jnp.int32(1)), load("afm-tiny"), "{}")
        returned = time.perf_counter() - began
        checkpoints.wait()
        complete = time.perf_counter() - began
        checkpoints.close()
        began = time.perf_counter()
        jax.block_until_ready(Checkpoints(Path(folder)).restore(1, shape, OPTIMIZER.init))
        return returned, complete, time.perf_counter() - began


if __name__ == "__main__":
    main()
