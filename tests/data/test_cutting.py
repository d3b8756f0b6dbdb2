"""The tokens of a document's pieces are the tokens of the whole."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from braeburn.data import cutting
from braeburn.data.tokenizer import END_OF_TEXT, Tokenizer, train
from braeburn.errors import UserError

CORPUS = [
    Path(__file__).read_text(),
    "The quick brown fox; l'été, 1234567890 times. Don't.\n\n" * 50,
    "四五六。七八\n" * 9,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def made(
    model: object,
    trainer: object,
    normalizer: object = None,
    splitter: object = None,
    added: tuple[str, ...] = (),
) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    return Tokenizer(tokenizer)


def bpe(
    normalizer: object = None, splitter: object = None, added: tuple[str, ...] = ()
) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        limit_alphabet=400,
    )
    return made(models.BPE(), trainer, normalizer, splitter, added)


def split_by(pattern: str) -> object:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", END_OF_TEXT], show_progress=False
    )
    return made(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", END_OF_TEXT],
        unk_token="<unk>",
        show_progress=False,
    )
    return made(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizers.Metaspace())


def llama2() -> Tokenizer:
    return bpe(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


# Tokenizers that split text into words, by what in them might make a cut unsafe.
CAN_BE_CUT = {
    "our own": lambda: train(CORPUS, 600),
    "of three digits": lambda: bpe(None, split_by(LLAMA3)),
    "with a space before documents": lambda: bpe(
        None, pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "of GPT-2, with NFC": lambda: bpe(
        normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "of marks for spaces, before all words": lambda: bpe(
        None, pre_tokenizers.Metaspace(prepend_scheme="always")
    ),
    "of marks for spaces, before the first": lambda: bpe(
        None, pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "of words with marks for the rest": word_piece,
    "by likelihood": unigram,
    "with tokens across words": lambda: bpe(
        None, split_by(LLAMA3), ("fox; l'", "\n\nThe", "quick brown")
    ),
    "that strips": lambda: bpe(
        normalizers.Strip(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
}
# Those that make tokens of the whole document at once.
CANNOT = {"of Llama 2": llama2, "without words": lambda: bpe(None, None)}
MADE: dict[str, Tokenizer] = {}


def tokenizer_of(name: str) -> Tokenizer:
    if name not in MADE:
        MADE[name] = (CAN_BE_CUT | CANNOT)[name]()
    return MADE[name]


def parts_of(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def cut(tokenizer: Tokenizer, text: str, part: int) -> list[str]:
    found = list(cutting.pieces(parts_of(text, part), tokenizer.encodes_alike, "books"))
    assert "".join(found) == text
    return found


def require_the_same_tokens(tokenizer: Tokenizer, text: str, part: int) -> list[str]:
    found = cut(tokenizer, text, part)
    pieces = [[], *tokenizer.encode_pieces(found)]
    assert list(np.concatenate(pieces).astype(int)) == tokenizer.encode(text)
    return found


# What a text is made of: words, numbers, white space, marks that combine, scripts without spaces,
# long rows.
ATOMS = [
    *(
        "the quick",
        " brown",
        "fox;",
        " l'été",
        "Don't",
        "1",
        "23",
        "4567",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        ".",
    ),
    *(
        "...",
        "!?",
        "é",
        "e\u0301",
        "\u0301",
        "四五",
        "。",
        "🍏",
        "\u00a0",
        "x_y",
        "'s",
        "<|endoftext|>",
        "▁",
        "  a",
    ),
    *("0" * 40, "z" * 40, " " * 40, "-" * 40, "四" * 40),
]


@pytest.mark.parametrize("name", [*CAN_BE_CUT, *CANNOT])
@given(
    atoms=st.lists(st.sampled_from(ATOMS), max_size=120),
    part=st.integers(1, 400),
    piece=st.integers(1, 60),
)
@settings(max_examples=25, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(
    name: str, atoms: list[str], part: int, piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE_CHARACTERS", piece)
        patch.setattr(cutting, "CONTEXT_CHARACTERS", 48)  # longer than any row
        require_the_same_tokens(tokenizer_of(name), "".join(atoms), part)


@pytest.mark.parametrize("name", [*CAN_BE_CUT, *CANNOT])
@pytest.mark.parametrize("alphabet", ["prose", "digits", "no spaces", "code"])
def test_long_texts_are_cut_where_words_are(
    name: str, alphabet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PIECE_CHARACTERS", 4096)
    chance = random.Random(0)
    atoms = {
        "prose": ["The ", "quick ", "brown ", "fox, ", "jumps.\n", "Été "],
        "digits": list("0123456789"),
        "no spaces": ["四五", "六七", "。", "，", "四"],
        "code": ["x = 1\n", "    def f(self):\n", "return ", "'a'", "\n\n", "# "],
    }[alphabet]
    text = "".join(chance.choices(atoms, k=16_000))
    found = require_the_same_tokens(tokenizer_of(name), text, 4_000)
    if name in CANNOT or alphabet == "digits":
        assert len(found) == 1 or name == "our own"
    elif alphabet == "prose" and name != "that strips":
        assert max(map(len, found)) < 2 * 4096


def test_a_document_without_a_place_to_cut_is_refused_when_it_is_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cutting, "LONGEST_PIECE_CHARACTERS", 2**18)
    text = "the quick brown fox " * 2**14
    with pytest.raises(
        UserError, match=r"books: the tokenizer finds no place to cut .* set the source's separator"
    ):
        cut(tokenizer_of("of Llama 2"), text, 2**16)
    assert len(cut(tokenizer_of("our own"), text, 2**16)) > 1
    assert len(cut(tokenizer_of("of Llama 2"), text[: 2**17], 2**16)) == 1


def test_cutting_looks_at_each_place_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()

    def never(left: str, right: str) -> bool:
        next(asked)
        return False

    assert len(list(cutting.pieces(["a b\n" * 2**18], never, "books"))) == 1
    assert next(asked) < 1000


def test_the_tokenizers_are_what_they_are_called() -> None:
    assert json.loads(tokenizer_of("of Llama 2").json)["pre_tokenizer"] is None
    assert tokenizer_of("with a space before documents").encode("a") == tokenizer_of(
        "with a space before documents"
    ).encode(" a")
    assert isinstance(tokenizer_of("our own")._tokenizer.decoder, decoders.ByteLevel)
