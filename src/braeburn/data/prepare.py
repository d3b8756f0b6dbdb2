"""From a run's configuration to its tokenizer and token shards, built once and kept in a cache."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from braeburn.config import Run
from braeburn.data.corpus import documents
from braeburn.data.listing import Listing, cache_folder, fingerprint, keep, list_sources, mirror_of
from braeburn.data.ray_cluster import check_nodes
from braeburn.data.token_shards import TokenShards, writing
from braeburn.data.tokenising import HELD_OUT, TRAIN, Settings, SourceText, build
from braeburn.data.tokenizer import PATTERN, Tokenizer, sample, train
from braeburn.data.workers import ALONE, Work
from braeburn.errors import UserError

# Text that a tokenizer is trained on, for each entry of its vocabulary.
TRAINING_BYTES_PER_ENTRY = 1024

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
    sides = (HELD_OUT,) if only_held_out else (TRAIN, HELD_OUT)
    settings = Settings(cache, tokenizer, run.data.held_out, sides)
    mirror = mirror_of(run.data)
    texts = [SourceText(listing, settings, mirror) for listing in listings]
    if any(text.missing for text in texts):
        build(texts, tokenizer, log, work)
    elif not only_held_out:
        where = run.data.cache or str(cache)
        log(f"the text is ready: it was prepared before, in {where!r}")
    for text in texts:
        text.publish()
    opened = {}
    for text in texts:
        shards = {
            side: TokenShards.open(directory, tokenizer.hash, verified_for)
            for side, directory in text.directories.items()
        }
        opened[text.listing.name] = shards
        work.proceed()
        if not only_held_out:
            for line in _account(text.listing, run.data.held_out, shards[TRAIN], shards[HELD_OUT]):
                log(line)
            keep(run.data, text.listing)
    for listing in listings:
        if listing.problem is not None:
            log(
                f"data.sources.{listing.name}: its files are not here; going on with what was "
                f"prepared from them"
            )
    both = {} if only_held_out else opened
    return Prepared(
        tokenizer,
        {name: shards[TRAIN] for name, shards in both.items()},
        {
            name: shards[HELD_OUT] if shards[HELD_OUT].documents else None
            for name, shards in opened.items()
        },
        {
            name: fingerprint(*(side.fingerprint for side in shards.values()))
            for name, shards in both.items()
        },
        verified_for,
    )


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
    key = fingerprint(
        fingerprints, run.model.vocab_size, run.data.held_out, PATTERN, TRAINING_BYTES_PER_ENTRY
    )
    path = cache_folder(run.data) / "tokenizers" / f"{key}.json"
    mirror = mirror_of(run.data)
    if mirror is not None:
        mirror.fetch(path)
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
    if mirror is not None:
        mirror.publish(path)
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
