"""Commands to and from other software: `import` and `export`."""

from typing import Annotated, Any

import typer

from braeburn.cli.options import AsJson, Location, NewRun, RunFolder
from braeburn.cli.output import print_json
from braeburn.cli.resolve import join_to_write, run_folder, written_type
from braeburn.parallel import processes

commands = typer.Typer()


@commands.command("import")
def import_(
    hf_dir: Annotated[
        Location,
        typer.Argument(
            metavar="HF_DIR",
            help="A Hugging Face directory, or its URL: Llama, Qwen3, Mixtral, Gemma 3 or OLMo 2.",
        ),
    ],
    out: NewRun,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="What weights are stored in: fp32 or bf16; without it, bf16 where the model has "
            "them so, and fp32 otherwise.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run directory of a Hugging Face model, to evaluate, sample or train on."""
    from braeburn.config import weight_type

    stored_as = weight_type(dtype)
    from braeburn.remote import place

    source, target = place(hf_dir, "HF_DIR"), place(out, "--out")
    join_to_write(target)
    from braeburn.interop.exchange import import_huggingface
    from braeburn.train.copies import fetched, made_for

    with made_for(target) as made:
        run = import_huggingface(fetched(source), made, stored_as)
    result = {"out": out, "model": run.model.model_dump(mode="json")}
    if not processes.is_main():
        return
    if as_json:
        print_json(result)
        return
    print(f"imported {hf_dir!r} into {out!r}")
    print(
        f"a recipe trains on with model=ModelConfig.from_directory({out!r}) and "
        f"initial_weights={out!r}"
    )


@commands.command()
def export(
    directory: RunFolder,
    out: Annotated[
        Location,
        typer.Option(
            metavar="PATH", help="The folder to make, or a file that ends in .gguf; or its URL."
        ),
    ],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            help="hf: safetensors, config and tokenizer for transformers; gguf: one file for "
            "llama.cpp; stablehlo: programs that plain JAX runs on any platform."
        ),
    ] = "hf",
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Of a gguf's matrices: f16, q8_0 or q4_0; f16 without it."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of an hf's or stablehlo's weights: fp32 or bf16; without it fp32 of an hf, and "
            "what the run computes in of a stablehlo.",
        ),
    ] = None,
    platforms: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of a stablehlo's programs: some of cpu,cuda,rocm,tpu; all of them without it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the newest checkpoint for other software."""
    from braeburn.config import platforms_of
    from braeburn.remote import place

    written_as: Any = written_type(out, format, dtype, type_)
    lowered_for = platforms_of(format, platforms)
    target = place(out, "--out")
    join_to_write(target)
    from braeburn.interop.exchange import export_gguf, export_huggingface, export_stablehlo
    from braeburn.train.copies import made_for

    source = run_folder(directory)
    result: dict[str, Any] = {"out": out, "format": format}
    with made_for(target, among_others=format == "gguf") as made:
        if format == "hf":
            result |= {"dtype": written_as, "step": export_huggingface(source, made, written_as)}
        elif format == "stablehlo":
            about = export_stablehlo(source, made, lowered_for, written_as or None)
            told = ("dtype", "step", "platforms")
            result |= {name: value for name, value in about.items() if name in told}
        else:
            written = export_gguf(source, made, written_as)
            result["step"], path, uneven = written
            # Where it is in the end.
            file = out if path == made else f"{out.rstrip('/')}/{path.name}"
            result |= {"out": file, "type": written_as, "float16": uneven}
    if not processes.is_main():
        return
    if as_json:
        print_json(result)
        return
    print(f"exported step {result['step']} of {directory!r} into {result['out']!r}")
    if result.get("float16"):
        print(f"float16, since their rows are no multiple of 32: {', '.join(result['float16'])}")
