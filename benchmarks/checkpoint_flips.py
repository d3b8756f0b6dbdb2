"""Flips random bits in the files of a checkpoint, one at a time, and looks whether each is noticed.

    python benchmarks/checkpoint_flips.py [--flips 1000] [--seed 0]

It trains `afm-tiny` for a few steps in a temporary folder. A flip that is not noticed must change
nothing of what is restored: the state is read in full and compared bit by bit. The exit code is 1
where a flip gets through.
"""

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from braeburn.config import Run, override
from braeburn.recipes import load
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.loop import train
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import abstract_state
from braeburn.train.state import TrainState

STEP = 3


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        run = override(load("afm-tiny"), {"mesh.fsdp": 1})
        with contextlib.redirect_stderr(io.StringIO()):
            train(run, directory, stop_after_steps=STEP)
        counts = flip(run, directory, options.flips, random.Random(options.seed))
    print(
        f"{options.flips} flips: {counts['noticed']} noticed, {counts['harmless']} changed "
        f"nothing of what is restored"
    )
    for path, number in sorted(counts.items()):
        if path not in ("noticed", "harmless"):
            print(f"{number} flips of {path} got through")
    sys.exit(counts["noticed"] + counts["harmless"] != options.flips)


def flip(run: Run, directory: Path, flips: int, chance: random.Random) -> Counter[str]:
    """How many flips were noticed, were harmless, and got through, these by the file."""
    folder = directory / "checkpoints" / str(STEP)
    whole = leaves(restore(run, directory))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    counts: Counter[str] = Counter()
    # Half of them anywhere, by bytes; the other half by files, since most bytes are those of one
    # large file.
    anywhere = chance.choices(files, sizes, k=flips - flips // 2)
    for path in anywhere + chance.choices(files, k=flips // 2):
        content, status = path.read_bytes(), path.stat()
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        if Checkpoints(directory).fault(STEP):
            counts["noticed"] += 1
        elif all(map(np.array_equal, whole, leaves(restore(run, directory)))):
            counts["harmless"] += 1
        else:
            counts[str(path.relative_to(folder))] += 1
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return counts


def restore(run: Run, directory: Path) -> TrainState:
    """The whole state of the checkpoint."""
    first = resolve_stage(run, next(iter(run.stages)))
    return Checkpoints(directory).restore(STEP, abstract_state(first), first.optimizer.init)


def leaves(state: TrainState) -> list[np.ndarray]:
    """The state's arrays as bytes, in which even two kinds of NaN differ."""
    return [
        np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8)
        for leaf in jax.tree.leaves(state)
    ]


if __name__ == "__main__":
    main()
