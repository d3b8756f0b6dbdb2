"""The faster engine gives the ids of the tokenizers library, or is not used."""

import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

from braeburn.data import fast_encoding
from braeburn.data.fast_encoding import LLAMA3_PATTERN, PROBE, agrees_on, fast_encoder, slow_ids
from braeburn.data.tokenizer import END_OF_TEXT, Tokenizer, train

fastokens = pytest.importorskip("fastokens")

CORPUS = [Path(__file__).read_text(), PROBE, "The quick brown fox, l'été, 1234567890 times.\n" * 50]
TRAINED = json.loads(train(CORPUS, 900).json)
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(content: str, **flags: bool) -> dict[str, Any]:
    flags = (
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False) | flags
    )
    return {"id": 900, "content": content, **flags}


def with_pattern(pattern: str) -> dict[str, Any]:
    split, byte_level = TRAINED["pre_tokenizer"]["pretokenizers"]
    split = split | {"pattern": {"Regex": pattern}}
    return {"pre_tokenizer": TRAINED["pre_tokenizer"] | {"pretokenizers": [split, byte_level]}}


FORMS: dict[str, dict[str, Any]] = {
    "as trained here": {},
    "with Unicode composed, as Qwen2's": {"normalizer": {"type": "NFC"}},
    "Llama 3's": with_pattern(LLAMA3_PATTERN)
    | {"model": TRAINED["model"] | {"ignore_merges": True}},
    "GPT-2's": {"pre_tokenizer": GPT2},
    "with a token that is none of the special ones": {
        "added_tokens": [*TRAINED["added_tokens"], added("<tool_call>")]
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    # Of these the two split "\u017f" and "\u180e" differently.
    "another pattern": with_pattern(r"\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+"),
    "a token for all that is unknown": {"model": TRAINED["model"] | {"unk_token": "a"}},
    "bytes as a last resort": {"model": TRAINED["model"] | {"byte_fallback": True}},
    "not every byte": {
        "model": TRAINED["model"]
        | {"vocab": {k: v for k, v in TRAINED["model"]["vocab"].items() if k != "\u0100"}}
    },
    "a space before each text": {"pre_tokenizer": GPT2 | {"add_prefix_space": True}},
    "another normaliser": {"normalizer": {"type": "Lowercase"}},
    "a token that takes the space before it": {
        "added_tokens": [*TRAINED["added_tokens"], added("<mask>", lstrip=True)]
    },
    "no splitter": {"pre_tokenizer": None},
    "another kind of model": {"model": {"type": "Unigram", "vocab": []}},
}
PARTS = [
    *PROBE.split(" "),
    *("'s", "'S", "'\u017f", "I'LL", "<tool_call>", END_OF_TEXT, "<|end", "fooBar", "__init__"),
    *("\u1100\u1161\u11a8", "\u0300", "e\u0301", "\u212b", "\u0130", "\U000e0001", "\uffff"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u180e", "\u2028", "\x85", "\x00"),
]


def both(form: dict[str, Any]) -> tuple[Any, Any]:
    """What gives the ids of texts, by the library and by the engine."""
    contents = TRAINED | form
    library = tokenizers.Tokenizer.from_str(json.dumps(contents))
    library.encode_special_tokens = True
    fast = fast_encoder(library, contents)
    assert fast is not None
    return lambda texts: slow_ids(library, texts), fast


def assert_same(form: dict[str, Any], texts: list[str]) -> None:
    slow, fast = both(form)
    for text, expected, found in zip(texts, slow(texts), fast(texts), strict=True):
        assert found.dtype == np.int32
        assert np.array_equal(found, expected), repr(text)


def random_text(generator: random.Random) -> str:
    def part() -> str:
        kind = generator.random()
        if kind < 0.8:
            return generator.choice(PARTS)
        if kind < 0.9:
            return generator.choice(" \n\t'") * generator.randint(1, 9)
        first, last = generator.choice([(0, 0x7F), (0, 0x2FFF), (0, 0xD7FF), (0xE000, 0x10FFFF)])
        return chr(generator.randint(first, last))

    return "".join(part() for _ in range(generator.randint(0, 60)))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_ids_of_random_text_are_those_of_the_library(form: dict[str, Any]) -> None:
    generator = random.Random(0)
    assert_same(form, ["", *(random_text(generator) for _ in range(800))])


# The deep test takes each character that Unicode has assigned, and one of eleven others; this one
# those of most scripts and some others.
@pytest.mark.parametrize(
    "characters",
    [
        [*range(0x3000), *range(0x3000, 0x110000, 211)],
        pytest.param(
            [*range(0x34000), *range(0x34000, 0x110000, 11), *range(0xE0000, 0xE0200)],
            marks=pytest.mark.deep,
        ),
    ],
    ids=["many", "all assigned"],
)
def test_ids_of_each_character_are_those_of_the_library(characters: list[int]) -> None:
    texts = [
        f"ab{c}cd {c}ef1{c}2 {c} {c}{c}'{c}\n{c}.A{c}  {c}"
        for c in (chr(i) for i in characters if not 0xD800 <= i < 0xE000)
    ]
    assert_same({}, texts)


def test_ids_of_real_text_are_those_of_the_library() -> None:
    files = sorted(Path(fast_encoding.__file__).parent.glob("*.py"))
    texts = [path.read_text() for path in files] + [" " * 9999, "a" * 9999, "\n\r" * 999, "1" * 999]
    assert_same({}, texts)


@pytest.mark.parametrize("form", OTHERS.values(), ids=OTHERS)
def test_the_library_itself_encodes_for_all_other_tokenizers(form: dict[str, Any]) -> None:
    assert agrees_on(TRAINED)
    assert not agrees_on(TRAINED | form)


def engine(ids: list[int]) -> Any:
    """Stands for an engine that gives these ids for a text."""

    def encode(texts: list[str], split_special_tokens: bool) -> tuple[bytes, bytes]:
        return np.array(ids, "<u4").tobytes(), np.array([0, len(ids)], "<u8").tobytes()

    made = SimpleNamespace(encode_batch_flat=encode)
    return SimpleNamespace(Tokenizer=SimpleNamespace(from_json_str=lambda text: made))


def test_an_engine_of_other_ids_is_told_of_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", engine([1, 2, 3]))
    tokenizer = Tokenizer.from_json(json.dumps(TRAINED))
    with caplog.at_level(logging.WARNING):
        (ids,) = tokenizer.encode_pieces(["The fox"])
    assert ids.tolist() == tokenizer.encode("The fox")
    assert "gives other ids" in caplog.text


def test_without_an_engine_the_library_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer = Tokenizer.from_json(json.dumps(TRAINED))
    (ids,) = tokenizer.encode_pieces(["The fox"])
    assert ids.tolist() == tokenizer.encode("The fox")


def test_where_the_engine_fails_the_library_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, _ = both({})
    monkeypatch.setattr(fastokens, "Tokenizer", SimpleNamespace(from_json_str=OnlyTheProbe))
    _, fast = both({})
    assert np.array_equal(fast(["The fox"])[0], slow(["The fox"])[0])


class OnlyTheProbe:
    """An engine that fails on any text but the first."""

    def __init__(self, text: str) -> None:
        self._engine = fastokens._native.Tokenizer.from_json_str(text)

    def encode_batch_flat(self, texts: list[str], split_special_tokens: bool) -> Any:
        if texts[0] != PROBE:
            raise ValueError("match limit exceeded")
        return self._engine.encode_batch_flat(texts, split_special_tokens=split_special_tokens)
