"""Text of tokens as they come: only what no later token can change."""

import re
from collections.abc import Sequence

from braeburn.data.tokenizer import Tokenizer

# What stands for bytes that are no character yet.
REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Tokens that are decoded before those that are new: how a token reads may depend on its neighbours.
# A character has at most four bytes, and so at most four tokens.
NEIGHBOURS = 8
LONGEST = 64


class TextStream:
    """The text of one continuation, piece by piece.

    All pieces together are what `Tokenizer.decode` makes of all tokens. Held back are the bytes of
    a character that is not complete, and tokens that are single bytes of SentencePiece, which read
    otherwise when more bytes follow.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Begins a text."""
        self._tokenizer = tokenizer
        # Decoding leaves special tokens out before it joins the others.
        self._special = frozenset(tokenizer.special_tokens)
        self._ids: list[int] = []
        # Text of the ids from `_first` on, of which `_told` characters have been given.
        self._first = 0
        self._told = 0

    def add(self, tokens: Sequence[int]) -> str:
        """What is certain of the text with further tokens, and has not been given before."""
        self._ids += filter(self._has_text, tokens)
        end = len(self._ids)
        while end > self._first and self._is_byte(self._ids[end - 1]):
            end -= 1
        whole = self._tokenizer.decode(self._ids[self._first : end])
        text = whole.rstrip(REPLACEMENT)
        new = text[self._told :]
        self._told = max(self._told, len(text))
        if end - self._first > LONGEST and self._told == len(whole):
            self._forget(end)
        return new

    def finish(self) -> str:
        """What was held back, once no more tokens follow."""
        text = self._tokenizer.decode(self._ids[self._first :])
        new = text[self._told :]
        self._told = len(text)
        return new

    def _forget(self, end: int) -> None:
        """Leaves early tokens out of what is decoded again each time, once the text of the first
        `end` is given.
        """
        first = end - NEIGHBOURS
        # Single bytes of SentencePiece in a row stay together.
        while first > self._first and all(map(self._is_byte, self._ids[first - 1 : first + 1])):
            first -= 1
        self._first = first
        self._told = len(self._tokenizer.decode(self._ids[first:end]))

    def _has_text(self, token: int) -> bool:
        content = self._tokenizer.token(token)
        return content != "" and content not in self._special

    def _is_byte(self, token: int) -> bool:
        return BYTE_TOKEN.fullmatch(self._tokenizer.token(token)) is not None
