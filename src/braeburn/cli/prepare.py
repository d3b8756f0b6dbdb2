"""The command `prepare`."""

from typing import Annotated, Any

import typer

from braeburn.cli.options import AsJson, Recipe, Set
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import resolve

commands = typer.Typer()


@commands.command()
def prepare(
    recipe: Recipe,
    assignments: Set = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Processes that tokenise; by default one for each core."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="A Ray cluster that does the work: auto, or HOST:PORT."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise and shard the data of a recipe ahead of training; run again, it goes on."""
    run, _ = resolve(recipe, assignments)
    from braeburn.data.prepare import prepare
    from braeburn.data.workers import Work
    from braeburn.errors import Interrupted
    from braeburn.train.guard import StopRequest
    from braeburn.train.progress import Display

    with Display(0) as display, StopRequest() as stop:
        work = Work(stop.check, display.preparing, workers, ray)
        try:
            prepared = prepare(run, display.say, work=work)
        except Interrupted as reason:
            display.say(f"{reason}; what was tokenised is kept: run the same command to go on")
            raise typer.Exit(130) from None
    facts = {name: _facts(prepared, name) for name in prepared.train}
    if as_json:
        print_json({"vocab_size": prepared.tokenizer.vocab_size, "sources": facts})
        return
    header = ("source", "documents", "tokens", "held-out documents", "held-out tokens", "text")
    rows = [
        (
            name,
            f"{fact['documents']:,}",
            f"{fact['tokens']:,}",
            f"{fact['held_out_documents']:,}",
            f"{fact['held_out_tokens']:,}",
            f"{fact['text_bytes'] / 1e6:,.1f} MB",
        )
        for name, fact in facts.items()
    ]
    print_rows([header, *rows])


def _facts(prepared: Any, name: str) -> dict[str, Any]:
    """What a source came to."""
    train, held_out = prepared.train[name], prepared.held_out[name]
    return {
        "documents": train.documents,
        "tokens": train.tokens,
        "held_out_documents": held_out.documents if held_out else 0,
        "held_out_tokens": held_out.tokens if held_out else 0,
        "text_bytes": train.text_bytes + (held_out.text_bytes if held_out else 0),
        "fingerprint": prepared.fingerprints[name],
        "folder": str(train.directory),
    }
