"""One table of what gpu.sh measured.

python benchmarks/gpu_summary.py OUT
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a file that are JSON objects; none of one that is absent."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def speeds(out: Path) -> list[str]:
    """A line for each model that was timed, by Braeburn and by PyTorch."""
    row_of_product = (rows_of(out / "product.json") or [{}])[-1]
    product = row_of_product.get("flops_per_second")
    lines = []
    if product:
        width = row_of_product["width"]
        lines.append(f"one product of {width} x {width} x {width}: {product / 1e12:.3g} TFLOP/s")
    for file in sorted(out.glob("*.json")):
        for row in rows_of(file):
            if "tokens_per_second" not in row:
                continue
            name = row.get("framework", f"Braeburn, jax {row.get('jax')}")
            rate = row["model_flops_per_second"]
            share = f"{rate / product:.1%} of the product" if product else ""
            first = row.get("seconds_to_first_step", row.get("first_step_seconds"))
            lines.append(
                f"{file.stem:<22} {name:<30} {row['batch_tokens']:>7,} tokens a step "
                f"{row['tokens_per_second']:>8,.0f} tokens/s {row['step_seconds_median']:.3f} s "
                f"{rate / 989e12:.1%} of 989 TFLOP/s {share} "
                f"{(row['peak_memory_bytes'] or 0) / 2**30:.1f} GiB first step {first:.1f} s"
            )
    return lines


def kernels(out: Path) -> list[str]:
    """A line for each of the kernels that took longest."""
    found = (rows_of(out / "kernels.json") or [{"kernels": []}])[-1]
    return [
        f"{row['share']:6.1%} {row['calls']:6} {row['seconds'] * 1e3:9.2f} ms  {row['kernel'][:90]}"
        for row in found["kernels"]
    ]


def checks(out: Path) -> list[str]:
    """A line for each part that compares."""
    lines = []
    for row in rows_of(out / "kinds.json"):
        error = row.get("error", "")
        difference = row.get("difference", float("nan"))
        lines.append(
            f"{row['run']:<42} {difference:9.1e} of at most {row.get('limit', float('nan')):.0e} "
            f"{row['seconds']:5.1f} s {error[:120]}"
        )
    lines += [json.dumps(row) for row in rows_of(out / "train.json")]
    attention = rows_of(out / "attention.json")
    worst = [
        max(row.get(part, 0.0) for part in ("output", "query", "key", "value"))
        for row in attention
        if "output" in row
    ]
    if worst:
        lines.append(f"attention: {len(worst)} checks, the largest error {max(worst):.4f}")
    lines += [
        f"attention: {row['back_end']}, {row['shape']}: {row['not run']}"
        for row in attention
        if "shape" in row and "not run" in row
    ]
    for row in attention:
        if "documents" in row:
            time = f"{row['seconds'] * 1e3:8.2f} ms" if "seconds" in row else ""
            lines.append(
                f"{row['back_end']:<28} {row['documents']:>3} documents {row.get('spans', 0):>3} "
                f"a call {time} {row.get('error', row.get('not run', ''))}"
            )
    return lines


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="what gpu.sh wrote to")
    out = parser.parse_args().out
    left_out = out / "torch.log"
    rest = left_out.read_text().splitlines() if left_out.exists() else []
    print("\n".join(["== summary", *speeds(out), *kernels(out), *checks(out), *rest]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
