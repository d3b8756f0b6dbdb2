"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

# Arguments that a command does not take. typer brings a click of its own.
UsageError: Any = typer.BadParameter.__base__

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in recipe, or file.py:function.")
]
# A path or the URL of an fsspec file system; `braeburn.remote.place` reads it. pathlib would make
# one slash of the two in a URL.
Location = str
RunFolder = Annotated[Location, typer.Argument(metavar="DIR", help="A run directory, or its URL.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field; may be given repeatedly."),
]
Out = Annotated[
    Location,
    typer.Option(
        metavar="DIR", help="The run directory, or its URL as s3://...; a run begun there goes on."
    ),
]
NewRun = Annotated[
    Location, typer.Option("--out", metavar="DIR", help="The run directory to make, or its URL.")
]
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
        min=0,
        metavar="N",
        help="Restarts after failures, at most; training goes on from the last checkpoint.",
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
Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=N,...",
        help="Devices to split the model over, as fsdp=4 or fsdp=2,tensor=2; one without it. Other "
        "fields of a mesh may follow, as expert_dispatch=all_to_all.",
    ),
]
HeldAs = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="What weights are held in: fp32 or bf16; as the checkpoint has them without it.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]

# What is planned and compiled, and the settings of jobs after training; what each of them is
# without its option, `braeburn.plan.jobs` says.
Job = Annotated[
    str,
    typer.Option("--job", metavar="JOB", help="train, or after it: evaluate, generate or export."),
]
TextTokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=1,
        max=2**50,
        metavar="N",
        help="evaluate: of the text; as many as the run evaluates on without it.",
    ),
]
WindowTokens = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        min=1,
        max=2**24,
        metavar="N",
        help="evaluate: tokens that the model sees at once; as many as in training without it.",
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        max=2**16,
        metavar="N",
        help="generate: prompts that are continued at once; 8 without it.",
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-tokens",
        min=1,
        max=2**24,
        metavar="N",
        help="generate: of the longest prompt; 1024 without it.",
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        max=2**20,
        metavar="N",
        help="generate: written for each prompt; 256 without it.",
    ),
]
ExportFormat = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="FORMAT", help="export: hf, gguf or stablehlo; hf without it."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="evaluate: that weights are held in, fp32 without it; generate: of weights and cache, "
        "as the run computes without it; export: of an hf's weights, fp32 without it.",
    ),
]
GgufType = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="export: of a gguf's matrices, f16, q8_0 or q4_0; f16 without it.",
    ),
]
HostMemory = Annotated[
    float | None,
    typer.Option(
        "--host-memory-gb", min=0.1, metavar="GB", help="export: of the host that runs it."
    ),
]
ReadSpeed = Annotated[
    float | None,
    typer.Option(
        "--read-gb-per-s",
        min=0.001,
        metavar="GB",
        help="Jobs after training: what a host reads of the checkpoint in a second; 1 without it.",
    ),
]
WriteSpeed = Annotated[
    float | None,
    typer.Option(
        "--write-gb-per-s",
        min=0.001,
        metavar="GB",
        help="export: what a host writes in a second; 1 without it.",
    ),
]
