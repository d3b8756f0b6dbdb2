"""Long documents cut where a tokenizer splits them in any case, so that they need not be encoded as
a whole.

Encoding takes some 200 bytes of memory for each byte of text. A tokenizer first normalises a text
and splits it into words, and then makes tokens of each word alone. So a text may be cut between two
words, if the pieces are normalised and split as the whole is. That is tried on the text around the
cut, with the tokenizer's own normaliser and splitter.

Only places are tried at which one kind of character ends and another begins. Elsewhere, as in a row
of digits that are split in threes, how a text is split may depend on what stands arbitrarily far
before.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from braeburn.errors import UserError

PIECE_CHARACTERS = 2**17  # of a long document that are encoded at once, about
CONTEXT_CHARACTERS = 512  # on either side of a cut that are looked at
# What a tokenizer that offers no cut is asked to encode at once: 3 GB of memory, about.
LONGEST_PIECE_CHARACTERS = 2**24
_TRIES = 8  # of each kind of place
# Of each match the end is a place to cut: in the order of how likely a tokenizer splits there.
_PLACES = (
    re.compile(r"[A-Za-z](?= [A-Za-z])"),
    re.compile(r"\n(?=\S)"),
    re.compile(r"[^\W\d_](?=[.,;:!?，。、；：！？])"),
    re.compile(r"[^\W\d_](?=\d)"),
    re.compile(r"\s(?=\S)"),
)


def pieces(
    parts: Iterable[str], encodes_alike: Callable[[str, str], bool], where: str
) -> Iterator[str]:
    """The text of a document in pieces whose tokens, one behind the other, are those of the whole.

    Args:
        parts: the text, in parts of any size.
        encodes_alike: whether a text is normalised and split in two pieces, given, as it is as a
            whole.
        where: what to call the document in errors.

    Raises:
        UserError: a long stretch of text has no place to be cut.
    """
    buffer = ""
    tried = 0  # where no place was found up to here, none is looked for again
    for part in parts:
        buffer += part
        while len(buffer) >= tried + PIECE_CHARACTERS + 2 * CONTEXT_CHARACTERS:
            end = tried + PIECE_CHARACTERS
            cut = _cut(buffer, max(tried, 1), end, encodes_alike)
            if cut is None:
                tried = end
            else:
                yield buffer[:cut]
                buffer = buffer[cut:]
                tried = 0
        if len(buffer) > LONGEST_PIECE_CHARACTERS:
            raise UserError(
                f"{where}: the tokenizer finds no place to cut {len(buffer):,} characters of one "
                f"document, which are "
                f"more than can be encoded at once; set the source's separator, as \\n, to cut it "
                f"into documents"
            )
    if buffer:
        yield buffer


def _cut(text: str, first: int, last: int, encodes_alike: Callable[[str, str], bool]) -> int | None:
    """A position in [first, last] at which the text may be cut, a late one if there are several."""
    for places in _PLACES:
        # The last places are found by looking at the end, and before it only where there is none.
        for begin in (max(first, last - 4096), first):
            found = [match.end() for match in places.finditer(text, begin - 1, last + 1)]
            for position in found[: -_TRIES - 1 : -1]:
                if position > last:
                    continue
                left = text[max(0, position - CONTEXT_CHARACTERS) : position]
                right = text[position : position + CONTEXT_CHARACTERS]
                if encodes_alike(left, right):
                    return position
    return None
