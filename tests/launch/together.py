"""A run of one stage that is small enough to train again and again, and the processes that do."""

import os
from pathlib import Path

RECIPE = """
from braeburn.config import AdamW
from braeburn.recipes import load

def run():
    base = load("afm-tiny")
    return base.model_copy(update={"stages": {"core": base.stages["core"]}, "optimizer": AdamW()})
"""
STEPS = 30
# Each process has one device, as it has without the tests' simulated ones.
ENVIRON = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


def members(out: Path) -> dict[int, int]:
    """The processes that train in a folder now: their ids by their numbers."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "--process-id" in words and str(out) in words:
            found[int(words[words.index("--process-id") + 1])] = int(entry.name)
    return found
