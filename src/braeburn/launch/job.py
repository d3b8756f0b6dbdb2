"""What is launched on a cluster, whatever the cluster's scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass

from braeburn.errors import UserError
from braeburn.hardware.targets import Target
from braeburn.launch.places import Place

TRAIN, PREPARE = "train", "prepare"
# The commands on a trained model that several processes can run together.
JOBS = ("evaluate", "generate", "import", "prune", "upcycle", "export")


@dataclass(frozen=True)
class Job:
    """A command of Braeburn on a cluster: `train`, one of `JOBS`, or `prepare`.

    Attributes:
        name: of the run, or of the command with that of the run directory.
        command: its name.
        arguments: all that stands behind the command.
        home: the run directory, as the processes of the job see it: the one that is trained or
            read, or made where none is read.
        target: the hardware to run on.
        max_restarts: restarts of all processes after failures, at most.
        places: what all machines of the job must reach.
    """

    name: str
    command: str
    arguments: Sequence[str]
    home: Place
    target: Target
    max_restarts: int
    places: Sequence[Place] = ()

    @property
    def trains(self) -> bool:
        """Whether it saves checkpoints, and goes on from them."""
        return self.command == TRAIN

    @property
    def begins(self) -> str:
        """What it does when it is started again, as a clause without a subject."""
        if self.trains:
            return f"goes on from the last checkpoint in {self.home.path}"
        return "starts from the beginning"

    @property
    def origin(self) -> str:
        """Where a restart goes on from."""
        return "from the last checkpoint" if self.trains else "from the beginning"

    @property
    def keeps_programs(self) -> bool:
        """Whether its compiled programs are kept in the run directory. One that is to be made must
        be empty before.
        """
        return not self.home.is_remote and (self.trains or self.home.read)

    def check(self) -> None:
        """Refuses a job that no script or manifest can be written for.

        Raises:
            UserError: no JAX can be installed for the target, or a value would not stay within its
                line of the text.
        """
        self.target.check_installable()
        check_line(self.home.field, self.home.path)
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
