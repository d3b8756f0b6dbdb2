"""Handing a script or manifest to the program of a cluster."""

import shutil
import subprocess
from collections.abc import Sequence

from braeburn.errors import UserError


def submit(command: Sequence[str], text: str) -> str:
    """Gives `text` to a command on its standard input and returns its answer.

    Raises:
        UserError: the program is missing, or refuses.
    """
    program = command[0]
    if shutil.which(program) is None:
        raise UserError(
            f"--submit needs {program!r}, which is not on the PATH; run this where it is, or leave "
            f"--submit out and pass on what is printed"
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (
            " ".join((done.stderr or done.stdout).split())
            .removeprefix(f"{program}: ")
            .removeprefix("error: ")
        )
        raise UserError(
            f"{program} refused the job ({reason.rstrip('.') or f'code {done.returncode}'})"
        )
    return done.stdout.strip()
