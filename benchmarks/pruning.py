"""Whether a pruned start saves tokens, and which way to choose the units is best.

For each seed a larger model is trained once. From copies of it, each method cuts the FFN in a stage
of the same tokens: Soft-Top-K learns masks for the whole stage and cuts at its end; activation
importance, magnitude and the lot cut first and train what is left. A short core stage follows.
Beside them stands the same small model from scratch, which has more tokens than the pruned one's
core stage. Losses are of held-out text, measured at intervals.
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from braeburn.config import (
    ONE_DEVICE,
    Checkpoint,
    Data,
    Evaluation,
    ModelConfig,
    Precision,
    Pruning,
    Run,
    Schedule,
    Source,
    Stage,
)
from braeburn.errors import UserError
from braeburn.jsonfile import json_lines
from braeburn.train.compiler_flags import cache_compilations
from braeburn.train.loop import train
from corpora import sources

METHODS = ("soft_top_k", "activation", "magnitude", "random")
WANTED_SHARE = 0.6
# Steps between evaluations.
EVERY = 20


def base_run(arguments: argparse.Namespace, found: dict[str, Source], seed: int) -> Run:
    """The larger model and what all runs share, with no stage yet."""
    return Run(
        name="pruning",
        model=ModelConfig(
            vocab_size=512,
            d_model=arguments.d_model,
            num_layers=arguments.layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=arguments.d_model // 4,
            ffn_dim=arguments.ffn,
            scan_layers=False,
        ),
        stages={},
        data=Data(sources=found, held_out=0.1, cache=str(arguments.out / "cache")),
        seed=seed,
        mesh=ONE_DEVICE,
        checkpoint=Checkpoint(every_steps=1_000_000, keep_last=1),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(tokens=arguments.held_out_tokens),
    )


def stage(
    run: Run, arguments: argparse.Namespace, tokens: int, pruning: Pruning | None = None
) -> Stage:
    """A stage of so many tokens spread evenly over the sources."""
    return Stage(
        tokens=tokens,
        sequence_length=64,
        batch_tokens=1024,
        mixture=dict.fromkeys(run.data.sources, 1.0),
        learning_rate=arguments.pruning_learning_rate if pruning else arguments.learning_rate,
        weight_decay=3.16e-4,
        schedule=Schedule(warmup_steps=10, floor=0.05),
        pruning=pruning,
    )


def mean_loss(held_out: dict[str, dict[str, float]]) -> float:
    """Nats per held-out token over all sources."""
    return sum(r["loss"] * r["tokens"] for r in held_out.values()) / sum(
        r["tokens"] for r in held_out.values()
    )


def curve(directory: Path, run: Run, name: str) -> list[tuple[int, float]]:
    """Tokens seen in a stage and the held-out loss there, at each evaluation and at the stage's
    end.
    """
    first = run.first_steps[name]
    return [
        ((event["step"] - first) * run.stages[name].batch_tokens, mean_loss(event["held_out"]))
        for event in json_lines(directory / "events.jsonl")
        if event["event"] in ("evaluation", "stage_end") and event["stage"] == name
    ]


def measure(arguments: argparse.Namespace, found: dict[str, Source], seed: int) -> dict[str, Any]:
    """All runs of one seed."""
    base, folder = base_run(arguments, found, seed), arguments.out / f"seed-{seed}"
    small = base.model.model_copy(update={"ffn_dim": arguments.keep})

    def stages(method: Any) -> dict[str, Stage]:
        pruning = Pruning(keep={"ffn": arguments.keep}, method=method, calibration_tokens=16_384)
        return {
            "larger": stage(base, arguments, arguments.larger_tokens),
            "prune": stage(base, arguments, arguments.pruning_tokens, pruning),
            "core": stage(base, arguments, arguments.core_tokens),
        }

    larger = base.model_copy(update={"stages": stages("random")})
    train(larger, folder / "larger", stop_after_steps=larger.stages["larger"].steps)
    methods = {}
    for method in METHODS:
        run, directory = base.model_copy(update={"stages": stages(method)}), folder / method
        if method == "soft_top_k":
            run = run.model_copy(
                update={"evaluation": run.evaluation.model_copy(update={"every_steps": EVERY})}
            )
        shutil.copytree(folder / "larger", directory)
        train(run, directory)
        methods[method] = {name: curve(directory, run, name) for name in ("prune", "core")}
    scratch = base.model_copy(
        update={
            "model": small,
            "stages": {"core": stage(base, arguments, arguments.scratch_tokens)},
        }
    )
    train(scratch, folder / "scratch")
    from_scratch = curve(folder / "scratch", scratch, "core")
    wanted = from_scratch[-1][1]
    reached = next(
        (tokens for tokens, loss in methods["soft_top_k"]["core"] if loss <= wanted), None
    )
    return {
        "seed": seed,
        "larger_loss": curve(folder / "larger", larger, "larger")[-1][1],
        "after_pruning": {method: curves["prune"][-1][1] for method, curves in methods.items()},
        "after_core": {method: curves["core"][-1][1] for method, curves in methods.items()},
        "scratch_loss": wanted,
        "scratch_curve": from_scratch,
        "core_curves": {method: curves["core"] for method, curves in methods.items()},
        "reached_after_core_tokens": reached,
        "share_of_core_tokens": reached and reached / arguments.scratch_tokens,
        "share_with_pruning_tokens": reached
        and (reached + arguments.pruning_tokens) / arguments.scratch_tokens,
    }


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, bool]:
    """What is claimed, and whether it holds: of tokens for each seed, of methods on the mean over
    seeds.
    """
    claims = {
        f"a pruned start reaches the loss of the model from scratch in at most {WANTED_SHARE:.0%} "
        f"of its tokens": all(
            row["share_of_core_tokens"] is not None and row["share_of_core_tokens"] <= WANTED_SHARE
            for row in seeds
        )
    }
    for place, words in (
        ("after_pruning", "after pruning"),
        ("after_core", "after the core stage"),
    ):
        means = {method: statistics.mean(row[place][method] for row in seeds) for method in METHODS}
        claims[f"Soft-Top-K is at least as good as activation importance {words}"] = (
            means["soft_top_k"] <= means["activation"]
        )
        claims[f"activation importance beats the lot {words}"] = (
            means["activation"] < means["random"]
        )
    return claims


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    seeds, settings = result["seeds"], result["settings"]
    heads = [f"seed {row['seed']}" for row in seeds]
    lines = [
        f"FFN {settings['ffn']} -> {settings['keep']}; tokens: larger "
        f"{settings['larger_tokens']:,}, pruning {settings['pruning_tokens']:,}, core "
        f"{settings['core_tokens']:,}, scratch {settings['scratch_tokens']:,}",
        "",
        f"{'held-out loss, nats per token':<36}"
        + "".join(f"{head:>9}" for head in (*heads, "mean")),
    ]

    def line(name: str, values: list[float | None], form: str = "9.4f") -> str:
        known = [value for value in values if value is not None]
        mean = format(statistics.mean(known), form) if len(known) == len(values) else f"{'-':>9}"
        return (
            f"{name:<36}"
            + "".join(f"{'never':>9}" if v is None else format(v, form) for v in values)
            + mean
        )

    lines.append(line("larger model", [row["larger_loss"] for row in seeds]))
    for place, words in (("after_pruning", "after pruning"), ("after_core", "after core")):
        lines += [
            line(f"{words}: {method}", [row[place][method] for row in seeds]) for method in METHODS
        ]
    lines += [
        line("from scratch", [row["scratch_loss"] for row in seeds]),
        line(
            "reached in share of its tokens", [row["share_of_core_tokens"] for row in seeds], "9.0%"
        ),
        line(
            "  with those of pruning", [row["share_with_pruning_tokens"] for row in seeds], "9.0%"
        ),
        "",
        f"The loss from scratch counts as reached at the first evaluation, of one in {EVERY} "
        f"steps, at or below it.",
        *(f"{'yes' if holds else 'NO':<4}{claim}" for claim, holds in result["claims"].items()),
    ]
    return "\n".join(lines)


def main() -> int:
    """Trains everything; returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FILE", help="text or JSON lines"
    )
    parser.add_argument(
        "--out", type=Path, help="keep the run directories here; they must not exist yet"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=384, help="hidden units of the larger model")
    parser.add_argument("--keep", type=int, default=96, help="hidden units that stay")
    parser.add_argument("--larger-tokens", type=int, default=1_228_800)
    parser.add_argument("--pruning-tokens", type=int, default=163_840)
    parser.add_argument("--core-tokens", type=int, default=81_920)
    parser.add_argument("--scratch-tokens", type=int, default=307_200)
    parser.add_argument(
        "--held-out-tokens", type=int, default=8192, help="of each source, for each evaluation"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--pruning-learning-rate", type=float, default=5e-3)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)

    cache_compilations()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary)
        try:
            found = sources(arguments.data, arguments.out / "text")
            seeds = [measure(arguments, found, seed) for seed in arguments.seeds]
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    settings = {
        key: value for key, value in vars(arguments).items() if key not in ("data", "out", "json")
    }
    claims = verdicts(seeds)
    result = {"settings": settings, "sources": sorted(found), "seeds": seeds, "claims": claims}
    print(json.dumps(result) if arguments.json else report(result))
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
