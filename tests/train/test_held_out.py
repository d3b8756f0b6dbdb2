import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from braeburn.config import Execution, ModelConfig, Precision
from braeburn.data.corpus import Document
from braeburn.data.loader import held_out_batches
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import train
from braeburn.layers.spec import initialize
from braeburn.models import decoder
from braeburn.models.decoder import param_specs
from braeburn.parallel.layout import one_device
from braeburn.train.held_out import evaluator, measure

TEXTS = [
    "The quick brown fox – schnell!",
    "jumps over",
    "the lazy dog, and over that dog's own shadow",
]


def test_measure_is_the_computation_by_hand(tmp_path: Path) -> None:
    tokenizer = train(TEXTS * 3, 280)
    build_token_shards(
        tmp_path / "shards", [Document(str(i), text) for i, text in enumerate(TEXTS)], tokenizer
    )
    shards = TokenShards.open(tmp_path / "shards", tokenizer.hash)
    # More rows in the model than entries in the tokenizer, and windows that do not divide the
    # tokens.
    model = ModelConfig(
        vocab_size=300,
        d_model=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=24,
    )
    length = 10
    assert shards.tokens % length and -(-shards.tokens // length) % 4
    precision = Precision(compute="float32")
    params = jax.tree.map(lambda x: 3 * x, initialize(decoder.param_specs(model), 3))

    stream = [token for text in TEXTS for token in (tokenizer.begin, *tokenizer.encode(text))]
    assert len(stream) == shards.tokens
    starts = {i for i, token in enumerate(stream) if token == tokenizer.begin}
    forward = jax.jit(decoder.forward, static_argnames=("model", "execution"))
    nll, correct = 0.0, 0
    for start in range(0, len(stream), length):
        # Each document within the window is seen on its own, from position 0; what follows it has
        # no influence.
        inputs = stream[start : start + length]
        cuts = sorted({0, *(i - start for i in starts if start <= i < start + length), len(inputs)})
        for begin, end in itertools.pairwise(cuts):
            tokens = np.zeros((1, length), np.int32)
            tokens[0, : end - begin] = inputs[begin:end]
            hidden = forward(
                params,
                (tokens, np.arange(length)[None], np.ones_like(tokens)),
                model,
                Execution(precision=precision),
            )
            embedding = np.asarray(params["embedding"], np.float64)
            logits = np.asarray(hidden[0, : end - begin], np.float64) @ embedding.T
            targets = [*stream, tokenizer.begin][start + begin + 1 : start + end + 1]
            peak = logits.max(-1, keepdims=True)
            log_z = peak[:, 0] + np.log(np.exp(logits - peak).sum(-1))
            nll += float((log_z - logits[range(len(targets)), targets]).sum())
            correct += int((logits.argmax(-1) == targets).sum())

    evaluate = evaluator(model, tokenizer.token_bytes, one_device(param_specs(model), precision))
    summary = measure(
        evaluate,
        params,
        held_out_batches(shards, length, 4, shards.tokens + length),
        shards.byte_ratio,
    )
    assert summary["accuracy"] == pytest.approx(correct / len(stream))
    assert summary["loss"] == pytest.approx(nll / len(stream), rel=1e-5)
    bits = nll / math.log(2)
    assert summary["bits_per_byte"] == pytest.approx(bits / shards.text_bytes, rel=1e-5)
    assert (summary["tokens"], summary["bytes"]) == (len(stream), shards.text_bytes)

    fewer = measure(
        evaluate, params, held_out_batches(shards, length, 4, 2 * length), shards.byte_ratio
    )
    assert fewer["tokens"] == 2 * length
