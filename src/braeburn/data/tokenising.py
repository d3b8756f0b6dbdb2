"""Sources to token shards, in parts.

Each part is tokenised into token shards of its own, a folder for each side of the split, by whoever
comes to it first; then those of all parts are joined. A source of one part is tokenised into its
place. Nobody coordinates the processes at work: what is complete is there under its name, and what
is done twice gives the same bytes.
"""

import contextlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from braeburn.config import Source
from braeburn.data.building import ABANDONED_SECONDS, age, is_at_work
from braeburn.data.corpus import Report, is_held_out, nothing_found, read
from braeburn.data.division import Part, divide
from braeburn.data.joining import Joining, copy_shard, plan_joining, report_of
from braeburn.data.listing import Listing, fingerprint
from braeburn.data.manifest import TokenManifest, read_manifest
from braeburn.data.mirror import Mirror
from braeburn.data.ray_cluster import on_ray
from braeburn.data.token_shards import FORMAT_VERSION, SHARD_TOKENS, Plan, build_several, writing
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.workers import (
    SECONDS_BETWEEN_LOOKS,
    Function,
    Progress,
    Task,
    Work,
    in_processes,
    in_threads,
)
from braeburn.disk import matching
from braeburn.errors import UserError

# Of less text, processes of their own would take longer to start than they save.
WORTH_PROCESSES_BYTES = 16 * 2**20
SECONDS_BETWEEN_TELLING = 1.0
# The two sides of a source, as their folders are named.
TRAIN, HELD_OUT = "train", "held-out"
# What is in a folder of parts: a folder for each part, and of each side the shards that are joined.
_PART = re.compile(rf"\d+|{TRAIN}|{HELD_OUT}")
# Of more parts, only those that are complete are counted.
MOST_PARTS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Settings:
    """What the token shards of a run depend on beside the files of its sources.

    Attributes:
        cache: the folder that holds them.
        tokenizer: turns text into tokens.
        held_out: the share of documents that is held out.
        sides: which of the two sides are wanted.
    """

    cache: Path
    tokenizer: Tokenizer
    held_out: float
    sides: tuple[str, ...] = (TRAIN, HELD_OUT)


class SourceText:
    """The token shards of a source, and what is missing of them.

    Attributes:
        listing: the source's files.
        directories: the folder of each side.
    """

    def __init__(self, listing: Listing, settings: Settings, mirror: Mirror | None = None) -> None:
        """Looks what is there.

        Args:
            listing: the source's files.
            settings: what else its tokens depend on.
            mirror: the remote folder that may hold them already, and is to.

        Raises:
            UserError: something is missing that the source's files are needed for.
        """
        self.listing = listing
        self._settings = settings
        folder = settings.cache.absolute() / "stores"
        # Fingerprints have told the sides apart by a truth value from the first version on.
        names = {
            side: fingerprint(
                listing.fingerprint,
                settings.tokenizer.hash,
                settings.held_out,
                side == HELD_OUT,
                FORMAT_VERSION,
            )
            for side in (TRAIN, HELD_OUT)
        }
        self.directories = {
            side: folder / f"{listing.name}-{side}-{names[side]}" for side in settings.sides
        }
        self.parts_folder = folder / f"{listing.name}-{names[TRAIN]}.parts"
        self._mirror = mirror
        if mirror is not None:
            for directory in self.directories.values():
                mirror.fetch_shards(directory)
        if self.missing and listing.problem is not None:
            raise listing.problem

    @property
    def missing(self) -> list[str]:
        """The sides whose folders are not there by now; another process may make them."""
        return [side for side, path in self.directories.items() if not path.exists()]

    def publish(self) -> None:
        """Copies what is here to the remote folder, where there is one that lacks it."""
        if self._mirror is not None:
            for directory in self.directories.values():
                self._mirror.publish_shards(directory)

    def remove_parts(self) -> None:
        """Removes what was only needed to make the folders, which are there."""
        for side in self.directories:
            shutil.rmtree(self.parts_folder / side, ignore_errors=True)
            for path in matching(self.parts_folder, f"*/{side}*"):
                shutil.rmtree(path, ignore_errors=True)
        # They hold parts of the other side, or are gone.
        for path in (*matching(self.parts_folder, "*"), self.parts_folder):
            with contextlib.suppress(OSError):
                path.rmdir()

    @cached_property
    def parts(self) -> list[Part]:
        """The parts in which the source is read."""
        return divide(self.listing.source, self.listing.found)

    @property
    def size(self) -> int:
        """Bytes of the source's files."""
        return sum(part.size for part in self.parts)

    def part_directory(self, side: str, index: int) -> Path:
        """The folder of what one part holds; of an only part, that of the whole."""
        if len(self.parts) == 1:
            return self.directories[side]
        return self.parts_folder / f"{index:06d}" / side

    def tasks(self) -> list["PartTask"]:
        """What is to be tokenised."""
        missing = self.missing
        return [
            PartTask(
                self.listing.name,
                self.listing.source,
                part,
                {side: self.part_directory(side, index) for side in missing},
                self._settings.held_out,
            )
            for index, part in enumerate(self.parts)
        ]

    def joinings(self) -> list[Joining]:
        """What is to be put together, once all parts are tokenised.

        Raises:
            UserError: nothing is left to train on.
        """
        folders = {
            side: [self.part_directory(side, index) for index in range(len(self.parts))]
            for side in self.missing
        }
        manifests = {
            side: [read_manifest(path / "manifest.json", TokenManifest) for path in paths]
            for side, paths in folders.items()
        }
        documents = {
            side: sum(manifest.documents for manifest in found) for side, found in manifests.items()
        }
        if documents.get(TRAIN) == 0:
            for paths in folders.values():
                for path in paths:
                    shutil.rmtree(path, ignore_errors=True)
            self.remove_parts()
            held_out = documents.get(HELD_OUT, 1)  # where that side was there, it holds some
            report = report_of(manifests[TRAIN])
            raise UserError(nothing_found(self.listing.name, self.listing.source, held_out, report))
        if len(self.parts) == 1:
            return []
        return [
            plan_joining(
                self.directories[side],
                self.parts_folder / side,
                folders[side],
                manifests[side],
                SHARD_TOKENS,
            )
            for side in folders
        ]


@dataclass(frozen=True)
class PartTask:
    """A part of a source that is to be tokenised."""

    name: str
    source: Source
    part: Part
    directories: dict[str, Path]
    fraction: float

    @property
    def is_done(self) -> bool:
        """Whether all of it has been tokenised."""
        return all(path.exists() for path in self.directories.values())

    @property
    def begun(self) -> list[Path]:
        """The folders in which it is being tokenised, or was."""
        return [
            folder
            for path in self.directories.values()
            for folder in matching(path.parent, f"{path.name}.partial-*")
        ]

    def side_of(self, document: str) -> str:
        """The side of a document by its name."""
        return HELD_OUT if is_held_out(document, self.fraction) else TRAIN


def _tokenise(tokenizer: Tokenizer, task: PartTask, proceed: Callable[[], None]) -> int | None:
    """Tokenises a part, unless it has been; returns the bytes of its files, or None where another
    process is at work on it.
    """
    if _is_taken(task):
        return None
    missing = {side for side, path in task.directories.items() if not path.exists()}
    if missing:
        plan = Plan(task.directories, task.side_of)
        report = Report()
        texts = read(
            task.name, task.source, task.part, lambda name: task.side_of(name) in missing, report
        )
        build_several(plan, texts, tokenizer, proceed=proceed, report=report)
    return task.part.size


def _is_taken(task: PartTask) -> bool:
    """Whether another process is at work on a part."""
    return any(is_at_work(path) for path in task.directories.values() if not path.exists())


def build(
    texts: Sequence[SourceText], tokenizer: Tokenizer, log: Callable[[str], None], work: Work
) -> None:
    """Tokenises what is missing, in parts that any number of processes share out among them, and
    puts the parts together.

    Args:
        texts: of all sources.
        tokenizer: turns text into tokens.
        log: takes a line for each source.
        work: who does it, and who is told.

    Raises:
        UserError: a source, or the cache, is not as it should be.
    """
    made = [text for text in texts if text.missing]
    while missing := [text for text in texts if text.missing]:
        sides = [text.missing for text in missing]
        try:
            _build(missing, tokenizer, log, work)
        except (UserError, OSError):
            # Another process that prepares the same text may have ended before this one, and
            # removed the parts that this one was at work on.
            if [text.missing for text in missing] == sides:
                raise
    # Last, since a part that this process was at work on while another one ended is there again.
    for text in made:
        text.remove_parts()


def _build(
    texts: Sequence[SourceText], tokenizer: Tokenizer, log: Callable[[str], None], work: Work
) -> None:
    stores = texts[0].parts_folder.parent
    with writing(stores):
        stores.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    total = sum(text.size for text in texts)
    tasks = [task for text in texts for task in text.tasks() if not task.is_done]
    finished = before = total - sum(task.part.size for task in tasks)
    told = 0.0

    def done(task: PartTask, size: int) -> None:
        nonlocal finished
        finished += size

    def proceed() -> None:
        nonlocal told
        work.proceed()
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_TELLING:
            told = now
            at_work = _bytes_at_work(tasks)
            work.watch(Progress(min(total, finished + at_work), total, now - began, before))

    watched = replace(work, proceed=proceed)
    ordered = _mixed(tasks, first=lambda task: bool(task.begun))
    _do_all(partial(_tokenise, tokenizer), ordered, total, watched, done, _is_taken)
    work.watch(Progress(total, total, time.monotonic() - began, before))
    joinings = [joining for text in texts for joining in text.joinings()]
    copies = [copy for joining in joinings for copy in joining.copies]
    _do_all(copy_shard, _mixed(copies), total, work, lambda copy, size: None)
    for joining in joinings:
        joining.finish(tokenizer, SHARD_TOKENS)
    for text in texts:
        log(f"tokenised {text.listing.name}: {text.size / 1e6:,.1f} MB of files")
    seconds = time.monotonic() - began
    log(f"prepared {total / 1e6:,.1f} MB of files in {seconds:.1f} s")
    _sweep(stores)


def _sweep(folder: Path) -> None:
    """Removes the parts of text that nobody asked for again."""
    for parts in matching(folder, "*.parts"):
        names = [path.name for path in matching(parts, "*")]
        if all(_PART.fullmatch(name) for name in names) and age(parts) > ABANDONED_SECONDS:
            shutil.rmtree(parts, ignore_errors=True)


def _mixed(tasks: Sequence[Task], first: Callable[[Task], bool] = lambda task: False) -> list[Task]:
    """Tasks in an order of this call's own, so that several machines that prepare the same text
    begin with different ones; before all others those that `first` tells of.
    """
    chance = random.SystemRandom()
    return sorted(tasks, key=lambda task: (not first(task), chance.random()))


def _do_all(
    function: Function[Task, int | None],
    tasks: Sequence[Task],
    size: int,
    work: Work,
    done: Callable[[Task, int], None],
    is_taken: Callable[[Task], bool] = lambda task: False,
) -> None:
    """Does tasks on a cluster, where there is one; in processes of this machine, where that is
    worth their start; in threads of this process elsewhere.

    A task that another process is at work on is come back to when all others are done.
    """
    left = list(tasks)
    while left:
        taken: list[Task] = []

        def ended(task: Task, result: int | None, taken: list[Task] = taken) -> None:
            if result is None:
                taken.append(task)
            else:
                done(task, result)

        count = min(work.count, len(left))
        if work.ray is not None:
            on_ray(function, left, work.ray, work.proceed, ended)
        elif count > 1 and size >= WORTH_PROCESSES_BYTES:
            in_processes(function, left, count, work.proceed, ended)
        else:
            in_threads(function, left, work.proceed, ended)
        left = taken
        while left and all(is_taken(task) for task in left):
            work.proceed()
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _bytes_at_work(tasks: Sequence[PartTask]) -> int:
    """Bytes of text in the parts that are being tokenised, by any process; of no part more than its
    files have.
    """
    if len(tasks) > MOST_PARTS_LOOKED_AT:
        return 0
    found = 0
    for task in tasks:
        read_so_far = 0
        for folder in task.begun:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                progress = json.loads((folder / "progress.json").read_bytes())
                read_so_far += int(progress["text_bytes"])
        found += min(task.part.size, read_so_far)
    return found
