"""Which files the sources of a run have, and what they had when their text was prepared.

A machine that has the prepared text and not the files trains on what was prepared last: the
fingerprint of the files is kept in the cache, under a name that depends on the source's
configuration alone.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braeburn.atomic import write_atomically
from braeburn.config import Data, Run, Source
from braeburn.data.corpus import READING_VERSION, File, files
from braeburn.data.mirror import Mirror
from braeburn.errors import UserError
from braeburn.remote import RemoteFolder, is_remote, place, user_cache


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        name: the source's.
        source: its configuration.
        found: its files; empty where they cannot be listed.
        fingerprint: of what decides their text; where they cannot be listed, that of the files
            which were prepared last.
        problem: why they cannot be listed; None where they can.
    """

    name: str
    source: Source
    found: tuple[File, ...]
    fingerprint: str
    problem: UserError | None = None


def list_sources(run: Run) -> list[Listing]:
    """Lists the files of all sources that some stage draws from.

    Files may be absent where their text was prepared before, from this cache.

    Raises:
        UserError: the files of a source cannot be listed, and no text of it was prepared.
    """
    listings = []
    for name, source in used_sources(run).items():
        try:
            found = tuple(files(name, source))
            listings.append(Listing(name, source, found, _fingerprint_of(source, found)))
        except UserError as problem:
            kept = _kept(run.data, name)
            if kept is None:
                raise
            listings.append(Listing(name, source, (), kept, problem))
    return listings


def _path(data: Data, name: str) -> Path:
    key = fingerprint(READING_VERSION, name, data.sources[name].model_dump())
    return cache_folder(data) / "listings" / f"{key}.json"


def _kept(data: Data, name: str) -> str | None:
    """The fingerprint of the files of a source that were prepared last; None where none were."""
    path = _path(data, name)
    mirror = mirror_of(data)
    if mirror is not None:
        mirror.fetch(path)
    try:
        found = json.loads(path.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def keep(data: Data, listing: Listing) -> None:
    """Remembers which files a source had, for a machine that does not have them.

    Args:
        data: the configuration of all sources.
        listing: of a source whose text is prepared.
    """
    path = _path(data, listing.name)
    if listing.problem is not None:
        return
    text = json.dumps({"fingerprint": listing.fingerprint})
    with contextlib.suppress(OSError):  # the cache may be read-only
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    mirror = mirror_of(data)
    if mirror is not None:
        mirror.publish(path)


def used_sources(run: Run) -> dict[str, Source]:
    """The sources that some stage draws from."""
    used = {
        name
        for stage in run.stages.values()
        for name, weight in stage.mixture.items()
        if weight > 0
    }
    return {name: run.data.sources[name] for name in sorted(used)}


def cache_folder(data: Data) -> Path:
    """The local folder that holds tokenizers and token shards; of a remote `data.cache`, what this
    machine needs of them.
    """
    if data.cache is not None:
        found = place(data.cache, "data.cache")
        if isinstance(found, Path):
            return found
    own = user_cache() / "data"
    return own if data.cache is None else own / "mirrors" / fingerprint(data.cache.rstrip("/"))


def mirror_of(data: Data) -> Mirror | None:
    """The remote `data.cache` and its local folder; None where it is local."""
    if data.cache is None or not is_remote(data.cache):
        return None
    return Mirror(cache_folder(data), RemoteFolder(data.cache.rstrip("/")), data.local_cache_bytes)


def _fingerprint_of(source: Source, found: Sequence[File]) -> str:
    # Which files parse, and so have docstrings, depends on the version of Python.
    python = list(sys.version_info[:2]) if source.format == "python-prose" else []
    listing = [(file.path, file.size, file.version) for file in found]
    return fingerprint(READING_VERSION, source.model_dump(), python, listing)


def fingerprint(*parts: object) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
