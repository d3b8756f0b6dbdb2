"""From a run's configuration to its tokenizer and token shards, built once and kept in a cache."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from braeburn.config import Data, Run, Source
from braeburn.data.corpus import READING_VERSION, Report, documents, files
from braeburn.data.token_shards import FORMAT_VERSION, TokenShards, build_token_shards, writing
from braeburn.data.tokenizer import PATTERN, Tokenizer, sample, train
from braeburn.errors import UserError

TRAINING_BYTES_PER_ENTRY = (
    1024  # text that a tokenizer is trained on, for each entry of its vocabulary
)

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
    proceed: Callable[[], None] = lambda: None,
    verified_for: str | None = None,
    only_held_out: bool = False,
) -> Prepared:
    """Trains or loads the tokenizer, then builds or opens the token shards of every source that a
    stage draws from.

    Args:
        run: names the sources, the tokenizer and the cache.
        log: takes one line for each thing that is built, and warnings.
        tokenizer: used as it is where given, as on resuming.
        proceed: called about once a second, from any thread. What it raises ends the work; what was
            tokenised stays.
        verified_for: the run directory that the text is for; contents of token shards are checked
            once for each, and with None every time.
        only_held_out: leaves the text to train on alone, as evaluation does; `train` and
            `fingerprints` are empty.

    Raises:
        UserError: a source, the tokenizer, the cache or their sizes do not fit.
    """
    sources = used_sources(run)
    cache = cache_folder(run.data)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    listed = {name: _source_fingerprint(name, source) for name, source in sources.items()}
    proceed()
    if tokenizer is None:
        tokenizer = _tokenizer(run, sources, listed, log, proceed)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"model.vocab_size={run.model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size} entries; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or data.tokenizer to a smaller one"
        )
    own = tokenizer

    def sides(name: str) -> list[TokenShards]:
        opened = []
        for side in (True,) if only_held_out else (False, True):
            fingerprint = _fingerprint(
                listed[name], own.hash, run.data.held_out, side, FORMAT_VERSION
            )
            directory = cache / "stores" / f"{name}-{'held-out' if side else 'train'}-{fingerprint}"
            if not directory.exists():
                began = time.perf_counter()
                report = Report()
                texts = documents(name, sources[name], side, run.data.held_out, report)
                build_token_shards(directory, texts, own, proceed=proceed, report=report)
                log(f"tokenised {directory.name} in {time.perf_counter() - began:.1f} s")
            opened.append(TokenShards.open(directory, own.hash, verified_for))
            proceed()
        if not only_held_out:
            for line in _account(name, sources[name], run.data.held_out, *opened):
                log(line)
        return opened

    # Two at a time: while one is read, which takes Python, another is tokenised, which does not.
    with ThreadPoolExecutor(2) as pool:
        opened = dict(zip(sources, pool.map(sides, sources), strict=True))
    both = {} if only_held_out else opened
    return Prepared(
        tokenizer,
        {name: train for name, (train, _) in both.items()},
        {name: found[-1] if found[-1].documents else None for name, found in opened.items()},
        {name: _fingerprint(*(side.fingerprint for side in found)) for name, found in both.items()},
        verified_for,
    )


def _account(
    name: str, source: Source, fraction: float, train: TokenShards, held_out: TokenShards
) -> Iterator[str]:
    """What a source turned out to be, with warnings about what was hardly meant."""
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
    run: Run,
    sources: dict[str, Source],
    fingerprints: dict[str, str],
    log: Callable[[str], None],
    proceed: Callable[[], None],
) -> Tokenizer:
    if run.data.tokenizer is not None:
        try:
            # A model that is trained from scratch sees no text without a begin token before it.
            return Tokenizer.load(run.data.tokenizer).beginning_prompts()
        except UserError as error:
            raise UserError(
                f"data.tokenizer: {error}, or leave data.tokenizer unset to train one"
            ) from None
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
    streams = [
        (document.text for document in documents(name, source, False, run.data.held_out))
        for name, source in sources.items()
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


def _source_fingerprint(name: str, source: Source) -> str:
    # Which files parse, and so have docstrings, depends on the version of Python.
    python = list(sys.version_info[:2]) if source.format == "python-prose" else []
    listing = [(file.path, file.size, file.version) for file in files(name, source)]
    return _fingerprint(READING_VERSION, source.model_dump(), python, listing)


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
