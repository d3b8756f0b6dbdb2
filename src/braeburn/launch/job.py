"""What is launched on a cluster, whatever the cluster's scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass

from braeburn.errors import UserError
from braeburn.hardware.targets import Target
from braeburn.launch.places import Place


@dataclass(frozen=True)
class Job:
    """A run of `braeburn train` on a cluster.

    Attributes:
        name: of the run.
        arguments: the recipe and its overrides, as every command takes them.
        out: the run directory, as the processes of the job see it, or its URL.
        target: the hardware to run on.
        max_restarts: restarts of all processes after failures, at most.
        places: what all machines of the job must reach.
    """

    name: str
    arguments: Sequence[str]
    out: str
    target: Target
    max_restarts: int
    places: Sequence[Place] = ()

    @property
    def train_arguments(self) -> list[str]:
        """Those of `braeburn train`."""
        recipe, *overrides = self.arguments
        return [recipe, "--out", self.out, *overrides]

    def check(self) -> None:
        """Refuses a job that no script or manifest can be written for.

        Raises:
            UserError: no JAX can be installed for the target, or a value would not stay within its
                line of the text.
        """
        self.target.check_installable()
        check_line("--out", self.out)
        check_line("RECIPE", self.arguments[0])
        check_line("the name", self.name)


def check_line(option: str, value: str) -> None:
    """Refuses a value that would be more than one line of a script, or hide what follows it.

    Args:
        option: that the value was given with.
        value: as given.

    Raises:
        UserError: it has a line break or another control character.
    """
    if not value.isprintable():
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        raise UserError(
            f"{option} {shown!a} has a line break or control character; write it without"
        )
