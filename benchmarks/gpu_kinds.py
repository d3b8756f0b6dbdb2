"""Small runs of every kind on one GPU beside the same on the CPU: families, optimizers, and stages
that prune, distil and quantise.

    python benchmarks/gpu_kinds.py

The runs are those of tests/golden_losses.py on one device, and models of further families. Prints a
row for each: the largest relative difference of the losses of 20 steps. In float32, with products
in full float32, it is at most 1e-4, or 1e-3 where weights are rounded to few levels; in bfloat16,
and with products in 8 bits, the mean of the last five losses differs by at most 0.01. Exits with 1
where one is larger.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

STEPS_AT_THE_END = 5
WORKERS = 4  # processes on the GPU, and as many on the CPU
LIMITS = {"float32": 1e-4, "rounded": 1e-3, "narrow": 0.01}
# What the names of runs end in whose losses are compared at the end alone.
IN_EIGHT_BITS = ("fp8", "fp8_rows", "int8 products")
NARROW = ("bfloat16", *IN_EIGHT_BITS)
ROUNDED = ("int8", "int4", "int2")
PRODUCTS_IN_FLOAT32 = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
# Recipes of further families.
FAMILIES = (
    "gemma3-1b",
    "olmo2-7b",
    "afm-on-device-2025-tiny",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "deepseek-v3",
)
# Small float32 products are right whichever kernel computes them, and choosing takes minutes.
NO_CHOICE = "--xla_gpu_autotune_level=0"


def runs() -> dict[str, Any]:
    """Each run by its name; those in bfloat16 or 8 bits end in one of `NARROW`."""
    import golden_losses as golden
    from braeburn import recipes
    from braeburn.config import AdamW
    from braeburn.config.optimizers.muon import Muon

    one_device = ", one device"
    found = {
        name.removesuffix(one_device): run
        for name, run in golden.cases().items()
        if run.mesh == golden.MESHES["one device"]
    }
    plain = found["qwen3, adamw"]
    found["qwen3, muon"] = plain.model_copy(
        update={
            "optimizer": Muon(),
            "stages": {"core": plain.stages["core"].model_copy(update={"learning_rate": 0.02})},
        }
    )
    small = {**golden.SIZES, "num_layers": 6}
    for recipe in FAMILIES:
        model = recipes.load(recipe).model
        patterns = {
            name: tuple(map(_shrunk, getattr(model, name))) for name in ("pattern", "tail_pattern")
        }
        sizes = small if model.tail_layers == 0 else {**small, "num_layers": 8, "tail_layers": 3}
        model = model.model_copy(update={**sizes, **patterns})
        found[f"{recipe.rpartition('-')[0]}, adamw"] = plain.model_copy(
            update={"model": model, "optimizer": AdamW()}
        )
    for name in [name for name in found if name.endswith("adamw")]:
        run = found[name]
        narrow = run.precision.model_copy(update={"compute": "bfloat16"})
        found[f"{name}, bfloat16"] = run.model_copy(update={"precision": narrow})
    # In float32, so that nothing but the products differs.
    for name in IN_EIGHT_BITS:
        eight = plain.precision.model_copy(update={"matmul": name.removesuffix(" products")})
        found[f"qwen3, adamw, {name}"] = plain.model_copy(update={"precision": eight})
    return found


def _shrunk(layer: Any) -> Any:
    """A layer of a narrow model, whose experts are as wide as tensor cores need it."""

    def smaller(size: int) -> int:
        return min(size, 48)

    return layer.model_copy(
        update={
            "attention": layer.attention.shrunk(16, smaller),
            "feed_forward": layer.feed_forward.shrunk(smaller),
        }
    )


def print_losses(names: list[str]) -> None:
    """Prints a line for each run: its losses on the device that JAX takes."""
    import golden_losses as golden

    for name, run in runs().items():
        if names and name not in names:
            continue
        began = time.monotonic()
        try:
            row: dict[str, Any] = {"run": name, "losses": golden.losses(run)}
        except Exception as error:  # a run that fails is a result too
            row = {"run": name, "losses": [], "error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(row | {"seconds": round(time.monotonic() - began, 1)}), flush=True)


def main() -> int:
    """Runs all on both devices and compares; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="RUN", help="which; all by default")
    parser.add_argument("--losses", action="store_true", help="print the losses of this device")
    arguments = parser.parse_args()
    if arguments.losses:
        print_losses(arguments.names)
        return 0
    names = arguments.names or list(runs())
    flags = f"{os.environ.get('XLA_FLAGS', '')} {NO_CHOICE}".strip()
    # Compiling takes nearly all of the time.
    shares = [share for share in (names[i::WORKERS] for i in range(WORKERS)) if share]
    with ThreadPoolExecutor(WORKERS) as pool:
        wrong = sum(pool.map(lambda share: compare_all(share, flags), shares))
    print(f"{wrong} runs are wrong" if wrong else "all runs are right", flush=True)
    return 1 if wrong else 0


def begin(names: list[str], **environment: str) -> subprocess.Popen[str]:
    """Starts a process that prints the losses of some runs."""
    return subprocess.Popen(
        [sys.executable, __file__, "--losses", *names],
        env=os.environ | PRODUCTS_IN_FLOAT32 | environment,
        text=True,
        stdout=subprocess.PIPE,
    )


def compare_all(names: list[str], flags: str) -> int:
    """Prints a row for each of some runs as it ends; returns how many are wrong."""
    on_cpu, here = begin(names, JAX_PLATFORMS="cpu"), begin(names, XLA_FLAGS=flags)
    assert on_cpu.stdout is not None
    assert here.stdout is not None
    right = 0
    for line, line_on_cpu in zip(here.stdout, on_cpu.stdout, strict=False):
        row = json.loads(line)
        right += compare(row, json.loads(line_on_cpu)["losses"])
        print(json.dumps(row), flush=True)
    return len(names) - right


def compare(row: dict[str, Any], expected: list[float]) -> bool:
    """Puts the difference and the limit into a row in the place of its losses; returns whether the
    one is within the other.
    """
    found, name = row.pop("losses"), row["run"]
    if not found or not expected:
        return False
    row["last"] = found[-1]
    if name.endswith(NARROW):
        found, expected = ([sum(x[-STEPS_AT_THE_END:])] for x in (found, expected))
        row["limit"] = LIMITS["narrow"]
    else:
        row["limit"] = LIMITS["rounded" if name in ROUNDED else "float32"]
    row["difference"] = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    return bool(row["difference"] <= row["limit"])


if __name__ == "__main__":
    sys.exit(main())
