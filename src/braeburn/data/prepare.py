"""From a run's configuration to its tokenizer and token shards, built once and kept in a cache."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from braeburn.atomic import write_atomically
from braeburn.config import Data, Run, Source
from braeburn.data.building import ABANDONED_SECONDS, age
from braeburn.data.corpus import (
    READING_VERSION,
    File,
    Report,
    documents,
    files,
    is_held_out,
    merge,
    nothing_found,
    read,
)
from braeburn.data.division import Part, divide
from braeburn.data.joining import Joining, copy_shard, plan_joining
from braeburn.data.manifest import TokenManifest, read_manifest
from braeburn.data.ray_cluster import check_nodes, on_ray
from braeburn.data.token_shards import (
    FORMAT_VERSION,
    SHARD_TOKENS,
    Plan,
    TokenShards,
    build_several,
    writing,
)
from braeburn.data.tokenizer import PATTERN, Tokenizer, sample, train
from braeburn.data.workers import ALONE, Function, Progress, Task, Work, in_processes, in_threads
from braeburn.errors import UserError

# Text that a tokenizer is trained on, for each entry of its vocabulary.
TRAINING_BYTES_PER_ENTRY = 1024
# Of less text, processes of their own would take longer to start than they save.
WORTH_PROCESSES_BYTES = 16 * 2**20
SECONDS_BETWEEN_TELLING = 1.0
# The two sides of a source, as their folders are named.
TRAIN, HELD_OUT = "train", "held-out"
_PART = re.compile(rf"({TRAIN}|{HELD_OUT})(-\d+(\.partial-[0-9a-f]+)?)?")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """All that training reads. A source with no held-out document maps to None in `held_out`.

    Attributes:
        tokenizer: the tokenizer.
        train: the text of each source to train on.
        held_out: the text of each source to evaluate on.
        fingerprints: of each source, a hash of the tokens of both sides and of where documents
            start.
        verified_for: the run directory that all this is for, where contents are not to be checked
            every time.
    """

    tokenizer: Tokenizer
    train: dict[str, TokenShards]
    held_out: dict[str, TokenShards | None]
    fingerprints: dict[str, str] = field(default_factory=dict)
    verified_for: str | None = None


def prepare(
    run: Run,
    log: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
    *,
    work: Work = ALONE,
    verified_for: str | None = None,
    only_held_out: bool = False,
) -> Prepared:
    """Trains or loads the tokenizer, then builds or opens the token shards of every source that a
    stage draws from.

    Args:
        run: names the sources, the tokenizer and the cache.
        log: takes one line for each thing that is built, and warnings.
        tokenizer: used as it is where given, as on resuming.
        work: who does it, and who is told.
        verified_for: the run directory that the text is for; contents of token shards are checked
            once for each, and with None every time.
        only_held_out: leaves the text to train on alone, as evaluation does; `train` and
            `fingerprints` are empty.

    Raises:
        UserError: a source, the tokenizer, the cache or their sizes do not fit.
    """
    cache = cache_folder(run.data)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    if work.ray is not None:
        check_nodes(work.ray, cache)
    listings = list_sources(run)
    work.proceed()
    if tokenizer is None:
        tokenizer = _tokenizer(run, listings, log, work.proceed)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"model.vocab_size={run.model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} entries; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or data.tokenizer to a smaller one"
        )
    texts = [
        _Text(listing, cache, tokenizer, run.data.held_out, only_held_out) for listing in listings
    ]
    if any(text.missing for text in texts):
        _build([text for text in texts if text.missing], tokenizer, log, work)
    elif not only_held_out:
        log(f"the text is ready: it was prepared before, in {str(cache)!r}")
    opened = {}
    for text in texts:
        sides = {
            side: TokenShards.open(directory, tokenizer.hash, verified_for)
            for side, directory in text.directories.items()
        }
        opened[text.listing.name] = sides
        work.proceed()
        if not only_held_out:
            for line in _account(text.listing, run.data.held_out, sides[TRAIN], sides[HELD_OUT]):
                log(line)
            _keep_listing(cache, run.data, text.listing)
    for listing in listings:
        if listing.problem is not None:
            log(
                f"data.sources.{listing.name}: its files are not here; going on with what was "
                f"prepared from them"
            )
    both = {} if only_held_out else opened
    return Prepared(
        tokenizer,
        {name: sides[TRAIN] for name, sides in both.items()},
        {
            name: sides[HELD_OUT] if sides[HELD_OUT].documents else None
            for name, sides in opened.items()
        },
        {
            name: _fingerprint(*(side.fingerprint for side in sides.values()))
            for name, sides in both.items()
        },
        verified_for,
    )


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
            listings.append(Listing(name, source, found, _source_fingerprint(source, found)))
        except UserError as problem:
            kept = _kept_listing(cache_folder(run.data), run.data, name)
            if kept is None:
                raise
            listings.append(Listing(name, source, (), kept, problem))
    return listings


def _listing_path(cache: Path, data: Data, name: str) -> Path:
    key = _fingerprint(READING_VERSION, name, data.sources[name].model_dump())
    return cache / "listings" / f"{key}.json"


def _kept_listing(cache: Path, data: Data, name: str) -> str | None:
    """The fingerprint of the files of a source that were prepared last; None where none were."""
    try:
        found = json.loads(_listing_path(cache, data, name).read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _keep_listing(cache: Path, data: Data, listing: Listing) -> None:
    """Remembers which files a source had, for a machine that has them not."""
    path = _listing_path(cache, data, listing.name)
    if listing.problem is None and _kept_listing(cache, data, listing.name) != listing.fingerprint:
        with contextlib.suppress(OSError):  # the cache may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"fingerprint": listing.fingerprint}))


class _Text:
    """The token shards of a source, and what is missing of them."""

    def __init__(
        self,
        listing: Listing,
        cache: Path,
        tokenizer: Tokenizer,
        fraction: float,
        only_held_out: bool,
    ) -> None:
        """Raises UserError where something is missing that the source's files are needed for."""
        self.listing = listing
        self.fraction = fraction
        folder = cache.absolute() / "stores"
        # Fingerprints have told the sides apart by a truth value from the first version on.
        fingerprints = {
            side: _fingerprint(
                listing.fingerprint, tokenizer.hash, fraction, side == HELD_OUT, FORMAT_VERSION
            )
            for side in (TRAIN, HELD_OUT)
        }
        sides = (HELD_OUT,) if only_held_out else (TRAIN, HELD_OUT)
        self.directories = {
            side: folder / f"{listing.name}-{side}-{fingerprints[side]}" for side in sides
        }
        self.parts_folder = folder / f"{listing.name}-{fingerprints[TRAIN]}.parts"
        self.missing = [side for side, path in self.directories.items() if not path.exists()]
        if self.missing and listing.problem is not None:
            raise listing.problem
        self.parts = divide(listing.source, listing.found) if self.missing else []

    @property
    def size(self) -> int:
        """Bytes of the files that are to be read."""
        return sum(part.size for part in self.parts)

    def part_directory(self, side: str, index: int) -> Path:
        """The folder of what one part holds; of an only part, that of the whole."""
        if len(self.parts) == 1:
            return self.directories[side]
        return self.parts_folder / f"{side}-{index:06d}"

    def tasks(self) -> list["_Tokenising"]:
        """What is to be tokenised."""
        return [
            _Tokenising(
                self.listing.name,
                self.listing.source,
                part,
                {side: self.part_directory(side, index) for side in self.missing},
                self.fraction,
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
            for path in [
                *(path for paths in folders.values() for path in paths),
                self.parts_folder,
            ]:
                shutil.rmtree(path, ignore_errors=True)
            held_out = documents.get(HELD_OUT, 1)  # where that side was there, it holds some
            report = merge([Report(dict(found.passed_over)) for found in manifests[TRAIN]])
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
            for side in self.missing
        ]


@dataclass(frozen=True)
class _Tokenising:
    """A part of a source that is to be tokenised."""

    name: str
    source: Source
    part: Part
    directories: dict[str, Path]
    fraction: float

    def side_of(self, document: str) -> str:
        """The side of a document by its name."""
        return HELD_OUT if is_held_out(document, self.fraction) else TRAIN


def _tokenise(tokenizer: Tokenizer, task: _Tokenising, proceed: Callable[[], None]) -> int:
    """Tokenises a part, unless it has been; returns the bytes of its files."""
    plan = Plan(task.directories, task.side_of)
    missing = {side for side, path in task.directories.items() if not path.exists()}
    if missing:
        report = Report()
        texts = read(
            task.name, task.source, task.part, lambda name: task.side_of(name) in missing, report
        )
        build_several(plan, texts, tokenizer, proceed=proceed, report=report)
    return task.part.size


def _build(
    texts: Sequence[_Text], tokenizer: Tokenizer, log: Callable[[str], None], work: Work
) -> None:
    """Tokenises what is missing, in parts that any number of processes share out among them, and
    puts the parts together.
    """
    stores = texts[0].parts_folder.parent
    with writing(stores):
        stores.mkdir(exist_ok=True)
    began = time.monotonic()
    total = sum(text.size for text in texts)
    tasks = [task for text in texts for task in text.tasks()]
    finished = 0
    told = 0.0

    def done(task: _Tokenising, size: int) -> None:
        nonlocal finished
        finished += size

    def proceed() -> None:
        nonlocal told
        work.proceed()
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_TELLING:
            told = now
            at_work = _bytes_at_work(tasks)
            work.watch(Progress(min(total, finished + at_work), total, now - began))

    _do_all(partial(_tokenise, tokenizer), tasks, total, replace(work, proceed=proceed), done)
    joinings = [joining for text in texts for joining in text.joinings()]
    copies = [copy for joining in joinings for copy in joining.copies]
    _do_all(copy_shard, copies, total, work, lambda copy, size: None)
    for joining in joinings:
        joining.finish(tokenizer, SHARD_TOKENS)
    for text in texts:
        shutil.rmtree(text.parts_folder, ignore_errors=True)
        log(f"tokenised {text.listing.name}: {text.size / 1e6:,.1f} MB of files")
    seconds = time.monotonic() - began
    log(f"prepared {total / 1e6:,.1f} MB of files in {seconds:.1f} s")
    _sweep(stores)


def _sweep(folder: Path) -> None:
    """Removes the parts of text that nobody asked for again."""
    for parts in folder.glob("*.parts"):
        names = [path.name for path in parts.glob("*")]
        if all(_PART.fullmatch(name) for name in names) and age(parts) > ABANDONED_SECONDS:
            shutil.rmtree(parts, ignore_errors=True)


def _do_all(
    function: Function[Task, int],
    tasks: Sequence[Task],
    size: int,
    work: Work,
    done: Callable[[Task, int], None],
) -> None:
    """Does tasks on a cluster, where there is one; in processes of this machine, where that is
    worth their start; in threads of this process elsewhere.
    """
    if work.ray is not None:
        on_ray(function, tasks, work.ray, work.proceed, done)
        return
    count = min(work.count, len(tasks))
    if count > 1 and size >= WORTH_PROCESSES_BYTES:
        # Where several machines prepare the same text, they begin with different parts of it.
        first = int.from_bytes(os.urandom(4), "big") % len(tasks)
        turned = [*tasks[first:], *tasks[:first]]
        in_processes(function, turned, count, work.proceed, done)
    else:
        in_threads(function, tasks, work.proceed, done)


def _bytes_at_work(tasks: Sequence[_Tokenising]) -> int:
    """Bytes of text in the parts that are being tokenised, by any process."""
    found = 0
    for folder in {path.parent for task in tasks for path in task.directories.values()}:
        for path in folder.glob("*.partial-*/progress.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found += int(json.loads(path.read_bytes())["text_bytes"])
    return found


def _account(
    listing: Listing, fraction: float, train: TokenShards, held_out: TokenShards
) -> Iterator[str]:
    """What a source turned out to be, with warnings about what was hardly meant."""
    name, source = listing.name, listing.source
    yield (
        f"data.sources.{name}: {train.documents} documents, {train.tokens} tokens for training; "
        f"{held_out.documents} documents, {held_out.tokens} tokens held out"
    )
    if train.passed_over:
        met = ", ".join(f"{count:,} {kind}" for kind, count in train.passed_over.items())
        yield f"data.sources.{name}: passed over {met}"
    if train.separator_missing:
        yield (
            f"warning: data.sources.{name}.separator={source.separator!r} is in none of its files, "
            f"so each of them is one document; mend the separator, or leave it out"
        )
    elif train.documents + held_out.documents == 1:
        yield (
            f"warning: data.sources.{name} is one document; set data.sources.{name}.separator to "
            f"cut it into more, as --set 'data.sources.{name}.separator=\\n\\n' at blank lines"
        )
    if not held_out.documents and fraction > 0:
        yield (
            f"warning: data.held_out={fraction} holds out no document of {name}, so it cannot be "
            f"evaluated; raise data.held_out or add documents"
        )


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
    """The folder that holds tokenizers and token shards."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        / "braeburn"
        / "data"
    )


def _tokenizer(
    run: Run, listings: Sequence[Listing], log: Callable[[str], None], proceed: Callable[[], None]
) -> Tokenizer:
    if run.data.tokenizer is not None:
        try:
            # A model that is trained from scratch sees no text without a begin token before it.
            return Tokenizer.load(run.data.tokenizer).beginning_prompts()
        except UserError as error:
            raise UserError(
                f"data.tokenizer: {error}, or leave data.tokenizer unset to train one"
            ) from None
    fingerprints = {listing.name: listing.fingerprint for listing in listings}
    fingerprint = _fingerprint(
        fingerprints, run.model.vocab_size, run.data.held_out, PATTERN, TRAINING_BYTES_PER_ENTRY
    )
    path = cache_folder(run.data) / "tokenizers" / f"{fingerprint}.json"
    if path.exists():
        try:
            return Tokenizer.load(path).beginning_prompts()
        except UserError:
            log(f"warning: the trained tokenizer {str(path)!r} is corrupt; training it again")
    began = time.perf_counter()
    for listing in listings:
        if listing.problem is not None:
            raise listing.problem
    streams = [
        (
            document.text
            for document in documents(listing.name, listing.source, False, run.data.held_out)
        )
        for listing in listings
    ]
    texts = sample(streams, TRAINING_BYTES_PER_ENTRY * run.model.vocab_size)
    tokenizer = _in_background(lambda: train(texts, run.model.vocab_size), proceed)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    log(
        f"trained a tokenizer of {tokenizer.vocab_size} entries in "
        f"{time.perf_counter() - began:.1f} s"
    )
    return tokenizer


def _in_background(work: Callable[[], Result], proceed: Callable[[], None]) -> Result:
    """What `work` returns, done in a thread that is left to itself when `proceed` raises.

    A tokenizer is trained in one call of Rust, during which Python would hear of no signal.
    """
    ending: list[Callable[[], Result]] = []

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            failure = error

            def fail() -> Result:
                raise failure

            ending.append(fail)
        else:
            ending.append(lambda: result)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        proceed()
    return ending[0]()


def _source_fingerprint(source: Source, found: Sequence[File]) -> str:
    # Which files parse, and so have docstrings, depends on the version of Python.
    python = list(sys.version_info[:2]) if source.format == "python-prose" else []
    listing = [(file.path, file.size, file.version) for file in found]
    return _fingerprint(READING_VERSION, source.model_dump(), python, listing)


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
