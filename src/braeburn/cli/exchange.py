"""Commands to and from other software: `import` and `export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from braeburn.cli.options import AsJson, RunFolder
from braeburn.cli.output import print_json
from braeburn.cli.resolve import weight_type
from braeburn.errors import UserError
from braeburn.parallel import processes

commands = typer.Typer()


@commands.command("import")
def import_(
    hf_dir: Annotated[
        Path,
        typer.Argument(metavar="HF_DIR", help="A Hugging Face directory: Llama or Qwen3, dense."),
    ],
    out: Annotated[Path, typer.Option(help="The run directory to make.")],
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
    stored_as = weight_type(dtype)
    from braeburn.interop.exchange import import_huggingface

    run = import_huggingface(hf_dir, out, stored_as)
    result = {"out": str(out), "model": run.model.model_dump(mode="json")}
    if as_json:
        print_json(result)
        return
    print(f"imported {str(hf_dir)!r} into {str(out)!r}")
    print(
        f"a recipe trains on with model=ModelConfig.from_directory({str(out)!r}) and "
        f"initial_weights={str(out)!r}"
    )


@commands.command()
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
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of an hf's weights: fp32 or bf16; fp32 without it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the newest checkpoint for other software."""
    if format not in ("hf", "gguf"):
        raise UserError(f"--format {format!r} is not known; use --format hf or --format gguf")
    if format == "hf" and type_ is not None:
        raise UserError(
            f"--type {type_} is one of --format gguf; of a Hugging Face directory it is --dtype "
            f"fp32 or --dtype bf16"
        )
    if format == "gguf" and dtype is not None:
        raise UserError(
            f"--dtype {dtype} is one of --format hf; of a GGUF file it is --type f16, q8_0 or q4_0"
        )
    if format == "hf" and out.suffix == ".gguf":
        raise UserError(
            f"--out {str(out)!r} names a GGUF file, but a folder will be made; add --format gguf"
        )
    if type_ not in (None, "f16", "q8_0", "q4_0"):
        raise UserError(f"--type {type_!r} is not known; use --type f16, q8_0 or q4_0")
    chosen = weight_type(dtype)
    processes.connect()
    from braeburn.interop.exchange import export_gguf, export_huggingface

    result: dict[str, Any] = {"out": str(out), "format": format}
    if format == "hf":
        written_as = chosen or "float32"
        result |= {"dtype": written_as, "step": export_huggingface(directory, out, written_as)}
    else:
        written = export_gguf(directory, out, type_ or "f16")  # type: ignore[arg-type]
        result["step"], path, uneven = written
        result |= {"out": str(path), "type": type_ or "f16", "float16": uneven}
    if not processes.is_main():
        return
    if as_json:
        print_json(result)
        return
    print(f"exported step {result['step']} of {str(directory)!r} into {result['out']!r}")
    if result.get("float16"):
        print(f"float16, since their rows are no multiple of 32: {', '.join(result['float16'])}")
