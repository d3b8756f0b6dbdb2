"""Commands that start several processes: `launch local`, `slurm` and `kubernetes`."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from braeburn.cli.jobs import check_devices, checked, unused_devices
from braeburn.cli.options import AsJson, Location, MaxRestarts, On, Set, Submit, UsageError
from braeburn.cli.output import print_json, say
from braeburn.cli.resolve import on_target, recipe_arguments, resolve
from braeburn.errors import UserError
from braeburn.parallel import processes

if TYPE_CHECKING:
    from braeburn.config import Run
    from braeburn.hardware.targets import Target
    from braeburn.launch.job import Job

commands = typer.Typer(help="Several processes here, or the script or manifest for a cluster.")

Launched = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A built-in recipe, or file.py:function; or, behind --, a command on a trained model "
        "with its arguments: -- evaluate DIR --mesh fsdp=-1.",
    ),
]
# What stands behind such a command.
Words = Annotated[list[str] | None, typer.Argument(metavar="ARGUMENT", hidden=True)]
Out = Annotated[
    Location | None,
    typer.Option(
        metavar="DIR",
        help="Of training: the run directory, or its URL as s3://...; a run begun there goes on.",
    ),
]
# The options that each launcher needs, for examples.
_NEEDED = {
    "local": "--processes 2",
    "slurm": "--on h100:8",
    "kubernetes": "--on h100:8 --image IMAGE --claim NAME",
}


class _Launcher(TyperCommand):
    """A command that says where the options of what it starts stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the arguments, of which those behind -- belong to another command."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            from braeburn.launch.job import JOBS

            option = getattr(error, "option_name", None)
            own = [name for parameter in self.params for name in parameter.opts]
            job = next((word for word in given if word in JOBS), None)
            if option is None or option in own or job is None or "--" in given:
                raise
            raise UserError(
                f"{option} is no option of launch {ctx.info_name}; write -- before {job}, and its "
                f"options behind it, as in {_example(ctx)}"
            ) from None


def _example(context: typer.Context) -> str:
    """How a command on a trained model is started by a launcher."""
    needed = _NEEDED[context.info_name or ""]
    return f"{context.command_path} {needed} -- evaluate DIR --mesh fsdp=-1"


@commands.command(cls=_Launcher)
def local(
    context: typer.Context,
    recipe: Launched,
    num_processes: Annotated[
        int, typer.Option("--processes", min=1, max=1024, metavar="N", help="How many.")
    ],
    words: Words = None,
    out: Out = None,
    assignments: Set = None,
    max_restarts: MaxRestarts = 3,
    as_json: AsJson = False,
) -> None:
    """Train with several processes here; when one dies or hangs, all go on from the last save.

    Or run a command on a trained model in several processes.
    """
    from braeburn.launch.local import launch, launch_job

    if _after_training(context, recipe, {"--out": out, "--set": assignments, "--json": as_json}):
        words = words or []
        checked(context, recipe, words, num_processes)
        with _giving_up():
            ending = launch_job([recipe, *words], num_processes, max_restarts)
        print(ending.output, end="")
        return
    out = _training(recipe, words, out)
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


@commands.command(cls=_Launcher)
def slurm(
    context: typer.Context,
    recipe: Launched,
    on: On,
    words: Words = None,
    out: Out = None,
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
            help="Of training: instead, the script of an array of N tasks that prepare the text.",
        ),
    ] = None,
    submit: Submit = False,
    as_json: AsJson = False,
) -> None:
    """Print the script that trains on a SLURM cluster, or submit it.

    Or that of a command on a trained model.
    """
    from braeburn.launch.places import doubts
    from braeburn.launch.slurm import Account, prepare_script, processes_of, script

    charged, command = Account(time, partition, account), ["sbatch"] if submit else None
    given = {"--out": out, "--set": assignments, "--prepare": prepare}
    if _after_training(context, recipe, given):
        job, unused = _job_on(context, [recipe, *(words or [])], on, processes_of, max_restarts)
        told = [*unused, *doubts(job.places)]
        _print_job("script", script(job, charged), command, job, told, as_json)
        return
    out = _training(recipe, words, out)
    job, run = _training_on(recipe, on, out, assignments, max_restarts, prepares=bool(prepare))
    if prepare is None:
        text = script(job, charged)
    else:
        from braeburn.data.listing import cache_folder

        cache = run.data.cache or str(cache_folder(run.data))
        text = prepare_script(job, prepare, cache, charged)
    _print_job("script", text, command, job, doubts(job.places), as_json)


@commands.command(cls=_Launcher)
def kubernetes(
    context: typer.Context,
    recipe: Launched,
    on: On,
    image: Annotated[str, typer.Option(help="Container image with Braeburn and the target's JAX.")],
    words: Words = None,
    out: Annotated[
        Location | None,
        typer.Option(
            metavar="DIR",
            help="Of training: the run directory inside the containers, below the volume's folder; "
            "or its URL.",
        ),
    ] = None,
    claim: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="PersistentVolumeClaim for the run directory; none if that is a URL.",
        ),
    ] = None,
    mount: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the containers for the volume; the parent folder of the run directory "
            "without it.",
        ),
    ] = None,
    assignments: Set = None,
    max_restarts: MaxRestarts = 3,
    submit: Submit = False,
    as_json: AsJson = False,
) -> None:
    """Print the JobSet that trains on TPUs, GPUs or CPUs of a Kubernetes cluster, or apply it.

    Or that of a command on a trained model.
    """
    from braeburn.launch.kubernetes import Volume, manifest, processes_of
    from braeburn.launch.places import doubts_in_containers

    if _after_training(context, recipe, {"--out": out, "--set": assignments}):
        job, told = _job_on(context, [recipe, *(words or [])], on, processes_of, max_restarts)
    else:
        job, _ = _training_on(recipe, on, _training(recipe, words, out), assignments, max_restarts)
        told = []
    volume = Volume(claim, mount)
    text = manifest(job, image, volume)
    told = [*told, *doubts_in_containers(job.places, volume.folder(job))]
    _print_job(
        "manifest", text, ["kubectl", "apply", "-f", "-"] if submit else None, job, told, as_json
    )


def _after_training(context: typer.Context, recipe: str, given: Mapping[str, object]) -> bool:
    """Whether it is a command on a trained model that is to be started.

    Args:
        context: of the launcher.
        recipe: what stands in the place of the recipe.
        given: options of training alone, by their names.

    Raises:
        UserError: it is, and an option of training is given.
    """
    from braeburn.launch.job import JOBS

    if recipe not in JOBS:
        return False
    if misplaced := [option for option, value in given.items() if value not in (None, False, [])]:
        raise UserError(
            f"{misplaced[0]} of launch {context.info_name} is of training alone; leave it out, or "
            f"write it behind -- {recipe}, as in {_example(context)}"
        )
    return True


def _training(recipe: str, words: Sequence[str] | None, out: str | None) -> str:
    """The run directory of a run that is to be trained.

    Raises:
        UserError: there is none, or more stands there than a recipe.
    """
    from braeburn.launch.job import JOBS

    if words:
        raise UserError(
            f"{words[0]!r} is one argument too many behind {recipe!r}; name one recipe, or behind "
            f"-- one of the commands {', '.join(JOBS)} with its arguments"
        )
    if out is None:
        raise UserError("--out is missing; name the run directory, as in --out runs/first")
    return out


def _training_on(
    recipe: str,
    on: str,
    out: str,
    assignments: list[str] | None,
    max_restarts: int,
    *,
    prepares: bool = False,
) -> "tuple[Job, Run]":
    """The job that trains a recipe on a target, once the mesh is known to fit, and the run.

    With `prepares`, the job that prepares its text.
    """
    from braeburn.launch.job import PREPARE, TRAIN, Job, check_line
    from braeburn.launch.places import places_of, places_of_text
    from braeburn.remote import place
    from braeburn.train.resolved import sizes_of

    run, target, assignments = on_target(recipe, on, assignments)
    for stage in run.stages:
        sizes_of(run, stage, target.devices)
    check_line("RECIPE", recipe)
    place(out, "--out")  # is neither made nor reached here, but may be no URL
    places = places_of(run, recipe, out)
    job = Job(run.name, TRAIN, [], places[0], target, max_restarts, places)
    name, *overrides = recipe_arguments(recipe, assignments)
    if prepares:
        text = places_of_text(run, recipe)
        return dataclasses.replace(
            job, command=PREPARE, arguments=[name, *overrides], places=text
        ), run
    return dataclasses.replace(job, arguments=[name, "--out", out, *overrides]), run


def _job_on(
    context: typer.Context,
    words: Sequence[str],
    on: str,
    processes_of: "Callable[[Target], int]",
    max_restarts: int,
) -> "tuple[Job, list[str]]":
    """A command on a trained model on a target, once its arguments are known to be accepted, and
    sentences about devices that it does not use.
    """
    from braeburn.hardware.targets import parse_target
    from braeburn.launch.job import Job
    from braeburn.launch.places import home_of_command, places_of_command

    target = parse_target(on)
    command, *arguments = words
    num_processes = processes_of(target)
    values = checked(context, command, arguments, num_processes)
    check_devices(values, target, num_processes)
    places = places_of_command(values)
    home = home_of_command(places)
    name = "-".join(filter(None, (command, Path(home.path).name)))
    unused = unused_devices(command, values, target, num_processes)
    return Job(name, command, arguments, home, target, max_restarts, places), unused


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
