"""Text as it comes is the text of all tokens, and nothing that was printed changes."""

import functools
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from braeburn.data import tokenizer as own
from braeburn.data.tokenizer import Tokenizer
from braeburn.evaluate.streaming import LONGEST, TextStream

TEXTS = [
    "for line in lines:\n    print(line)  # naïve café",
    "你好，世界 🍎🍏 👩‍👩‍👧",
    "Hello, world. It isn't so, is it?",
]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A small tokenizer of a kind whose decoder has its own way with neighbours."""
    if kind == "bytes":
        return own.train(TEXTS, 300)
    special = {"<s>": 0, "</s>": 1, "<unk>": 2}
    if kind == "sentencepiece":
        pieces = ["▁", "▁Hello", "o", "a", ",", "▁wor", "ld", "caf", "é"]
        byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
        vocab = special | {piece: 3 + i for i, piece in enumerate([*pieces, *byte_tokens])}
        model = tokenizers.Tokenizer(
            models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        model.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        model.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        pieces = ["hello", "##s", "##.", ".", ",", "is", "n", "'", "t", "n't", "it", "do", "?"]
        vocab = special | {piece: 3 + i for i, piece in enumerate(pieces)}
        model = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.Whitespace()
        model.decoder = decoders.WordPiece()
    model.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(model)


def pieces_of(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """What is printed when tokens come in chunks of some sizes."""
    stream = TextStream(tokenizer)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.add(ids[at : at + size]))
        at += size
        turn += 1
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "wordpiece"])
@settings(max_examples=150)
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_pieces_make_up_the_text(kind: str, data: st.DataObject, sizes: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(pieces_of(tokenizer, ids, sizes)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "wordpiece"])
def test_long_texts_are_not_decoded_whole_each_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, generator = tokenizer_of(kind), random.Random(0)
    ids = [generator.randrange(tokenizer.vocab_size) for _ in range(3000)]
    whole = tokenizer.decode(ids)
    lengths = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    assert "".join(pieces_of(tokenizer, ids, [3, 1])) == whole
    assert max(lengths) < 4 * LONGEST


def test_a_character_of_several_tokens_is_printed_whole() -> None:
    tokenizer = own.train(["a"], 257)  # no merges: every byte is a token
    ids = tokenizer.encode("é🍎.")
    assert len(ids) == 7
    assert pieces_of(tokenizer, ids, [1]) == ["", "é", "", "", "", "🍎", ".", ""]
    # Cut short, what is there of a character is shown as the whole text has it.
    assert "".join(pieces_of(tokenizer, ids[:4], [1])) == tokenizer.decode(ids[:4])
