"""What commands share before they begin: the run, the target, logs."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braeburn.cli.output import say
from braeburn.errors import UserError
from braeburn.parallel import processes
from braeburn.reading import shown

if TYPE_CHECKING:
    from braeburn.remote import RemoteFolder


def checked_stage(recipe: str, run: Any, stage: str) -> str:
    """The name of a stage, once the run is known to have it."""
    if stage not in run.stages:
        raise UserError(
            f"--stage {stage!r} is no stage of {recipe}; it must be one of {', '.join(run.stages)}"
        )
    return stage


def on_target(
    recipe: str, on: str, assignments: list[str] | None, chips: Path | None = None
) -> Any:
    """The run on a target, the target, and the overrides, completed with one replica for each
    slice.
    """
    from braeburn.hardware.catalogue import catalogue
    from braeburn.hardware.targets import parse_target

    run, origins = resolve(recipe, assignments)
    target = parse_target(on, catalogue(chips))
    if target.slices > 1:
        # Only the sum of gradients is to cross slices.
        meshes = [
            "mesh",
            *(f"stages.{name}.mesh" for name, stage in run.stages.items() if stage.mesh),
        ]
        unset = [mesh for mesh in meshes if origins.get(f"{mesh}.replica", "default") == "default"]
        assignments = [*(assignments or []), *(f"{mesh}.replica={target.slices}" for mesh in unset)]
        run, _ = resolve(recipe, assignments)
    return run, target, assignments


def recipe_arguments(recipe: str, assignments: list[str] | None) -> list[str]:
    """A recipe and its overrides, as arguments that a launcher passes on."""
    return [recipe, *(part for text in assignments or [] for part in ("--set", text))]


def resolve(recipe: str, assignments: list[str] | None) -> Any:
    """The run that a recipe and its overrides amount to, and where each value came from."""
    from braeburn.config import override, parse_assignment, provenance
    from braeburn.recipes import load

    base = load(recipe)
    values = dict(parse_assignment(text) for text in assignments or [])
    return override(base, values), provenance(base, values)


def run_folder(location: str, *, optimizer: bool = False) -> Path:
    """The local folder of a run directory that a command reads: of a URL, a copy of what it needs.

    Args:
        location: the path or URL.
        optimizer: whether the state of the optimizer is needed, too.

    Raises:
        UserError: there is no model at the URL, or it does not answer.
    """
    from braeburn.remote import place

    found = place(location, "DIR")
    if isinstance(found, Path):
        return found
    from braeburn.train.copies import fetched

    return fetched(found, optimizer=optimizer)


def parse_mesh(text: str | None) -> Any:
    """The mesh that `--mesh` names, by any fields of a `MeshConfig`; None without it.

    Raises:
        UserError: it names none, a field twice, or a value that the field does not take.
    """
    if text is None:
        return None
    from braeburn.config import MeshConfig

    fields: dict[str, str] = {}
    for part in text.split(","):
        field, _, value = (each.strip() for each in part.partition("="))
        if not value:
            raise UserError(
                f"--mesh {shown(text)} is not a list of axes with their sizes; write it as "
                f"--mesh fsdp=2,tensor=2"
            )
        if field in fields:
            raise UserError(f"--mesh {shown(text)} names {field} twice; name it once")
        fields[field] = value
    try:
        return MeshConfig().replace(**{"fsdp": 1, **fields})
    except UserError as error:
        raise UserError(f"--mesh {shown(text)}: {error}") from None


def written_type(out: str, format_: str, dtype: str | None, type_: str | None) -> str:
    """The type of weights in the files of an export, as `config.file_type`.

    Args:
        out: what `--out` says.
        format_: what `--format` says.
        dtype: what `--dtype` says; None without it.
        type_: what `--type` says; None without it.

    Raises:
        UserError: the format or the type is not known, the option is of the other format, or the
            path names a file of the other format.
    """
    from braeburn.config import file_type

    found = file_type(format_, dtype, type_)
    if format_ != "gguf" and out.endswith(".gguf"):
        raise UserError(
            f"--out {out!r} names a GGUF file, but a folder will be made; add --format gguf"
        )
    return found


def join(command: str, mesh: str | None) -> None:
    """Joins the other processes of a command that several run together, if there are any.

    They are told of each other as those of `train` are, by SLURM, Open MPI, GKE or JAX's
    environment variables. To be called before `begin_computing`.

    Args:
        command: its name.
        mesh: what `--mesh` says, over which the processes share a model.

    Raises:
        UserError: there are several, and no mesh.
    """
    found = processes.find()
    if found:
        check_mesh(command, mesh, found.num_processes)
    processes.connect()


def require_shared(label: str, is_remote: bool, num_processes: int) -> None:
    """Refuses a URL as the place for what several processes write together.

    Args:
        label: of the place, with the option that names it.
        is_remote: whether it is a URL.
        num_processes: that write there.

    Raises:
        UserError: it is one, and there are several.
    """
    if is_remote and num_processes > 1:
        raise UserError(
            f"{label} is a URL, and {num_processes} processes write into one folder; name a folder "
            f"that all of them see, or run one process"
        )


def join_to_write(target: "Path | RemoteFolder") -> None:
    """Joins the other processes of a command that write into one folder together, if there are any.

    Args:
        target: the folder.

    Raises:
        UserError: there are several, and it is a URL.
    """
    found = processes.find()
    if found and not isinstance(target, Path):
        require_shared(target.label, True, found.num_processes)
    processes.connect()


def check_mesh(command: str, mesh: str | None, num_processes: int) -> None:
    """Refuses several processes of a command that have no mesh to share a model over.

    Args:
        command: its name.
        mesh: what `--mesh` says.
        num_processes: that run it together.

    Raises:
        UserError: there are several, and no mesh.
    """
    if mesh is None and num_processes > 1:
        raise UserError(
            f"{command} runs in {num_processes} processes, which share a model over --mesh alone; "
            f"add --mesh fsdp=-1, or run one process"
        )


def begin_computing() -> None:
    """Logs go to standard error, from the main process only, and compiled programs to the cache.

    Imports JAX.
    """
    from braeburn.train.compiler_flags import cache_compilations

    cache_compilations()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("braeburn").setLevel(logging.INFO if processes.is_main() else logging.WARNING)


def warn_of_unused_accelerator() -> None:
    """Warns where JAX computes on the CPU of a machine that has a GPU or a TPU."""
    import jax

    from braeburn.train.environment import unused_accelerator

    if warning := unused_accelerator(jax.default_backend()):
        say(warning)
