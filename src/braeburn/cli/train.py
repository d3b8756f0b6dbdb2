"""The command `train`."""

import os
from typing import Annotated, Any

import typer

from braeburn.cli.options import AsJson, Out, Recipe, Set
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import begin_computing, resolve
from braeburn.errors import UserError
from braeburn.parallel import processes
from braeburn.reading import shown

commands = typer.Typer()


@commands.command()
def train(
    recipe: Recipe,
    out: Out,
    assignments: Set = None,
    stop_after_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Save and stop after N steps of this call."),
    ] = None,
    profile_steps: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST", help="Write a profile of these steps to the folder `profile`."
        ),
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
    run, origins = resolve(recipe, assignments)
    profiled = range(0) if profile_steps is None else _steps(profile_steps, run.total_steps)
    from braeburn.remote import RemoteFolder, place
    from braeburn.train.environment import gpu_environment
    from braeburn.train.remote_run import check_machines

    os.environ |= gpu_environment()
    # Before JAX, for whose import a mistake need not wait.
    found = processes.find(coordinator, num_processes, process_id)
    target = place(out, "--out")
    if isinstance(target, RemoteFolder):
        check_machines(target, found is not None and not processes.on_one_machine(found))
        target.size("config.json")  # whether it can be reached
    processes.connect(coordinator, num_processes, process_id)
    begin_computing()
    from braeburn.interop.exchange import find_teacher
    from braeburn.train.loop import train

    outcome = train(
        run,
        target,
        origins=origins,
        stop_after_steps=stop_after_steps,
        profile_steps=profiled,
        find_teacher=find_teacher,
    )
    if processes.is_main() and as_json:
        print_json({"step": outcome.step, "finished": outcome.finished, "stages": outcome.stages})
    elif processes.is_main():
        _print_stages(outcome.stages)
    if processes.joined() and not outcome.finished:
        processes.leave(
            0
        )  # where one was stopped at work that goes on, JAX would wait at exit for all to end well


def _steps(text: str, total: int) -> range:
    """The steps that `FIRST:LAST` names, both among them, of a run of so many.

    Raises:
        UserError: it is no such pair.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= total):
        raise UserError(
            f"--profile-steps={shown(text)} is not a first and a last of the run's {total} steps; "
            f"write it as --profile-steps {min(3, total)}:{min(5, total)}"
        )
    return range(int(first), int(last) + 1)


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
        print_rows(rows)
