"""Commands that start several processes: `launch local`, `slurm` and `kubernetes`."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from braeburn.cli.options import AsJson, Location, MaxRestarts, On, Out, Recipe, Set, Submit
from braeburn.cli.output import print_json, say
from braeburn.cli.resolve import on_target, recipe_arguments, resolve
from braeburn.errors import UserError
from braeburn.parallel import processes

if TYPE_CHECKING:
    from braeburn.config import Run
    from braeburn.launch.job import Job

commands = typer.Typer(help="Several processes here, or the script or manifest for a cluster.")


@commands.command()
def local(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A built-in recipe, or file.py:function; or, behind --, a command on a trained "
            "model with its arguments: -- evaluate DIR --mesh fsdp=-1.",
        ),
    ],
    num_processes: Annotated[
        int, typer.Option("--processes", min=1, max=1024, metavar="N", help="How many.")
    ],
    job: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    out: Annotated[
        Location | None,
        typer.Option(
            metavar="DIR", help="The run directory, or its URL; a run begun there goes on."
        ),
    ] = None,
    assignments: Set = None,
    max_restarts: MaxRestarts = 3,
    as_json: AsJson = False,
) -> None:
    """Train with several processes here; when one dies or hangs, all go on from the last save.

    Or run evaluate, generate, import, prune or export in several processes.
    """
    from braeburn.launch.local import JOBS, launch, launch_job

    if recipe in JOBS:
        if out is not None or assignments or as_json:
            raise UserError(
                f"the options of {recipe} stand behind it; write them as in braeburn launch local "
                f"--processes 2 -- evaluate DIR --mesh fsdp=-1 --json"
            )
        with _giving_up():
            ending = launch_job([recipe, *(job or [])], num_processes, max_restarts)
        print(ending.output, end="")
        return
    if job:
        raise UserError(
            f"{job[0]!r} is one argument too many; name one recipe, or behind -- one of the "
            f"commands {', '.join(JOBS)} with its arguments"
        )
    if out is None:
        raise UserError("--out is missing; name the run directory, as in --out runs/first")
    resolve(recipe, assignments)
    from braeburn.remote import place

    arguments = [
        *recipe_arguments(recipe, assignments),
        *("--out", out),
        *(["--json"] if as_json else []),
    ]
    with _giving_up():
        ending = launch(arguments, place(out, "--out"), num_processes, max_restarts)
    if not as_json:
        print(ending.output, end="")
        return
    restarts = [dataclasses.asdict(restart) for restart in ending.restarts]
    print_json({**json.loads(ending.output), "processes": num_processes, "restarts": restarts})


@contextmanager
def _giving_up() -> Iterator[None]:
    """Ends with code 1 and one sentence where processes have failed too often."""
    from braeburn.launch.supervisor import GaveUp

    try:
        yield
    except GaveUp as failure:
        processes.report(str(failure))
        raise typer.Exit(1) from None


@commands.command()
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
    prepare: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            metavar="N",
            help="Instead, the script of an array of N tasks that prepare the text.",
        ),
    ] = None,
    submit: Submit = False,
    as_json: AsJson = False,
) -> None:
    """Print the script that trains on a SLURM cluster, or submit it."""
    from braeburn.data.listing import cache_folder
    from braeburn.launch.places import doubts, places_of_text
    from braeburn.launch.slurm import Account, prepare_script, script

    job, run = _job(recipe, on, out, assignments, max_restarts)
    charged = Account(time, partition, account)
    if prepare is None:
        text = script(job, charged)
    else:
        job = dataclasses.replace(job, places=places_of_text(run, recipe))
        cache = run.data.cache or str(cache_folder(run.data))
        text = prepare_script(job, prepare, cache, charged)
    command = ["sbatch"] if submit else None
    _print_job("script", text, command, job, doubts(job.places), as_json)


@commands.command()
def kubernetes(
    recipe: Recipe,
    on: On,
    out: Annotated[
        Location,
        typer.Option(
            metavar="DIR",
            help="The run directory inside the containers, below the volume's folder; or its URL.",
        ),
    ],
    image: Annotated[str, typer.Option(help="Container image with Braeburn and the target's JAX.")],
    claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="PersistentVolumeClaim for the parent folder of --out; none for a URL.",
        ),
    ] = None,
    assignments: Set = None,
    max_restarts: MaxRestarts = 3,
    submit: Submit = False,
    as_json: AsJson = False,
) -> None:
    """Print the JobSet that trains on TPUs, GPUs or CPUs of a Kubernetes cluster, or apply it."""
    from braeburn.launch.kubernetes import manifest, mount_of
    from braeburn.launch.places import doubts_in_containers

    job, _ = _job(recipe, on, out, assignments, max_restarts)
    text = manifest(job, image, claim)
    command = ["kubectl", "apply", "-f", "-"] if submit else None
    doubts = doubts_in_containers(job.places, mount_of(job))
    _print_job("manifest", text, command, job, doubts, as_json)


def _job(
    recipe: str, on: str, out: str, assignments: list[str] | None, max_restarts: int
) -> "tuple[Job, Run]":
    """The job that trains a recipe on a target, once the mesh is known to fit, and the run."""
    from braeburn.launch.job import Job
    from braeburn.launch.places import places_of
    from braeburn.remote import place
    from braeburn.train.resolved import sizes_of

    run, target, assignments = on_target(recipe, on, assignments)
    for stage in run.stages:
        sizes_of(run, stage, target.devices)
    arguments = recipe_arguments(recipe, assignments)
    place(out, "--out")  # is neither made nor reached here, but may be no URL
    places = places_of(run, recipe, out)
    return Job(run.name, arguments, out, target, max_restarts, places), run


def _print_job(
    kind: str, text: str, command: list[str] | None, job: "Job", doubts: list[str], as_json: bool
) -> None:
    """Prints what describes a job, or hands it to `command` and prints the answer."""
    from braeburn.launch.submit import submit

    for doubt in doubts:
        say(doubt)
    answer = submit(command, text) if command else None
    if as_json:
        shared = [
            {"field": place.field, "path": place.path, "use": place.use} for place in job.places
        ]
        print_json({kind: text, "submitted": answer, "shared": shared, "warnings": doubts})
        return
    print(answer or text, end="\n" if answer else "")
