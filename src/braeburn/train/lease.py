"""Who trains in a remote run directory: a file there that the one process renews, and others heed.

A remote folder has no locks. Whoever finds the file of a process that may still run waits until the
file is renewed, or has not been for long; no two clocks are compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from braeburn.errors import UserError
from braeburn.remote import RemoteFolder

LEASE = ".lease.json"
SECONDS_BETWEEN_RENEWALS = 20.0
# Without a renewal for as long, its process is taken to be gone.
SECONDS_TO_WAIT = 75.0
_POLL_SECONDS = 1.0


class Lease:
    """The right to write to a remote run directory, held from `take` to `release`."""

    def __init__(self, folder: RemoteFolder):
        """Takes nothing yet.

        Args:
            folder: the run directory.
        """
        self._folder = folder
        self._token = uuid.uuid4().hex
        self._renewals = 0
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken_by: str | None = None

    def take(self, say: Callable[[str], None], proceed: Callable[[], None]) -> None:
        """Takes the lease, once no other process has it.

        Args:
            say: takes a line where that is to be waited for.
            proceed: called again and again while waiting; what it raises ends the wait.

        Raises:
            UserError: another process has it, or the folder cannot be written to.
        """
        found = self._folder.read_if_there(LEASE)
        if found is not None and not _is_gone(_parsed(found)):
            self._wait_for(found, say, proceed)
        self._write()
        if self._read_token() not in (None, self._token):
            raise UserError(self._in_use())
        self._thread = threading.Thread(target=self._renew, name="braeburn-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuses to go on where another process has taken the lease over.

        Raises:
            UserError: one has, since this one could not renew it for long.
        """
        if self._taken_by is not None:
            raise UserError(
                f"{self._folder.label} was taken over by another process on {self._taken_by!r} "
                f"while it could not be reached from here; nothing more is written there: stop "
                f"that process to go on here, or leave it to it"
            )

    def confirm(self) -> None:
        """As `check`, once the folder was asked; to be called before something is written there.

        Raises:
            UserError: another process has the lease, or the folder does not answer.
        """
        self._notice(_parsed(self._folder.read_if_there(LEASE) or b""))
        self.check()

    def _notice(self, holder: dict[str, Any]) -> None:
        if holder.get("token") not in (None, self._token):
            self._taken_by = str(holder.get("host"))

    def release(self) -> None:
        """Gives the lease back, unless another process has taken it over."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join(timeout=_POLL_SECONDS)
        self._thread = None
        with contextlib.suppress(Exception):
            if self._taken_by is None and self._read_token() == self._token:
                self._folder.delete([LEASE])

    def _wait_for(
        self, found: bytes, say: Callable[[str], None], proceed: Callable[[], None]
    ) -> None:
        """Returns once the holder of a lease has not renewed it for long."""
        say(
            f"another process may still train in {self._folder.url!r}; waiting up to "
            f"{SECONDS_TO_WAIT:.0f} s for a sign of it"
        )
        until = time.monotonic() + SECONDS_TO_WAIT
        while time.monotonic() < until:
            proceed()
            time.sleep(_POLL_SECONDS)
            now = self._folder.read_if_there(LEASE)
            if now is None:
                return
            if now != found:
                raise UserError(self._in_use())

    def _in_use(self) -> str:
        holder = _parsed(self._folder.read_if_there(LEASE) or b"")
        where = f" on {holder['host']!r}" if isinstance(holder.get("host"), str) else ""
        return (
            f"{self._folder.label} is in use by another process{where} that trains there; "
            f"wait for it to end or stop it, or choose another --out"
        )

    def _write(self) -> None:
        self._renewals += 1
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "numbered_by": _numbered_by(),
            "renewals": self._renewals,
        }
        self._folder.write(LEASE, json.dumps(content).encode())

    def _read_token(self) -> Any:
        found = self._folder.read_if_there(LEASE)
        return None if found is None else _parsed(found).get("token")

    def _renew(self) -> None:
        while not self._released.wait(SECONDS_BETWEEN_RENEWALS):
            # An outage is no reason to stop: others wait longer than a renewal takes.
            with contextlib.suppress(Exception):
                self._notice(_parsed(self._folder.read_if_there(LEASE) or b""))
                if self._taken_by is not None:
                    return
                if not self._released.is_set():
                    self._write()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process that holds a lease is known to have ended: it ran here, and does not."""
    number, here = holder.get("process"), _numbered_by()
    if here is None or holder.get("numbered_by") != here or not isinstance(number, int):
        return False
    if number == os.getpid():  # an earlier process of this number
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _numbered_by() -> list[Any] | None:
    """What tells the system that gives processes their numbers from others; None where that cannot
    be told.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, Path("/proc/self/ns/pid").stat().st_ino]
    except OSError:
        return None
