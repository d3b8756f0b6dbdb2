"""Evaluation of a trained model on files."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braeburn.config import Source
from braeburn.data.corpus import Document, Report, documents
from braeburn.data.packing import Batch
from braeburn.data.prepare import prepare
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.evaluate.windows import SHORTEST, evaluation_batches, text_alone
from braeburn.parallel.rules import batch_shards, sequence_pieces
from braeburn.train.held_out import evaluator, measure
from braeburn.train.progress import tracked
from braeburn.train.trained import Trained

BATCH_TOKENS = 4096
DEFAULT_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Windows:
    """How text is cut into what the model sees at once.

    Attributes:
        sequence_length: tokens in a window; None for the longest sequence that the model was
            trained on.
        stride: tokens from the start of one window to that of the next; None for `sequence_length`,
            without overlap.
        by_position: whether the loss is told by ranges of positions, too.
    """

    sequence_length: int | None = None
    stride: int | None = None
    by_position: bool = False

    def sizes(self, trained: Trained) -> tuple[int, int]:
        """The length of a window and the stride, in tokens.

        Raises:
            UserError: the stride is longer than a window, so that tokens would be left out.
        """
        length = self.sequence_length or trained.sequence_length or DEFAULT_SEQUENCE_LENGTH
        stride = self.stride or length
        if stride > length:
            raise UserError(
                f"--stride {stride} is more than the {length} tokens of a window, so that some "
                f"would be left out; "
                f"set --stride to at most {length}, or --sequence-length to {stride}"
            )
        return length, stride


def evaluate_files(
    trained: Trained, paths: list[str], field: str = "text", windows: Windows | None = None
) -> dict[str, dict[str, Any]]:
    """Results for all documents of files: of the tokens of each, and of the one that ends it.

    Args:
        trained: the model.
        paths: files, globs, or URLs of any fsspec file system; each has a result of its own.
        field: of JSONL and Parquet rows that holds the text.
        windows: how the text is cut.

    Raises:
        UserError: a path matches nothing, cannot be read as text or holds none, or `windows` leave
            tokens out.
    """
    windows = windows or Windows()
    windows.sizes(trained)  # before any text is read
    results = {}
    for path in paths:
        source = Source(paths=(path,), field=field)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "store"
            try:
                texts = tracked(_told_documents(path, source), f"tokenising {path}")
                build_token_shards(directory, texts, trained.tokenizer)
            except UserError as error:
                raise UserError(_as_options(str(error), path)) from None
            shards = TokenShards.open(directory, trained.tokenizer.hash)
            results[path] = _evaluate(trained, shards, windows, shards.tokens, path, text_alone)
    return results


def _told_documents(path: str, source: Source) -> Iterator[Document]:
    """The documents of files, and behind the last a warning about what held no text."""
    report = Report()
    yield from documents(path, source, report=report)
    if report.passed_over:
        met = ", ".join(f"{count:,} {kind}" for kind, count in report.passed_over.items())
        logging.getLogger(__name__).warning("warning: --data %s: passed over %s", path, met)


def _as_options(message: str, source: str) -> str:
    """A message about the fields of a source, naming options of the command line instead."""
    field = f"data.sources.{source}"
    return (
        message.replace(f"{field}.paths", "--data")
        .replace(f"{field}.field", "--field")
        .replace(field, "--data")
    )


def evaluate_held_out(
    trained: Trained, windows: Windows | None = None
) -> dict[str, dict[str, Any]]:
    """Results for the held-out text of each source that the run trained on, with the weights that
    training's own evaluation gives to targets.

    Args:
        trained: the model.
        windows: how the text is cut.

    Raises:
        UserError: the run has no held-out text, or `windows` leave tokens out.
    """
    windows = windows or Windows()
    length, _ = windows.sizes(trained)
    prepared = prepare(trained.run, lambda line: None, trained.tokenizer, only_held_out=True)
    held_out = {
        source: shards for source, shards in prepared.held_out.items() if shards is not None
    }
    if not held_out:
        raise UserError("the run holds out no text; name files with --data")
    # As many whole windows as training looks at.
    most = max(1, trained.run.evaluation.tokens // length) * length
    return {
        source: _evaluate(trained, shards, windows, min(shards.tokens, most), source)
        for source, shards in held_out.items()
    }


def _evaluate(
    trained: Trained,
    shards: TokenShards,
    windows: Windows,
    tokens: int,
    name: str,
    weighted: Callable[[Batch, Tokenizer], Batch] = lambda batch, _: batch,
) -> dict[str, Any]:
    """Results for the first tokens of a text.

    Args:
        trained: the model.
        shards: the text.
        windows: how it is cut.
        tokens: how many of them are seen.
        name: of the text, as progress is shown.
        weighted: gives targets of a batch another weight; as in training without it.
    """
    length, stride = windows.sizes(trained)
    layout = trained.layout
    sequences = batch_shards(layout.execution)
    pieces = sequence_pieces(layout.sizes)
    if length % pieces:
        raise UserError(
            f"--mesh cuts windows of {length} tokens into {pieces} pieces, which do not come out "
            f"even; set --sequence-length to a multiple of {pieces}"
        )
    positions = ranges(length) if windows.by_position else ()
    evaluate = evaluator(trained.model, trained.tokenizer.token_bytes, layout, positions)
    most = BATCH_TOKENS * sequences
    found = evaluation_batches(shards, length, stride, tokens, most, (sequences, pieces))
    placed = (
        layout.place(
            weighted(batch, trained.tokenizer), range(len(batch["inputs"])), len(batch["inputs"])
        )
        for batch in tracked(found.batches, f"evaluating {name}", found.count)
    )
    return measure(evaluate, trained.params, placed, shards.byte_ratio, positions=positions)


def ranges(length: int) -> tuple[int, ...]:
    """Where ranges of positions begin, up to a length in tokens: 0, 64, 128, 256 and so on."""
    found = [0, SHORTEST]
    while found[-1] < length:
        found.append(2 * found[-1])
    return tuple(found[:-1])
