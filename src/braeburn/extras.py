"""How to install what only some commands need; the one place that changes once the package is
published.

Until then nothing may be advised that asks a package index for `braeburn`: no index has it, and a
stranger could publish a package of that name.
"""

import shlex
import sys
from pathlib import Path

# Two extras get environments of their own: what `compile` installs claims accelerators that are not
# there, and torch wants NVIDIA packages of other versions than JAX does.
_APART = {"compile": ".venv-compile", "hf": ".venv-hf"}


def target(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, in a clone of Braeburn and with its
    pins.
    """
    return f"make extra-{extra}"


def how_to_install(extra: str) -> str:
    """The clause that tells a user how to install an extra of pyproject.toml, beginning with an
    imperative.
    """
    command = target(extra)
    if extra in _APART:
        return f"run `{command}` in a clone of Braeburn and use {_APART[extra]}/bin/braeburn there"
    # An environment other than the clone's own has to be named.
    in_environment = sys.prefix != sys.base_prefix
    if in_environment and Path(sys.prefix) != Path(__file__).resolve().parents[2] / ".venv":
        command += f" VENV={shlex.quote(sys.prefix)}"
    return f"run `{command}` in a clone of Braeburn"
