"""GGUF files, read back with llama.cpp's own reader; what llama.cpp makes of them is in
`on_llama_cpp.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType

from braeburn.config import LayerConfig, ModelConfig, Quantization, RopeScaling
from braeburn.data.tokenizer import PATTERN, Tokenizer, train
from braeburn.errors import UserError
from braeburn.interop import gguf as ours
from braeburn.layers import rope
from braeburn.layers.spec import Tree, map_specs
from braeburn.models import decoder
from braeburn.models.families.mixtures import pattern
from braeburn.transforms.quantization import quantized
from support import braeburn

CODES = {
    "f16": (GGMLQuantizationType.F16, 1),
    "q8_0": (GGMLQuantizationType.Q8_0, 7),
    "q4_0": (GGMLQuantizationType.Q4_0, 2),
}
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64)


def make(**fields: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 310,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    return ModelConfig(**{**sizes, "ffn_dim": 96, "norm_epsilon": 1e-6, **fields})


QWEN3, LLAMA = make(), make(qk_norm=False, tied_embeddings=False, rope_base=10_000.0)
EXPERTS = pattern(num_experts=3, experts_per_token=2, expert_dim=32)
MIXTURE, MIXTRAL = make(pattern=EXPERTS), make(pattern=EXPERTS, qk_norm=False)


def draw(model: ModelConfig) -> Tree:
    generator = np.random.default_rng(0)
    return map_specs(
        lambda _, spec: (0.1 * generator.standard_normal(spec.shape)).astype(np.float32),
        decoder.param_specs(model),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the cat sat on the mat\n\n    in 1234 ways: don't " * 20], 300)


def write(
    path: Path, model: ModelConfig, tokenizer: Tokenizer, type_: Any = "f16"
) -> tuple[Tree, gguf.GGUFReader]:
    params = draw(model)
    ours.write(path, params, model, tokenizer, ours.File(512, type_, "a name"))
    return params, gguf.GGUFReader(path)


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor in float32, [outputs, inputs]."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def expected(params: Tree, model: ModelConfig) -> dict[str, np.ndarray]:
    """What llama.cpp's names and layouts make of the parameters, written out for each of them."""
    d = model.d_model
    tensors = {"token_embd": params["embedding"], "output_norm": params["final_norm"]}
    if "head" in params:
        tensors["output"] = params["head"]
    for i in range(model.num_layers):
        layer = {name: value[i] for name, value in params["layers"].items()}
        query, key = (
            layer["query"].transpose(1, 2, 0),
            layer["key"].transpose(1, 2, 0),
        )  # [heads, head_dim, inputs]
        if not model.qk_norm:
            # llama.cpp rotates neighbours in a Llama: its row 2 i is our row i, its row 2 i + 1 our
            # row i + half.
            order = np.arange(model.head_dim).reshape(2, -1).T.ravel()
            query, key = query[:, order], key[:, order]
        block = {
            "attn_norm": layer["attention_norm"],
            "ffn_norm": layer["ffn_norm"],
            "attn_q": query.reshape(-1, d),
            "attn_k": key.reshape(-1, d),
            "attn_v": layer["value"].transpose(1, 2, 0).reshape(-1, d),
            "attn_output": layer["attention_output"].reshape(-1, d).T,
        }
        if "router" in layer:
            block["ffn_gate_inp"] = layer["router"].T
            for name in ("gate", "up", "down"):
                block[f"ffn_{name}_exps"] = layer[f"expert_{name}"].transpose(0, 2, 1)
        else:
            block |= {f"ffn_{name}": layer[name].T for name in ("gate", "up", "down")}
        if model.qk_norm:
            block |= {"attn_q_norm": layer["query_norm"], "attn_k_norm": layer["key_norm"]}
        tensors |= {f"blk.{i}.{name}": value for name, value in block.items()}
    return {f"{name}.weight": value for name, value in tensors.items()}


def rounded(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(values), kind), kind)


@pytest.mark.parametrize("type_", CODES)
@pytest.mark.parametrize(
    "model", [QWEN3, LLAMA, MIXTURE, MIXTRAL], ids=["qwen3", "llama", "qwen3-moe", "mixtral"]
)
def test_tensors_are_the_parameters(
    model: ModelConfig, type_: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    params, reader = write(tmp_path / "a.gguf", model, tokenizer, type_)
    code, file_type = CODES[type_]
    found, wanted = values(reader), expected(params, model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        is_precise = value.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        kind = GGMLQuantizationType.F32 if is_precise else code
        np.testing.assert_array_equal(found[name], rounded(value, kind), err_msg=name)
        assert {t.name: t.tensor_type for t in reader.tensors}[name] == kind
    assert reader.get_field("general.file_type").contents() == file_type
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_rows_that_are_no_multiple_of_32_stay_float16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(d_model=64, head_dim=10, ffn_dim=72)
    uneven = ours.write(tmp_path / "a.gguf", draw(model), model, tokenizer, ours.File(512, "q4_0"))
    assert uneven == ["attention_output", "down"]
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    half = {name for name, kind in kinds.items() if kind == GGMLQuantizationType.F16}
    assert half == {
        f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_output", "ffn_down")
    }


@pytest.mark.parametrize(("kind", "type_"), [("int8", "q8_0"), ("int4", "q4_0")])
def test_weights_trained_on_the_grid_lose_nothing(
    kind: Any, type_: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make(qk_norm=False, ffn_dim=72)
    quantization = Quantization(kind=kind)
    specs = decoder.param_specs(model)
    params = jax.device_get(jax.jit(lambda p: quantized(p, {}, specs, quantization))(draw(model)))
    ours.write(tmp_path / "a.gguf", params, model, tokenizer, ours.File(512, type_))
    found = values(gguf.GGUFReader(tmp_path / "a.gguf"))
    for name, value in expected(params, model).items():
        exact = value if "ffn_down" not in name else value.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found[name], exact, err_msg=name)


@pytest.mark.parametrize("model", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_sizes_are_the_models(model: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, reader = write(tmp_path / "a.gguf", model, tokenizer)
    family = "qwen3" if model.qk_norm else "llama"
    found = {name: field.contents() for name, field in reader.fields.items()}
    sizes = {
        "context_length": 512,
        "vocab_size": 310,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": model.rope_base,
        "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    }
    assert {
        name.removeprefix(f"{family}."): v for name, v in found.items() if name.startswith(family)
    } == sizes
    assert (found["general.architecture"], found["general.name"]) == (family, "a name")


def test_rope_scalings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    linear = make(rope_scaling=RopeScaling(kind="linear", factor=4.0))
    _, reader = write(tmp_path / "linear.gguf", linear, tokenizer)
    assert reader.get_field("qwen3.rope.scaling.type").contents() == "linear"
    assert reader.get_field("qwen3.rope.scaling.factor").contents() == 4.0

    _, reader = write(tmp_path / "yarn.gguf", make(rope_scaling=YARN), tokenizer)
    assert reader.get_field("qwen3.rope.scaling.type").contents() == "yarn"
    assert reader.get_field("qwen3.rope.scaling.original_context_length").contents() == 64
    whole = make(rope_scaling=YARN.model_copy(update={"truncate": False}))
    with pytest.raises(UserError, match=r"rope_scaling.truncate=False .*--format hf"):
        write(tmp_path / "whole.gguf", whole, tokenizer)

    llama3 = make(qk_norm=False, rope_scaling=LLAMA3)
    _, reader = write(tmp_path / "llama3.gguf", llama3, tokenizer)
    assert reader.get_field("llama.rope.scaling.type") is None
    plain = llama3.rope_base ** (-np.arange(0, 16, 2) / 16)
    divided = plain / values(reader)["rope_freqs.weight"]
    np.testing.assert_allclose(
        divided, rope.inverse_frequencies(16, llama3.rope_base, LLAMA3), rtol=1e-6
    )
    assert values(reader)["rope_freqs.weight"][[0, -1]].tolist() == [1, 8]

    with pytest.raises(
        UserError, match=r"rope_scaling.kind='llama3' together with qk_norm=true .*--format hf"
    ):
        write(tmp_path / "both.gguf", make(rope_scaling=LLAMA3), tokenizer)


def vocabulary(tokenizer: Tokenizer, tmp_path: Path, **sizes: Any) -> dict[str, Any]:
    _, reader = write(tmp_path / "a.gguf", make(**sizes), tokenizer)
    names = [name for name in reader.fields if name.startswith("tokenizer.ggml.")]
    return {name.removeprefix("tokenizer.ggml."): reader.fields[name].contents() for name in names}


def test_the_tokenizer_is_shipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = vocabulary(tokenizer, tmp_path)
    assert (found["model"], found["pre"]) == ("gpt2", "qwen2")
    contents = json.loads(tokenizer.json)
    tokens = sorted(contents["model"]["vocab"].items(), key=lambda item: item[1])
    assert found["tokens"] == [token for token, _ in tokens] + [
        f"[PAD{i}]" for i in range(len(tokens), 310)
    ]
    assert len(tokens) < 310
    assert found["token_type"] == [3] + [1] * (len(tokens) - 1) + [5] * (310 - len(tokens))
    assert found["merges"] == contents["model"]["merges"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (0, 0)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)


def edited(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """With other parts of its `tokenizer.json`."""
    contents = json.loads(tokenizer.json)
    contents["model"] |= parts.pop("model", {})
    return Tokenizer.from_json(json.dumps(contents | parts))


def byte_level(use_regex: bool, **fields: Any) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
        **fields,
    }


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, byte_level(False)]}


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
}
TRIPLETS = split(PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|"))


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ({"normalizer": {"type": "NFC"}}, "qwen2"),
        ({"pre_tokenizer": TRIPLETS, "model": {"ignore_merges": True}}, "llama-bpe"),
        ({"pre_tokenizer": TRIPLETS}, "dbrx"),
        ({"pre_tokenizer": byte_level(True)}, "gpt-2"),
        ({"pre_tokenizer": DIGITS}, "smollm"),
    ],
)
def test_ways_to_split_text_that_llama_cpp_knows(
    parts: dict[str, Any], name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert vocabulary(edited(tokenizer, **parts), tmp_path)["pre"] == name


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"pre_tokenizer": split(r"\w+")},
            r"splits text by \['..w\+'\], for which llama.cpp has no name here; export",
        ),
        ({"model": {"ignore_merges": True}}, "for which llama.cpp has no name here"),
        (
            {"pre_tokenizer": byte_level(True, add_prefix_space=True)},
            "puts a space before the text, which llama.cpp",
        ),
        (
            {"normalizer": {"type": "Lowercase"}},
            "normalises by Lowercase, which llama.cpp does not; export with",
        ),
        (
            {"pre_tokenizer": None},
            r"is not a byte-level BPE, .*--format hf and convert .*convert_hf_to_gguf.py",
        ),
    ],
)
def test_tokenizers_refused(
    parts: dict[str, Any], sentence: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        write(tmp_path / "folder" / "a.gguf", QWEN3, edited(tokenizer, **parts))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_vocabulary_of_words_is_refused(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1}, "a"))
    words.add_special_tokens(["<s>"])
    with pytest.raises(UserError, match="is not a byte-level BPE"):
        write(tmp_path / "a.gguf", QWEN3, Tokenizer(words))


def test_boundaries_added_tokens_and_merges_as_text(tmp_path: Path) -> None:
    own = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.add_special_tokens(["<s>", "</s>"])
    own.add_tokens(["<tool>"])
    contents = json.loads(own.to_str())
    contents["model"]["merges"] = ["a b"]
    found = vocabulary(Tokenizer.from_json(json.dumps(contents)), tmp_path, vocab_size=6)
    assert found["tokens"] == ["a", "b", "ab", "<s>", "</s>", "<tool>"]
    assert found["token_type"] == [1, 1, 1, 3, 3, 4]
    assert found["merges"] == ["a b"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (3, 4)


def test_files_that_cannot_be_written(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.gguf").write_text("years of work")
    with pytest.raises(UserError, match=r"taken.gguf' exists; remove it or name another file"):
        write(tmp_path / "taken.gguf", QWEN3, tokenizer)
    with pytest.raises(UserError, match=r"cannot be written .*; free space or name another folder"):
        write(tmp_path / "taken.gguf" / "a.gguf", QWEN3, tokenizer)
    with pytest.raises(UserError, match=r"the token \d+, which vocab_size=100 has no row for"):
        write(tmp_path / "a.gguf", make(vocab_size=100), tokenizer)
    with pytest.raises(ValueError, match=r"params\['layers/query_norm'\] has the shape None"):
        ours.write(tmp_path / "a.gguf", draw(LLAMA), QWEN3, tokenizer, ours.File(512))

    # An interruption in the middle of the weights.
    real, written = gguf.GGUFWriter.write_tensor_data, []

    def interrupted(self: Any, tensor: np.ndarray) -> None:
        if len(written) == 5:
            raise OSError("No space left on device")
        written.append(real(self, tensor))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(UserError, match=r"a.gguf' cannot be written \(No space left on device\)"):
        write(tmp_path / "a.gguf", QWEN3, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UserError, match=r"needs the gguf package; run `make extra-gguf.*` in a clone of Braeburn"
    ):
        ours.write(tmp_path / "a.gguf", draw(QWEN3), QWEN3, tokenizer, ours.File(512))


def test_the_command(finished: Path, tmp_path: Path) -> None:
    answer = braeburn("export", finished, "--format", "gguf", "--out", tmp_path / "new")
    path = tmp_path / "new" / "afm-tiny-f16.gguf"
    assert (answer.code, answer.out) == (
        0,
        f"exported step 14 of {str(finished)!r} into {str(path)!r}\n",
    ), answer.err
    reader = gguf.GGUFReader(path)
    assert reader.get_field("qwen3.context_length").contents() == 256
    assert reader.get_field("qwen3.rope.freq_base").contents() == 6_315_089.0
    assert reader.get_field("general.name").contents() == "afm-tiny"

    named = tmp_path / "new" / "mine.gguf"
    answer = braeburn(
        "export", finished, "--format", "gguf", "--type", "q4_0", "--out", named, "--json"
    )
    assert json.loads(answer.out) == {
        "out": str(named),
        "format": "gguf",
        "step": 14,
        "type": "q4_0",
        "float16": [],
    }
    assert (
        "mine.gguf' exists"
        in braeburn("export", finished, "--format", "gguf", "--out", named).error
    )
    wrong = ["export", finished, "--out", tmp_path / "x"]
    assert (
        "--type 'q5_k' is not known; use"
        in braeburn(*wrong, "--format", "gguf", "--type", "q5_k").error
    )
    assert "--type q8_0 is one of --format gguf" in braeburn(*wrong, "--type", "q8_0").error
    assert (
        "names a GGUF file, but a folder will be made; add"
        in braeburn("export", finished, "--out", named).error
    )
    assert (
        "use --format hf, --format gguf or --format stablehlo"
        in braeburn(*wrong, "--format", "onnx").error
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("model", "architecture", "dense", "own"),
    [
        (MIXTURE, "qwen3moe", 96, {"expert_feed_forward_length": 32}),
        # To llama.cpp a Mixtral is a Llama, whose experts have its feed-forward sublayers' width.
        (MIXTRAL, "llama", 32, {}),
    ],
    ids=["qwen3-moe", "mixtral"],
)
def test_experts_are_told_of(
    model: ModelConfig,
    architecture: str,
    dense: int,
    own: dict[str, int],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    _, reader = write(tmp_path / "a.gguf", model, tokenizer)
    assert reader.get_field("general.architecture").contents() == architecture
    found = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.expert") or name.endswith("feed_forward_length")
    }
    assert found == {"feed_forward_length": dense, "expert_count": 3, "expert_used_count": 2, **own}


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (
            pattern(num_experts=3, experts_per_token=2, expert_dim=32, normalize=False),
            r"normalize=false is nothing that llama.cpp runs .* train with normalize=true, or",
        ),
        (
            (LayerConfig(), *EXPERTS),
            r"layers without experts are nothing that llama.cpp runs .* train with experts in all",
        ),
    ],
    ids=["not normalized", "every second layer"],
)
def test_mixtures_that_llama_cpp_has_not(
    layers: tuple[LayerConfig, ...], sentence: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{sentence}.* export with --format hf"):
        write(tmp_path / "b.gguf", make(pattern=layers), tokenizer)
