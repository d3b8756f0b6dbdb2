"""Evaluation of files: every token is scored once, cost follows the text, and bytes are those of
the text.
"""

import itertools
import json
import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Execution, ModelConfig, Precision, Run
from braeburn.data.corpus import Document
from braeburn.data.loader import held_out_batches
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import Tokenizer, train
from braeburn.evaluate.text import Windows, evaluate_files
from braeburn.evaluate.windows import evaluation_batches, padded_length, spans
from braeburn.layers.spec import initialize
from braeburn.models import decoder
from braeburn.parallel.layout import one_device
from braeburn.train.held_out import evaluator, measure
from braeburn.train.trained import Trained
from support import braeburn

TEXTS = [
    "The quick brown fox – schnell! " * 9,
    "jumps over",
    "the lazy dog, and over that dog's own shadow " * 6,
]
TOKENIZER = train(TEXTS * 3, 280)
MODEL = ModelConfig(
    vocab_size=300, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24
)
FLOAT32 = Precision(compute="float32")


def shards_of(folder: Path, texts: list[str], tokenizer: Tokenizer = TOKENIZER) -> TokenShards:
    build_token_shards(folder, [Document(str(i), text) for i, text in enumerate(texts)], tokenizer)
    return TokenShards.open(folder, tokenizer.hash)


@given(st.integers(1, 3000), st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=200, deadline=None)
def test_spans_score_each_token_once(tokens: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    scored = []
    for span in spans(tokens, length, stride):
        assert span.start <= span.scored < span.stop <= span.start + length
        assert span.start == 0 or span.scored - span.start == length - stride
        scored += range(span.scored, span.stop)
    assert scored == list(range(tokens))


@pytest.mark.parametrize("length", [64, 100, 512, 32_768])
def test_what_is_computed_follows_the_text(length: int, tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "shards", TEXTS)
    found = evaluation_batches(shards, length, length, shards.tokens, 4096)
    batches = list(found.batches)
    assert len(batches) == found.count
    computed = sum(batch["inputs"].size for batch in batches)
    assert computed <= max(64, 2 * shards.tokens) + length * (length < shards.tokens)
    assert len({batch["inputs"].shape for batch in batches}) <= 3
    assert sum(batch["weights"].sum() for batch in batches) == shards.tokens


def test_lengths_of_windows() -> None:
    assert [padded_length(n, 32_768) for n in (1, 64, 65, 504, 512, 32_000)] == [
        64,
        64,
        128,
        512,
        512,
        32_768,
    ]
    assert [padded_length(n, 100) for n in (1, 65, 100)] == [64, 100, 100]
    assert padded_length(3, 10) == 10


def measured(
    shards: TokenShards, batches: Iterator[Any], positions: tuple[int, ...] = ()
) -> dict[str, Any]:
    params = jax.tree.map(lambda x: 3 * x, initialize(decoder.param_specs(MODEL), 3))
    layout = one_device(decoder.param_specs(MODEL), FLOAT32)
    evaluate = evaluator(MODEL, TOKENIZER.token_bytes, layout, positions)
    return measure(evaluate, params, batches, shards.byte_ratio, positions=positions)


def test_padding_changes_no_result(tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "shards", TEXTS)
    for length in (100, 1024):
        found = measured(
            shards, evaluation_batches(shards, length, length, shards.tokens, 4096).batches
        )
        padded = measured(shards, held_out_batches(shards, length, 8, shards.tokens + length))
        assert found == pytest.approx(padded, rel=1e-5)
        assert found["bytes"] == shards.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_overlapping_windows_by_hand(tmp_path: Path) -> None:
    """One document: each token is predicted from the window in which it is scored."""
    shards = shards_of(tmp_path / "shards", TEXTS[:1])
    length, stride = 64, 24
    params = jax.tree.map(lambda x: 3 * x, initialize(decoder.param_specs(MODEL), 3))
    tokens = shards.read(0, shards.tokens + 1)
    losses = {}
    for span in spans(shards.tokens, length, stride):
        inputs = tokens[span.start : span.stop][None]
        positions = np.arange(inputs.shape[1])[None]
        hidden = decoder.forward(
            params, (inputs, positions, np.ones_like(inputs)), MODEL, Execution(precision=FLOAT32)
        )
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["embedding"], np.float64).T
        log_z = np.log(np.exp(logits).sum(-1))
        for index in range(span.scored, span.stop):
            at = index - span.start
            losses[at, index] = log_z[at] - logits[at, tokens[index + 1]]
    batches = evaluation_batches(shards, length, stride, shards.tokens, 4096).batches
    found = measured(shards, batches, (0, 10, 40))
    nll = sum(losses.values())
    assert found["loss"] == pytest.approx(nll / shards.tokens, rel=1e-5)
    for part, stop in zip(found["by_position"], (10, 40, 64), strict=True):
        of_range = [loss for (at, _), loss in losses.items() if part["from"] <= at < stop]
        assert part["tokens"] == len(of_range)
        assert part["loss"] == pytest.approx(np.mean(of_range), rel=1e-5)
    assert found["tokens"] == shards.tokens
    assert found["bits_per_byte"] == pytest.approx(
        nll / math.log(2) / len(TEXTS[0].encode()), rel=1e-5
    )


def spaced() -> Tokenizer:
    """One that puts a space before each text, as SentencePiece does."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    own = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    own.add_special_tokens(["<unk>", "<s>", "</s>"])
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    return Tokenizer(own)


def composed() -> Tokenizer:
    """One that brings text into NFC, as Qwen's does."""
    own = tokenizers.Tokenizer.from_str(TOKENIZER.json)
    own.normalizer = tokenizers.normalizers.NFC()
    return Tokenizer(own)


@pytest.mark.parametrize("make", [spaced, composed])
def test_bytes_are_those_of_the_text(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    texts = [unicodedata.normalize("NFD", f"caf\u00e9 {i} \u00c5ngstr\u00f6m") for i in range(20)]
    shards = shards_of(tmp_path / "shards", texts, tokenizer)
    size = sum(len(text.encode()) for text in texts)
    tokens = shards.read(0, shards.tokens)
    assert shards.token_bytes == tokenizer.token_bytes[tokens].sum() != size
    assert shards.text_bytes == size
    batches = evaluation_batches(shards, 64, 64, shards.tokens, 4096).batches

    def evaluate(_: Any, batch: Any) -> dict[str, float]:
        weights = batch["weights"]
        counted = float((weights * tokenizer.token_bytes[batch["targets"]]).sum())
        return {"nll": 1.0, "correct": 0.0, "tokens": weights.sum(), "token_bytes": counted}

    assert measure(evaluate, {}, batches, shards.byte_ratio)["bytes"] == size


@pytest.mark.parametrize("tokenizer", [TOKENIZER, spaced()], ids=["one token", "begin and end"])
def test_documents_of_files_are_scored_each_by_itself(
    tokenizer: Tokenizer, tiny: Run, tmp_path: Path
) -> None:
    """With its tokens and the one that ends it, whatever stands behind it in the file."""
    params = jax.tree.map(lambda x: 3 * x, initialize(decoder.param_specs(MODEL), 3))
    layout = one_device(decoder.param_specs(MODEL), FLOAT32)
    trained = Trained(tiny, 0, MODEL, params, tokenizer, 1024, layout)
    nll, tokens = 0.0, 0
    for text in TEXTS:
        document = [tokenizer.begin, *tokenizer.encode(text), tokenizer.end]
        inputs = np.array([document[:-1]])
        at = (inputs, np.arange(inputs.size)[None], np.ones_like(inputs))
        hidden = decoder.forward(params, at, MODEL, Execution(precision=FLOAT32))
        logits = np.asarray(hidden[0], np.float64) @ np.asarray(params["embedding"], np.float64).T
        log_z = np.log(np.exp(logits).sum(-1))
        nll += (log_z - logits[np.arange(inputs.size), document[1:]]).sum()
        tokens += inputs.size
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (found,) = evaluate_files(trained, [str(file)], windows=Windows(by_position=True)).values()
    assert found["tokens"] == tokens == sum(part["tokens"] for part in found["by_position"])
    assert found["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)


def test_the_command(finished: Path, tmp_path: Path) -> None:
    text = "def f(x):\n    return x + 1\n" * 40
    (tmp_path / "a.txt").write_text(text)
    results = {}
    for options in ((), ("--sequence-length", 64), ("--sequence-length", 64, "--stride", 16)):
        answer = braeburn("evaluate", finished, "--data", tmp_path / "a.txt", "--json", *options)
        assert answer.code == 0, answer.err
        (results[options],) = json.loads(answer.out)["results"].values()
    assert len({result["tokens"] for result in results.values()}) == 1
    assert {result["bytes"] for result in results.values()} == {len(text.encode())}
    assert len({result["loss"] for result in results.values()}) == 3
    for first, second in itertools.pairwise([(), ("--sequence-length", 64, "--stride", 16)]):
        assert results[first]["loss"] == pytest.approx(results[second]["loss"], rel=0.1)

    wrong = (
        "evaluate",
        finished,
        "--data",
        tmp_path / "a.txt",
        "--sequence-length",
        64,
        "--stride",
        65,
    )
    assert "--stride 65 is more than the 64 tokens of a window" in braeburn(*wrong).error
