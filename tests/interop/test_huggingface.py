"""Hugging Face directories: the same logits as transformers both ways, and a sentence for everything refused."""

import json
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from braeburn.config import Model, Precision, RopeScaling
from braeburn.data.tokenizer import Tokenizer, train
from braeburn.errors import UserError
from braeburn.interop import huggingface
from braeburn.model import transformer
from braeburn.model.spec import ParamSpec, Tree, initialize, map_specs, walk

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TOLERANCE = 1e-4
FLOAT32 = Precision(compute="float32")
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
LINEAR = RopeScaling(kind="linear", factor=4.0)


def make(**fields) -> Model:
    sizes = {
        "vocab_size": 307,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 96,
        "norm_epsilon": 1e-6,
    }
    return Model(**(sizes | fields))


# name -> (model, length of the compared sequence)
MODELS = {
    "qwen3": (make(), 40),
    "qwen3-7-heads-1-kv": (make(d_model=48, num_heads=7, num_kv_heads=1, head_dim=10, num_layers=3), 33),
    "qwen3-untied-wide-heads": (make(num_heads=3, num_kv_heads=3, head_dim=32, tied_embeddings=False), 40),
    "qwen3-odd-sizes": (make(vocab_size=301, d_model=51, ffn_dim=77, num_heads=5, num_kv_heads=5, head_dim=6), 17),
    "qwen3-long": (make(rope_base=1e6, num_layers=1, ffn_dim=32), 1500),
    "qwen3-linear": (make(rope_scaling=LINEAR, norm_epsilon=1e-5), 200),
    "llama": (make(qk_norm=False, rope_base=10_000.0), 40),
    "llama-9-heads-3-kv": (make(qk_norm=False, d_model=72, num_heads=9, num_kv_heads=3, head_dim=8), 40),
    "llama-one-kv-wide-heads": (make(qk_norm=False, d_model=60, num_heads=5, num_kv_heads=1, head_dim=20), 40),
    "llama-untied": (make(qk_norm=False, num_kv_heads=4, tied_embeddings=False, scan_layers=False), 40),
    "llama-llama3-long": (make(qk_norm=False, rope_scaling=LLAMA3, num_layers=1, ffn_dim=32), 1500),
    "llama-linear": (make(qk_norm=False, rope_scaling=LINEAR, tied_embeddings=False), 300),
}
cases = pytest.mark.parametrize(("model", "length"), MODELS.values(), ids=MODELS.keys())


def random_params(model: Model, seed: int = 0) -> Tree:
    """Weights scaled as `initialize` scales them, and norms that are not all one; drawn without compiling."""
    generator = np.random.default_rng(seed)

    def draw(_: str, spec: ParamSpec) -> np.ndarray:
        if spec.role == "norm":
            return generator.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        fan_in = np.prod([spec.shape[spec.axes.index(axis)] for axis in spec.fan_in])
        return (generator.standard_normal(spec.shape) * fan_in**-0.5).astype(np.float32)

    return map_specs(draw, transformer.param_specs(model))


@jax.jit(static_argnames="model")
def _logits(params: Tree, tokens: jax.Array, model: Model) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.forward(params, tokens, positions, jnp.zeros_like(tokens), model, FLOAT32)
    return jnp.einsum("BTD,VD->BTV", hidden, transformer.head_matrix(params))


def our_logits(params: Tree, tokens: np.ndarray, model: Model) -> np.ndarray:
    return np.asarray(_logits(params, tokens, model))


def their_logits(theirs, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(tokens).long()).logits.float().numpy()


def random_tokens(model: Model, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, model.vocab_size, (1, length), np.int32)


def their_config(model: Model):
    """The configuration that a user of transformers would write for the same sizes."""
    rope = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling is not None:
        rope |= {"rope_type": model.rope_scaling.kind, "factor": model.rope_scaling.factor}
        if model.rope_scaling.kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config_class = transformers.Qwen3Config if model.qk_norm else transformers.LlamaConfig
    return config_class(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )


def their_model(model: Model):
    """A transformers model whose random weights give logits of about unit deviation."""
    theirs = transformers.AutoModelForCausalLM.from_config(their_config(model)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return theirs


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    tokenizer = train(["the cat sat on the mat\n\n    in 1234 ways " * 20], 300)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


def write(directory: Path, params: Tree, model: Model, tokenizer_file: Path | None, **options) -> Path:
    tokenizer = None if tokenizer_file is None else Tokenizer.load(tokenizer_file)
    huggingface.write(directory, params, model, tokenizer, max_position_embeddings=2048, **options)
    return directory


def load(directory: Path, **options):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return theirs.eval()


@cases
def test_their_weights_give_their_logits(model, length, tokenizer_file, tmp_path):
    theirs = their_model(model)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    read_model, params, found_tokenizer = huggingface.read(tmp_path)
    assert read_model == model.model_copy(update={"scan_layers": True, "max_position_embeddings": 2048})
    assert found_tokenizer == tmp_path / "tokenizer.json"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    tokens = random_tokens(model, length)
    expected = their_logits(theirs, tokens)
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(our_logits(params, tokens, model), expected, rtol=0, atol=TOLERANCE)


@cases
def test_our_weights_give_our_logits_and_come_back_unchanged(model, length, tmp_path):
    params = random_params(model)
    theirs = load(write(tmp_path / "out", params, model, None), attn_implementation="eager")
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM")
    tokens = random_tokens(model, length)
    expected = our_logits(params, tokens, model)
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(their_logits(theirs, tokens), expected, rtol=0, atol=TOLERANCE)

    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert_same(huggingface.read(tmp_path / "out")[1], params)


def test_initial_values_give_the_same_logits(tmp_path):
    model, length = MODELS["qwen3-7-heads-1-kv"]
    params = jax.jit(lambda: initialize(transformer.param_specs(model), 0))()
    tokens = random_tokens(model, length)
    difference = their_logits(load(write(tmp_path / "out", params, model, None)), tokens) - our_logits(
        params, tokens, model
    )
    assert np.abs(difference).max() < TOLERANCE


def assert_same(found: Tree, expected: Tree) -> None:
    leaves = dict(walk(found))
    assert leaves.keys() == dict(walk(expected)).keys()
    for path, leaf in walk(expected):
        np.testing.assert_array_equal(leaves[path], np.asarray(leaf, np.float32), err_msg=path)


def test_shards_hold_what_one_file_holds(tokenizer_file, tmp_path):
    model, length = MODELS["qwen3-untied-wide-heads"]
    params = random_params(model)
    directory = write(tmp_path / "out", params, model, tokenizer_file, max_shard_bytes=50_000)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 3
    sizes = [sum(x.nbytes for x in load_file(file).values()) for file in files]
    assert all(size <= 50_000 or len(load_file(file)) == 1 for file, size in zip(files, sizes, strict=True))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}

    read_model, read_params, _ = huggingface.read(directory)
    assert read_model == model.model_copy(update={"max_position_embeddings": 2048})
    assert_same(read_params, params)
    tokens = random_tokens(model, length)
    difference = their_logits(load(directory), tokens) - our_logits(params, tokens, model)
    assert np.abs(difference).max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(dtype, tokenizer_file, tmp_path):
    theirs = their_model(make()).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    model, params, _ = huggingface.read(tmp_path)
    expected = theirs.model.layers[1].mlp.down_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(params["layers"]["down"][1], expected)
    tokens = random_tokens(model, 40)
    difference = our_logits(params, tokens, model) - their_logits(load(tmp_path, dtype=torch.float32), tokens)
    assert np.abs(difference).max() < TOLERANCE


def test_bfloat16_parameters_are_written_exactly(tokenizer_file, tmp_path):
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), random_params(make()))
    assert_same(huggingface.read(write(tmp_path / "out", params, make(), tokenizer_file))[1], params)


def test_a_tied_head_that_was_saved_too_is_accepted(tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, directory / "model.safetensors")
    assert_same(huggingface.read(directory)[1], random_params(make()))


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_theta": 5e5}, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 4}}, LINEAR),
        (
            {
                "rope_theta": 5e5,
                "max_position_embeddings": 64,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            },
            LLAMA3,
        ),
    ],
)
def test_rope_is_read_wherever_a_version_put_it(rope, scaling, tokenizer_file, tmp_path):
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer_file)
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("rope_")} | rope
    (directory / "config.json").write_text(json.dumps(config))
    model, _, _ = huggingface.read(directory)
    assert (model.rope_base, model.rope_scaling) == (5e5, scaling)
    theirs = transformers.AutoConfig.from_pretrained(directory).rope_parameters
    assert theirs["rope_theta"] == model.rope_base
    assert theirs["rope_type"] == (scaling.kind if scaling else "default")


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
    for change in (lambda config: config.pop("head_dim"), lambda config: config.update(head_dim=None)):
        edit_config(directory, change)
        assert huggingface.read(directory)[0].head_dim == 16


TEXTS = [
    "the cat sat on the mat",
    "cafe\u0301 \u212b \ufb01 \u1100\u1161 \u00e9 " + unicodedata.normalize("NFD", "Ångström São"),
    "in 1234 ways: 3.14159, 10000000 and 2\u00b3 \u0664\u0665",
    "  two\n\n\n    four\t\ttabs \r\n   \n trailing   ",
    "\u3053\u3093\u306b\u3061\u306f 你好 \U0001f600\U0001f469\u200d\U0001f680 \u05e9\u05dc\u05d5\u05dd \u0000 \ufffd",
    "a<|endoftext|>b ' don't n't . , ?",
    "",
]


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_tokenizer_is_ours_unchanged(qk_norm, tokenizer_file, tmp_path):
    import tokenizers

    model = make(qk_norm=qk_norm)
    directory = write(tmp_path / "out", random_params(model), model, tokenizer_file)
    assert (directory / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    assert len(theirs) == ours.get_vocab_size()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 0)
    assert theirs.model_max_length == 2048
    # What users write: no argument that the model would refuse.
    output = load(directory).generate(**theirs("the cat", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[0] == 1


def test_without_a_tokenizer_there_are_no_special_tokens(tmp_path):
    config = transformers.AutoConfig.from_pretrained(write(tmp_path / "out", random_params(make()), make(), None))
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_begin_and_end_may_differ(tmp_path):
    import tokenizers

    separate = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    separate.add_special_tokens(["<s>", "</s>"])
    separate.save(str(tmp_path / "tokenizer.json"))
    directory = write(tmp_path / "out", random_params(make()), make(), tmp_path / "tokenizer.json")
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")


def test_an_interrupted_export_leaves_nothing(tokenizer_file, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "save_file", interrupted)
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
        ({"model": make(vocab_size=256)}, "holds the token 2.., which vocab_size=256 has no row for"),
        ({"model": make(qk_norm=False, num_heads=5, num_kv_heads=1)}, "d_model=64 is not a multiple .* d_model=65 or"),
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
    return lambda directory: edit_tensors(directory, lambda all_tensors: all_tensors.update(tensors))


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
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (config_with(model_type="mixtral"), "model_type='mixtral' cannot be imported; choose a model of type llama or"),
        (config_without("model_type"), "model_type=None cannot be imported"),
        (config_with(attention_bias=True), "attention_bias=True cannot be imported; choose"),
        (config_with(mlp_bias=True), "mlp_bias=True cannot be imported"),
        (config_with(use_sliding_window=True), "use_sliding_window=True cannot be imported"),
        (
            config_with(layer_types=["full_attention", "sliding_attention"]),
            "layer_types='sliding_attention' cannot be imported",
        ),
        (config_with(rope_scaling=YARN), "rope_type='yarn' cannot be imported; choose a model with rope_type default"),
        (config_with(rope_scaling={"rope_type": "linear"}), "rope_type='linear' lacks factor"),
        (config_with(rope_scaling={"type": "linear", "factor": -1.0}), "rope_scaling.factor=-1.0 is not valid"),
        (config_with(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rope_parameters differ by kind"),
        (config_with(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5 cannot be imported"),
        (config_with(hidden_act="gelu"), "hidden_act='gelu' cannot be imported; choose a model with hidden_act='silu'"),
        (config_with(quantization_config={"bits": 4}), "quantization_config=.* cannot be imported"),
        (config_without("hidden_size"), "hidden_size=None is not a size"),
        (config_with(num_hidden_layers="two"), "num_hidden_layers='two' is not a size"),
        (config_with(num_key_value_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
        (config_with(rms_norm_eps=0), "norm_epsilon=0 is not valid"),
        (config_with(intermediate_size=128), "has the shape .96, 64., not .128, 64.; download the two again"),
        (config_with(num_hidden_layers=3), "model.layers.2.input_layernorm.weight and 10 more is missing"),
        (config_with(tie_word_embeddings=False), "unlike its config.json: lm_head.weight is missing; download"),
        (
            config_with(num_hidden_layers=1),
            "unlike its config.json: model.layers.1.input_layernorm.weight and 10 more has no place",
        ),
        (tensors_without(NORM), "model.norm.weight is missing"),
        (tensors_with(**{"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}), "q_proj.bias has no place"),
        (tensors_with(**{"lm_head.weight": np.ones((307, 64), np.float32)}), "set tie_word_embeddings to false"),
        (tensors_with(**{NORM: np.ones(63, np.float32)}), "model.norm.weight has the shape .63,.*, not .64"),
        (tensors_with(**{NORM: np.ones(64, np.int8)}), "model.norm.weight has the type I8; choose weights in F32"),
        (
            lambda directory: (directory / "config.json").unlink(),
            "config.json. cannot be read .*No such.*; name the folder",
        ),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json. cannot be read"),
        (
            lambda directory: (directory / "config.json").write_text("[]"),
            "config.json. cannot be read .it holds no JSON object",
        ),
        (lambda directory: (directory / "model.safetensors").unlink(), "holds no model.safetensors; download the safe"),
        (lambda directory: (directory / "tokenizer.json").unlink(), "holds no tokenizer.json; download it"),
        (only_bin, "holds no model.safetensors; download the safetensors weights, or convert"),
        (a_missing_shard, "model-00002-of-00002.safetensors. cannot be read .No such.*; download it again"),
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


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*; name a downloaded"):
        huggingface.read(tmp_path / "nowhere")
