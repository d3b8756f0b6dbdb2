"""The run that a run directory holds."""

from pathlib import Path
from typing import Any

from braeburn.config.run import Run, validate
from braeburn.disk import explained
from braeburn.errors import UserError
from braeburn.jsonfile import Unreadable, read_json


def read_run(directory: Path) -> Run:
    """The run that a run directory's `config.json` holds.

    Raises:
        UserError: there is no such file, or it holds no run of this version.
    """
    path = directory / "config.json"
    fields = _read_config(directory).get("run")
    if not isinstance(fields, dict):
        raise UserError(
            f"{str(path)!r} does not hold a run; restore it or start in another folder with --out"
        )
    try:
        return validate(fields)
    except UserError as error:
        raise UserError(
            f"{str(path)!r} does not hold a run of this version of Braeburn: {error}"
        ) from None


def read_identity(directory: Path) -> str | None:
    """What tells the run of a run directory from all others; None where its `config.json` does not
    say.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    identity = _read_config(directory).get("identity")
    return identity if isinstance(identity, str) else None


def _read_config(directory: Path) -> dict[str, Any]:
    """The fields of a run directory's `config.json`."""
    path = directory / "config.json"
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{str(directory)!r} is not a run directory: it holds no config.json; "
            f"name the folder given to --out of train or import"
        ) from None
    except Unreadable as error:
        raise UserError(
            f"{str(path)!r} does not hold a run: it {error}; restore it or start in another "
            f"folder with --out"
        ) from None
    except OSError as error:
        reason = explained(error) or f"{str(path)!r} cannot be read ({error.strerror}); see to it"
        raise UserError(reason) from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{str(path)!r} does not hold a run; restore it or start in another folder with --out"
        )
    return fields
