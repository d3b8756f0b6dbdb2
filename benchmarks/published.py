"""Predicted step times beside published ones, each for the layout that was run.

    python benchmarks/published.py [--json]

The constants of `braeburn.plan.cost.EFFICIENCY`, one set for a family of chips, come from compiled
steps and from measurements of kernels; none was chosen for a row of this table. Rows with a limit
must keep to it, or the program ends with 1; the others show how far the same constants carry.
Layouts that no source states are marked as assumed.

Mixtures of experts are beside dense models, and so are the pipelines of Frontier, whose counter has
the work that is computed again in it: 4 units in place of 3, so that of the fraction of the peak
that it gives three quarters are the model's own. Of speeds in float8 there are those of dense
models: the plan has experts in bfloat16, whose products in float8 others publish.

Sources: [1] AXLearn, arXiv 2507.05411, table of training speed, with the meshes and remat of its
public configurations (fuji.py, honeycrisp.py). [2] Step times in honeycrisp.py. [3] Step times in
fuji.py. [4] MaxText, Megatron-LM, NeMo and torchtitan as quoted in [1] or on their own pages. [5]
Dash et al., arXiv 2312.12705: 22B, 175B and 1T on Frontier, with the layouts of the recipes. [6]
MaxText's page of optimized models (reference/models/tiering of v0.2.2), with the layout, batch and
remat of its benchmarks (maxtext_trillium_model_configs.py, maxtext_v5p_model_configs.py); on v6e
its experts drop what exceeds 1.25 times an even share. [7] Marin, throughput tuning on H100. [8]
Nous Research's torchtitan with DeepEP, on 8 GPUs of the size of a B200. [9] DeepSeek-V3 on v5p as
Google published it, with MaxText's configuration deepseek3_671b_v5p_1024. [10] Google's recipes for
TPU7x (tpu-recipes, training/ironwood), each with the layout, batch and remat of its script; those
of DeepSeek-V3 sum gradients in bfloat16. [11] NVIDIA, Megatron-Bridge's table of performance:
gpt-oss-120b in bfloat16, with tokens dealt out to experts evenly. [12] torchtitan's benchmarks of
Llama 3.1 of December 2024, with float8 and one scale for each array, gathered in float8.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from braeburn.config import override
from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.targets import parse_target
from braeburn.models.decoder import has_experts
from braeburn.plan.cost import estimate
from braeburn.recipes import load

# What "save all products" of JAX (dots_saveable) keeps; attention's kernel is none and runs again.
PRODUCTS = ("query", "key", "value", "attention_output", "ffn_gate", "ffn_up")
ATTENTION = ("query", "key", "value", "attention", "attention_output")
PROJECTIONS = ("query", "key", "value", "attention_output")


@dataclass(frozen=True)
class Row:
    """A published step: `seconds` of one step, tokens per second of one chip, or the fraction of
    the peak by the model's own products (`mfu`).

    `fields` change the recipe; without a mesh the row has the recipe's own layout. `aside` says
    what slows a program down that the plan knows nothing of.
    """

    source: str
    recipe: str
    target: str
    mesh: dict[str, int]
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    keep: tuple[str, ...] = ()
    accumulation_steps: int = 1
    offload: tuple[str, ...] = ()
    assumed: str = ""
    aside: str = ""


FP8 = {"precision.matmul": "fp8"}
SLOWER_H100 = "GPUs held to 500 W, with memory of 2.4 TB/s"
_EXPERTS = "model.pattern.0.feed_forward"
MIXTRAL = {
    "model.d_model": 4096,
    "model.num_layers": 32,
    "model.num_kv_heads": 8,
    "model.vocab_size": 32_000,
    "model.qk_norm": False,
    f"{_EXPERTS}.num_experts": 8,
    f"{_EXPERTS}.experts_per_token": 2,
    f"{_EXPERTS}.expert_dim": 14_336,
}
MIXTRAL_22B = MIXTRAL | {
    "model.d_model": 6144,
    "model.num_layers": 56,
    "model.num_heads": 48,
    "model.vocab_size": 32_768,
    f"{_EXPERTS}.expert_dim": 16_384,
}
GRUG = {
    "model.num_layers": 24,
    "model.num_heads": 16,
    f"{_EXPERTS}.num_experts": 64,
    f"{_EXPERTS}.experts_per_token": 4,
    f"{_EXPERTS}.expert_dim": 1024,
    "stages.general.batch_tokens": 256 * 4096,
}

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
    Row("[5]", "frontier-22b", "mi250x:64", {}, mfu=0.3838 * 3 / 4, limit=0.25, assumed="mesh"),
    Row("[5]", "frontier-175b", "mi250x:512", {}, mfu=0.3614 * 3 / 4, limit=0.25),
    Row("[5]", "frontier-1t", "mi250x:1536", {}, mfu=0.3196 * 3 / 4, limit=0.25),
    Row(
        "[6] MaxText, 52.6% MFU",
        "qwen3-30b-a3b",
        "v5p:128",
        {"fsdp": 128},
        mfu=0.526,
        fields=MIXTRAL,
        limit=0.25,
        assumed="mesh, remat, batch",
    ),
    Row(
        "[6] MaxText",
        "qwen3-30b-a3b",
        "v6e:256",
        {"fsdp": 256},
        tokens_per_second=3899,
        fields={**MIXTRAL, "stages.general.batch_tokens": 256 * 12 * 4096},
        keep=PROJECTIONS,
        offload=PROJECTIONS,
        limit=0.25,
    ),
    Row(
        "[6] MaxText",
        "qwen3-30b-a3b",
        "v6e:256",
        {"fsdp": 64, "expert": 4},
        tokens_per_second=1326,
        fields={
            **MIXTRAL_22B,
            "stages.general.batch_tokens": 256 * 8 * 4096,
            "mesh.expert_dispatch": "all_to_all",
        },
        keep=PROJECTIONS,
        offload=PROJECTIONS,
    ),
    Row(
        "[9]",
        "deepseek-v3",
        "v5p:512",
        {"fsdp": 512},
        90.67,
        fields={
            "stages.pretrain.sequence_length": 8192,
            "stages.pretrain.batch_tokens": 512 * 6 * 8192,
        },
        keep=("attention_output",),
        offload=("attention_output",),
        limit=0.25,
    ),
    Row(
        "[10]",
        "deepseek-v3",
        "tpu7x:128",
        {"fsdp": 256},
        27.02,
        fields={"stages.pretrain.batch_tokens": 2048 * 4096, "precision.reduce": "bfloat16"},
        limit=0.25,
    ),
    Row(
        "[10]",
        "deepseek-v3",
        "tpu7x:256",
        {"fsdp": 512},
        26.79,
        fields={"stages.pretrain.batch_tokens": 4096 * 4096, "precision.reduce": "bfloat16"},
    ),
    Row(
        "[10]",
        "qwen3-235b-a22b",
        "tpu7x:256",
        {"fsdp": 512},
        30.87,
        fields={"stages.general.batch_tokens": 8192 * 4096},
        limit=0.25,
    ),
    Row(
        "[10]",
        "gpt-oss-120b",
        "tpu7x:64",
        {"data": 2, "fsdp": 64},
        17.10,
        fields={"stages.general.sequence_length": 8192, "stages.general.batch_tokens": 1280 * 8192},
        aside="widths of 2880 and heads of 64 fill no tiles",
    ),
    Row(
        "[10]",
        "llama3-70b",
        "tpu7x:64",
        {"fsdp": 128},
        12.20,
        fields={"stages.pretrain.batch_tokens": 256 * 8192},
        keep=("query", "key", "value", "attention"),
        limit=0.25,
    ),
    Row(
        "[10]",
        "llama3-70b",
        "tpu7x:256",
        {"fsdp": 512},
        12.27,
        fields={"stages.pretrain.batch_tokens": 1024 * 8192},
        keep=("query", "key", "value", "attention"),
    ),
    Row(
        "[10]",
        "llama3-70b",
        "tpu7x:64",
        {"fsdp": 128},
        7.93,
        fields={"stages.pretrain.batch_tokens": 256 * 8192, **FP8},
        keep=("query", "key", "value", "attention"),
        limit=0.25,
    ),
    Row(
        "[10]",
        "llama3-70b",
        "tpu7x:256",
        {"fsdp": 512},
        7.95,
        fields={"stages.pretrain.batch_tokens": 1024 * 8192, **FP8},
        keep=("query", "key", "value", "attention"),
        limit=0.25,
    ),
    Row(
        "[12] torchtitan",
        "llama3-8b",
        "h100:8",
        {"fsdp": 8},
        tokens_per_second=8532,
        fields={"stages.pretrain.batch_tokens": 16 * 8192, **FP8},
        keep=PRODUCTS,
        assumed="remat",
        aside=SLOWER_H100,
    ),
    Row(
        "[12] torchtitan",
        "llama3-8b",
        "h100:128",
        {"fsdp": 128},
        tokens_per_second=8380,
        fields={"stages.pretrain.batch_tokens": 256 * 8192, **FP8},
        keep=PRODUCTS,
        assumed="remat",
        aside=SLOWER_H100,
    ),
    Row(
        "[12] torchtitan",
        "llama3-70b",
        "h100:256",
        {"fsdp": 32, "tensor": 8},
        tokens_per_second=829,
        fields={"stages.pretrain.batch_tokens": 512 * 8192, **FP8},
        aside=SLOWER_H100,
    ),
    Row(
        "[7] Marin, 28.2% MFU",
        "qwen3-30b-a3b",
        "h100:8",
        {"fsdp": 8},
        mfu=0.282,
        fields=GRUG,
        accumulation_steps=8,
        assumed="width of experts, remat",
    ),
    Row(
        "[8] torchtitan",
        "qwen3-30b-a3b",
        "b200:8",
        {"fsdp": 8},
        tokens_per_second=9930,
        accumulation_steps=16,
        assumed="mesh, remat, batch",
        aside="no grouped products",
    ),
    Row(
        "[8] with DeepEP",
        "qwen3-30b-a3b",
        "b200:8",
        {"expert": 8},
        tokens_per_second=14_796,
        fields={"mesh.expert_dispatch": "all_to_all"},
        accumulation_steps=16,
        assumed="mesh, remat, batch",
    ),
    # 1,280 sequences of 4,096 tokens, in microbatches of 4 on each of 16 replicas.
    Row(
        "[11] Megatron-Bridge",
        "gpt-oss-120b",
        "h100:64",
        {"fsdp": 2, "expert": 8, "pipeline": 4},
        tokens_per_second=5824,
        fields={"mesh.expert_dispatch": "all_to_all", "stages.general.batch_tokens": 1280 * 4096},
        accumulation_steps=20,
        assumed="GPUs, fsdp, remat, batch",
    ),
)


def predict(row: Row) -> dict[str, Any]:
    """A row with what is predicted for its layout."""
    run = load(row.recipe)
    name = next(iter(run.stages))
    changes: dict[str, Any] = dict(row.fields)
    if row.mesh:
        changes |= {f"mesh.{axis}": row.mesh.get(axis, 1) for axis in run.mesh.sizes}
        changes[f"stages.{name}.accumulation_steps"] = row.accumulation_steps
        changes |= (
            {"remat.policy": "save_named", "remat.names": row.keep}
            if row.keep
            else {"remat.policy": "full"}
        )
        changes["offload.activations"] = row.offload
    run = override(run, changes)
    target = parse_target(row.target, catalogue())
    found = estimate(run, name, target)
    batch = run.stages[name].batch_tokens
    if row.mfu:
        published = found.step * found.mfu / row.mfu
    else:
        published = row.seconds or batch / (row.tokens_per_second * target.chips)
    error = found.step / published - 1
    return {
        "source": row.source,
        "recipe": row.recipe,
        "target": row.target,
        "mesh": row.mesh or {axis: n for axis, n in run.mesh.sizes.items() if n > 1},
        "mfu": found.mfu,
        "assumed": row.assumed,
        "published": published,
        "predicted": found.step,
        "overlapped": found.overlapped,
        "serial": found.serial,
        "error": error,
        "limit": row.limit,
        "aside": row.aside,
        "kept": row.limit is None or abs(error) <= row.limit,
    }


def _mixtures(rows: list[dict[str, Any]]) -> None:
    """Prints how far off mixtures of experts are, by chip, but for those that are set aside."""
    of_chip: dict[str, list[float]] = {}
    for row in rows:
        if has_experts(load(row["recipe"]).model) and not row["aside"]:
            of_chip.setdefault(row["target"].partition(":")[0], []).append(abs(row["error"]))
    of_chip["all of these"] = [error for errors in of_chip.values() for error in errors]
    for chip, errors in of_chip.items():
        print(f"mixtures on {chip}: median {median(errors):.0%}, worst {max(errors):.0%}")


def _frontier(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of Frontier by the paper's own counter, and how its layout scales."""
    for row in rows:
        if row["recipe"].startswith("frontier"):
            published = row["mfu"] * row["predicted"] / row["published"]
            print(
                f"{row['recipe']}: {row['mfu'] * 4 / 3:.1%} of the peak by the counter of the "
                f"paper, which found {published * 4 / 3:.1%}; {row['mfu']:.1%} by the model's own "
                f"products"
            )
    run = load("frontier-175b")
    few, many = (
        estimate(
            override(run, {"mesh.data": data, "stages.pretrain.batch_tokens": 640 * data * 2048}),
            "pretrain",
            parse_target(f"mi250x:{32 * data}", catalogue()),
        )
        for data in (4, 16)
    )
    print(
        f"frontier-175b from 256 to 1,024 GCDs, the batch growing with them: "
        f"{few.step / many.step:.1%} (published: 100%)"
    )


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
            f"{'recipe':21} {'target':11} {'mesh':30} published predicted  interval       error  "
            f"  MFU  limit  source"
        )
        for row in rows:
            mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
            interval = f"[{row['overlapped']:.2f}, {row['serial']:.2f}]"
            limit = f"{row['limit']:.0%}" if row["limit"] else "-"
            source = row["source"] + (f" (assumed: {row['assumed']})" if row["assumed"] else "")
            source += f" (set aside: {row['aside']})" if row["aside"] else ""
            print(
                f"{row['recipe']:21} {row['target']:11} {mesh:30} {row['published']:9.2f} "
                f"{row['predicted']:9.2f}  {interval:14} {row['error']:+5.0%} {row['mfu']:6.1%} "
                f"{limit:>5}  {source}"
            )
        errors = sorted(abs(row["error"]) for row in rows)
        print(f"median of all rows {median(errors):.0%}, worst {errors[-1]:.0%}")
        _mixtures(rows)
        _frontier(rows)
    return 0 if all(row["kept"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
