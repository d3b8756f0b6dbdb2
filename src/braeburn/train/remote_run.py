"""A run directory at a URL, as in an object store: this machine works on it in a folder of its own,
and a thread copies what is made there.

A checkpoint at the URL counts once its `record.json` is there, which is copied last and deleted
first; the record names all other files. The run itself counts once its `config.json` is there.
"""

import contextlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from braeburn.atomic import write_atomically
from braeburn.background import Background, nothing_to_ask
from braeburn.config import Checkpoint, Run, read_identity
from braeburn.errors import Interrupted, UserError
from braeburn.remote import RemoteFile, RemoteFolder, folder_for, user_cache
from braeburn.train import record as records
from braeburn.train.lease import Lease
from braeburn.train.record import PARTS, RECORD, Damaged

# Names a folder for working copies, in the place of one below the user's cache. Processes on
# several machines can share one that all of them mount.
VARIABLE = "BRAEBURN_RUNS"
CONFIG = "config.json"
_CHECKPOINT = re.compile(r"checkpoints/(0|[1-9][0-9]{0,17})/(.+)")
# In the working copy: what is being copied to the URL or from it, and whether anything was copied.
_OUTGOING, _INCOMING, _COPIED = ".outgoing", ".incoming", ".copied.json"
_GROWING = ("tensorboard/", "profile/")
# Between looks for a new checkpoint, and between copies of the rows of metrics at least.
POLL_SECONDS = 1.0
SECONDS_BETWEEN_COPIES = 60.0
# Of the time, what copying rows may take.
SHARE_OF_COPYING = 0.05
SECONDS_AFTER_FAILURE = 15.0
SECONDS_BETWEEN_LINES = 10.0
# For the rest of the copy, where the run ends by a fault of the program.
SECONDS_IN_A_HURRY = 60.0
# How often a damaged checkpoint is fetched, in case it was damaged on its way.
ATTEMPTS = 2


def working_folder(folder: RemoteFolder) -> Path:
    """Where this machine works on a remote run directory."""
    parent = os.environ.get(VARIABLE)
    return folder_for(folder.url, Path(parent).expanduser() if parent else user_cache() / "runs")


def check_machines(folder: RemoteFolder, several: bool) -> None:
    """Refuses a remote run directory for processes that may share no disk.

    Args:
        folder: the run directory.
        several: whether the processes of the run may be on several machines.

    Raises:
        UserError: they may, and nothing says where they share a folder.
    """
    if several and not os.environ.get(VARIABLE):
        raise UserError(
            f"{folder.label} cannot be written by processes on several machines, which write the "
            f"parts of a checkpoint into one folder; name a folder that all of them mount with "
            f"--out, or set {VARIABLE} to one, in which the run is worked on and copied from"
        )


def steps_of(listed: Iterable[str]) -> list[int]:
    """The steps of the complete checkpoints among the files of a run directory, in order."""
    found = (_CHECKPOINT.fullmatch(name) for name in listed)
    return sorted(int(match[1]) for match in found if match and match[2] == RECORD)


def kept(steps: Iterable[int], options: Checkpoint, lasting: Iterable[int]) -> set[int]:
    """Those of some checkpoints that are to stay, as the options and `lasting` say."""
    steps = set(steps)
    every = options.keep_every_steps
    return {
        *sorted(steps)[-options.keep_last :],
        *(step for step in steps if every and step % every == 0),
        *(steps & set(lasting)),
    }


def lasting_steps(run: Run) -> set[int]:
    """The steps of checkpoints that a later stage reads its teacher from."""
    teachers = {stage.teacher for stage in run.stages.values()}
    return {step for name, step in run.last_steps.items() if name in teachers}


class RemoteRun:
    """A run directory at a URL, and the folder that this machine works on it in."""

    def __init__(self, folder: RemoteFolder, say: Callable[[str], None]):
        """Reaches nothing yet.

        Args:
            folder: the run directory.
            say: takes lines for the user.
        """
        self.folder = folder
        self.path = working_folder(folder)
        self._say = say
        self._lease = Lease(folder)
        self._copying: _Copying | None = None

    def claim(self, run: Run, proceed: Callable[[], None] = nothing_to_ask) -> None:
        """Keeps other machines from training there, and brings the working copy up to date.

        Whichever of the two holds the newer checkpoint is gone on with. To be called by one process
        that holds the claim on the working copy.

        Args:
            run: that is to be trained there.
            proceed: called again and again; what it raises ends the work.

        Raises:
            UserError: another process trains there, the folder holds other things or another run,
                or does not answer.
        """
        for left_over in (_OUTGOING, _INCOMING):
            shutil.rmtree(self.path / left_over, ignore_errors=True)
        begun = (self.path / CONFIG).exists()
        self._check(begun)
        self._lease.take(self._say, proceed)
        # Another process may have begun or ended there while this one waited.
        if self._check(begun):
            try:
                self._update(run, self.folder.list(), begun, proceed)
            except FileNotFoundError as error:
                if error.filename is not None:
                    raise  # of this disk
                raise UserError(
                    f"{self.folder.label} changed while it was fetched; run the same command again"
                ) from None

    def release(self) -> None:
        """Lets other machines train there."""
        self._lease.release()

    @contextmanager
    def copying(self, run: Run) -> Iterator[None]:
        """Copies what is made in the working copy, in the background, until all of it is there.

        Raises:
            UserError: it could not be copied in the end; the working copy has all of it.
        """
        self._copying = _Copying(self, run, self._lease, self._say)
        try:
            yield
        except BaseException as error:
            # What ends the run is told, not what becomes of the copy after it. A second Ctrl-C
            # waits for nothing.
            seconds = SECONDS_IN_A_HURRY if isinstance(error, Exception) else 0.0
            with contextlib.suppress(UserError, Interrupted):
                self._copying.finish(None if isinstance(error, UserError) else seconds)
            raise
        self._copying.finish()

    def check(self) -> None:
        """Refuses to go on where another machine has taken over.

        Raises:
            UserError: one has.
        """
        self._lease.check()

    def _check(self, begun: bool) -> bool:
        """Whether the folder holds a run.

        Args:
            begun: whether the working copy does.

        Raises:
            UserError: it holds something else, or not the run that the working copy is of.
        """
        content = self.folder.read_if_there(CONFIG)
        if content is not None:
            identity = _identity(content, self.folder)
            if begun and read_identity(self.path) != identity:
                raise UserError(
                    f"{self.folder.label} holds another run than its copy {str(self.path)!r} on "
                    f"this machine; delete that folder to go on with the run there, or choose "
                    f"another --out"
                )
            return True
        strangers = sorted(name for name in self.folder.list() if not name.startswith("."))
        if strangers:
            raise UserError(
                f"{self.folder.label} holds {strangers[0].partition('/')[0]!r} but no run; choose "
                f"an empty or new folder"
            )
        if begun and (self.path / _COPIED).exists():
            raise UserError(
                f"{self.folder.label} no longer holds the run that {str(self.path)!r} is a copy "
                f"of; delete that folder to begin anew, or choose another --out"
            )
        return False

    def _update(
        self, run: Run, listed: dict[str, RemoteFile], begun: bool, proceed: Callable[[], None]
    ) -> None:
        """Fetches what is newer there than here."""
        self._note_copied()
        newest = self._newest_sound(read_identity(self.path)) if begun else None
        candidates = [
            step for step in reversed(steps_of(listed)) if newest is None or step >= newest
        ]
        if newest in candidates and self._same_record(newest):
            candidates = [step for step in candidates if step > newest]
        if candidates or newest is None:
            # Before checkpoints, so that none is ever here without the rows of its steps.
            self._fetch_files(listed)
        for step in candidates:
            if self._fetch_checkpoint(step, listed, proceed):
                self._drop_others(steps_of(listed))
                break
        here = set(_local_steps(self.path))
        for step in sorted(lasting_steps(run) & set(steps_of(listed)) - here):
            self._fetch_checkpoint(step, listed, proceed)

    def _note_copied(self) -> None:
        """Notes that the URL has held this run."""
        if not (self.path / _COPIED).exists():
            write_atomically(self.path / _COPIED, json.dumps({"url": self.folder.url}) + "\n")

    def _newest_sound(self, identity: str | None) -> int | None:
        """The newest checkpoint here that is what its record says."""
        for step in reversed(_local_steps(self.path)):
            with contextlib.suppress(Damaged):
                records.verify(self.path / "checkpoints" / str(step), step, identity, PARTS)
                return step
        return None

    def _same_record(self, step: int | None) -> bool:
        here = (self.path / "checkpoints" / str(step) / RECORD).read_bytes()
        return self.folder.read_if_there(f"checkpoints/{step}/{RECORD}") == here

    def _fetch_files(self, listed: dict[str, RemoteFile]) -> None:
        """Replaces the files here that training goes on with by those there.

        The configuration comes first: without it, the others would be no run's.
        """
        others = ("checkpoints/", "profile/")
        names = [name for name in listed if not _is_hidden(name) and not name.startswith(others)]
        for path in (self.path / "tensorboard").glob("*"):
            if f"tensorboard/{path.name}" not in listed:
                path.unlink()
        self.folder.fetch(CONFIG, self.path / CONFIG)
        for _ in self.folder.fetch_all((name for name in names if name != CONFIG), self.path):
            pass

    def _drop_others(self, there: list[int]) -> None:
        """Deletes checkpoints here that the run, as it went on elsewhere, has not made."""
        for step in _local_steps(self.path):
            if step not in there or not self._same_record(step):
                shutil.rmtree(self.path / "checkpoints" / str(step))

    def _fetch_checkpoint(
        self, step: int, listed: dict[str, RemoteFile], proceed: Callable[[], None]
    ) -> bool:
        """Fetches a checkpoint; returns whether it is sound. An unsound one is here, too."""
        prefix = f"checkpoints/{step}/"
        names = [name for name in listed if name.startswith(prefix)]
        total = sum(listed[name].size for name in names)
        self._say(f"fetching checkpoint {step} ({total / 1e6:,.1f} MB) from {self.folder.url!r}")
        incoming, target = self.path / _INCOMING, self.path / "checkpoints" / str(step)
        for _ in range(ATTEMPTS):
            shutil.rmtree(incoming, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            for _ in self.folder.fetch_all(names, incoming):
                proceed()
            target.parent.mkdir(exist_ok=True)
            (incoming / prefix).replace(target)
            with contextlib.suppress(Damaged):
                records.verify(target, step, read_identity(self.path), PARTS)
                return True
        return False


class _Copying:
    """The thread that copies a working copy to its URL."""

    def __init__(self, remote: RemoteRun, run: Run, lease: Lease, say: Callable[[str], None]):
        self._folder, self._path = remote.folder, remote.path
        self._note_copied = remote._note_copied
        self._options, self._lasting = run.checkpoint, lasting_steps(run)
        self._lease, self._say = lease, say
        self._there: set[int] | None = None  # steps of checkpoints; None before they were looked at
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of the files that are there
        self._closing = threading.Event()
        self._failing = False
        self._due = 0.0
        self._thread = Background(self._work, "copying")

    def finish(self, seconds: float | None = None) -> None:
        """Returns once all is copied.

        Args:
            seconds: after which to give up; None for no such limit.

        Raises:
            UserError: it could not be, for as long as an outage is waited for.
            Interrupted: it could not be in so many seconds.
        """
        limit = math.inf if seconds is None else time.monotonic() + seconds

        def proceed() -> None:
            if time.monotonic() > limit:
                raise Interrupted

        self._closing.set()
        self._thread.result(proceed)

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()
            try:
                if closing or self._is_due():
                    self._copy()
                    self._tell_recovered()
                if closing:
                    return
                self._closing.wait(POLL_SECONDS)
            except Exception as error:
                self._lease.check()
                if closing:
                    raise self._final(error) from None
                self._tell_failing(error)
                self._closing.wait(SECONDS_AFTER_FAILURE)

    def _final(self, error: Exception) -> UserError:
        return UserError(
            f"{self._folder.label} has not got all of the run, which is whole in "
            f"{str(self._path)!r}: {error}"
        )

    def _tell_failing(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            self._say(
                f"warning: {error}; training goes on, and what belongs there is kept in "
                f"{str(self._path)!r} until it can be copied"
            )

    def _tell_recovered(self) -> None:
        if self._failing:
            self._failing = False
            self._say(f"{self._folder.url!r} has everything again")

    def _is_due(self) -> bool:
        if self._there is None or time.monotonic() >= self._due:
            return True
        return bool(self._missing())

    def _missing(self) -> list[int]:
        """Steps of checkpoints that are here, not there, and to stay, in order."""
        assert self._there is not None
        here = set(_local_steps(self._path))
        return sorted((here - self._there) & kept(here | self._there, self._options, self._lasting))

    def _copy(self) -> None:
        """Copies what is not there, and deletes there what is not to stay."""
        self._lease.confirm()
        if self._there is None:
            self._there = self._look()
        began = time.monotonic()
        self._copy_files()
        seconds = time.monotonic() - began
        self._due = time.monotonic() + max(SECONDS_BETWEEN_COPIES, seconds / SHARE_OF_COPYING)
        skipped: set[int] = set()
        # The newest first: after an outage, it is what a resume would need.
        while missing := [step for step in self._missing() if step not in skipped]:
            if not self._copy_checkpoint(missing[-1]):
                skipped.add(missing[-1])  # it was deleted meanwhile
        for step in self._there - kept(self._there, self._options, self._lasting):
            self._delete(step)

    def _look(self) -> set[int]:
        """The checkpoints there that are as here, or not here; others, as parts of one that was cut
        short, are deleted.
        """
        listed = self._folder.list()
        for name in listed:
            # These are written once, or grow; a call that goes on begins new ones.
            with contextlib.suppress(FileNotFoundError):
                state = _state(self._path / name)
                if name.startswith(_GROWING) and listed[name].size == state[0]:
                    self._copied[name] = state
        here = _local_steps(self._path)
        complete = steps_of(listed)
        for step in {int(m[1]) for name in listed if (m := _CHECKPOINT.fullmatch(name))}:
            stale = here and step > here[-1]  # of a history that was not gone on with
            if step in complete and not stale and not self._differs(step, here):
                continue
            self._delete_files(step, listed)
        return set(steps_of(self._folder.list()))

    def _differs(self, step: int, here: list[int]) -> bool:
        if step not in here:
            return False
        ours = (self._path / "checkpoints" / str(step) / RECORD).read_bytes()
        return self._folder.read_if_there(f"checkpoints/{step}/{RECORD}") != ours

    def _delete(self, step: int) -> None:
        assert self._there is not None
        self._there.discard(step)
        self._delete_files(
            step, self._folder.below(f"checkpoints/{step}").list(), f"checkpoints/{step}/"
        )

    def _delete_files(self, step: int, listed: Iterable[str], prefix: str = "") -> None:
        own = f"checkpoints/{step}/"
        names = [f"{prefix}{name}" for name in listed if f"{prefix}{name}".startswith(own)]
        self._folder.delete(sorted(names, key=lambda name: name != f"{own}{RECORD}"))

    def _copy_checkpoint(self, step: int) -> bool:
        """Copies a checkpoint, its record last; False where it was deleted here meanwhile."""
        assert self._there is not None
        try:
            pinned = self._pinned(step)
        except FileNotFoundError:
            return False
        prefix = f"checkpoints/{step}/"
        names = [f"{prefix}{name}" for name in records.walk(pinned / prefix) if name != RECORD]
        told = time.monotonic()
        for done, _ in enumerate(self._folder.put_all(pinned, names), start=1):
            if self._closing.is_set() and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                self._say(
                    f"copying checkpoint {step} to {self._folder.url!r}: {done} of {len(names)} "
                    f"files"
                )
        # A checkpoint never comes without the rows of its steps.
        self._copy_files()
        self._lease.confirm()
        self._folder.put(pinned / prefix / RECORD, f"{prefix}{RECORD}")
        self._there.add(step)
        shutil.rmtree(pinned, ignore_errors=True)
        return True

    def _pinned(self, step: int) -> Path:
        """A folder with the files of a checkpoint, which stay while the checkpoint may be deleted.

        Raises:
            FileNotFoundError: it is being deleted.
        """
        pinned = self._path / _OUTGOING
        shutil.rmtree(pinned, ignore_errors=True)
        source, target = (each / "checkpoints" / str(step) for each in (self._path, pinned))
        record = records.read(source)
        for name in records.walk(source):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, target / name)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copy2(source / name, target / name)
        if record is None or not record.files.keys() <= records.walk(target).keys():
            raise FileNotFoundError(f"checkpoint {step} is being deleted")
        return pinned

    def _copy_files(self) -> None:
        """Copies the files that have changed, other than checkpoints, the configuration first."""
        if not (self._path / CONFIG).exists():
            return
        found = [name for name in records.walk(self._path) if _belongs(name)]
        for name in sorted(found, key=lambda name: (name != CONFIG, name)):
            path = self._path / name
            with contextlib.suppress(FileNotFoundError):
                state = _state(path)
                if self._copied.get(name) == state:
                    continue
                # Files may grow while they are read.
                snapshot = self._path / _OUTGOING / f"{path.name}.snapshot"
                snapshot.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, snapshot)
                self._folder.put(snapshot, name)
                self._copied[name] = state
                snapshot.unlink()
                if name == CONFIG:
                    self._note_copied()


def _local_steps(path: Path) -> list[int]:
    """The steps of the complete checkpoints in a run directory here, in order."""
    names = (
        f"checkpoints/{found.parent.name}/{RECORD}"
        for found in path.glob(f"checkpoints/*/{RECORD}")
    )
    return steps_of(names)


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written to: its size and time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _belongs(name: str) -> bool:
    """Whether a file of a working copy is one of the run, and of no checkpoint."""
    return not (_is_hidden(name) or _CHECKPOINT.match(name) or ".orbax-checkpoint-tmp" in name)


def _identity(content: bytes, folder: RemoteFolder) -> str | None:
    """What tells a run from all others, of the content of its `config.json`.

    Raises:
        UserError: it is the file of something else, as of a Hugging Face directory.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("run"), dict):
        raise UserError(
            f"{folder.label} holds {CONFIG!r} but no run; restore it, or choose an empty or new "
            f"folder"
        )
    identity = found.get("identity")
    return identity if isinstance(identity, str) else None
