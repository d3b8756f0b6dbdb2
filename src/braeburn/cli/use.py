"""Commands on a trained model: `evaluate`, `prune` and `upcycle`."""

from typing import Annotated

import typer

from braeburn.cli.options import AsJson, HeldAs, Mesh, NewRun, RunFolder, Set
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import (
    begin_computing,
    join,
    join_to_write,
    parse_mesh,
    run_folder,
    warn_of_unused_accelerator,
)
from braeburn.errors import UserError
from braeburn.parallel import processes

commands = typer.Typer()


@commands.command()
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
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Tell the loss by position in a document, too.")
    ] = False,
    mesh: Mesh = None,
    dtype: HeldAs = None,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity, next-token accuracy and bits per byte of the newest checkpoint."""
    from braeburn.config import weight_type

    devices, held_as = parse_mesh(mesh), weight_type(dtype)
    folder = run_folder(directory)
    join("evaluate", mesh)
    begin_computing()
    from braeburn.evaluate.text import Windows, evaluate_files, evaluate_held_out
    from braeburn.train.trained import load

    trained = load(folder, devices, held_as, for_programs=True)
    warn_of_unused_accelerator()
    texts = [*(data or []), *(more or [])]
    windows = Windows(sequence_length, stride, by_position)
    results = (
        evaluate_files(trained, texts, field, windows)
        if texts
        else evaluate_held_out(trained, windows)
    )
    if not processes.is_main():
        return
    if as_json:
        print_json({"step": trained.step, "results": results})
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
    print_rows([("text", *(key.replace("_", " ") for key in formats)), *rows])
    if by_position:
        found = [
            (name, f"from {part['from']:,}", f"{part['tokens']:,}", f"{part['loss']:.4f}")
            for name, result in results.items()
            for part in result["by_position"]
        ]
        print()
        print_rows([("text", "position in a document", "tokens", "loss"), *found])


@commands.command()
def prune(
    directory: RunFolder,
    ffn: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Hidden units of the FFN that stay in each layer."),
    ],
    out: NewRun,
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
    from braeburn.remote import place

    try:
        pruning = Pruning.model_validate({"keep": {"ffn": ffn}, "method": method})
    except ValidationError as error:
        raise UserError(f"--{explain_validation_error(error)}") from None
    changes = dict(parse_assignment(text) for text in assignments or [])
    source, target = run_folder(directory, optimizer=True), place(out, "--out")
    join_to_write(target)
    begin_computing()
    from braeburn.prune.run_directory import prune
    from braeburn.train.copies import made_for

    text = Source(paths=tuple(data), field=field) if data else None
    with made_for(target) as made:
        model = prune(source, made, pruning, tokens, changes, text)
    result = {"out": out, "model": model.model_dump(mode="json")}
    if not processes.is_main():
        return
    print_json(result) if as_json else print(f"pruned {directory!r} to ffn_dim={ffn} into {out!r}")


@commands.command()
def upcycle(
    directory: RunFolder,
    experts: Annotated[int, typer.Option(metavar="E", help="Experts of a layer.")],
    out: NewRun,
    experts_per_token: Annotated[
        int, typer.Option(metavar="K", help="Experts that a token is sent to.")
    ] = 2,
    every: Annotated[
        int, typer.Option(metavar="N", help="The last of so many layers gets experts.")
    ] = 1,
    noise: Annotated[
        float,
        typer.Option(metavar="X", help="Added to each expert, as a share of its matrices' RMS."),
    ] = 0.01,
    balance_loss: Annotated[
        float,
        typer.Option(metavar="X", help="Coefficient of the loss that keeps experts equally busy."),
    ] = 1e-3,
    as_json: AsJson = False,
) -> None:
    """Make a mixture of experts of the newest checkpoint: each a copy of the FFN, with noise."""
    from pydantic import ValidationError

    from braeburn.config import explain_validation_error
    from braeburn.config.upcycling import Upcycling
    from braeburn.remote import place

    try:
        upcycling = Upcycling(
            experts=experts,
            experts_per_token=experts_per_token,
            every=every,
            noise=noise,
            balance_loss=balance_loss,
        )
    except ValidationError as error:
        field, equals, reason = explain_validation_error(error).partition("=")
        raise UserError(f"--{field.replace('_', '-')}{equals}{reason}") from None
    source, target = run_folder(directory), place(out, "--out")
    join_to_write(target)
    begin_computing()
    from braeburn.train.copies import made_for
    from braeburn.upcycle.run_directory import upcycle

    with made_for(target) as made:
        model = upcycle(source, made, upcycling)
    result = {"out": out, "model": model.model_dump(mode="json")}
    if not processes.is_main():
        return
    if as_json:
        print_json(result)
        return
    print(f"upcycled {directory!r} to {experts} experts in {out!r}")
    print(
        f"a recipe trains on with model=ModelConfig.from_directory({out!r}) and "
        f"initial_weights={out!r}"
    )
