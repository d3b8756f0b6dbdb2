"""Exports and imports beside transformers itself, with torch: `make test-hf`.

`make test` compares with what `write_golden_logits.py` wrote down of them.
"""

import json
import unicodedata
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hf_models import (
    FLOAT32,
    LLAMA_AS_MISTRAL,
    MODELS,
    ROPES,
    SAME_MODEL,
    TOLERANCE,
    assert_same,
    cases,
    change_config,
    chat_model,
    make,
    only_head,
    our_logits,
    random_params,
    random_tokens,
    separate_tokens,
    with_rope,
    without_prefix,
    write,
)
from real_demo import Demo, real
from safetensors.numpy import load_file, save_file
from theirs import load, their_config, their_logits, their_model

from braeburn.data.tokenizer import PATTERN
from braeburn.errors import UserError
from braeburn.evaluate.chat import encode_chat
from braeburn.evaluate.generate import Generation, Sampling, generate
from braeburn.interop import gguf, huggingface
from braeburn.layers.spec import initialize
from braeburn.models import decoder
from braeburn.models.families import family_of, gpt_oss
from braeburn.train import trained
from support import braeburn

transformers.logging.set_verbosity_error()


@cases
def test_their_weights_give_their_logits(model, length, tokenizer_file, tmp_path):
    theirs = their_model(model)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    read_model, params, found_tokenizer = huggingface.read(tmp_path)
    assert read_model == model.model_copy(
        update={"scan_layers": True, "max_position_embeddings": 2048}
    )
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
    assert type(theirs).__name__ == family_of(model).architecture
    tokens = random_tokens(model, length)
    expected = our_logits(params, tokens, model)
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(their_logits(theirs, tokens), expected, rtol=0, atol=TOLERANCE)

    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert_same(huggingface.read(tmp_path / "out")[1], params)


def test_initial_values_give_the_same_logits(tmp_path):
    model, length = MODELS["qwen3-7-heads-1-kv"]
    params = jax.jit(lambda: initialize(decoder.param_specs(model), 0))()
    tokens = random_tokens(model, length)
    difference = their_logits(
        load(write(tmp_path / "out", params, model, None)), tokens
    ) - our_logits(params, tokens, model)
    assert np.abs(difference).max() < TOLERANCE


def test_shards_are_loaded(tokenizer_file, tmp_path):
    model, length = MODELS["qwen3-untied-wide-heads"]
    params = random_params(model)
    directory = write(tmp_path / "out", params, model, tokenizer_file, max_shard_bytes=50_000)
    assert len(list(directory.glob("*.safetensors"))) > 3
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
    difference = our_logits(params, tokens, model) - their_logits(
        load(tmp_path, dtype=torch.float32), tokens
    )
    assert np.abs(difference).max() < TOLERANCE


@pytest.mark.parametrize(("rope", "scaling"), ROPES)
def test_rope_is_read_wherever_a_version_put_it(rope, scaling, tokenizer_file, tmp_path):
    directory = with_rope(
        write(tmp_path / "out", random_params(make()), make(), tokenizer_file), rope
    )
    model = load(directory)
    theirs = (
        model.config.rope_parameters
    )  # as the model has it: its configuration alone is not complete yet
    ours = huggingface.read(directory)[0]
    assert theirs["rope_theta"] == ours.rope_base
    assert theirs["rope_type"] == (scaling.kind if scaling else "default")
    for field in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        if field in theirs:
            assert theirs[field] == getattr(ours.rope_scaling, field), field
    tokens = random_tokens(make(), 300)
    difference = our_logits(huggingface.read(directory)[1], tokens, ours) - their_logits(
        model, tokens
    )
    assert np.abs(difference).max() < TOLERANCE


@pytest.mark.parametrize("fields", SAME_MODEL)
def test_fields_that_change_nothing(fields, tmp_path):
    directory = change_config(
        write(tmp_path / "out", random_params(make()), make(), None), **fields
    )
    tokens = random_tokens(make(), 300)
    difference = our_logits(random_params(make()), tokens, make()) - their_logits(
        load(directory), tokens
    )
    assert np.abs(difference).max() < TOLERANCE


def as_mxfp4(directory: Path) -> None:
    """Makes the experts of a gpt-oss those of a checkpoint as it is published."""
    tensors = load_file(directory / "model.safetensors")
    generator = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = generator.integers(0, 256, (*groups, 16), np.uint8)
        tensors[f"{name}_scales"] = generator.integers(120, 124, groups, np.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]}
    change_config(directory, quantization_config=quantized)


def test_mxfp4_is_read_by_the_way_that_its_refusal_names(tokenizer_file, tmp_path):
    pattern = gpt_oss.layers(16, num_experts=4, experts_per_token=2, expert_dim=64)
    model = MODELS["gpt-oss"][0].model_copy(update={"ffn_dim": 64, "pattern": pattern})
    their_model(model).save_pretrained(tmp_path)
    as_mxfp4(tmp_path)
    with pytest.raises(UserError, match=r"Mxfp4Config\(dequantize=True\)"):
        huggingface.read(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    theirs.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    found, params, _ = huggingface.read(tmp_path / "whole")
    tokens = random_tokens(found, 40)
    expected = their_logits(theirs.float().eval(), tokens)
    np.testing.assert_allclose(our_logits(params, tokens, found), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fields", LLAMA_AS_MISTRAL)
def test_a_mistral_without_a_window_is_a_llama(fields, tmp_path):
    model = make(qk_norm=False)
    directory = write(tmp_path / "out", random_params(model), model, None)
    theirs = load(change_config(directory, model_type="mistral", **fields))
    assert type(theirs).__name__ == "MistralForCausalLM"
    tokens = random_tokens(model, 300)
    difference = our_logits(random_params(model), tokens, model) - their_logits(theirs, tokens)
    assert np.abs(difference).max() < TOLERANCE


@pytest.mark.parametrize("renamed", [without_prefix, only_head])
def test_weights_under_other_names(renamed, tokenizer_file, tmp_path):
    """What transformers loads is loaded here, with the same logits."""
    directory = renamed(write(tmp_path / "out", random_params(make()), make(), tokenizer_file))
    model, params, _ = huggingface.read(directory)
    tokens = random_tokens(model, 40)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert (
        np.abs(our_logits(params, tokens, model) - their_logits(theirs, tokens)).max() < TOLERANCE
    )


@pytest.mark.parametrize("bos_token", [None, "<|begin|>"])
@pytest.mark.parametrize("prefix", [None, "<|begin|>", "<|endoftext|>"])
def test_prompts_and_chats_have_their_ids(prefix, bos_token, tmp_path):
    """Of a published model, of the run that it is imported into, and of that run's export."""
    source = chat_model(tmp_path / "source", prefix, bos_token=bos_token)
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    assert braeburn("export", tmp_path / "run", "--out", tmp_path / "hf").code == 0
    ours = trained.load(tmp_path / "run").tokenizer
    messages = [{"role": "user", "content": " what sat on the mat? "}]
    for directory in (source, tmp_path / "hf"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        for text in TEXTS:
            if "<|" not in text:  # as they have it, text may hold a marker
                assert theirs(text).input_ids == ours.encode_prompt(text), text
        chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat == encode_chat(ours, messages)
        generation = transformers.GenerationConfig.from_pretrained(directory)
        assert tuple(generation.eos_token_id) == ours.stops
        assert (
            generation.temperature,
            generation.top_k,
            generation.top_p,
            generation.do_sample,
        ) == (0.6, 20, 0.95, True)
        assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|pad|>")
        assert generation.pad_token_id == theirs.pad_token_id == ours.padding


def test_an_exported_run_begins_prompts_as_the_run_does(finished, tmp_path):
    assert braeburn("export", finished, "--out", tmp_path / "hf").code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = trained.load(finished).tokenizer
    assert theirs("def f(x):").input_ids == ours.encode_prompt("def f(x):")
    assert theirs("def f(x):").input_ids[0] == ours.begin


TEXTS = [
    "the cat sat on the mat",
    "cafe\u0301 \u212b \ufb01 \u1100\u1161 \u00e9 " + unicodedata.normalize("NFD", "Ångström São"),
    "in 1234 ways: 3.14159, 10000000 and 2\u00b3 \u0664\u0665",
    "  two\n\n\n    four\t\ttabs \r\n   \n trailing   ",
    "\u3053\u3093\u306b\u3061\u306f 你好 \U0001f600\U0001f469\u200d\U0001f680 "
    "\u05e9\u05dc\u05d5\u05dd \u0000 \ufffd",
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
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(
            ids, skip_special_tokens=True
        )
    assert len(theirs) == ours.get_vocab_size()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 0)
    assert theirs.model_max_length == 2048
    # What users write: no argument that the model would refuse.
    output = load(directory).generate(
        **theirs("the cat", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert output.shape[0] == 1


def test_without_a_tokenizer_there_are_no_special_tokens(tmp_path):
    config = transformers.AutoConfig.from_pretrained(
        write(tmp_path / "out", random_params(make()), make(), None)
    )
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_begin_and_end_may_differ(tmp_path):
    tokenizer = separate_tokens(tmp_path / "tokenizer.json")
    directory = write(tmp_path / "out", random_params(make()), make(), tokenizer)
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")


def test_our_pattern_is_that_of_qwen2(tokenizer_file):
    from tokenizers import Tokenizer
    from transformers.models.qwen2 import tokenization_qwen2

    assert PATTERN == tokenization_qwen2.PRETOKENIZE_REGEX
    ours = Tokenizer.from_file(str(tokenizer_file)).pre_tokenizer
    theirs = tokenization_qwen2.Qwen2Tokenizer()._tokenizer.pre_tokenizer
    for text in (
        *TEXTS,
        Path(__file__).read_text(),
        "I'LL  go\r\n\r\n\tnow…  12,345.67€ 四五 \u00a0 x_y\n ",
    ):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("name", ["qwen3", "llama-untied"])
def test_greedy_text_is_theirs(name, tmp_path):
    model, _ = MODELS[name]
    params = random_params(model)
    theirs = load(write(tmp_path / "out", params, model, None))
    prompts = [[5, 17, 3], [42], list(range(1, 71)), [9] * 12]
    greedy = Generation(64, Sampling(temperature=0.0))
    ours = generate(jax.tree.map(jax.numpy.asarray, params), prompts, model, FLOAT32, greedy)
    for prompt, new in zip(prompts, ours, strict=True):
        tokens = torch.tensor([prompt])
        output = theirs.generate(
            tokens, do_sample=False, max_new_tokens=64, attention_mask=torch.ones_like(tokens)
        )
        assert output[0, len(prompt) :].tolist() == new


def test_a_pruned_run_is_an_ordinary_smaller_model(finished, corpus, tmp_path):
    """After pruning transformers loads what was trained, and its tokenizer, and gives the same
    logits.
    """
    for arguments in (
        ("prune", finished, "--ffn", "32", "--out", tmp_path / "pruned"),
        ("export", tmp_path / "pruned", "--format", "hf", "--out", tmp_path / "hf"),
    ):
        answer = braeburn(*arguments)
        assert answer.code == 0, answer.err
    pruned = trained.load(tmp_path / "pruned")
    assert pruned.model.ffn_dim == 32
    text = "def encode(self, text):\n    return text"
    tokens = np.asarray(
        [transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids]
    )
    ours = our_logits(pruned.params, tokens, pruned.model)
    theirs = their_logits(load(tmp_path / "hf", dtype=torch.float32), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_demonstration_agrees_with_transformers_on_every_file(demo: Demo, capsys) -> None:
    assert demo("--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["checks"]) == 6 and all(printed["checks"].values())
    # Weights that are rounded further have another perplexity: the files were really read.
    perplexities = [row["transformers"] for row in printed["rows"] if row["model"].endswith("gguf")]
    assert len(set(perplexities)) == len(real.EXPORTS)


def test_a_gguf_file_becomes_a_directory_with_its_weights_and_its_splits(tmp_path: Path) -> None:
    source = chat_model(tmp_path / "hf", None, make(qk_norm=False), bos_token="<|im_start|>")
    file = source / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(file))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own.save(str(file))
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    file = tmp_path / "model.gguf"
    assert braeburn("export", tmp_path / "run", "--format", "gguf", "--out", file).code == 0

    real.converted(file, tmp_path / "back")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "in 1234 ways\n  12   345"
    assert found(text)["input_ids"] == own.encode(text).ids
    assert braeburn("import", tmp_path / "back", "--out", tmp_path / "again").code == 0
    params, again = (trained.load(tmp_path / name).params for name in ("run", "again"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, again)


def test_a_gguf_file_of_a_mixture_has_its_logits(tmp_path: Path) -> None:
    """As transformers reads it, of weights that float16 holds as they are."""
    model, _ = MODELS["qwen3-moe"]
    params = random_params(model)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params)
    source = chat_model(tmp_path / "hf", None, model)
    own = trained.Tokenizer.load(source / "tokenizer.json")
    gguf.write(tmp_path / "model.gguf", params, model, own, gguf.File(2048))
    # transformers 5.23 takes the width of experts for 768, whatever the file says.
    config = their_config(model)
    theirs = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32, config=config)
    tokens = random_tokens(model, 40)
    expected = our_logits(params, tokens, model)
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(their_logits(theirs, tokens), expected, rtol=0, atol=TOLERANCE)
