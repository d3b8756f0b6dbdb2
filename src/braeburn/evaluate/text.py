"""Evaluation of a trained model on files."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from braeburn.config import Source
from braeburn.data.corpus import Document, Report, documents
from braeburn.data.loader import held_out_batches
from braeburn.data.prepare import prepare
from braeburn.data.store import TokenStore, build_store
from braeburn.errors import UserError
from braeburn.model.transformer import param_specs
from braeburn.parallel.layout import one_device
from braeburn.train.held_out import evaluator, measure
from braeburn.train.progress import tracked
from braeburn.train.trained import Trained

BATCH_TOKENS = 4096
DEFAULT_SEQUENCE_LENGTH = 2048


def evaluate_files(trained: Trained, paths: list[str], field: str = "text") -> dict[str, dict[str, float]]:
    """Results for each of `paths` (files, globs, or URLs of any fsspec file system), all of its documents.

    Raises:
        UserError: a path matches nothing, or cannot be read as text.
    """
    results = {}
    for path in paths:
        source = Source(paths=(path,), field=field)
        with tempfile.TemporaryDirectory() as folder:
            store_path = Path(folder) / "store"
            try:
                texts = tracked(_told_documents(path, source), f"tokenising {path}")
                build_store(store_path, texts, trained.tokenizer)
            except UserError as error:
                raise UserError(_as_options(str(error), path)) from None
            results[path] = _evaluate(trained, TokenStore.open(store_path, trained.tokenizer.hash), None)
    return results


def _told_documents(path: str, source: Source) -> Iterator[Document]:
    """The documents of files, and behind the last a warning about what held no text."""
    report = Report()
    yield from documents(path, source, report=report)
    if report.passed_over:
        met = ", ".join(f"{count:,} {kind}" for kind, count in report.passed_over.items())
        logging.getLogger(__name__).warning("warning: --data %s: passed over %s", path, met)


def _as_options(message: str, source: str) -> str:
    """A message about the fields of a source, with the options of the command line in their stead."""
    field = f"data.sources.{source}"
    return message.replace(f"{field}.paths", "--data").replace(f"{field}.field", "--field").replace(field, "--data")


def evaluate_held_out(trained: Trained) -> dict[str, dict[str, float]]:
    """Results for the held-out text of each source that the run trained on.

    Raises:
        UserError: the run has no held-out text.
    """
    prepared = prepare(trained.run, lambda line: None, trained.tokenizer, only_held_out=True)
    stores = {source: store for source, store in prepared.held_out.items() if store is not None}
    if not stores:
        raise UserError("the run holds out no text; name files with --data")
    return {name: _evaluate(trained, store, trained.run.evaluation.tokens) for name, store in stores.items()}


def _evaluate(trained: Trained, store: TokenStore, max_tokens: int | None) -> dict[str, float]:
    length = trained.sequence_length or DEFAULT_SEQUENCE_LENGTH
    layout = one_device(param_specs(trained.model))
    evaluate = evaluator(trained.model, trained.run.precision, trained.tokenizer.token_bytes, layout)
    # Without a limit, the last window counts too, though it is rarely full.
    batches = held_out_batches(store, length, max(1, BATCH_TOKENS // length), max_tokens or store.tokens + length)
    rows = max(1, BATCH_TOKENS // length)
    total = -(-min(store.tokens, max_tokens or store.tokens) // (length * rows))
    return measure(evaluate, trained.params, tracked(batches, "evaluating", total))
