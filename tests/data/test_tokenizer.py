import base64
import json
import os
from pathlib import Path
from typing import Any

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
    other = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    other.add_special_tokens(["<unk>", "<s>", "</s>"])
    other.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    other.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
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
    with pytest.raises(
        UserError, match=r"tokenizer\.json'.*; name a sound tokenizer\.json$"
    ) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


BASE = json.loads(TOKENIZER.json)
# Files on which the tokenizers library panics or ends the process; each once did so to `braeburn
# import`.
CHARSMAP = {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode(bytes(range(200))).decode(),
}
UNKNOWN = {"SpecialToken": {"id": "[NOWHERE]", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [UNKNOWN],
    "pair": [UNKNOWN],
    "special_tokens": {},
}
CRASHES = {
    "panics on its version": BASE | {"version": 7},
    "aborts on its normalizer": BASE | {"normalizer": CHARSMAP},
    "panics on its template": BASE | {"post_processor": TEMPLATE},
    "ids of 32 bits": BASE
    | {"model": BASE["model"] | {"vocab": BASE["model"]["vocab"] | {"far": 2**32 - 1}}},
    "a list": [1],
    "a number of 5,000 digits": '{"version": ' + "9" * 5000 + "}",
    "nested deeply": "[" * 100_000,
    "a lone surrogate": '{"version": "\\ud800"}',
}


@pytest.mark.parametrize("contents", CRASHES.values(), ids=CRASHES.keys())
def test_files_that_crash_the_library_get_a_sentence(tmp_path: Path, contents: Any) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(UserError, match=r"tokenizer\.json'") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="it is not an ordinary file"):
        Tokenizer.load(tmp_path / "pipe.json")


def bytes_and(*tokens: str, prefix: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with special tokens, which it adds one of to a text where asked to."""
    own = tokenizers.Tokenizer.from_str(
        json.dumps(BASE | {"added_tokens": [], "post_processor": None})
    )
    own.add_special_tokens(list(tokens))
    if prefix is not None:
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single=[prefix, "$A"],
            pair=[prefix, "$A", "$B:1"],
            special_tokens=[(prefix, own.token_to_id(prefix))],
        )
    return own


@pytest.mark.parametrize(
    ("tokens", "prefix", "files", "begin", "end"),
    [
        (
            (
                "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
                "<\uff5cend\u2581of\u2581sentence\uff5c>",
            ),
            None,
            {},
            0,
            1,
        ),
        (("<|bos|>", "<|eos|>"), None, {}, 0, 1),
        (("[BOS]", "[EOS]"), None, {}, 0, 1),
        (("[X]", "[START]"), "[START]", {}, 1, 1),
        (("[X]", "[START]", "[STOP]"), None, {"bos_token": "[START]", "eos_token": "[STOP]"}, 1, 2),
        (("[X]", "[START]"), None, {"bos_token": {"content": "[START]", "lstrip": False}}, 1, 1),
        (
            ("<s>", "[START]", "</s>"),
            None,
            {"bos_token": "[START]"},
            1,
            1,
        ),  # the files before the names
        (("[X]", "[STOP]"), None, {"eos_token": "[STOP]"}, 1, 1),
    ],
)
def test_the_begin_token_is_the_one_that_the_files_name(
    tokens: tuple[str, ...], prefix: str | None, files: dict, begin: int, end: int, tmp_path: Path
) -> None:
    own = bytes_and(*tokens, prefix=prefix)
    own.save(str(tmp_path / "tokenizer.json"))
    if files:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(files))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.token(tokenizer.begin) == tokens[begin]
    assert tokenizer.token(tokenizer.end) == tokens[end]
    assert tokenizer.encode_prompt("the cat") == own.encode("the cat").ids
    # From a checkpoint, and after saving, it is the same.
    tokenizer.save_all(tmp_path)
    for again in (
        Tokenizer.from_json(tokenizer.to_json()),
        Tokenizer.load(tmp_path / "tokenizer.json"),
    ):
        assert vars(again) | {"_tokenizer": None} == vars(tokenizer) | {"_tokenizer": None}


def test_files_beside_it_that_do_not_fit(tmp_path: Path) -> None:
    bytes_and("[X]", "[START]").save(str(tmp_path / "tokenizer.json"))
    for name, contents, sentence in (
        (
            "tokenizer_config.json",
            {"bos_token": "[BEGIN]"},
            r"has no token '\[BEGIN\]', which the files .* as bos_token",
        ),
        (
            "tokenizer_config.json",
            {"bos_token": 5},
            "tokenizer_config.json': bos_token cannot be 5; download",
        ),
        ("tokenizer_config.json", {"chat_template": {"a": [1]}}, "chat_template cannot be"),
        ("tokenizer_config.json", [], "holds no JSON object"),
        ("generation_config.json", {"eos_token_id": "all"}, "eos_token_id cannot be 'all'"),
        ("generation_config.json", {"temperature": []}, r"temperature cannot be \[\]"),
    ):
        (tmp_path / name).write_text(json.dumps(contents))
        with pytest.raises(UserError, match=sentence):
            Tokenizer.load(tmp_path / "tokenizer.json")
        (tmp_path / name).unlink()


def test_a_model_trained_from_scratch_begins_its_prompts(tmp_path: Path) -> None:
    bytes_and("<|im_end|>", "<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
    foreign = Tokenizer.load(tmp_path / "tokenizer.json")
    ours = foreign.beginning_prompts()
    assert foreign.encode_prompt("the") == foreign.encode("the")
    assert ours.encode_prompt("the") == [ours.begin, *foreign.encode("the")]
    assert ours._tokenizer.encode("the").ids == ours.encode_prompt("the")
    assert ours.hash == foreign.hash  # documents are the same


def test_a_tokenizer_of_an_earlier_version_begins_prompts() -> None:
    alone = json.dumps(BASE | {"post_processor": None})
    assert Tokenizer.from_json(alone).encode_prompt("the") == TOKENIZER.encode_prompt("the")
    assert Tokenizer.from_json(alone).hash == TOKENIZER.hash


def test_merges_are_text_as_every_version_of_the_library_reads_them() -> None:
    assert all(isinstance(merge, str) for merge in BASE["model"]["merges"])


def test_no_boundary_token(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json.* has no token to begin a document"):
        Tokenizer.load(tmp_path / "t.json")
