"""Predicted step times beside published ones, each for the layout that was run.

    python benchmarks/published.py [--json]

The constants of `braeburn.plan.cost.EFFICIENCY`, one set for a family of chips, come from compiled
steps and from measurements of kernels; none was chosen for a row of this table. Rows with a limit
must keep to it, or the program ends with 1; the others show how far the same constants carry.
Layouts that no source states are marked as assumed.

Sources: [1] AXLearn, arXiv 2507.05411, table of training speed, with the meshes and remat of its
public configurations (fuji.py, honeycrisp.py). [2] Step times in honeycrisp.py. [3] Step times in
fuji.py. [4] MaxText, Megatron-LM, NeMo and torchtitan as quoted in [1] or on their own pages.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from braeburn.config import override
from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.targets import parse_target
from braeburn.plan.cost import estimate
from braeburn.recipes import load

# What "save all products" of JAX (dots_saveable) keeps; attention's kernel is none and runs again.
PRODUCTS = ("query", "key", "value", "attention_output", "ffn_gate", "ffn_up")
ATTENTION = ("query", "key", "value", "attention", "attention_output")


@dataclass(frozen=True)
class Row:
    """A published step: `seconds` of one step, or tokens per second of one chip."""

    source: str
    recipe: str
    target: str
    mesh: dict[str, int]
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    limit: float | None = None
    keep: tuple[str, ...] = ()
    accumulation_steps: int = 1
    offload: tuple[str, ...] = ()
    assumed: str = ""


ROWS = (
    Row("[1]", "llama2-7b", "v5p:256", {"data": 32, "fsdp": 8}, 2.5, limit=0.15, keep=PRODUCTS),
    Row(
        "[1]",
        "llama2-70b",
        "v5p:512",
        {"fsdp": 512},
        11.6,
        limit=0.15,
        keep=ATTENTION,
        assumed="remat",
    ),
    Row(
        "[1]",
        "llama2-7b",
        "h100:256",
        {"data": 32, "fsdp": 8},
        1.4,
        limit=0.25,
        keep=PRODUCTS,
        assumed="remat",
    ),
    Row(
        "[1]", "llama2-70b", "h100:512", {"data": 4, "fsdp": 128}, 9.2, limit=0.25, assumed="remat"
    ),
    Row("[2]", "afm-on-device-scratch", "v5p:512", {"data": 512}, 1.48, limit=0.25, keep=PRODUCTS),
    Row(
        "[2]", "afm-on-device-scratch", "v5p:1024", {"data": 1024}, 0.80, limit=0.25, keep=PRODUCTS
    ),
    Row(
        "[2]", "afm-on-device-scratch", "v5p:2048", {"data": 2048}, 0.47, limit=0.25, keep=PRODUCTS
    ),
    Row("[3]", "llama2-7b", "v5e:4x256", {"data": 4, "fsdp": 256}, 2.21, keep=PRODUCTS),
    Row(
        "[3]",
        "llama2-70b",
        "v5e:4x256",
        {"data": 4, "fsdp": 256},
        14.37,
        keep=PRODUCTS,
        offload=PRODUCTS,
    ),
    Row(
        "[4] MaxText",
        "llama2-7b",
        "v5p:256",
        {"fsdp": 256},
        2.7,
        keep=PRODUCTS,
        assumed="mesh, remat",
    ),
    Row(
        "[4] MaxText",
        "llama2-70b",
        "v5p:512",
        {"fsdp": 512},
        12.3,
        keep=ATTENTION,
        assumed="mesh, remat",
    ),
    Row("[4] MaxText", "llama2-70b", "h100:512", {"fsdp": 512}, 9.4, assumed="mesh, remat"),
    Row(
        "[4] MaxText, 52.6% MFU",
        "llama2-70b",
        "h100:64",
        {"fsdp": 64},
        tokens_per_second=0.526 * 989e12 / 444.6e9,
        accumulation_steps=8,
        assumed="mesh, remat, batch",
    ),
    Row(
        "[4] Megatron-LM",
        "llama2-7b",
        "h100:256",
        {"data": 32, "fsdp": 8},
        1.7,
        keep=PRODUCTS,
        assumed="all",
    ),
    Row(
        "[4] NeMo",
        "llama3-8b",
        "h100:8",
        {"fsdp": 8},
        tokens_per_second=10_682,
        keep=PRODUCTS,
        accumulation_steps=64,
        assumed="mesh, remat, batch",
    ),
    Row(
        "[4] torchtitan",
        "llama3-8b",
        "h100:8",
        {"fsdp": 8},
        tokens_per_second=6667,
        accumulation_steps=64,
        assumed="remat, batch",
    ),
)


def predict(row: Row) -> dict[str, Any]:
    """A row with what is predicted for its layout."""
    run = load(row.recipe)
    name = next(iter(run.stages))
    changes: dict[str, Any] = {f"mesh.{axis}": row.mesh.get(axis, 1) for axis in run.mesh.sizes}
    changes[f"stages.{name}.accumulation_steps"] = row.accumulation_steps
    changes |= (
        {"remat.policy": "save_named", "remat.names": row.keep}
        if row.keep
        else {"remat.policy": "full"}
    )
    run = override(run, changes | {"offload.activations": row.offload})
    target = parse_target(row.target, catalogue())
    found = estimate(run, name, target)
    batch = run.stages[name].batch_tokens
    published = row.seconds or batch / (row.tokens_per_second * target.chips)
    error = found.step / published - 1
    return {
        "source": row.source,
        "recipe": row.recipe,
        "target": row.target,
        "mesh": row.mesh,
        "assumed": row.assumed,
        "published": published,
        "predicted": found.step,
        "overlapped": found.overlapped,
        "serial": found.serial,
        "error": error,
        "limit": row.limit,
        "kept": row.limit is None or abs(error) <= row.limit,
    }


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    rows = [predict(row) for row in ROWS]
    if parser.parse_args().json:
        print(json.dumps(rows, indent=2))
    else:
        print(
            f"{'recipe':21} {'target':10} {'mesh':20} published predicted  interval       error  "
            f"limit  source"
        )
        for row in rows:
            mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
            interval = f"[{row['overlapped']:.2f}, {row['serial']:.2f}]"
            limit = f"{row['limit']:.0%}" if row["limit"] else "-"
            source = row["source"] + (f" (assumed: {row['assumed']})" if row["assumed"] else "")
            print(
                f"{row['recipe']:21} {row['target']:10} {mesh:20} {row['published']:9.2f} "
                f"{row['predicted']:9.2f}  {interval:14} {row['error']:+5.0%}  {limit:>5}  {source}"
            )
    return 0 if all(row["kept"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
