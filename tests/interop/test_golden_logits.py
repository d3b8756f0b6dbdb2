"""Models as transformers writes and computes them, without it: `write_golden_logits.py` wrote down
what it says.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import (
    FAMILIES,
    FLOAT32,
    GOLDEN,
    MODELS,
    TOLERANCE,
    golden_tokens,
    golden_weights,
    hash_of,
    our_logits,
    write,
)
from safetensors.numpy import load_file, save_file

from braeburn.config import Execution, MeshConfig, ModelConfig
from braeburn.data.tokenizer import PATTERN, Tokenizer
from braeburn.evaluate.generate import Generation, Sampling, generate
from braeburn.interop import huggingface
from braeburn.layers.spec import Tree
from braeburn.models import decoder
from braeburn.models.families import family_of
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build

ANSWERS = {
    name: answer
    for family in FAMILIES
    for name, answer in json.loads((GOLDEN / f"{family}.json").read_text())["models"].items()
}
LOGITS = {
    name: logits
    for family in FAMILIES
    for name, logits in np.load(GOLDEN / f"{family}.npz").items()
}
# Where an export may differ from transformers' own file without changing what is computed.
FREE = {
    "dtype",
    "torch_dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def test_every_model_was_asked_about():
    """Run write_golden_logits.py after a change of the models."""
    assert list(ANSWERS) == sorted(LOGITS, key=list(MODELS).index) == list(MODELS)


def read_theirs(name: str, tokenizer_file: Path, directory: Path) -> tuple[ModelConfig, Tree]:
    """Fills a directory as transformers does for one of the models, and reads it."""
    answer = ANSWERS[name]
    weights = golden_weights(answer["shapes"], MODELS[name][0])
    assert hash_of(weights) == answer["weights"], (
        "NumPy drew other weights than those that transformers had"
    )
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(answer["config"]))
    (directory / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    model, params, _ = huggingface.read(directory)
    return model, params


@pytest.mark.parametrize("name", MODELS)
def test_their_weights_give_their_logits(name, tokenizer_file, tmp_path):
    model, params = read_theirs(name, tokenizer_file, tmp_path)
    stated, length = MODELS[name]
    assert model == stated.model_copy(update={"scan_layers": True, "max_position_embeddings": 2048})
    found = our_logits(params, golden_tokens(model, length), model)[0, ANSWERS[name]["positions"]]
    np.testing.assert_allclose(found, LOGITS[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_experts_give_their_logits_on_meshes(sizes, tokenizer_file, tmp_path):
    """Of the same sequence in each row of a batch, which devices deal out."""
    name = "qwen3-moe-linear"
    model, params = read_theirs(name, tokenizer_file, tmp_path)
    # The vocabulary of the compared model is odd, and tensor splits it.
    rows = model.vocab_size + 1
    wider = model.model_copy(update={"vocab_size": rows})
    params |= {"embedding": np.pad(params["embedding"], ((0, 1), (0, 0)))}
    tokens = np.repeat(golden_tokens(model, MODELS[name][1]), 4, axis=0)
    mesh = MeshConfig.model_validate({"fsdp": 1, **sizes})
    execution = Execution(mesh, precision=FLOAT32)
    layout = Layout(execution, build(mesh, jax.devices()[:4]), decoder.param_specs(wider))

    def hidden(params: Tree, batch: Tree) -> jax.Array:
        inputs = (batch["inputs"], batch["positions"], jnp.zeros_like(batch["inputs"]))
        return decoder.forward(params, inputs, wider, execution)

    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = layout.place({"inputs": tokens, "positions": positions}, range(4), 4)
    with layout.compiling():
        found = jax.jit(layout.tokenwise(hidden))(
            jax.device_put(params, layout.parameters()), batch
        )
    logits = np.asarray(found) @ params["embedding"][:-1].T
    for row in logits:
        np.testing.assert_allclose(
            row[ANSWERS[name]["positions"]], LOGITS[name], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("name", MODELS)
def test_the_export_is_what_transformers_writes(name, tokenizer_file, tmp_path):
    """The same names, shapes and values, and no field that would change what is computed."""
    (tmp_path / "theirs").mkdir()
    model, params = read_theirs(name, tokenizer_file, tmp_path / "theirs")
    exported = write(tmp_path / "out", params, model, None)
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", exported)
    )
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        # The sum of a stored norm and its offset is rounded once.
        offset = family_of(model).norm_offset if theirs[tensor].ndim == 1 else 0.0
        np.testing.assert_allclose(
            ours[tensor], theirs[tensor], rtol=0, atol=offset * 2.0**-23, err_msg=tensor
        )
    answer = ANSWERS[name]
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == [answer["class"]]
    common = (answer["config"].keys() & config.keys()) - FREE
    assert {
        "model_type",
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
    } <= common
    assert {field: config[field] for field in common} == {
        field: answer["config"][field] for field in common
    }


@pytest.mark.parametrize("name", ["qwen3", "llama-untied"])
def test_greedy_text_is_theirs(name, tokenizer_file, tmp_path):
    model, params = read_theirs(name, tokenizer_file, tmp_path)
    answer = ANSWERS[name]
    prompts = [row["prompt"] for row in answer["greedy"]]
    found = generate(
        jax.tree.map(jnp.asarray, params),
        prompts,
        model,
        FLOAT32,
        Generation(32, Sampling(temperature=0.0)),
    )
    for row, new in zip(answer["greedy"], found, strict=True):
        assert new[: len(row["continued"])] == row["continued"]
    assert sum(len(row["continued"]) for row in answer["greedy"]) > 64


def test_our_pattern_is_that_of_qwen2(tokenizer_file):
    answer = json.loads((GOLDEN / "qwen2_pattern.json").read_text())
    assert answer["pattern"] == PATTERN
    tokenizer = Tokenizer.load(tokenizer_file)
    for text, pieces in answer["pieces"].items():
        assert [
            piece for piece, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ] == pieces
