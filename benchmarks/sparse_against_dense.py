"""Whether a mixture of experts beats a dense model of as many active parameters on as many tokens.

For each seed both models are trained on the same batches with the same optimizer and rate. They
differ in the feed-forward sublayers alone: those of the dense model have as many hidden units as
all experts of a token together, and as many more as make up for the parameters of the router.
Losses are of held-out text, over all sources, in nats per token. Runs that are finished are found
again in --out.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from braeburn.config import (
    ONE_DEVICE,
    AdamW,
    Checkpoint,
    Data,
    Evaluation,
    LayerConfig,
    ModelConfig,
    Precision,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.config.sublayers.experts import Experts
from braeburn.errors import UserError
from braeburn.jsonfile import json_lines
from braeburn.layers.spec import count, count_active
from braeburn.models.decoder import param_specs
from braeburn.train.compiler_flags import cache_compilations
from braeburn.train.loop import train
from corpora import sources
from short_runs import held_out_loss, stage_end

KINDS = ("dense", "sparse")
HEAD_DIM = 16
MATRICES = 3  # of a gated network


def models(arguments: argparse.Namespace) -> dict[str, ModelConfig]:
    """Both models by their kind."""
    experts = Experts(
        num_experts=arguments.experts,
        experts_per_token=arguments.experts_per_token,
        expert_dim=arguments.expert_dim,
        balance_loss=arguments.balance_loss,
    )
    active = arguments.experts_per_token * arguments.expert_dim
    dense = ModelConfig(
        vocab_size=arguments.vocabulary,
        d_model=arguments.d_model,
        num_layers=arguments.layers,
        num_heads=arguments.d_model // HEAD_DIM,
        num_kv_heads=arguments.d_model // HEAD_DIM,
        head_dim=HEAD_DIM,
        ffn_dim=active + -(-arguments.experts // MATRICES),
    )
    sparse = dense.model_copy(update={"pattern": (LayerConfig(feed_forward=experts),)})
    return {"dense": dense, "sparse": sparse}


def run_of(
    arguments: argparse.Namespace, found: dict[str, Source], model: ModelConfig, seed: int
) -> Run:
    """One training run."""
    steps = arguments.tokens // arguments.batch_tokens
    stage = Stage(
        tokens=arguments.tokens,
        sequence_length=arguments.sequence_length,
        batch_tokens=arguments.batch_tokens,
        mixture=dict.fromkeys(found, 1.0),
        learning_rate=arguments.learning_rate,
        weight_decay=0.1,
        schedule=Schedule(warmup_steps=max(1, steps // 20), floor=0.1),
    )
    return Run(
        name="sparse-against-dense",
        model=model,
        stages={"core": stage},
        data=Data(sources=found, held_out=0.1, cache=str(arguments.out / "cache")),
        optimizer=AdamW(),
        seed=seed,
        mesh=ONE_DEVICE,
        checkpoint=Checkpoint(every_steps=1_000_000, keep_last=1),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=arguments.held_out_tokens),
    )


def measure(run: Run, directory: Path) -> dict[str, Any]:
    """What a run gives, once it is trained."""
    if not train(run, directory).finished:
        raise KeyboardInterrupt  # the same command goes on
    rows = list(json_lines(directory / "metrics.jsonl"))
    return {
        "held_out": held_out_loss(stage_end(directory)),
        "step_seconds": statistics.median(row["step_seconds"] for row in rows[10:]),
        "largest_load": rows[-1].get("router_largest_load"),
    }


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['tokens']:,} tokens; parameters, and those that a token is multiplied by:"]
    for kind, sizes in result["parameters"].items():
        lines.append(f"  {kind}: {sizes['all']:,} and {sizes['active']:,}")
    heads = [*(f"seed {seed}" for seed in result["seeds"]), "mean"]
    lines.append(f"{'held-out loss':<16}" + "".join(f"{head:>9}" for head in heads))
    rows = {kind: [each["held_out"] for each in result["runs"][kind]] for kind in KINDS}
    rows["difference"] = [b - a for a, b in zip(rows["dense"], rows["sparse"], strict=True)]
    for name, values in rows.items():
        shown = (format(value, "9.4f") for value in (*values, statistics.mean(values)))
        lines.append(f"{name:<16}" + "".join(shown))
    for kind in KINDS:
        seconds = statistics.median(each["step_seconds"] for each in result["runs"][kind])
        lines.append(f"a step of the {kind} model: {1000 * seconds:.0f} ms")
    loads = ", ".join(f"{each['largest_load']:.2f}" for each in result["runs"]["sparse"])
    lines.append(f"load of the busiest expert at the end, as multiples of an even one: {loads}")
    verdict = "yes" if result["holds"] else "NO"
    lines.append(f"{verdict:<4}the sparse model beats the dense one with each seed")
    return "\n".join(lines)


def compared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains both models with all seeds."""
    found = sources(arguments.data, arguments.out / "text")
    both = models(arguments)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in arguments.seeds:
        for kind, model in both.items():
            run = run_of(arguments, found, model, seed)
            runs[kind].append(measure(run, arguments.out / f"{kind}-{seed}"))
            print(kind, seed, json.dumps(runs[kind][-1]), file=sys.stderr, flush=True)
    specs = {kind: param_specs(model) for kind, model in both.items()}
    pairs = zip(runs["dense"], runs["sparse"], strict=True)
    return {
        "tokens": arguments.tokens,
        "seeds": arguments.seeds,
        "parameters": {
            kind: {"all": count(each), "active": count_active(each)} for kind, each in specs.items()
        },
        "runs": runs,
        "holds": all(sparse["held_out"] < dense["held_out"] for dense, sparse in pairs),
    }


def main() -> int:
    """Trains everything; returns 1 if the sparse model does not beat the dense one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FILE", help="text or JSON lines"
    )
    parser.add_argument("--out", type=Path, help="keep the run directories here, and go on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--d-model", type=int, default=64, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--expert-dim", type=int, default=96, help="hidden units of an expert")
    parser.add_argument("--balance-loss", type=float, default=1e-2)
    parser.add_argument("--tokens", type=int, default=1_228_800)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument(
        "--held-out-tokens", type=int, default=32_768, help="of each source, at the end"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)

    cache_compilations()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary)
        try:
            result = compared(arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps(result, indent=1) if arguments.json else report(result))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
