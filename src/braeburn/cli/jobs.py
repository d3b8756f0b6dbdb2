"""The commands on a trained model, as launchers start them: their arguments, checked ahead."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from braeburn.cli.resolve import check_mesh, parse_mesh, require_shared, written_type
from braeburn.errors import UserError

if TYPE_CHECKING:
    from braeburn.hardware.targets import Target


def checked(
    context: typer.Context, command: str, arguments: Sequence[str], num_processes: int
) -> dict[str, Any]:
    """The values of a command's parameters, by their names, once it is known to accept them.

    What depends on the machines that the command will run on is left to it.

    Args:
        context: of the launcher.
        command: its name.
        arguments: all that stands behind its name.
        num_processes: that will run it together.

    Raises:
        UserError: it would refuse its arguments, or so many processes.
        typer.Exit: it was asked for its help, which is printed.
        UsageError: as the command line itself raises it, of typer's.
    """
    root = context.find_root()
    group: Any = root.command
    values: dict[str, Any] = (
        group.commands[command].make_context(command, [*arguments], parent=root).params
    )
    _check_types(values)
    _check_prompts(values)
    _check_places(values, num_processes)
    if "mesh" in values:
        parse_mesh(values["mesh"])
        check_mesh(command, values["mesh"], num_processes)
    return values


def check_devices(values: Mapping[str, Any], target: "Target", num_processes: int) -> None:
    """Refuses a mesh that does not fit a target.

    Args:
        values: of the command's parameters, checked.
        target: the hardware that it will run on.
        num_processes: that will run it together.

    Raises:
        UserError: it is too large, or leaves devices of some processes out.
    """
    given = parse_mesh(values.get("mesh"))
    if given is None:
        return
    from braeburn.parallel.mesh import check_processes, resolve

    try:
        check_processes(resolve(given, target.devices), target.devices, num_processes)
    except UserError as error:
        raise UserError(f"--mesh {values['mesh']!r} does not fit {target}: {error}") from None


def unused_devices(
    command: str, values: Mapping[str, Any], target: "Target", num_processes: int
) -> list[str]:
    """A sentence about devices of a single process that a command without a mesh leaves alone."""
    has_mesh = "mesh" not in values or values["mesh"] is not None
    if has_mesh or num_processes > 1 or target.devices == 1:
        return []
    return [
        f"warning: {command} uses one of the {target.devices} devices of {target}; add --mesh "
        f"fsdp=-1 to split the model over all of them"
    ]


def _check_places(values: Mapping[str, Any], num_processes: int) -> None:
    """Refuses what looks like a URL and is none, and a URL for several processes to write to."""
    from braeburn.launch.places import places_of_command
    from braeburn.remote import place

    for each in places_of_command(values):
        place(each.path, each.field)
        if not each.read:
            require_shared(each.label, each.is_remote, num_processes)


def _check_types(values: Mapping[str, Any]) -> None:
    """Refuses a format or a type of weights that there is not, or that its file does not have."""
    from braeburn.config import platforms_of, weight_type

    if "format" in values:
        written_type(values["out"], values["format"], values["dtype"], values["type_"])
        platforms_of(values["format"], values["platforms"])
    elif "dtype" in values:
        weight_type(values["dtype"])


def _check_prompts(values: Mapping[str, Any]) -> None:
    """Refuses a command without prompts that needs some, and standard input, which no process that
    is launched has.
    """
    if "prompts" not in values:
        return
    from braeburn.evaluate.prompts import STANDARD_INPUT, check_prompts

    texts, files = values["prompt"] or [], values["prompts"] or []
    check_prompts(texts, files)
    for option, given in (("--prompt", texts), ("--prompts", files)):
        if STANDARD_INPUT in given:
            raise UserError(
                f"{option} - is standard input, which processes that are launched do not have; "
                f"write the prompts into a file, and name it with --prompts FILE"
            )
