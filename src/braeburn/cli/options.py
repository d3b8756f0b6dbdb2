"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=N,...",
        help="Devices to split the model over, as fsdp=4 or fsdp=2,tensor=2; one without it.",
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
