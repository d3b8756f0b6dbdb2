"""What `make demo` runs: train the quickstart, compare it with general compressors, and let it
write.

The model and the compressors see the same bytes: the held-out files of the `code` source, each file
alone. A model that predicts the next byte well is a good compressor (arXiv 2309.10668), so bits per
byte put them on one scale.
"""

import argparse
import gzip
import json
import logging
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from braeburn.config import Run
from braeburn.errors import UserError

SOURCE = "code"
PROMPT = "import os\nimport sys\n\n\ndef "
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "xz -9": lambda data: lzma.compress(data, lzma.FORMAT_XZ, preset=9),
}


def held_out_files(run: Run) -> list[bytes]:
    """The text of every held-out file of the source, in UTF-8."""
    from braeburn.data.corpus import documents

    return [
        document.text.encode()
        for document in documents(SOURCE, run.data.sources[SOURCE], True, run.data.held_out)
    ]


def sample(directory: Path, max_new_tokens: int) -> str:
    """What the newest checkpoint writes after the prompt."""
    from braeburn.evaluate.generate import Generation, Sampling, generate
    from braeburn.train.trained import load

    trained = load(directory)
    prompt = trained.tokenizer.encode_prompt(PROMPT)
    generation = Generation(
        max_new_tokens, Sampling(temperature=0.8), stop_ids=trained.tokenizer.stops
    )
    (tokens,) = generate(trained.params, [prompt], trained.model, trained.run.precision, generation)
    return PROMPT + trained.tokenizer.decode(tokens)


def demonstrate(recipe: str, out: Path, max_new_tokens: int) -> dict[str, Any]:
    """Trains, compares and samples.

    Raises:
        UserError: training failed, or was stopped before its end.
    """
    from braeburn import recipes
    from braeburn.train.compiler_flags import cache_compilations
    from braeburn.train.loop import train

    run = recipes.load(recipe)
    cache_compilations()
    began = time.monotonic()
    outcome = train(run, out)
    call_seconds = time.monotonic() - began
    if not outcome.finished:
        raise UserError(
            f"training stopped at step {outcome.step} of {run.total_steps}; run the same command "
            f"to go on"
        )

    with (out / "metrics.jsonl").open() as rows:
        step_seconds = sum(json.loads(row)["step_seconds"] for row in rows)
    stages = [
        {key: stage[key] for key in ("stage", "tokens", "loss")}
        | {"held_out": stage["held_out"][SOURCE]}
        for stage in outcome.stages
    ]
    files = held_out_files(run)
    text_bytes = sum(map(len, files))
    model = stages[-1]["held_out"]
    compressors = {
        name: 8 * sum(len(compress(data)) for data in files) / text_bytes
        for name, compress in COMPRESSORS.items()
    }
    return {
        "recipe": recipe,
        "directory": str(out),
        "steps": outcome.step,
        "step_seconds": step_seconds,
        "call_seconds": call_seconds,
        "stages": stages,
        "held_out_files": len(files),
        "held_out_bytes": text_bytes,
        "same_bytes": model["bytes"] == text_bytes,
        "bits_per_byte": {"model": model["bits_per_byte"]} | compressors,
        "beats_both": model["bytes"] == text_bytes
        and model["bits_per_byte"] < min(compressors.values()),
        "sample": sample(out, max_new_tokens),
    }


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    compressors = [
        (name, value) for name, value in result["bits_per_byte"].items() if name != "model"
    ]
    lines = [
        f"{'stage':<10} {'tokens':>10} {'loss':>8} {'bits per byte':>14}"
        + "".join(f" {n:>9}" for n, _ in compressors)
    ]
    for stage in result["stages"]:
        bits = stage["held_out"]["bits_per_byte"]
        lines.append(
            f"{stage['stage']:<10} {stage['tokens']:>10,} {stage['loss']:>8.4f} {bits:>14.4f}"
            + "".join(f" {value:>9.4f}" for _, value in compressors)
        )
    lines += [
        "",
        f"{result['steps']} steps in {result['step_seconds']:.0f} s; this call spent "
        f"{result['call_seconds']:.0f} s training, with preparation, compilation and evaluation.",
        f"Bits per byte are of {result['held_out_files']} held-out files of source {SOURCE!r}, "
        f"{result['held_out_bytes']:,} bytes, which training never saw; each is compressed alone.",
    ]
    evaluated = result["stages"][-1]["held_out"]["bytes"]
    if not result["same_bytes"]:
        lines.append(
            f"The model was evaluated on {evaluated:,} bytes of them only, so the columns do not "
            f"compare: raise evaluation.tokens."
        )
    elif result["beats_both"]:
        lines.append(
            "The model predicts these files better than both gzip -9 and xz -9 compress them."
        )
    else:
        better = [name for name, value in compressors if value <= result["bits_per_byte"]["model"]]
        lines.append(f"The model does not beat {' and '.join(better)} on these files.")
    lines += ["", f"The model at temperature 0.8, after {PROMPT!r}:", "", result["sample"]]
    return "\n".join(lines)


def main() -> int:
    """Runs the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--recipe", default="quickstart", help="any recipe with a source named code"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="the run directory"
    )
    parser.add_argument("--max-new-tokens", type=int, default=160, help="length of the sample")
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("braeburn").setLevel(logging.INFO)

    out = arguments.out
    if (out / "config.json").exists():
        print(
            f"{str(out)!r} holds a run: it goes on, or is shown if finished. Delete it to train "
            f"anew.",
            file=sys.stderr,
        )
    try:
        result = demonstrate(arguments.recipe, out, arguments.max_new_tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if arguments.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
