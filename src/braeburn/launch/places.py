"""What the machines of a job must all reach: which paths and URLs they are, and what can be told of
them where the job is submitted.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braeburn.config import Run
from braeburn.data.listing import cache_folder, used_sources
from braeburn.remote import is_remote

# Where prepared text is kept; it can be made anew.
CACHE = "data.cache"
# The run directory that a command reads.
_RUN_FOLDER = "directory"
# What commands on a trained model name by the parameters that are paths: how the parameter is
# called, what is done there, and whether it is read.
PARAMETERS: dict[str, tuple[str, str, bool]] = {
    _RUN_FOLDER: ("DIR", "the run directory", True),
    "hf_dir": ("HF_DIR", "the Hugging Face directory", True),
    "data": ("--data", "text", True),
    "more": ("--data", "text", True),
    "prompts": ("--prompts", "prompts", True),
    "out": ("--out", "what is made", False),
}
# Folders that every machine has for itself.
_OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev", "/run", "/proc")
_OWN_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Place:
    """A path or URL that a job reads or writes.

    Attributes:
        field: the option or field that names it.
        path: as given; a glob where it holds `*`, `?` or `[`.
        use: what the job does there, in a few words.
        read: whether it must be there before the job begins.
    """

    field: str
    path: str
    use: str
    read: bool

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL."""
        return is_remote(self.path)

    @property
    def label(self) -> str:
        """The field and the path, as messages call them."""
        return f"{self.field}{' ' if self.field.startswith('-') else '='}{self.path!r}"


def places_of(run: Run, recipe: str, out: str) -> list[Place]:
    """What the processes that train a run must all reach.

    Args:
        run: the run.
        recipe: the name of a built-in recipe, or FILE.py:FUNCTION.
        out: the run directory.
    """
    found = [Place("--out", out, "the run directory, which processes write together", False)]
    found += places_of_text(run, recipe)
    if run.initial_weights is not None:
        found.append(Place("initial_weights", run.initial_weights, "weights to start from", True))
    for name, stage in run.stages.items():
        if stage.teacher is not None and stage.teacher not in run.stages:
            found.append(Place(f"stages.{name}.teacher", stage.teacher, "a teacher", True))
    return found


def places_of_text(run: Run, recipe: str) -> list[Place]:
    """What the processes that prepare the text of a run must all reach; arguments as of
    `places_of`.
    """
    found = []
    file, colon, _ = recipe.rpartition(":")
    if colon and file.endswith(".py"):
        found.append(Place("RECIPE", file, "the recipe", True))
    cache = run.data.cache or _for_any_user(cache_folder(run.data))
    found.append(Place(CACHE, cache, "prepared text, made once for all", False))
    for name, source in used_sources(run).items():
        found += (
            Place(f"data.sources.{name}.paths", path, "text, unless it is prepared", True)
            for path in source.paths
        )
    if run.data.tokenizer is not None:
        found.append(Place("data.tokenizer", run.data.tokenizer, "the tokenizer", True))
    return found


def places_of_command(values: Mapping[str, Any]) -> list[Place]:
    """What the processes of a command on a trained model must all reach.

    Args:
        values: of its parameters, by their names.
    """
    found = []
    for name, (field, use, read) in PARAMETERS.items():
        given = values.get(name) or []
        paths = given if isinstance(given, list | tuple) else [given]
        found += [Place(field, str(path), use, read) for path in paths]
    return found


def home_of_command(places: Sequence[Place]) -> Place:
    """The run directory among the places of a command: the one that it reads, or else makes."""
    field = PARAMETERS[_RUN_FOLDER][0]
    return next(place for place in places if place.field == field or not place.read)


def _for_any_user(path: Path) -> str:
    """A path with `~` for the home folder, which may be another where the job runs."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def comment(places: Sequence[Place]) -> str:
    """Lines for the head of a script or manifest that name what must be shared."""
    lines = ["# All machines of the job must reach these, each under this name:"]
    for place in places:
        # A line break in a path must not end the comment.
        path = place.path if place.path.isprintable() else ascii(place.path)
        how = "; each needs the credentials" if place.is_remote else ""
        lines.append(f"#   {place.field} {path}: {place.use}{how}")
    return "".join(f"{line}\n" for line in lines)


def doubts(places: Sequence[Place]) -> list[str]:
    """Sentences about paths that other machines are likely not to have, as they look from here."""
    return [f"warning: {place.label} {doubt}" for place in places if (doubt := _doubt(place))]


def _doubt(place: Place) -> str | None:
    if place.is_remote:
        return None
    path = Path(place.path).expanduser().absolute()
    if own := _own_folder(path):
        return (
            f"lies in {own!r}, which every machine has for itself; name a folder on storage that "
            f"all machines of the job mount"
        )
    if place.read and not _matches(path):
        return (
            "is not there, as seen from this machine; make sure that the machines of the job have "
            "it"
        )
    return None


def _matches(path: Path) -> bool:
    """Whether a path is there, or a glob matches something."""
    if path.exists():
        return True
    root = Path(path.anchor)
    return any(True for _ in root.glob(str(path.relative_to(root))))


def _own_folder(path: Path) -> str | None:
    """The folder of this machine alone that a path lies in; None where none is known."""
    real = path.resolve()
    for folder in (*_OWN_FOLDERS, tempfile.gettempdir()):
        if real.is_relative_to(Path(folder).resolve()):
            return folder
    for mounted, kind in _mounts():
        if kind in _OWN_FILE_SYSTEMS and mounted != Path("/") and real.is_relative_to(mounted):
            return str(mounted)
    return None


def _mounts() -> Iterator[tuple[Path, str]]:
    """Where file systems are mounted here, and of which kind; nothing where the system does not
    tell.
    """
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, folder, kind, *_ = line.split(" ")
        yield Path(folder.replace("\\040", " ")), kind


def doubts_in_containers(places: Sequence[Place], mount: str | None) -> list[str]:
    """Sentences about paths that containers do not have unless their image brings them.

    Args:
        places: what the job reads and writes.
        mount: the folder where the volume is mounted in the containers; None without a volume.
    """
    found = []
    for place in places:
        path = Path(place.path)
        if place.is_remote or (mount is not None and path.is_relative_to(mount)):
            continue
        where = (
            f"is not below {mount!r}, where the volume is mounted"
            if mount
            else "is a path, and this job has no volume"
        )
        if place.field == CACHE:
            example = f"{mount}/tokens" if mount else "s3://bucket/tokens"
            found.append(
                f"warning: {place.label} {where}: every pod would prepare the text for itself, and "
                f"lose it; add --set data.cache={example}"
            )
        elif place.read:
            fix = f"move it below {mount!r}" if mount else "add a volume with --claim and --mount"
            found.append(
                f"warning: {place.label} {where}; make sure that the image has it, or {fix}"
            )
    return found
