"""The command line. Each command imports what it needs, so that `--help` answers at once."""

import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from braeburn import __version__
from braeburn.background import ending_process
from braeburn.disk import explained
from braeburn.errors import UserError
from braeburn.parallel import processes
from braeburn.train.quiet import quieten_orbax

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in recipe, or file.py:function.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field; may be given repeatedly."),
]
Out = Annotated[Path, typer.Option(help="The run directory; a run begun there goes on.")]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="TARGET",
        help="chip:count or chip:slicesxchips, as in h100:16 or v4:8x1024.",
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Restarts from the last checkpoint after failures, at most."
    ),
]
Submit = Annotated[
    bool, typer.Option("--submit", help="Hand it to the cluster instead of printing it.")
]
ChipsFile = Annotated[
    Path | None,
    typer.Option(
        "--chips", metavar="FILE", help="TOML that adds chips to the catalogue or changes figures."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]


# typer brings a click of its own.
UsageError: Any = typer.BadParameter.__base__


def console() -> None:
    """The installed command: `main`, for training in a process that takes its memory in huge pages.

    They save a sixth of the time of a step on CPUs, and glibc reads its settings only as a process
    starts.
    """
    if (
        sys.argv[1:2] == ["train"]
        and sys.platform == "linux"
        and "GLIBC_TUNABLES" not in os.environ
    ):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
    with ending_process(processes.wait_for_others):
        main()


def main() -> None:
    """Runs the command line; a mistake of the user's is one sentence on standard error and exit
    code 2.
    """
    quieten_orbax()
    try:
        _check_encoding(sys.argv[1:])
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="braeburn", standalone_mode=False))
    except UserError as error:
        message = str(error)
    except UsageError as error:
        message = (
            f"{error.format_message().rstrip('.')}; `{error.ctx.command_path} --help` lists "
            f"what there is"
        )
    except typer.Abort:
        print("interrupted", file=sys.stderr)
        processes.leave(130)
    except processes.ProcessLost as error:
        processes.report(str(error))
        processes.leave(1)
    except Exception as error:
        sentence = explained(error) if isinstance(error, OSError) else None
        if sentence:
            processes.report(sentence)
            processes.leave(2)
        if not processes.joined():
            raise
        traceback.print_exc()
        processes.leave(1)
    processes.report(message)
    processes.leave(2)


def _check_encoding(arguments: Sequence[str]) -> None:
    """Refuses arguments that are not UTF-8: prompts become tokens, names and paths JSON, and
    neither can hold them.

    Raises:
        UserError: naming the argument.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the argument {argument!r} is not UTF-8; write it in UTF-8, or rename the file "
                f"or folder that it names"
            ) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"braeburn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Pretrain language models in pure JAX, from one recipe."""


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the built-in recipes."""
    from braeburn import recipes

    descriptions = {name: recipes.description(name) for name in recipes.BUILT_IN}
    if as_json:
        _print_json(descriptions)
        return
    _print_rows(list(descriptions.items()), "ll")


@app.command()
def chips(
    claims: Annotated[
        bool, typer.Option("--claims", help="Check an article's claims against the catalogue.")
    ] = False,
    extra: ChipsFile = None,
    as_json: AsJson = False,
) -> None:
    """List the accelerators, each figure with how far it is to be trusted."""
    from braeburn.hardware.catalogue import FIGURES, LEGEND, catalogue, facts
    from braeburn.plan.claims import claims as check

    table = catalogue(extra)
    checked = check(table, facts(extra)) if claims else []
    if as_json:
        listed = {name: dataclasses.asdict(chip) for name, chip in table.items()}
        _print_json([dataclasses.asdict(claim) for claim in checked] if claims else listed)
        return
    for c in checked:
        figures = ", ".join(map(str, c.checks))
        print(
            f"{c.claim}\n  figure   {figures} ({c.confidence or 'no figure'})\n  verdict  "
            f"{c.verdict}\n"
        )
    if not claims:
        rows = [("chip", *(name.replace("_", " ") for name in FIGURES), "JAX")]
        for name, chip in table.items():
            known = [getattr(chip, field) for field in FIGURES]
            cells = (
                f"{figure.value:,.10g} {figure.confidence}" if figure else "unknown"
                for figure in known
            )
            rows.append(
                (
                    name,
                    *cells,
                    f"refused: {chip.refused}" if chip.refused else chip.back_end or "unknown",
                )
            )
        _print_rows(rows, "l" + "r" * len(FIGURES) + "l")
    print(f"confidence: {LEGEND}")


@app.command()
def plan(
    recipe: Recipe,
    on: Annotated[
        list[str],
        typer.Option(
            "--on", metavar="TARGET ...", help="One or more of chip:count or chip:slicesxchips."
        ),
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="TARGET", hidden=True)
    ] = None,  # --on takes several
    assignments: Set = None,
    stage: Annotated[
        str | None, typer.Option(metavar="S", help="One stage of the recipe; all by default.")
    ] = None,
    layouts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Layouts to show of each stage.")
    ] = 5,
    verify: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Compile the best N of each stage and rank them anew."
        ),
    ] = 0,
    failures_per_chip_hour: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Of chips and all that belongs to them; Llama 3's by default."
        ),
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="That training stands still for a checkpoint.")
    ] = None,
    restart_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="From a failure until training goes on.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with charts, too.")
    ] = None,
    extra: ChipsFile = None,
    as_json: AsJson = False,
) -> None:
    """Rank the layouts of a recipe on hardware: memory, step time, MFU, days, cost, energy and
    goodput.
    """
    runs = [_on_target(recipe, text, assignments, extra)[:2] for text in [*on, *(more or [])]]
    stages = [_stage(recipe, runs[0][0], stage)] if stage else list(runs[0][0].stages)
    from braeburn.hardware.catalogue import catalogue
    from braeburn.plan.compare import compare
    from braeburn.plan.compiled import ranked_by_compiling
    from braeburn.plan.page import write
    from braeburn.plan.table import tables

    given = {
        "failures_per_chip_hour": failures_per_chip_hour,
        "checkpoint_seconds": checkpoint_seconds,
        "restart_seconds": restart_seconds,
    }
    failures = {name: value for name, value in given.items() if value is not None}
    ranking = {"ranked": ranked_by_compiling(verify, extra)} if verify else {}
    plan = compare(recipe, runs, catalogue(extra), stages, failures, **ranking)
    refused = [
        f"{target['target']}: {target['refused']}"
        for target in plan["targets"]
        if target["refused"]
    ]
    if len(refused) == len(runs):
        raise UserError("; ".join(refused))
    if html:
        write(plan, html)
    if as_json:
        _print_json(plan)
        return
    for title, rows, align in tables(plan, layouts):
        print(title)
        _print_rows(rows, align)
        print()
    print("\n".join(f"refused: {reason}" for reason in refused))


@app.command()
def explain(recipe: Recipe, assignments: Set = None, as_json: AsJson = False) -> None:
    """Print the resolved run, where each value came from, and what it amounts to."""
    run, origins = _resolve(recipe, assignments)
    from braeburn.config import flatten
    from braeburn.data.mixture import rounded_shares
    from braeburn.model import spec, transformer

    specs = transformer.param_specs(run.model)
    parameters = {
        "total": spec.count(specs),
        "embedding": spec.count(specs, ("embedding",)),
        "non_embedding": spec.count(specs, ("matrix", "norm")),
    }
    stages = {
        name: {
            "tokens": stage.steps * stage.batch_tokens,
            "steps": stage.steps,
            "sequence_length": stage.sequence_length,
            "batch_size": stage.batch_size,
            "rope_base": models.trained.rope_base,
            "parameters": spec.count(transformer.param_specs(models.trained)),
            "parameters_left": spec.count(transformer.param_specs(models.left)),
        }
        for (name, stage), models in zip(run.stages.items(), run.models().values(), strict=True)
    }
    resolved = run.model_dump(mode="json")
    warnings = rounded_shares(run.stages)
    if as_json:
        facts = {"run": resolved, "provenance": origins, "parameters": parameters, "stages": stages}
        _print_json({**facts, "warnings": warnings})
        return
    _print_rows(
        [
            (path, json.dumps(value), origins.get(path, "default"))
            for path, value in flatten(resolved)
        ],
        "lll",
    )
    total, embedding = parameters["total"], parameters["embedding"]
    print(
        f"\nparameters: {total:,} ({parameters['non_embedding']:,} without the {embedding:,} of "
        f"embeddings)\n"
    )
    header = ("stage", *(field.replace("_", " ") for field in next(iter(stages.values()), {})))
    rows = [
        (name, *(f"{value:,.0f}" for value in facts.values()), _besides_training(run.stages[name]))
        for name, facts in stages.items()
    ]
    total_row = ("all", f"{sum(f['tokens'] for f in stages.values()):,}", f"{run.total_steps:,}")
    _print_rows([header, *rows, total_row], "l" + "r" * (len(header) - 1) + "l")
    for line in warnings:
        print(f"\n{line}")


def _besides_training(stage: Any) -> str:
    """What a stage prunes, who teaches it, and how it rounds weights, in a few words."""
    said = []
    if stage.pruning:
        kept = " ".join(f"{axis}={size}" for axis, size in stage.pruning.keep.items())
        said.append(f"prunes to {kept} by {stage.pruning.method}")
    if stage.teacher:
        how = stage.distillation
        target = f"top {how.top_k}" if how.target == "top_k" else how.target
        said.append(
            f"taught by {stage.teacher}: {target}{', cached' if how.cached else ''}, weight "
            f"{how.weight:g}"
        )
    if stage.quantization:
        said.append(
            f"rounds to {stage.quantization.kind} in groups of {stage.quantization.group_size}"
        )
    return "; ".join(said)


@app.command()
def train(
    recipe: Recipe,
    out: Out,
    assignments: Set = None,
    stop_after_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Save and stop after N steps of this call."),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of several processes by hand: where process 0 listens, on all its interfaces.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(max=2**20, metavar="N", help="Of several: how many.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(metavar="I", help="Of several: which one, from 0.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train all stages of a recipe; run again on the same folder, it resumes."""
    run, origins = _resolve(recipe, assignments)
    from braeburn.train.environment import gpu_environment

    os.environ |= gpu_environment()
    processes.find(
        coordinator, num_processes, process_id
    )  # before JAX, for whose import a mistake need not wait
    processes.connect(coordinator, num_processes, process_id)
    _begin_computing()
    from braeburn.interop.exchange import find_teacher
    from braeburn.train.loop import train

    outcome = train(
        run, out, origins=origins, stop_after_steps=stop_after_steps, find_teacher=find_teacher
    )
    if processes.is_main() and as_json:
        _print_json({"step": outcome.step, "finished": outcome.finished, "stages": outcome.stages})
    elif processes.is_main():
        _print_stages(outcome.stages)
    if processes.joined() and not outcome.finished:
        processes.leave(
            0
        )  # where one was stopped at work that goes on, JAX would wait at exit for all to end well


def _print_stages(stages: list[dict[str, Any]]) -> None:
    """The table of finished stages that a run ends with."""
    rows = [("stage", "tokens", "loss", "held-out", "loss", "bits per byte")]
    for stage in stages:
        for source, held_out in stage["held_out"].items() or [("-", None)]:
            figures = (
                (f"{held_out['loss']:.4f}", f"{held_out['bits_per_byte']:.4f}")
                if held_out
                else ("-", "-")
            )
            loss = "-" if stage["loss"] is None else f"{stage['loss']:.4f}"  # its rows were lost
            rows.append((stage["stage"], f"{stage['tokens']:,}", loss, source, *figures))
    if stages:
        _print_rows(rows)


@app.command()
def evaluate(
    directory: RunFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Text, JSONL or Parquet; without it, the run's held-out text."
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", hidden=True)
    ] = None,  # --data FILE ... takes several
    field: Annotated[
        str, typer.Option(help="The field of JSONL or Parquet rows that holds the text.")
    ] = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens that the model sees at once; as many as in training without it.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens from window to window; with fewer than in one, windows overlap.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity, next-token accuracy and bits per byte of the newest checkpoint."""
    _begin_computing()
    from braeburn.evaluate.text import Windows, evaluate_files, evaluate_held_out
    from braeburn.train.trained import load

    trained = load(directory)
    _warn_of_unused_accelerator()
    texts = [*(data or []), *(more or [])]
    windows = Windows(sequence_length, stride)
    results = (
        evaluate_files(trained, texts, field, windows)
        if texts
        else evaluate_held_out(trained, windows)
    )
    if as_json:
        _print_json({"step": trained.step, "results": results})
        return
    formats = {
        "tokens": ",",
        "loss": ".4f",
        "perplexity": ".3f",
        "accuracy": ".2%",
        "bits_per_byte": ".4f",
    }
    rows = [
        (name, *(format(v[key], how) for key, how in formats.items()))
        for name, v in results.items()
    ]
    _print_rows([("text", *(key.replace("_", " ") for key in formats)), *rows])


@app.command()
def generate(
    directory: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given repeatedly.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Tokens to write at most.")
    ] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 is greedy; the model's own default without it, or 0.8."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0, help="Sample among the k likeliest tokens only; 0 is all, unless the model says."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens of this mass."),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Lay prompts out by the model's chat template, as a user's messages."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random choices.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with the newest checkpoint."""
    _begin_computing()
    from braeburn.evaluate.chat import encode_chat
    from braeburn.evaluate.generate import generate, sampling_defaults
    from braeburn.train.trained import load

    trained = load(directory)
    _warn_of_unused_accelerator()
    tokenizer = trained.tokenizer
    if chat:
        prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in prompt]
    else:
        prompts = [tokenizer.encode_prompt(text) for text in prompt]
    longest, context = max(map(len, prompts)), trained.sequence_length
    if context and longest + max_new_tokens > context:
        what = (
            "the prompt alone has"
            if longest >= context
            else f"with --max-new-tokens {max_new_tokens} there are"
        )
        _say(
            f"warning: {what} up to {longest if longest >= context else longest + max_new_tokens} "
            f"tokens, and the model was trained on sequences of at most {context}: expect poor "
            f"text beyond; shorten the prompt"
            + (
                ""
                if longest >= context
                else f", or set --max-new-tokens to at most {context - longest}"
            )
        )
    default, not_applied = sampling_defaults(tokenizer.sampling)
    if not_applied:
        print(
            f"the model asks for {', '.join(not_applied)}, which is not applied here",
            file=sys.stderr,
        )
    if greedy:
        temperature = 0.0
    continuations = generate(
        trained.params,
        prompts,
        trained.model,
        trained.run.precision,
        max_new_tokens=max_new_tokens,
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k if top_k is None else top_k or None,
        top_p=default.top_p if top_p is None else top_p,
        seed=seed,
        stop_ids=tokenizer.stops,
    )
    texts = [tokenizer.decode(tokens) for tokens in continuations]
    if as_json:
        samples = [
            {"prompt": before, "text": text, "tokens": tokens}
            for before, text, tokens in zip(prompt, texts, continuations, strict=True)
        ]
        _print_json({"step": trained.step, "samples": samples})
        return
    if not chat:
        texts = [before + text for before, text in zip(prompt, texts, strict=True)]
    print("\n---\n".join(texts))


@app.command()
def prune(
    directory: RunFolder,
    ffn: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Hidden units of the FFN that stay in each layer."),
    ],
    out: Annotated[Path, typer.Option(help="The run directory to make.")],
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="T", help="To learn masks on; 3% of the run's without it."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text to learn from; without it, that which the run was trained on.",
        ),
    ] = None,
    field: Annotated[
        str, typer.Option(help="The field of JSONL or Parquet rows that holds the text.")
    ] = "text",
    method: Annotated[
        str,
        typer.Option(
            help="soft_top_k learns what stays; activation, magnitude and random only cut."
        ),
    ] = "soft_top_k",
    assignments: Set = None,
    as_json: AsJson = False,
) -> None:
    """Cut FFN units off the newest checkpoint: a smaller run to evaluate, export or train on."""
    from pydantic import ValidationError

    from braeburn.config import Pruning, Source, explain_validation_error, parse_assignment

    try:
        pruning = Pruning.model_validate({"keep": {"ffn": ffn}, "method": method})
    except ValidationError as error:
        raise UserError(f"--{explain_validation_error(error)}") from None
    changes = dict(parse_assignment(text) for text in assignments or [])
    _begin_computing()
    from braeburn.compress.prune import prune

    text = Source(paths=tuple(data), field=field) if data else None
    model = prune(directory, out, pruning, tokens, changes, text)
    result = {"out": str(out), "model": model.model_dump(mode="json")}
    _print_json(result) if as_json else print(
        f"pruned {str(directory)!r} to ffn_dim={ffn} into {str(out)!r}"
    )


@app.command("import")
def import_(
    hf_dir: Annotated[
        Path,
        typer.Argument(metavar="HF_DIR", help="A Hugging Face directory: Llama or Qwen3, dense."),
    ],
    out: Annotated[Path, typer.Option(help="The run directory to make.")],
    as_json: AsJson = False,
) -> None:
    """Make a run directory of a Hugging Face model, to evaluate, sample or train on."""
    from braeburn.interop.exchange import import_huggingface

    run = import_huggingface(hf_dir, out)
    result = {"out": str(out), "model": run.model.model_dump(mode="json")}
    if as_json:
        _print_json(result)
        return
    print(f"imported {str(hf_dir)!r} into {str(out)!r}")
    print(
        f"a recipe trains on with model=Model.from_directory({str(out)!r}) and "
        f"initial_weights={str(out)!r}"
    )


@app.command()
def export(
    directory: RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to make, or a file that ends in .gguf.")],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            help="hf: safetensors, config and tokenizer for transformers; gguf: one file for "
            "llama.cpp."
        ),
    ] = "hf",
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Of a gguf's matrices: f16, q8_0 or q4_0; f16 without it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the newest checkpoint for other software."""
    if format not in ("hf", "gguf"):
        raise UserError(f"--format {format!r} is not known; use --format hf or --format gguf")
    if format == "hf" and type_ is not None:
        raise UserError(
            f"--type {type_} is one of --format gguf; a Hugging Face directory holds float32, "
            f"leave it out"
        )
    if format == "hf" and out.suffix == ".gguf":
        raise UserError(
            f"--out {str(out)!r} names a GGUF file, but a folder will be made; add --format gguf"
        )
    if type_ not in (None, "f16", "q8_0", "q4_0"):
        raise UserError(f"--type {type_!r} is not known; use --type f16, q8_0 or q4_0")
    from braeburn.interop.exchange import export_gguf, export_huggingface

    result: dict[str, Any] = {"out": str(out), "format": format}
    if format == "hf":
        result["step"] = export_huggingface(directory, out)
    else:
        written = export_gguf(directory, out, type_ or "f16")  # type: ignore[arg-type]
        result["step"], path, uneven = written
        result |= {"out": str(path), "type": type_ or "f16", "float16": uneven}
    if as_json:
        _print_json(result)
        return
    print(f"exported step {result['step']} of {str(directory)!r} into {result['out']!r}")
    if result.get("float16"):
        print(f"float16, since their rows are no multiple of 32: {', '.join(result['float16'])}")


@app.command()
def verify(
    recipe: Recipe, on: On = "cpu:8", assignments: Set = None, as_json: AsJson = False
) -> None:
    """Train a recipe, shrunk, on simulated devices: any layout, kill, resume or reshard must give
    the same losses.
    """
    from braeburn.hardware.targets import parse_target
    from braeburn.verify.shrink import ENVIRONMENT

    os.environ |= ENVIRONMENT  # before JAX, which a recipe of the user's may import
    run, _ = _resolve(recipe, assignments)
    target = parse_target(on)
    _begin_computing()
    from braeburn.verify.checks import verify

    checks = verify(run, recipe, target, lambda line: print(line, file=sys.stderr, flush=True))
    wrong = sum(not check.passed for check in checks)
    if as_json:
        _print_json(
            {
                "passed": not wrong,
                "target": str(target),
                "checks": [dataclasses.asdict(c) for c in checks],
            }
        )
    else:
        rows = [("check", "layout", "steps", "difference", "verdict", "")]
        for c in checks:
            difference = (
                "-" if c.difference is None else f"{c.difference:.1e}" if c.difference else "0"
            )
            rows.append((c.check, c.layout, str(c.steps), difference, c.verdict, c.reason))
        _print_rows(rows, "llrrll")
        skipped = sum(c.verdict == "skipped" for c in checks)
        print(
            f"\n{len(checks)} checks: {len(checks) - wrong - skipped} passed, {skipped} skipped, "
            f"{wrong} failed"
        )
    if wrong:
        raise typer.Exit(1)


@app.command("compile")
def compile_(
    recipe: Recipe,
    on: On,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the recipe's; the first without it.")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=N,...", help="Sizes of the mesh, as replica=1,fsdp=2048,tensor=4."
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", help="Where it does not fit, compile what the plan says would, best first."
        ),
    ] = False,
    assignments: Set = None,
    extra: ChipsFile = None,
    memory_limit: Annotated[
        float,
        typer.Option(
            min=0.1, metavar="GB", help="What compiling may take of this machine's memory."
        ),
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Compile a train step for hardware that is not here: does it fit, how fast, and what crosses
    which link.
    """
    base, _ = _resolve(recipe, assignments)
    stage = _stage(recipe, base, stage or next(iter(base.stages)))
    path = f"stages.{stage}.mesh" if base.stages[stage].mesh else "mesh"
    sizes = [f"{path}.{part.strip()}" for part in mesh.split(",")] if mesh else []
    run, target, _ = _on_target(recipe, on, [*(assignments or []), *sizes], extra)
    from braeburn.plan.compilation import check_compiler

    check_compiler(target)
    from braeburn.plan.compiled import changes_that_fit, compile_step
    from braeburn.plan.report import report

    print(f"compiling {stage} of {run.name} for {target} ...", file=sys.stderr, flush=True)
    compiled = compile_step(run, stage, target, extra, memory_limit)
    facts = compiled.summary()
    if not compiled.fits:
        facts["changes"] = changes_that_fit(
            compiled, verify=fix, chips=extra, memory_gb=memory_limit
        )
    if as_json:
        _print_json(facts)
    else:
        for rows in report(facts):
            _print_rows(rows)
    if not compiled.fits or compiled.offenders:
        raise typer.Exit(1)


launch = typer.Typer(help="Several processes here, or the script or manifest for a cluster.")
app.add_typer(launch, name="launch")


@launch.command()
def local(
    recipe: Recipe,
    out: Out,
    num_processes: Annotated[
        int, typer.Option("--processes", min=1, max=1024, metavar="N", help="How many.")
    ],
    assignments: Set = None,
    max_restarts: MaxRestarts = 3,
    as_json: AsJson = False,
) -> None:
    """Train with several processes on this machine; when one dies or hangs, all go on from the last
    checkpoint.
    """
    _resolve(recipe, assignments)
    from braeburn.launch.local import launch
    from braeburn.launch.supervisor import GaveUp

    arguments = [*_train_arguments(recipe, out, assignments), *(["--json"] if as_json else [])]
    try:
        ending = launch(arguments, out, num_processes, max_restarts)
    except GaveUp as failure:
        processes.report(str(failure))
        raise typer.Exit(1) from None
    if not as_json:
        print(ending.output, end="")
        return
    restarts = [dataclasses.asdict(restart) for restart in ending.restarts]
    _print_json({**json.loads(ending.output), "processes": num_processes, "restarts": restarts})


@launch.command()
def slurm(
    recipe: Recipe,
    on: On,
    out: Out,
    assignments: Set = None,
    time: Annotated[
        str, typer.Option(metavar="LIMIT", help="Time limit of the job, as SLURM writes it.")
    ] = "1-00:00:00",
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="Partition of the cluster.")
    ] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Account to charge.")] = None,
    max_restarts: MaxRestarts = 3,
    submit: Submit = False,
    as_json: AsJson = False,
) -> None:
    """Print the script that trains on a SLURM cluster, or submit it."""
    from braeburn.launch.slurm import script

    run, target, arguments = _job(recipe, on, out, assignments)
    text = script(run.name, arguments, out, target, time, partition, account, max_restarts)
    _print_job("script", text, ["sbatch"] if submit else None, as_json)


@launch.command()
def kubernetes(
    recipe: Recipe,
    on: On,
    out: Annotated[
        Path,
        typer.Option(help="The run directory inside the containers, below the volume's folder."),
    ],
    image: Annotated[str, typer.Option(help="Container image with Braeburn and the target's JAX.")],
    claim: Annotated[
        str,
        typer.Option(metavar="NAME", help="PersistentVolumeClaim for the parent folder of --out."),
    ],
    assignments: Set = None,
    max_restarts: MaxRestarts = 3,
    submit: Submit = False,
    as_json: AsJson = False,
) -> None:
    """Print the JobSet that trains on TPU slices, GPU nodes or CPUs of a Kubernetes cluster, or
    apply it.
    """
    from braeburn.launch.kubernetes import manifest

    run, target, arguments = _job(recipe, on, out, assignments)
    text = manifest(run.name, arguments, out, target, image, claim, max_restarts)
    _print_job("manifest", text, ["kubectl", "apply", "-f", "-"] if submit else None, as_json)


def _job(recipe: str, on: str, out: Path, assignments: list[str] | None) -> Any:
    """The run, the target, and the arguments of `train` there, once the mesh is known to fit."""
    from braeburn.train.stages import sizes_of

    run, target, assignments = _on_target(recipe, on, assignments)
    for stage in run.stages:
        sizes_of(run, stage, target.devices)
    return run, target, _train_arguments(recipe, out, assignments)


def _stage(recipe: str, run: Any, stage: str) -> str:
    """The name of a stage, once the run is known to have it."""
    if stage not in run.stages:
        raise UserError(
            f"--stage {stage!r} is no stage of {recipe}; it must be one of {', '.join(run.stages)}"
        )
    return stage


def _on_target(
    recipe: str, on: str, assignments: list[str] | None, chips: Path | None = None
) -> Any:
    """The run on a target, the target, and the overrides, completed with one replica for each
    slice.
    """
    from braeburn.hardware.catalogue import catalogue
    from braeburn.hardware.targets import parse_target

    run, origins = _resolve(recipe, assignments)
    target = parse_target(on, catalogue(chips))
    if target.slices > 1:
        # Only the sum of gradients is to cross slices.
        meshes = [
            "mesh",
            *(f"stages.{name}.mesh" for name, stage in run.stages.items() if stage.mesh),
        ]
        unset = [mesh for mesh in meshes if origins.get(f"{mesh}.replica", "default") == "default"]
        assignments = [*(assignments or []), *(f"{mesh}.replica={target.slices}" for mesh in unset)]
        run, _ = _resolve(recipe, assignments)
    return run, target, assignments


def _train_arguments(recipe: str, out: Path, assignments: list[str] | None) -> list[str]:
    """The arguments of `train` that a launcher passes on."""
    return [
        recipe,
        "--out",
        str(out),
        *(part for text in assignments or [] for part in ("--set", text)),
    ]


def _print_job(kind: str, text: str, command: list[str] | None, as_json: bool) -> None:
    """Prints what describes a job, or hands it to `command` and prints the answer."""
    from braeburn.launch.submit import submit

    answer = submit(command, text) if command else None
    if as_json:
        _print_json({kind: text, "submitted": answer})
        return
    print(answer or text, end="\n" if answer else "")


def _resolve(recipe: str, assignments: list[str] | None) -> Any:
    """The run that a recipe and its overrides amount to, and where each value came from."""
    from braeburn.config import override, parse_assignment, provenance
    from braeburn.recipes import load

    base = load(recipe)
    values = dict(parse_assignment(text) for text in assignments or [])
    return override(base, values), provenance(base, values)


def _begin_computing() -> None:
    """Logs go to standard error, from the main process only, and compiled programs to the cache.

    Imports JAX.
    """
    from braeburn.train.compilation import cache_compilations

    cache_compilations()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("braeburn").setLevel(logging.INFO if processes.is_main() else logging.WARNING)


def _warn_of_unused_accelerator() -> None:
    """Warns where JAX computes on the CPU of a machine that has a GPU or a TPU."""
    import jax

    from braeburn.train.environment import unused_accelerator

    if warning := unused_accelerator(jax.default_backend()):
        _say(warning)


def _say(line: str) -> None:
    """A line for the user on standard error."""
    print(line, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_rows(rows: Sequence[tuple[str, ...]], align: str = "l") -> None:
    """Columns as wide as their widest cell: to the left where `align` has an l, the others,
    figures, to the right.
    """
    columns = max(map(len, rows))
    widths = [
        max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)
    ]
    for row in rows:
        sides = (
            str.ljust if align[column : column + 1] == "l" else str.rjust
            for column in range(columns)
        )
        print(
            "  ".join(
                side(cell, width) for side, cell, width in zip(sides, row, widths, strict=False)
            ).rstrip()
        )
