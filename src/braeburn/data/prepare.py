"""From a run's configuration to its tokenizer and token stores, built once and kept in a cache."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from braeburn.background import nothing_to_ask
from braeburn.config import Data, Run, Source
from braeburn.data.corpus import Document, documents, files
from braeburn.data.store import FORMAT_VERSION, TokenStore, build_store, writing
from braeburn.data.tokenizer import PATTERN, Tokenizer, sample, train
from braeburn.errors import UserError

TRAINING_BYTES_PER_ENTRY = 1024  # text that a tokenizer is trained on, for each entry of its vocabulary


@dataclass(frozen=True)
class Prepared:
    """All that training reads. A source with no held-out document maps to None in `held_out`."""

    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    held_out: dict[str, TokenStore | None]


def prepare(
    run: Run,
    log: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
    proceed: Callable[[], None] = nothing_to_ask,
) -> Prepared:
    """Trains or loads the tokenizer, then builds or opens the stores of every source that a stage draws from.

    Args:
        run: names the sources, the tokenizer and the cache.
        log: takes one line for each thing that is built, and warnings.
        tokenizer: used as it is where given, as on resuming.
        proceed: called before each document; what it raises ends the work, of which complete stores stay.

    Raises:
        UserError: a source, the tokenizer, the cache or their sizes do not fit.
    """
    sources = used_sources(run)
    cache = cache_folder(run.data)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    fingerprints = {name: _source_fingerprint(name, source) for name, source in sources.items()}
    if tokenizer is None:
        tokenizer = _tokenizer(run, sources, fingerprints, cache, log, proceed)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"model.vocab_size={run.model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} entries; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or data.tokenizer to a smaller one"
        )

    def stores(name: str) -> tuple[TokenStore, TokenStore | None]:
        both = []
        for side in (False, True):
            fingerprint = _fingerprint(fingerprints[name], tokenizer.hash, run.data.held_out, side, FORMAT_VERSION)
            directory = cache / "stores" / f"{name}-{'held-out' if side else 'train'}-{fingerprint}"
            if not directory.exists():
                began = time.perf_counter()
                texts = _watched(documents(name, sources[name], side, run.data.held_out), proceed)
                build_store(directory, texts, tokenizer)
                log(f"tokenised {directory.name} in {time.perf_counter() - began:.1f} s")
            both.append(TokenStore.open(directory, tokenizer.hash))
        train, held_out = both
        log(
            f"data.sources.{name}: {train.documents} documents, {train.tokens} tokens for training; "
            f"{held_out.documents} documents, {held_out.tokens} tokens held out"
        )
        if not held_out.documents and run.data.held_out:
            log(
                f"warning: data.held_out={run.data.held_out} holds out no document of {name}, so it cannot be "
                f"evaluated; raise data.held_out or add documents"
            )
        return train, held_out if held_out.documents else None

    # Two at a time: while one is read, which takes Python, another is tokenised, which does not.
    with ThreadPoolExecutor(2) as pool:
        pairs = dict(zip(sources, pool.map(stores, sources), strict=True))
    return Prepared(tokenizer, {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})


def used_sources(run: Run) -> dict[str, Source]:
    """The sources that some stage draws from."""
    used = {name for stage in run.stages.values() for name, weight in stage.mixture.items() if weight > 0}
    return {name: run.data.sources[name] for name in sorted(used)}


def cache_folder(data: Data) -> Path:
    """Where tokenizers and stores are kept."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "braeburn" / "data"


def _watched(texts: Iterable[Document], proceed: Callable[[], None]) -> Iterator[Document]:
    """The documents as they are, with a call before each."""
    for document in texts:
        proceed()
        yield document


def _tokenizer(
    run: Run,
    sources: dict[str, Source],
    fingerprints: dict[str, str],
    cache: Path,
    log: Callable[[str], None],
    proceed: Callable[[], None],
) -> Tokenizer:
    if run.data.tokenizer is not None:
        return Tokenizer.load(run.data.tokenizer)
    fingerprint = _fingerprint(fingerprints, run.model.vocab_size, run.data.held_out, PATTERN, TRAINING_BYTES_PER_ENTRY)
    path = cache / "tokenizers" / f"{fingerprint}.json"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except UserError:
            log(f"warning: the trained tokenizer {str(path)!r} is corrupt; training it again")
    began = time.perf_counter()
    streams = [
        (document.text for document in _watched(documents(name, source, False, run.data.held_out), proceed))
        for name, source in sources.items()
    ]
    tokenizer = train(sample(streams, TRAINING_BYTES_PER_ENTRY * run.model.vocab_size), run.model.vocab_size)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    log(f"trained a tokenizer of {tokenizer.vocab_size} entries in {time.perf_counter() - began:.1f} s")
    return tokenizer


def _source_fingerprint(name: str, source: Source) -> str:
    # Which files parse, and so have docstrings, depends on the version of Python.
    python = list(sys.version_info[:2]) if source.format == "python-prose" else []
    listing = [(file.path, file.size, file.version) for file in files(name, source)]
    return _fingerprint(source.model_dump(), python, listing)


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
