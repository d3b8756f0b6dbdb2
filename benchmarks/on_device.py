"""What `make demo-on-device` runs: a larger model is pruned, its student distilled, lengthened,
quantised and shipped.

Beside this chain, the same small model is trained from scratch on the tokens that the student gets
once it is small. All models end in one table: each is written as the GGUF file that it would ship
as, and predicts the same held-out text, the files of the `code` source, in windows as long as the
core stage's sequences.
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braeburn.config import Run, override, validate
from braeburn.errors import UserError
from braeburn.extras import how_to_install

if TYPE_CHECKING:
    from braeburn.data.prepare import Prepared
    from braeburn.interop.gguf import Type

SOURCE = "code"
BATCH_TOKENS = 4096
STUDENT_STAGES = ("core", "continued", "context")
# What the table says of a model -> its run, the stage that leaves it, and the type of its file.
ROWS: "dict[str, tuple[str, str, Type]]" = {
    "larger model": ("chain", "larger", "f16"),
    "pruned start": ("chain", "prune", "f16"),
    "student from scratch": ("scratch", "context", "f16"),
    "distilled student": ("chain", "context", "f16"),
    "quantised student": ("chain", "quantized", "q4_0"),
}


def chain(recipe: str) -> Run:
    """The recipe, with every stage's last checkpoint kept, since all of them are measured."""
    from braeburn import recipes

    run = recipes.load(recipe)
    return override(
        run,
        {"checkpoint.keep_last": len(run.stages) + run.total_steps // run.checkpoint.every_steps},
    )


def from_scratch(run: Run, tokenizer: Path) -> Run:
    """The chain's student alone: its model, stages and text, with neither a larger model nor a
    teacher.
    """
    stages = {
        name: run.stages[name].model_copy(update={"teacher": None}) for name in STUDENT_STAGES
    }
    changes = {
        "name": f"{run.name}-scratch",
        "model": run.models()["prune"].left,
        "stages": stages,
        "data": run.data.model_copy(update={"tokenizer": str(tokenizer)}),
    }
    return validate(run.model_copy(update=changes).model_dump())


def tokens_until(run: Run, last: str, *, first: str | None = None) -> int:
    """Tokens of the stages from one to another, both included; 0 where the last comes before the
    first.
    """
    names = list(run.stages)
    between = names[names.index(first) if first else 0 : names.index(last) + 1]
    return sum(run.stages[name].steps * run.stages[name].batch_tokens for name in between)


def row(name: str, run: Run, directory: Path, prepared: "Prepared") -> dict[str, Any]:
    """A line of the table; the model's file is written into its run directory."""
    from braeburn.data.loader import held_out_batches
    from braeburn.interop import gguf
    from braeburn.layers.spec import abstract, count
    from braeburn.models.decoder import param_specs
    from braeburn.parallel.layout import one_device
    from braeburn.train.checkpoint import Checkpoints
    from braeburn.train.held_out import evaluator, measure

    _, stage, kind = ROWS[name]
    model, length = run.models()[stage].left, run.stages["core"].sequence_length
    specs = param_specs(model)
    params = Checkpoints(directory).restore_params(run.last_steps[stage], abstract(specs))
    file = directory / f"{name.replace(' ', '-')}.gguf"
    file.unlink(missing_ok=True)
    described = gguf.File(run.stages[stage].sequence_length, kind, name)
    gguf.write(file, params, model, prepared.tokenizer, described)

    shards = prepared.held_out[SOURCE]
    if shards is None:
        raise UserError(
            f"data.held_out={run.data.held_out} holds out no file of {SOURCE}; raise it"
        )
    evaluate = evaluator(model, prepared.tokenizer.token_bytes, one_device(specs, run.precision))
    batches = held_out_batches(shards, length, BATCH_TOKENS // length, shards.tokens + length)
    return {
        "model": name,
        "parameters": count(specs),
        "file": str(file),
        "bytes": file.stat().st_size,
        "tokens_seen": tokens_until(run, stage),
        "tokens_as_student": tokens_until(run, stage, first="core")
        if stage not in ("larger", "prune")
        else 0,
        "held_out": measure(evaluate, params, batches, shards.byte_ratio),
    }


def demonstrate(recipe: str, out: Path) -> dict[str, Any]:
    """Trains the chain and the student from scratch, or goes on with them, and measures all models.

    Raises:
        UserError: training failed or was stopped before its end, or the gguf package is missing.
    """
    from braeburn.data.prepare import prepare
    from braeburn.data.tokenizer import Tokenizer
    from braeburn.train.compiler_flags import cache_compilations
    from braeburn.train.loop import train

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"the models' files need the gguf package; {how_to_install('gguf')}")
    cache_compilations()
    began = time.monotonic()
    directories = {"chain": out / "chain", "scratch": out / "scratch"}
    tokenizer = directories["chain"] / "tokenizer.json"
    runs: dict[str, Run] = {}
    stages, steps, step_seconds = {}, 0, 0.0
    for key, directory in directories.items():
        runs[key] = run = from_scratch(runs["chain"], tokenizer) if runs else chain(recipe)
        print(f"{run.name}: {', '.join(run.stages)}", file=sys.stderr)
        outcome = train(run, directory)
        if not outcome.finished:
            raise UserError(
                f"{run.name} stopped at step {outcome.step} of {run.total_steps}; run this again "
                f"to go on"
            )
        stages[key] = {stage["stage"]: stage["held_out"][SOURCE] for stage in outcome.stages}
        steps += outcome.step
        with (directory / "metrics.jsonl").open() as lines:
            step_seconds += sum(json.loads(line)["step_seconds"] for line in lines)
    prepared = prepare(runs["chain"], lambda line: None, Tokenizer.load(tokenizer))
    rows = [row(name, runs[key], directories[key], prepared) for name, (key, _, _) in ROWS.items()]
    return {
        "recipe": recipe,
        "directory": str(out),
        "steps": steps,
        "step_seconds": step_seconds,
        "call_seconds": time.monotonic() - began,
        "sequence_length": runs["chain"].stages["core"].sequence_length,
        "rows": rows,
        "stages": stages,
    }


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    rows, stages = result["rows"], result["stages"]
    lines = [
        f"{'':<20} {'parameters':>11} {'bytes':>10} {'accuracy':>9} {'bits per byte':>14} "
        f"{'tokens seen':>12} {'as student':>11}"
    ]
    for line in rows:
        held_out = line["held_out"]
        lines.append(
            f"{line['model']:<20} {line['parameters']:>11,} {line['bytes']:>10,} "
            f"{held_out['accuracy']:>9.2%} {held_out['bits_per_byte']:>14.4f} "
            f"{line['tokens_seen']:>12,} {line['tokens_as_student']:>11,}"
        )
    core = {
        key: f"{v['core']['accuracy']:.2%} and {v['core']['bits_per_byte']:.4f}"
        for key, v in stages.items()
    }
    return "\n".join(
        [
            *lines,
            "",
            f"Accuracy is that of the next token, on {rows[0]['held_out']['bytes']:,} bytes of "
            f"held-out files of "
            f"source {SOURCE!r} in windows of {result['sequence_length']} tokens.",
            "Bytes are those of the GGUF file, tokenizer included: F16, and Q4_0 for the "
            "quantised student.",
            "Tokens seen are all that the weights were trained on; a pruned model's include those "
            "of the larger model it was cut from.",
            "Those as student were seen after the cut, or from scratch: there the two students "
            "are equal.",
            f"Accuracy and bits per byte as the core stage ends: from scratch {core['scratch']}, "
            f"distilled {core['chain']}.",
            f"{result['steps']} steps in {result['step_seconds']:.0f} s; this call took "
            f"{result['call_seconds']:.0f} s with preparation, compilation and evaluation.",
        ]
    )


def main() -> int:
    """Runs the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--recipe", default="afm-on-device-tiny", help="any recipe with the stages of this one"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/on-device"),
        help="the folder of both run directories",
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("braeburn").setLevel(logging.INFO)

    out = arguments.out
    if (out / "chain" / "config.json").exists():
        print(
            f"{str(out)!r} holds runs: they go on, or are shown if finished. Delete it to train "
            f"anew.",
            file=sys.stderr,
        )
    try:
        result = demonstrate(arguments.recipe, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if arguments.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
