"""Windows of a text to evaluate on: each token is scored once, and little is computed beside the
text.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from braeburn.data.packing import Batch, Row, batched, window
from braeburn.data.token_shards import TokenShards
from braeburn.data.tokenizer import Tokenizer

SHORTEST = 64  # a program for shorter windows would not pay for its compilation


@dataclass(frozen=True)
class Batches:
    """Batches of windows.

    Attributes:
        batches: makes them, one after the other.
        count: how many they are.
    """

    batches: Iterator[Batch]
    count: int


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a text, as the model sees them at once; those before `scored` are
    only seen.
    """

    start: int
    scored: int
    stop: int


def spans(tokens: int, length: int, stride: int) -> Iterator[Span]:
    """Spans that score each of so many tokens once.

    Args:
        tokens: how many there are to score.
        length: of a span, in tokens; the last may be shorter.
        stride: from the start of one to that of the next. With less than `length`, spans overlap,
            so that a token has at least `length - stride` tokens before it, but for the first ones.
    """
    start = scored = 0
    while scored < tokens:
        stop = min(start + length, tokens)
        yield Span(start, scored, stop)
        scored = stop
        start += stride


def evaluation_batches(
    shards: TokenShards,
    length: int,
    stride: int,
    tokens: int,
    batch_tokens: int,
    even: tuple[int, int] = (1, 1),
) -> Batches:
    """Batches [B, T] that score the first `tokens` tokens of a text; of at most three shapes.

    All batches but the last have T = `length`. A text shorter than a span, and the end of a longer
    one, has the next power of two instead: what is computed follows the text, not the longest
    sequence that the model was made for.

    Args:
        shards: the text.
        length: of a window, in tokens.
        stride: from the start of one window to that of the next, in tokens.
        tokens: how many to score.
        batch_tokens: the most in a batch, unless the fewest windows have more.
        even: what B and T are multiples of; `length` is one of the second.
    """
    sequences, pieces = even

    def rows(whole: bool) -> Iterator[Row]:
        for span in spans(tokens, length, stride):
            size = padded_length(span.stop - span.start, length, pieces)
            if (size == length) == whole:
                row = window(shards, span.start, size)
                row["weights"][: span.scored - span.start] = 0
                row["weights"][span.stop - span.start :] = 0
                yield row

    found = list(spans(tokens, length, stride))
    whole = sum(padded_length(span.stop - span.start, length, pieces) == length for span in found)
    size = batch_rows(length, whole, batch_tokens, sequences)
    return Batches(
        itertools.chain(batched(rows(True), size), batched(rows(False), sequences)),
        -(-whole // size) + -(-(len(found) - whole) // sequences),
    )


def text_alone(batch: Batch, tokenizer: Tokenizer) -> Batch:
    """A batch in which the begin token of a further document has no weight.

    It always follows the end token of the document before, so that it tells of how documents are
    joined and not of the text: a model that was trained elsewhere may never have seen the two
    together. Without a separate end token it is what ends a document, and keeps its weight.

    Args:
        batch: of NumPy arrays.
        tokenizer: that of the text.
    """
    if tokenizer.document_end is None:
        return batch
    joins = (batch["inputs"] == tokenizer.document_end) & (batch["targets"] == tokenizer.begin)
    return batch | {"weights": np.where(joins, np.float32(0), batch["weights"])}


def batch_rows(length: int, whole: int, batch_tokens: int, sequences: int) -> int:
    """Sequences of a batch of whole windows.

    Args:
        length: of a window, in tokens.
        whole: windows of that length that there are.
        batch_tokens: the most in a batch, unless the fewest windows have more.
        sequences: what the number is a multiple of.
    """
    most = min(max(1, batch_tokens // length), power_of_two(whole))
    return -(-most // sequences) * sequences


def padded_length(tokens: int, length: int, pieces: int = 1) -> int:
    """The length of the window for so many tokens: a power of two, made a multiple of `pieces`, or
    `length`.
    """
    padded = max(SHORTEST, power_of_two(tokens))
    return min(length, -(-padded // pieces) * pieces)


def power_of_two(count: int) -> int:
    """The least power of two that is not less than a number, at least 1."""
    return 1 << max(0, count - 1).bit_length()
