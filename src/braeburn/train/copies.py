"""Models at URLs: copies of them on this machine, to read from, and what is made here to be there.

A copy is checked against what the URL holds each time that it is asked for, and fetched anew where
that has changed. It may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braeburn.atomic import write_atomically
from braeburn.disk import check_space, explaining, locked
from braeburn.errors import UserError
from braeburn.parallel import processes
from braeburn.remote import RemoteFile, RemoteFolder, folder_for, user_cache
from braeburn.train import record as records
from braeburn.train.progress import tracked
from braeburn.train.record import FETCHED, PARTS, RECORD
from braeburn.train.remote_run import CONFIG, steps_of

_INDEX = "model.safetensors.index.json"
_MADE = ".being-made.json"  # at a URL: what an unfinished call puts there
_CHECKPOINT_URL = re.compile(r"(.+)/checkpoints/([0-9]+)")
# How often a model is fetched that changes meanwhile.
ATTEMPTS = 3
# Files that processes hold open while they may read from a copy.
_held: list[Any] = []


def fetched(place: Path | RemoteFolder, *, optimizer: bool = False) -> Path:
    """The local folder of a model: a run directory, one of its checkpoints, or a Hugging Face
    directory.

    Of a URL it is a copy of what is needed to use the model: of a run directory the newest
    checkpoint alone.

    Args:
        place: a local folder, which is returned as it is, or one at a URL.
        optimizer: whether the optimizer's state is needed, too.

    Raises:
        UserError: there is no model at the URL, it does not answer, or there is no room for it.
    """
    if isinstance(place, Path):
        return place
    found = _CHECKPOINT_URL.fullmatch(place.url)
    folder = RemoteFolder(found[1], place.named_by) if found else place
    step = int(found[2]) if found else None
    parts = PARTS if optimizer else ("params", "run")
    copy = folder_for(folder.url, user_cache() / "copies")
    config = folder.read_if_there(CONFIG)
    if config is None:
        raise UserError(
            f"{place.label} is neither a run directory nor a Hugging Face directory: it holds no "
            f"{CONFIG}; name what was given to --out of train, import or export"
        )
    with explaining():
        copy.mkdir(parents=True, exist_ok=True)
        with (copy / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be fetching the same
            for attempt in range(ATTEMPTS):
                try:
                    if _is_huggingface(config):
                        _fetch_huggingface(folder, folder.list(), copy)
                    else:
                        _fetch_run(folder, folder.list(), copy, step, parts)
                    break
                except _Changed:  # as of a run that goes on there, which deletes checkpoints
                    if attempt + 1 == ATTEMPTS:
                        raise UserError(
                            f"{place.label} changes while it is fetched; run the same command again"
                        ) from None
            _hold(copy)
    return copy / "checkpoints" / found[2] if found else copy


class _Changed(Exception):
    """What was listed at a URL is gone."""


def _is_huggingface(config: bytes) -> bool:
    try:
        return "model_type" in json.loads(config)
    except (ValueError, TypeError, RecursionError):
        return False


def _hold(copy: Path) -> None:
    """Keeps other processes from deleting what this one may read, until its end."""
    held = (copy / ".in-use").open("w")
    fcntl.flock(held, fcntl.LOCK_SH)
    _held.append(held)


def _fetch_huggingface(folder: RemoteFolder, listed: Mapping[str, RemoteFile], copy: Path) -> None:
    """Brings the copy of a Hugging Face directory up to date."""
    index = folder.read_if_there(_INDEX) or b""
    single = "model.safetensors" in listed

    def is_wanted(name: str) -> bool:
        if "/" in name:
            return False
        if name.endswith(".safetensors"):
            in_index = json.dumps(name).encode() in index
            return name == "model.safetensors" if single else in_index
        return name.endswith((".json", ".jinja"))

    versions = {
        name: [file.size, file.version] for name, file in sorted(listed.items()) if is_wanted(name)
    }
    known = _identity(copy)
    stale = [
        name
        for name, version in versions.items()
        if not (copy / name).exists() or not known or known.get(name) != version
    ]
    if not stale and known == versions:
        return
    _check_room(copy, sum(listed[name].size for name in stale))
    (copy / FETCHED).unlink(missing_ok=True)
    for path in copy.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name not in versions:
            path.unlink()
    _fetch(folder, stale, copy)
    _note(copy, {"identity": versions})


def _fetch_run(
    folder: RemoteFolder,
    listed: Mapping[str, RemoteFile],
    copy: Path,
    step: int | None,
    parts: Iterable[str],
) -> None:
    """Brings the copy of a run directory up to date.

    Args:
        folder: the run directory.
        listed: its files.
        copy: of it.
        step: of the checkpoint to have; None for the newest.
        parts: of the checkpoint.
    """
    names = [name for name in listed if "/" not in name and name.endswith(".json")]
    _fetch(folder, [name for name in names if not name.startswith(".")], copy)
    complete = steps_of(listed)
    newest = step is None
    step = max(complete, default=None) if step is None else step
    for path in (copy / "checkpoints").glob("*"):
        # What is read is the newest here.
        if path.name.isdigit() and newest and (step is None or int(path.name) > step):
            shutil.rmtree(path, ignore_errors=True)
    if step not in complete:
        (copy / "checkpoints").mkdir(exist_ok=True)
        return
    _drop_unused(copy, str(step))
    prefix = f"checkpoints/{step}/"
    target = copy / "checkpoints" / str(step)
    record = folder.read_if_there(f"{prefix}{RECORD}")
    if record is None:
        raise _Changed
    identity = hashlib.sha256(record).hexdigest()
    present = _noted(target).get("parts", []) if _identity(target) == identity else []
    wanted = [part for part in parts if part not in present]
    if not wanted:
        return
    if not present:
        shutil.rmtree(target, ignore_errors=True)
    left_out = tuple(f"{prefix}{part}/" for part in PARTS if part not in wanted)
    names = [name for name in listed if name.startswith(prefix) and not name.startswith(left_out)]
    _check_room(copy, sum(listed[name].size for name in names))
    incoming = copy / ".incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    _fetch(folder, names, incoming)
    if not present:
        _note(incoming / prefix, {"identity": identity, "parts": list(wanted)})
        target.parent.mkdir(exist_ok=True)
        (incoming / prefix).replace(target)
    else:
        for part in wanted:
            shutil.rmtree(target / part, ignore_errors=True)
            if (incoming / prefix / part).is_dir():
                (incoming / prefix / part).replace(target / part)
        _note(target, {"identity": identity, "parts": [*present, *wanted]})
    shutil.rmtree(incoming, ignore_errors=True)


def _fetch(folder: RemoteFolder, names: list[str], target: Path) -> None:
    shown = tracked(folder.fetch_all(names, target), f"fetching {folder.url}", total=len(names))
    try:
        for _ in shown:
            pass
    except FileNotFoundError as error:
        if error.filename is not None and Path(error.filename).is_relative_to(target):
            raise
        raise _Changed from None


def _drop_unused(copy: Path, wanted: str) -> None:
    """Deletes the copies of other checkpoints, unless a process may read from one."""
    with (copy / ".in-use").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        for path in (copy / "checkpoints").glob("*"):
            if path.name != wanted:
                shutil.rmtree(path, ignore_errors=True)


def _check_room(copy: Path, needed: int) -> None:
    check_space(
        copy,
        needed,
        "the copy takes",
        "free some, or set XDG_CACHE_HOME to a folder on another disk",
    )


def _note(folder: Path, content: Mapping[str, Any]) -> None:
    write_atomically(folder / FETCHED, json.dumps(content) + "\n")


def _noted(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FETCHED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _identity(folder: Path) -> Any:
    return _noted(folder).get("identity")


@contextmanager
def made_for(place: Path | RemoteFolder, *, among_others: bool = False) -> Iterator[Path]:
    """Where to make on this machine what is to be at a place: a folder, or a GGUF file.

    What is to be at a URL is copied there when it is complete, `config.json` last, without which no
    reader takes it for a model. What an earlier call could not complete there is made anew.

    Args:
        place: a local path, which is yielded as it is, or a URL.
        among_others: whether a folder may hold other files than what is made.

    Raises:
        UserError: the URL is in use, or does not answer.
    """
    if isinstance(place, Path):
        yield place
        return
    parent = folder_for(place.url, user_cache() / "outgoing")
    local = parent / place.url.rpartition("/")[2]
    if not processes.is_main():
        yield local
        return
    is_file = local.suffix == ".gguf"
    if is_file and place.size("") is not None:
        raise UserError(f"{place.label} is in use; name a new file")
    if not is_file and not among_others:
        _require_unused(place)
    with explaining():
        parent.mkdir(parents=True, exist_ok=True)
        in_use = f"{place.label} is being made by another process; wait for it to end"
        with locked(parent / ".lock", in_use):
            if local.exists():  # of a call that was cut short
                shutil.rmtree(local) if local.is_dir() else local.unlink()
            yield local
            if is_file:
                RemoteFolder(place.url.rpartition("/")[0], place.named_by).put(local, local.name)
            elif among_others:
                _add(local, place)
            else:
                _publish(local, place)
            shutil.rmtree(parent, ignore_errors=True)


def _require_unused(folder: RemoteFolder) -> None:
    """Refuses a folder that holds something, but for what an unfinished call has put there, which
    is deleted.
    """
    listed = folder.list()
    if unfinished := folder.read_if_there(_MADE):
        if CONFIG in listed:
            folder.delete([_MADE])  # it was finished after all
        else:
            with contextlib.suppress(ValueError, RecursionError):
                own = set(json.loads(unfinished))
                folder.delete(name for name in listed if name in own)
                listed = {name: file for name, file in listed.items() if name not in own}
    if any(not name.startswith(".") for name in listed):
        raise UserError(f"{folder.label} is in use; choose a new or empty folder")


def _add(local: Path, folder: RemoteFolder) -> None:
    """Copies files to a folder that has none of their names."""
    names = sorted(records.walk(local))
    for name in names:
        if folder.size(name) is not None:
            raise UserError(f"'{folder.url}/{name}' is in use; name another folder with --out")
    for name in names:
        folder.put(local / name, name)


def _publish(local: Path, folder: RemoteFolder) -> None:
    """Copies a folder whose last file is its configuration, if it has one."""
    hidden = re.compile(r"(^|/)\.")
    names = sorted(name for name in records.walk(local) if not hidden.search(name))
    folder.write(_MADE, json.dumps(names).encode())
    shown = tracked(
        folder.put_all(local, [name for name in names if name != CONFIG]),
        f"copying to {folder.url}",
        total=len(names),
    )
    for _ in shown:
        pass
    if CONFIG in names:
        folder.put(local / CONFIG, CONFIG)
    folder.delete([_MADE])
