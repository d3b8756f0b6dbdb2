from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.data.tokenizer import END_OF_TEXT, Tokenizer, sample, train
from braeburn.errors import UserError

CORPUS = [Path(__file__).read_text(), "The quick brown fox; l'été, 1234567890 times.\n" * 50]
TOKENIZER = train(CORPUS, 600)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(UNICODE)
@settings(max_examples=200, deadline=None)
def test_round_trip_and_byte_counts(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())
    assert TOKENIZER.begin not in ids


def test_training_is_deterministic_and_survives_saving(tmp_path: Path) -> None:
    again = train(iter(CORPUS), 600)
    again.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert TOKENIZER.hash == again.hash == loaded.hash
    assert loaded.encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])
    assert loaded.vocab_size == 600
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_digits_are_single_tokens() -> None:
    ids = TOKENIZER.encode("1234567890")
    assert len(ids) == 10
    assert all(TOKENIZER.token_bytes[i] == 1 for i in ids)


def test_special_tokens_in_text_are_text() -> None:
    text = f"a{END_OF_TEXT}b"
    (document,) = TOKENIZER.encode_documents([text])
    assert document.dtype == np.int32
    assert document[0] == TOKENIZER.begin == TOKENIZER.end == 0
    assert (document[1:] != 0).all()
    assert TOKENIZER.decode(document) == text


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert train(["ab"], 1000).vocab_size == 258
    with pytest.raises(UserError, match=r"model\.vocab_size=100 .* at least 257"):
        train(["ab"], 100)


def test_sample_takes_turns_and_no_text_twice() -> None:
    assert list(sample([iter("abc"), iter("axyz")], 5)) == ["a", "b", "x", "c", "y"]


def test_separate_end_byte_fallback_and_truncation(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3, "é": 4, "▁": 5, "a": 6}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    other.add_special_tokens(["<unk>", "<s>", "</s>"])
    other.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    other.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()])
    other.enable_truncation(2)
    other.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "é a aa四"
    (document,) = tokenizer.encode_documents([text])
    assert (document[0], document[-1]) == (tokenizer.begin, tokenizer.end) == (1, 2)
    assert tokenizer.token_bytes[document].sum() == len(text.encode())
    assert tokenizer.decode(document) == text


@pytest.mark.parametrize("content", [None, "", "{", '{"model": {}}'])
def test_missing_or_corrupt_file(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^data\.tokenizer: .*tokenizer\.json"):
        Tokenizer.load(path)


def test_no_boundary_token(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json.* has no token to begin a document"):
        Tokenizer.load(tmp_path / "t.json")
