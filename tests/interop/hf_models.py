"""Models whose logits are compared with those of transformers, and weights for them; needs neither
it nor torch.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from braeburn.config import Execution, ModelConfig, Precision, RopeScaling
from braeburn.data.tokenizer import Tokenizer, train
from braeburn.interop import huggingface
from braeburn.layers.spec import ParamSpec, Tree, map_specs, walk
from braeburn.models import decoder
from braeburn.models.families import family_of

# What tests/interop/write_golden_logits.py wrote from transformers: a file for each family.
GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = 1e-4
FLOAT32 = Precision(compute="float32")
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
LINEAR = RopeScaling(kind="linear", factor=4.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64)


def make(**fields) -> ModelConfig:
    """A small Qwen3 with some of its fields changed."""
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
    return ModelConfig(**(sizes | fields))


def rope_of(model: ModelConfig) -> dict[str, Any]:
    """What transformers is told of rotary embeddings that are the same in all layers."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling is not None:
        rope |= {"rope_type": model.rope_scaling.kind, "factor": model.rope_scaling.factor}
        if model.rope_scaling.kind != "linear":
            rope |= {"original_max_position_embeddings": 64}
        if model.rope_scaling.kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if model.rope_scaling.kind == "yarn":
            names = ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")
            stated = {name: getattr(model.rope_scaling, name) for name in names}
            rope |= {name: value for name, value in stated.items() if value is not None}
    return rope


# Where the fields of rotary embeddings stand in the config.json of one version or another, and what
# they say.
ROPES = [
    ({"rope_theta": 5e5}, None),
    ({"rope_theta": 5e5, "rope_scaling": None}, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 4}}, LINEAR),
    (
        {
            "rope_theta": 5e5,
            "max_position_embeddings": 64,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        LLAMA3,
    ),
    (
        {
            "rope_theta": 5e5,
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        LLAMA3,
    ),
    (
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        LLAMA3,
    ),
    (
        {
            "rope_theta": 1e4,
            "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 5e5},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
        },
        LINEAR,
    ),
]
# Changes to the config.json of a small Qwen3 or Llama, under which transformers computes what it
# did before.
SAME_MODEL = [
    {"hidden_act": "swish"},
    {"use_sliding_window": True, "sliding_window": 64},  # from the 29th layer on, of two
    {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    {
        "use_sliding_window": True,
        "sliding_window": 2048,
        "max_window_layers": 0,
    },  # as long as any text
    {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
]
LLAMA_AS_MISTRAL = [
    {"sliding_window": None},
    {"sliding_window": 2048},
    {},  # 4096 is the default
]


def families() -> dict[str, ModuleType]:
    """The modules of tests/interop/families by their names."""
    folder = Path(__file__).with_name("families")
    sys.path.insert(0, str(folder.parent))
    return {
        path.stem: importlib.import_module(f"families.{path.stem}")
        for path in sorted(folder.glob("[a-z]*.py"))
    }


# While `families` imports them, they import this module, which is whole by now.
FAMILIES = families()
# name -> (model, length of the compared sequence)
MODELS = {name: case for family in FAMILIES.values() for name, case in family.MODELS.items()}
cases = pytest.mark.parametrize(("model", "length"), MODELS.values(), ids=MODELS.keys())


def random_params(model: ModelConfig, seed: int = 0) -> Tree:
    """Weights scaled as `initialize` scales them, and norms that are not all one; drawn without
    compiling.
    """
    generator = np.random.default_rng(seed)

    def draw(_: str, spec: ParamSpec) -> np.ndarray:
        if spec.role == "norm":
            return generator.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        fan_in = np.prod([spec.shape[spec.axes.index(axis)] for axis in spec.fan_in])
        return (generator.standard_normal(spec.shape) * fan_in**-0.5).astype(np.float32)

    return map_specs(draw, decoder.param_specs(model))


def golden_weights(
    shapes: Mapping[str, Sequence[int]], model: ModelConfig
) -> dict[str, np.ndarray]:
    """Weights in float32 for the tensors of a Hugging Face model, the same on every machine and in
    every NumPy.

    NumPy keeps the numbers of `RandomState` unchanged for good, and those of `random_sample` need
    no function of the C library. Norms multiply by 0.5 to 1.5, and matrices are scaled so that
    logits have about unit deviation.
    """
    generator = np.random.RandomState(0)
    weights = {}
    for name in sorted(shapes):
        drawn = generator.random_sample(tuple(shapes[name]))
        norm = drawn + 0.5 - family_of(model).norm_offset
        values = norm if drawn.ndim == 1 else (2 * drawn - 1) * (3 / drawn.shape[1]) ** 0.5
        weights[name] = values.astype(np.float32)
    return weights


def hash_of(weights: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].tobytes())
    return digest.hexdigest()


def golden_tokens(model: ModelConfig, length: int) -> np.ndarray:
    """Tokens [1, length], the same on every machine and in every NumPy."""
    return np.random.RandomState(length).randint(0, model.vocab_size, (1, length)).astype(np.int32)


@jax.jit(static_argnames="model")
def _logits(params: Tree, tokens: jax.Array, model: ModelConfig) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = decoder.forward(
        params, (tokens, positions, jnp.zeros_like(tokens)), model, Execution(precision=FLOAT32)
    )
    return jnp.einsum("BTD,VD->BTV", hidden, decoder.head_matrix(params))


def our_logits(params: Tree, tokens: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Logits [B, T, V] in float32 of tokens [B, T] that begin at position 0."""
    return np.asarray(_logits(params, tokens, model))


def random_tokens(model: ModelConfig, length: int) -> np.ndarray:
    """Tokens [1, length] of the model's vocabulary."""
    return np.random.default_rng(length).integers(0, model.vocab_size, (1, length), np.int32)


def write(
    directory: Path, params: Tree, model: ModelConfig, tokenizer_file: Path | None, **options
) -> Path:
    """Exports a model to a directory, and returns that."""
    tokenizer = None if tokenizer_file is None else Tokenizer.load(tokenizer_file)
    huggingface.write(directory, params, model, tokenizer, huggingface.Files(2048, **options))
    return directory


def assert_same(found: Tree, expected: Tree) -> None:
    """Both hold the same parameters, bit for bit."""
    leaves = dict(walk(found))
    assert leaves.keys() == dict(walk(expected)).keys()
    for path, leaf in walk(expected):
        np.testing.assert_array_equal(leaves[path], np.asarray(leaf, np.float32), err_msg=path)


def with_rope(directory: Path, rope: dict) -> Path:
    """A directory whose config.json says `rope` of rotary embeddings, and nothing else of them."""
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("rope_")} | rope
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def change_config(directory: Path, **fields) -> Path:
    """A directory whose config.json has these fields."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def without_prefix(directory: Path) -> Path:
    """A directory whose tensors are named as a model without its head names them."""
    tensors = load_file(directory / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    return directory


def only_head(directory: Path) -> Path:
    """A directory of a model with tied embeddings, which are stored as its head."""
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


CHAT = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ "
    "message.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_model(
    directory: Path, prefix: str | None, model: ModelConfig | None = None, **settings
) -> Path:
    """A directory as an instruction-tuned model is published, with markers, a template and sampling
    defaults.

    Args:
        directory: where to write.
        prefix: the token that the tokenizer puts before a text; None for none.
        model: its sizes; None for those of `make`.
        settings: further fields of `tokenizer_config.json`.
    """
    model = model or make()
    own = tokenizers.Tokenizer.from_str(train(["the cat sat on the mat " * 20], 290).json)
    own.add_special_tokens(["<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"])
    own.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if prefix is not None:
        template = f"{prefix} $A"
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single=template,
            pair=template + " $B",
            special_tokens=[(prefix, own.token_to_id(prefix))],
        )
    write(directory, random_params(model), model, None)
    own.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": CHAT} | settings)
    )
    generation = {
        "bos_token_id": own.token_to_id("<|endoftext|>"),
        "eos_token_id": [own.token_to_id("<|im_end|>"), own.token_to_id("<|endoftext|>")],
        "pad_token_id": own.token_to_id("<|pad|>"),
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def separate_tokens(path: Path) -> Path:
    """Writes a tokenizer.json that begins a document with another token than it ends it with."""
    separate = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<s>": 1, "</s>": 2}, []))
    separate.add_special_tokens(["<s>", "</s>"])
    separate.save(str(path))
    return path
