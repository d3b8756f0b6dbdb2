"""Hugging Face directories, and a sentence for everything refused; `make test-hf` compares with
transformers itself.
"""

import json
import os
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import (
    LLAMA_AS_MISTRAL,
    MODELS,
    ROPES,
    SAME_MODEL,
    assert_same,
    change_config,
    make,
    only_head,
    random_params,
    separate_tokens,
    with_rope,
    without_prefix,
    write,
)
from safetensors.numpy import load_file, save_file

from braeburn.errors import UserError
from braeburn.interop import huggingface
from braeburn.models.families import gpt_oss
from braeburn.models.huggingface_config import parse_config
from braeburn.train.directory import RunDirectory
from support import braeburn


def test_shards_hold_what_one_file_holds(tokenizer_file, tmp_path):
    model, _ = MODELS["qwen3-untied-wide-heads"]
    params = random_params(model)
    directory = write(tmp_path / "out", params, model, tokenizer_file, max_shard_bytes=50_000)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 3
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
    assert all(
        size <= 50_000 or len(load_file(file)) == 1 for file, size in zip(files, sizes, strict=True)
    )
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}

    read_model, read_params, _ = huggingface.read(directory)
    assert read_model == model.model_copy(update={"max_position_embeddings": 2048})
    assert_same(read_params, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [50_000, 10**9])
def test_files_are_those_of_safetensors_byte_for_byte(
    dtype, max_shard_bytes, tokenizer_file, tmp_path
):
    model, _ = MODELS["qwen3-untied-wide-heads"]
    params = random_params(model)
    options = {"max_shard_bytes": max_shard_bytes, "dtype": dtype}
    directory = write(tmp_path / "out", params, model, tokenizer_file, **options)
    for file in directory.glob("*.safetensors"):
        theirs = tmp_path / "theirs.safetensors"
        save_file(load_file(file), theirs, {"format": "pt"})
        assert file.read_bytes() == theirs.read_bytes(), file.name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_read_exactly(dtype, tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    tensors = {
        name: tensor.astype(dtype)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors")
    _, params, _ = huggingface.read(directory)
    assert_same(params, jax.tree.map(lambda x: x.astype(dtype), random_params(make())))


def test_bfloat16_parameters_are_written_exactly(tokenizer_file, tmp_path):
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), random_params(make()))
    assert_same(
        huggingface.read(write(tmp_path / "out", params, make(), tokenizer_file))[1], params
    )


def test_a_tied_head_that_was_saved_too_is_accepted(tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, directory / "model.safetensors")
    assert_same(huggingface.read(directory)[1], random_params(make()))


@pytest.mark.parametrize(("rope", "scaling"), ROPES)
def test_rope_is_read_wherever_a_version_put_it(rope, scaling, tokenizer_file, tmp_path):
    directory = with_rope(
        write(tmp_path / "out", random_params(make()), make(), tokenizer_file), rope
    )
    model, _, _ = huggingface.read(directory)
    assert (model.rope_base, model.rope_scaling) == (5e5, scaling)


def test_an_absent_length_is_none(tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    for change in (
        lambda config: config.update(max_position_embeddings=None),
        lambda config: config.pop("max_position_embeddings"),
    ):
        edit_config(directory, change)
        assert huggingface.read(directory)[0].max_position_embeddings == 0


def test_an_absent_head_dim_follows_from_the_width(tokenizer_file, tmp_path):
    model = make(qk_norm=False)
    directory = write(tmp_path / "out", random_params(model), model, tokenizer_file)
    for change in (
        lambda config: config.pop("head_dim"),
        lambda config: config.update(head_dim=None),
    ):
        edit_config(directory, change)
        assert huggingface.read(directory)[0].head_dim == 16


def test_the_tokenizer_is_ours_unchanged(tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    assert (directory / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()


def test_without_a_tokenizer_there_are_no_special_tokens(tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), None)
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, None)


def test_begin_and_end_may_differ(tmp_path):
    tokenizer = separate_tokens(tmp_path / "tokenizer.json")
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer)
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


def test_an_interrupted_export_leaves_nothing(tokenizer_file, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface.Tensor, "exported", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new" / "out", random_params(make()), make(), tokenizer_file)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_empty_target_is_used_and_a_full_one_refused(tokenizer_file, tmp_path):
    (tmp_path / "out").mkdir()
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        write(directory, random_params(make(), seed=1), make(), tokenizer_file)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    with pytest.raises(UserError, match="is a file"):
        write(directory / "config.json", random_params(make()), make(), tokenizer_file)
    with pytest.raises(UserError, match="cannot be written"):
        write(directory / "config.json" / "below", random_params(make()), make(), tokenizer_file)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"model": make(vocab_size=256)},
            "holds the token 2.., which vocab_size=256 has no row for",
        ),
        (
            {"model": make(qk_norm=False, num_heads=5, num_kv_heads=1)},
            "d_model=64 is not a multiple .* d_model=65 or",
        ),
    ],
)
def test_exports_refused(options, sentence, tokenizer_file, tmp_path):
    arguments = {"model": make(), "tokenizer_file": tokenizer_file} | options
    with pytest.raises(UserError, match=sentence):
        write(tmp_path / "out", params=random_params(arguments["model"]), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_params_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"params\['head'\] has the shape None"):
        write(tmp_path / "out", random_params(make()), make(tied_embeddings=False), None)


def edit_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def config_with(**fields):
    return lambda directory: edit_config(directory, lambda config: config.update(fields))


def config_without(field):
    return lambda directory: edit_config(directory, lambda config: config.pop(field))


def tensors_with(**tensors):
    return lambda directory: edit_tensors(
        directory, lambda all_tensors: all_tensors.update(tensors)
    )


def tensors_without(name):
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.pop(name))


def only_bin(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def a_missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def an_empty_index(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("{}")


NORM = "model.norm.weight"
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            config_with(model_type="phi3"),
            "model_type='phi3' cannot be imported; choose a model of type .*, gpt_oss, llama, ",
        ),
        (config_without("model_type"), "model_type=None cannot be imported"),
        (config_with(attention_bias=True), "attention_bias=True cannot be imported; choose"),
        (config_with(mlp_bias=True), "mlp_bias=True cannot be imported"),
        (
            config_with(use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "use_sliding_window=True with sliding_window=64 cannot be imported",
        ),
        (
            config_with(layer_types=["full_attention", "sliding_attention"], sliding_window=64),
            "layer_types='sliding_attention' with sliding_window=64 cannot be imported",
        ),
        (
            config_with(layer_types=["chunked_attention"]),
            "layer_types='chunked_attention' cannot be imported",
        ),
        (
            config_with(model_type="mistral", max_position_embeddings=8192),
            "model_type='mistral' with sliding_window=4096 cannot be imported",
        ),
        (
            config_with(rope_scaling=DYNAMIC),
            "rope_type='dynamic' cannot be imported; choose a model with rope_type default",
        ),
        (config_with(rope_scaling={"rope_type": "linear"}), "rope_type='linear' lacks factor"),
        (
            config_with(rope_scaling={"type": "linear", "factor": -1.0}),
            "rope_scaling.factor=-1.0 is not valid",
        ),
        (
            config_with(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
            "rope_parameters differ by kind",
        ),
        (
            config_with(rope_parameters={"partial_rotary_factor": 0.5}),
            "partial_rotary_factor=0.5 cannot be imported",
        ),
        (
            config_with(hidden_act="gelu"),
            "hidden_act='gelu' cannot be imported; choose a model with hidden_act='silu'",
        ),
        (config_with(quantization_config={"bits": 4}), "quantization_config=.* cannot be imported"),
        (config_without("hidden_size"), "hidden_size=None is not a size"),
        (config_with(num_hidden_layers="two"), "num_hidden_layers='two' is not a size"),
        (config_with(num_key_value_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
        (config_with(rms_norm_eps=0), "norm_epsilon=0.0 is not valid"),
        (
            config_with(intermediate_size=128),
            "has the shape .96, 64., not .128, 64.; download the two again",
        ),
        (
            config_with(num_hidden_layers=3),
            "model.layers.2.input_layernorm.weight and 10 more is missing",
        ),
        (
            config_with(tie_word_embeddings=False),
            "unlike its config.json: lm_head.weight is missing; download",
        ),
        (
            config_with(num_hidden_layers=1),
            "unlike its config.json: model.layers.1.input_layernorm.weight and 10 more has no "
            "place",
        ),
        (tensors_without(NORM), "model.norm.weight is missing"),
        (
            tensors_with(**{"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}),
            "q_proj.bias has no place",
        ),
        (
            tensors_with(**{"lm_head.weight": np.ones((307, 64), np.float32)}),
            "set tie_word_embeddings to false",
        ),
        (
            tensors_with(**{NORM: np.ones(63, np.float32)}),
            "model.norm.weight has the shape .63,.*, not .64",
        ),
        (
            tensors_with(**{NORM: np.ones(64, np.int8)}),
            "model.norm.weight has the type I8; choose weights in F32",
        ),
        (
            lambda directory: (directory / "config.json").unlink(),
            "config.json. cannot be read .*No such.*; name the folder",
        ),
        (
            lambda directory: (directory / "config.json").write_text("{"),
            "config.json. cannot be read",
        ),
        (
            lambda directory: (directory / "config.json").write_text("[]"),
            "config.json. cannot be read .it holds no JSON object",
        ),
        (
            lambda directory: (directory / "model.safetensors").unlink(),
            "holds no model.safetensors; download the safe",
        ),
        (
            lambda directory: (directory / "tokenizer.json").unlink(),
            "holds no tokenizer.json; download it",
        ),
        (only_bin, "holds no model.safetensors; download the safetensors weights, or convert"),
        (
            a_missing_shard,
            "model-00002-of-00002.safetensors. cannot be read .No such.*; download it again",
        ),
        (an_empty_index, "unlike its config.json: .* is missing; download the weights again"),
        (truncated, "model.safetensors. cannot be read .*; download it again"),
    ],
)
def test_imports_refused(damage, sentence, tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    damage(directory)
    with pytest.raises(UserError, match=sentence) as caught:
        huggingface.read(directory)
    assert "\n" not in str(caught.value)


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (config_with(decoder_sparse_step=0), "decoder_sparse_step=0 is not a size; give it the"),
        (config_with(decoder_sparse_step=2), r"0.mlp.down_proj.* is missing; download the weights"),
        (config_with(mlp_only_layers=[0]), r"0.mlp.down_proj.* is missing; download the weights"),
        (config_with(mlp_only_layers=0), "mlp_only_layers=0 is not a list of numbers of layers"),
        (config_with(mlp_only_layers=["0"]), r"mlp_only_layers=.'0'. is not a list of numbers"),
        (config_with(num_experts="six"), "num_experts='six' is not a size; give it the positive"),
        (config_with(num_experts_per_tok=7), "experts_per_token=7 is more than num_experts=6"),
        (config_with(moe_intermediate_size=40), "has the shape .*, not .*; download the two again"),
        (config_with(num_experts=7), "experts.6.*is missing; download the weights again"),
        (config_with(num_experts=5), "experts.5.* has no place"),
        (tensors_without(EXPERT), f"{EXPERT} is missing; download the weights again"),
    ],
)
def test_mixtures_refused(damage, sentence, tokenizer_file, tmp_path):
    model, _ = MODELS["qwen3-moe"]
    directory = write(tmp_path / "out", random_params(model), model, tokenizer_file)
    damage(directory)
    with pytest.raises(UserError, match=sentence) as caught:
        huggingface.read(directory)
    assert "\n" not in str(caught.value)


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            config_with(quantization_config={"quant_method": "mxfp4"}),
            "quant_method='mxfp4' cannot be imported; load the model by transformers' .*dequantize",
        ),
        (config_with(swiglu_limit=8.0), "swiglu_limit=8.0 cannot be imported; choose a model with"),
        (config_with(attention_bias="x"), "attention_bias='x' cannot be imported; choose a model"),
        (config_with(layer_types=["full_attention"]), "layer_types names 1 layers and"),
        (config_with(num_local_experts=5), "has the shape .*, not .*; download the two again"),
        (config_with(attention_bias=False), "bias and .* has no place"),
        (tensors_without(GATE_UP), f"{GATE_UP} is missing; download the weights again"),
    ],
)
def test_gpt_oss_refused(damage, sentence, tokenizer_file, tmp_path):
    model, _ = MODELS["gpt-oss"]
    directory = write(tmp_path / "out", random_params(model), model, tokenizer_file)
    damage(directory)
    with pytest.raises(UserError, match=sentence) as caught:
        huggingface.read(directory)
    assert "\n" not in str(caught.value)


def test_experts_are_found_under_the_names_of_their_quantised_form(tokenizer_file, tmp_path):
    """As transformers 5 writes what it has read of them, in full precision."""
    model, _ = MODELS["gpt-oss"]
    params = random_params(model)
    directory = write(tmp_path / "out", params, model, tokenizer_file)

    def rename(tensors):
        for name in [name for name in tensors if name.endswith("_proj")]:
            tensors[f"{name}_blocks"] = tensors.pop(name)

    edit_tensors(directory, rename)
    assert_same(huggingface.read(directory)[1], params)


def test_a_config_that_leaves_all_out_is_that_of_the_large_gpt_oss():
    """As transformers takes the fields that a file leaves out."""
    stated = {
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "intermediate_size": 2880,
    }
    published = gpt_oss.gpt_oss_120b().model_copy(update={"z_loss": 1e-6})
    assert parse_config(stated, "config.json") == published


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*; name a downloaded"):
        huggingface.read(tmp_path / "nowhere")


@pytest.mark.parametrize(("owner", "method"), [(RunDirectory, "event"), (Path, "rmdir")])
def test_a_folder_that_another_command_fills_meanwhile_is_left_to_it(
    owner, method, tokenizer_file, tmp_path, monkeypatch
):
    """Of two imports into one folder, the slower one says so in a sentence and replaces nothing."""
    source = write(tmp_path / "hf", random_params(make()), make(), tokenizer_file)
    out = tmp_path / "run"
    out.mkdir()
    original = getattr(owner, method)

    def fill_afterwards(self, *arguments, **options):
        original(self, *arguments, **options)
        if owner is RunDirectory or self == out:
            out.mkdir(exist_ok=True)
            (out / "theirs.txt").write_text("theirs")

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, fill_afterwards)
        error = braeburn("import", source, "--out", out).error
    assert f"{str(out)!r} is in use" in error and "name a new or empty folder" in error
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]
    assert braeburn("import", source, "--out", tmp_path / "other").code == 0


def in_index(name):
    """Weights in two files, one of which the index has under another name."""

    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "a.safetensors")
        index = {"weight_map": {"a": "a.safetensors", "b": name}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def as_text(file, text):
    return lambda directory: (directory / file).write_text(text)


def as_folder(file):
    def change(directory: Path) -> None:
        (directory / file).unlink(missing_ok=True)
        (directory / file).mkdir()

    return change


def as_pipe(file):
    def change(directory: Path) -> None:
        (directory / file).unlink(missing_ok=True)
        os.mkfifo(directory / file)

    return change


INDEX = "model.safetensors.index.json"


def both(*changes):
    def change(directory: Path) -> None:
        for each in changes:
            each(directory)

    return change


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            config_with(num_hidden_layers=10**9),
            "num_hidden_layers=1000000000 is more than 10000, the largest that is read",
        ),
        (
            config_with(num_attention_heads=10**12),
            "num_attention_heads=1000000000000 is more than 65536",
        ),
        (config_with(vocab_size=True), "vocab_size=True is not a size"),
        (config_with(hidden_size=[64]), r"hidden_size=\[64\] is not a size"),
        (
            config_with(rope_scaling=[1]),
            r"config.json': rope_scaling cannot be \[1\]; download config.json again",
        ),
        (config_with(layer_types=7), "layer_types cannot be 7"),
        (config_with(max_position_embeddings="long"), "max_position_embeddings cannot be 'long'"),
        (config_with(model_type={}), "model_type cannot be {}"),
        (config_with(hidden_act={"a": 1}), "hidden_act={'a': 1} cannot be imported"),
        (
            config_with(rope_scaling={"rope_type": ["llama3"]}),
            r"rope_type=\['llama3'\] cannot be imported",
        ),
        (config_with(tie_word_embeddings="x" * 10_000), "tie_word_embeddings cannot be 'xxx"),
        (
            as_text("config.json", "[" * 100_000),
            "config.json' cannot be read .it is nested more than 100 deep",
        ),
        (
            as_text("config.json", '{"a": ' + "9" * 5000 + "}"),
            "config.json' cannot be read .it has a number of thousands of digits",
        ),
        (as_text("config.json", '{"a": "\\ud800"}'), "half of a surrogate pair"),
        (as_folder("config.json"), "config.json' cannot be read .it is a folder"),
        (as_pipe("config.json"), "config.json' cannot be read .it is not an ordinary file"),
        (as_folder("model.safetensors"), "holds no model.safetensors"),
        (as_pipe("model.safetensors"), "holds no model.safetensors"),
        (in_index("b.safetensors"), "b.safetensors' cannot be read .No such file"),
        (
            both(in_index("pipe"), as_pipe("pipe")),
            "pipe' cannot be read .it is not an ordinary file",
        ),
        (
            both(in_index("folder"), as_folder("folder")),
            "folder' cannot be read .it is not an ordinary file",
        ),
        (in_index("../b.safetensors"), "names the file '../b.safetensors', which is no file in"),
        (in_index("/dev/zero"), "names the file '/dev/zero', which is no file in"),
        (in_index("x" * 10_000), "names the file 'xxx"),
        (
            both(no_weights, as_text(INDEX, "[]")),
            "index.json' cannot be read .it holds no JSON object",
        ),
        (both(no_weights, as_text(INDEX, '{"weight_map": [1]}')), r"weight_map cannot be \[1\]"),
        (
            both(no_weights, as_text(INDEX, '{"weight_map": {"a": 1}}')),
            "weight_map cannot be {'a': 1}",
        ),
        (both(no_weights, as_folder(INDEX)), "index.json' cannot be read .it is a folder"),
    ],
)
def test_files_of_any_content_get_a_sentence(damage, sentence, tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    damage(directory)
    with pytest.raises(UserError, match=sentence) as caught:
        huggingface.read(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("fields", SAME_MODEL)
def test_fields_that_change_nothing(fields, tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    assert huggingface.read(change_config(directory, **fields))[0] == huggingface.read(directory)[0]


@pytest.mark.parametrize("fields", LLAMA_AS_MISTRAL)
def test_a_mistral_without_a_window_is_a_llama(fields, tokenizer_file, tmp_path):
    model = make(qk_norm=False)
    directory = write(tmp_path / "out", random_params(model), model, tokenizer_file)
    found, params, _ = huggingface.read(change_config(directory, model_type="mistral", **fields))
    assert found.model_copy(update={"max_position_embeddings": 0}) == model
    assert_same(params, random_params(model))


@pytest.mark.parametrize("renamed", [without_prefix, only_head])
def test_weights_under_other_names(renamed, tokenizer_file, tmp_path):
    directory = renamed(write(tmp_path / "out", random_params(make()), make(), tokenizer_file))
    assert_same(huggingface.read(directory)[1], random_params(make()))


def test_an_export_may_be_read_by_all_that_read_its_folder(tokenizer_file, tmp_path):
    directory = write(
        tmp_path / "out", random_params(make()), make(), tokenizer_file, max_shard_bytes=50_000
    )
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


def test_an_export_leaves_alone_what_it_did_not_make(tokenizer_file, tmp_path, monkeypatch):
    """A folder that an earlier process of the same number left, for one."""
    monkeypatch.setattr(huggingface.uuid, "uuid4", lambda: uuid.UUID(int=0))
    mine = tmp_path / f".out.partial-{'0' * 32}"
    mine.mkdir()
    (mine / "work.txt").write_text("years of it")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    assert (mine / "work.txt").read_text() == "years of it"
