"""The real llama.cpp on GGUF files, built from the source of its Python package: `make test-gguf`.

Models of four families are trained on the standard library's Python code, in minutes. Perplexities
are those of files that training has not seen.
"""

import functools
import json
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
import tokenizers
from hf_models import chat_model

from braeburn.config import Execution, ModelConfig, Precision, RopeScaling
from braeburn.data.tokenizer import PATTERN, Tokenizer, train
from braeburn.interop import gguf, huggingface
from braeburn.layers.spec import Tree, map_specs
from braeburn.models import decoder
from braeburn.models.families import gemma3, mixtures, olmo2
from braeburn.train.trained import load
from support import process

FLOAT32 = Precision(compute="float32")
OLMO2: dict[str, Any] = {"qk_norm": False, "tied_embeddings": False, "pattern": (olmo2.LAYER,)}
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64)
EXPERTS = mixtures.pattern(num_experts=6, experts_per_token=2, expert_dim=96)
ONE_EXPERT = mixtures.pattern(num_experts=3, experts_per_token=1, expert_dim=64)
LIBRARY = Path(sysconfig.get_path("stdlib"))
UNSEEN = ["argparse.py", "tarfile.py", "inspect.py"]
LENGTH = 128
WINDOWS = 160
STEPS = 700  # of the first stage: the longer a small model has trained, the more rounding costs it

RECIPE = f"""
from pathlib import Path

from braeburn.config import (
    Execution,
    ONE_DEVICE, AdamW, Checkpoint, Data, Evaluation, ModelConfig, Precision, Quantization, Run,
    Schedule, Source, Stage,
)
from braeburn.models.families.mixtures import pattern

EXPERTS = dict(pattern=pattern(num_experts=4, experts_per_token=2, expert_dim=96))
PATHS = sorted(Path({str(LIBRARY)!r}).glob("*.py"))
FILES = tuple(str(path) for path in PATHS if path.name not in {UNSEEN!r})


def stage(steps, learning_rate, **fields):
    return Stage(
        tokens=4096 * steps, sequence_length={LENGTH}, batch_tokens=4096, mixture={{"code": 1.0}},
        learning_rate=learning_rate, schedule=Schedule(warmup_steps=20, floor=0.05), **fields,
    )


def run(qk_norm, layers={{}}, **stages):
    return Run(
        name="on-device",
        model=ModelConfig(
            vocab_size=512, d_model=64, num_layers=4,
            num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=192,
            qk_norm=qk_norm, rope_base=10_000.0, scan_layers=False, **layers,
        ),
        stages=stages,
        data=Data(sources={{"code": Source(paths=FILES, format="text")}}),
        optimizer=AdamW(),
        mesh=ONE_DEVICE,
        precision=Precision(compute="float32"),
        checkpoint=Checkpoint(every_steps=10_000),
        evaluation=Evaluation(tokens=16_384),
    )


def llama():
    return run(False, core=stage({STEPS // 2}, 1e-2))


def qwen3_moe():
    return run(True, EXPERTS, core=stage({STEPS // 4}, 1e-2))


def mixtral():
    return run(False, EXPERTS, core=stage({STEPS // 4}, 1e-2))


def rounded():
    rounded = stage(160, 2e-3, quantization=Quantization(kind="int4"))
    return run(True, core=stage({STEPS}, 1e-2), rounded=rounded)


def plain():
    return run(True, core=stage({STEPS}, 1e-2), rounded=stage(160, 2e-3))
"""
PROMPTS = [
    "import os\n\n\ndef ",
    "class Error(Exception):\n    ",
    "    def __init__(self",
    "for name in ",
    "# The ",
]
TEXTS = [
    *PROMPTS,
    "the cat sat on the mat, didn't it? IT'S; we'll see... I'D say so",
    "in 1234 ways: 3.14159, 10000000 and 2\u00b3 \u0664\u0665 0x1F",
    "  two\n\n\n    four\t\ttabs \r\n   \n trailing   ",
    "\u3053\u3093\u306b\u3061\u306f 你好世界 안녕하세요 \u05e9\u05dc\u05d5\u05dd "
    "\u0645\u0631\u062d\u0628\u0627 Привет",
    "नमस्ते \U0001f600\U0001f469\u200d\U0001f680 caf\u00e9 e\u0301 \ufb01 \ufffd \u00a0\u2003x",
    "a<|endoftext|>b <|im_start|> <s></s> [PAD5]",
    "lambda x: {**x, 'y': [1, 2][::-1]}  # -> dict[str, \"int\"]\n@decorator\nasync def f(): ...",
]


class Theirs:
    """A file in llama.cpp."""

    def __init__(self, path: Path, **options: Any) -> None:
        # Keys and values in float32, as ours are.
        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        # Models are too small to share out over threads, which would wait for each other.
        threads = {"n_threads": 1, "n_threads_batch": 1}
        settings = {
            "n_ctx": 512,
            "logits_all": True,
            "verbose": False,
            **threads,
            **cache,
            **options,
        }
        self.llama = llama_cpp.Llama(str(path), **settings)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[tokens, vocabulary], float32."""
        self.llama.reset()
        self.llama.eval([int(token) for token in tokens])
        return np.array(self.llama.scores[: len(tokens)])

    def greedy(self, tokens: Sequence[int], count: int, stops: Sequence[int]) -> list[int]:
        """The most probable continuation."""
        self.llama.reset()
        self.llama.eval(list(tokens))
        found: list[int] = []
        while len(found) < count:
            token = int(np.argmax(self.llama.scores[self.llama.n_tokens - 1]))
            if token in stops:
                break
            found.append(token)
            self.llama.eval([token])
        return found


@jax.jit(static_argnames="model")
def our_logits(params: Tree, tokens: jax.Array, model: ModelConfig) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder.forward(
        params, (tokens, positions, jnp.zeros_like(tokens)), model, Execution(precision=FLOAT32)
    )
    return jnp.einsum("BTD,VD->BTV", hidden, decoder.head_matrix(params))


def windows(tokenizer: Tokenizer) -> np.ndarray:
    """Unseen text, [WINDOWS, LENGTH], each window begun as a document is."""
    tokens = np.concatenate([tokenizer.encode((LIBRARY / name).read_text()) for name in UNSEEN])
    found = tokens[: WINDOWS * (LENGTH - 1)].reshape(WINDOWS, LENGTH - 1)
    return np.insert(found, 0, tokenizer.begin, axis=1).astype(np.int32)


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Of all tokens but the first of each window, from the logits [windows, length, vocabulary] of
    those before.
    """
    wide = logits[:, :-1].astype(np.float64)
    largest = wide.max(-1, keepdims=True)
    log_z = np.log(np.exp(wide - largest).sum(-1)) + largest[..., 0]
    return math.exp((log_z - np.take_along_axis(wide, tokens[:, 1:, None], -1)[..., 0]).mean())


def perplexity_of(path: Path, tokens: np.ndarray) -> float:
    theirs = Theirs(path)
    return perplexity(np.stack([theirs.logits(window) for window in tokens]), tokens)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE)
    return path


def trained(recipe: Path, name: str, *arguments: object, folder: str | None = None) -> Path:
    directory = recipe.with_name(folder or name)
    # Unlike other tests, these run their programs for longer than they compile them, and on one
    # device.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    answer = process(
        "train", f"{recipe}:{name}", "--out", directory, *arguments, timeout=3600, env=environment
    )
    assert answer.code == 0, answer.err
    return directory


@pytest.fixture(scope="session")
def core(recipe: Path) -> Callable[[str], Path]:
    """Run directories by family, as they are before any rounding; each is trained when a test first
    asks for it.
    """

    def of(family: str) -> Path:
        if family == "qwen3":
            return trained(recipe, "rounded", "--stop-after-steps", STEPS, folder="qwen3")
        return trained(recipe, family)

    return functools.cache(of)


@pytest.fixture(scope="session")
def files(core: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """The files by family and type."""
    return functools.cache(lambda family, kind: exported(core(family), kind))


def exported(directory: Path, kind: str) -> Path:
    out = directory.parent / f"{directory.name}-{kind}.gguf"
    answer = process("export", directory, "--format", "gguf", "--type", kind, "--out", out)
    assert answer.code == 0, answer.err
    return out


FAMILIES = pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "mixtral"])


@FAMILIES
def test_float16_writes_the_same_tokens(
    family: str, core: Callable[[str], Path], files: Callable[[str, str], Path]
) -> None:
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    answer = process(
        "generate", core(family), "--greedy", "--max-new-tokens", 64, "--json", *prompts
    )
    theirs, tokenizer = Theirs(files(family, "f16")), load(core(family)).tokenizer
    for sample in json.loads(answer.out)["samples"]:
        prompt = theirs.llama.tokenize(sample["prompt"].encode(), add_bos=True, special=False)
        assert prompt == tokenizer.encode_prompt(sample["prompt"])
        assert theirs.greedy(prompt, 64, tokenizer.stops) == sample["tokens"], sample
        assert len(sample["tokens"]) == 64


@FAMILIES
def test_text_has_the_same_tokens(
    family: str, core: Callable[[str], Path], files: Callable[[str, str], Path]
) -> None:
    theirs, tokenizer = Theirs(files(family, "f16"), vocab_only=True), load(core(family)).tokenizer
    check_tokens(
        theirs, tokenizer, [*TEXTS, *((LIBRARY / name).read_text()[:20_000] for name in UNSEEN)]
    )


def check_tokens(theirs: Theirs, tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        found = theirs.llama.tokenize(text.encode(), add_bos=True, special=False)
        assert found == tokenizer.encode_prompt(text), text
        assert theirs.llama.detokenize(found[len(tokenizer.prefix) :]).decode() == text


@pytest.mark.parametrize("prefix", [None, "<|begin|>"])
def test_an_imported_model_keeps_its_begin_and_end_tokens(
    prefix: str | None, tmp_path: Path
) -> None:
    """A chat model as it is published: what stands before a prompt, the markers, and what ends an
    answer.
    """
    source = chat_model(tmp_path / "source", prefix)
    model, params, tokenizer_file = huggingface.read(source)
    tokenizer = Tokenizer.load(tokenizer_file)
    gguf.write(tmp_path / "a.gguf", params, model, tokenizer, gguf.File(512))
    theirs = Theirs(tmp_path / "a.gguf", vocab_only=True)
    check_tokens(theirs, tokenizer, PROMPTS)
    chat = CHAT_TEXT.encode()
    assert theirs.llama.tokenize(chat, add_bos=False, special=True) == tokenizer.encode_markup(
        CHAT_TEXT
    )
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.llama.model)
    ends = [i for i in range(tokenizer.vocab_size) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert set(ends) == set(tokenizer.stops)


CHAT_TEXT = "<|im_start|>user\nthe cat sat<|im_end|>\n<|im_start|>assistant\n"


def split_by(pattern: str | None) -> Any:
    from tokenizers import pre_tokenizers

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    if pattern is None:
        return bytes_
    first: Any = pre_tokenizers.Digits(individual_digits=True)
    if pattern != "digits":
        first = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([first, bytes_])


TRIPLETS = PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("pattern", "ignore_merges"),
    [(TRIPLETS, True), (TRIPLETS, False), (None, False), ("digits", False)],
)
def test_each_way_to_split_text_is_theirs(
    pattern: str | None, ignore_merges: bool, tmp_path: Path
) -> None:
    own = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    own.pre_tokenizer, own.decoder = split_by(pattern), tokenizers.decoders.ByteLevel()
    own.train_from_iterator(
        [(LIBRARY / name).read_text() for name in UNSEEN],
        tokenizers.trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer, model = Tokenizer(own, begins_prompts=True), small(vocab_size=1000)
    gguf.write(tmp_path / "a.gguf", draw(model), model, tokenizer, gguf.File(512))
    check_tokens(Theirs(tmp_path / "a.gguf", vocab_only=True), tokenizer, TEXTS)


def small(**fields: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 320,
        "d_model": 96,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
    }
    return ModelConfig(**{**sizes, "ffn_dim": 160, "rope_base": 10_000.0, **fields})


def draw(model: ModelConfig) -> Tree:
    """Random weights that float16 holds exactly."""
    generator = np.random.default_rng(0)

    def one(_: str, spec: Any) -> np.ndarray:
        if spec.role == "norm":
            return generator.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        fan_in = math.prod(spec.shape[spec.axes.index(axis)] for axis in spec.fan_in)
        return (
            (generator.standard_normal(spec.shape) * fan_in**-0.5)
            .astype(np.float16)
            .astype(np.float32)
        )

    return map_specs(one, decoder.param_specs(model))


@pytest.mark.parametrize(
    "model",
    [
        small(),
        small(
            tied_embeddings=False,
            num_heads=3,
            num_kv_heads=3,
            rope_scaling=RopeScaling(kind="linear", factor=4.0),
        ),
        small(qk_norm=False),
        small(qk_norm=False, tied_embeddings=False, head_dim=64, norm_epsilon=1e-2),
        small(qk_norm=False, rope_scaling=RopeScaling(original_max_position_embeddings=64)),
        small(qk_norm=False, rope_scaling=YARN),
        small(rope_scaling=YARN),
        # Windows shorter than the text, and a last repeat of the pattern that is cut short.
        small(num_layers=8, rope_base=1e6, scaled_embedding=True, pattern=gemma3.pattern(48)),
        small(
            num_layers=7,
            num_kv_heads=3,
            rope_base=1e6,
            rope_scaling=RopeScaling(kind="linear", factor=8.0),
            scaled_embedding=True,
            tied_embeddings=False,
            pattern=(*gemma3.layers(64), *gemma3.layers(64)[:1]),
        ),
        small(num_heads=3, num_kv_heads=3, **OLMO2),
        small(num_heads=3, num_kv_heads=1, norm_epsilon=1e-2, **OLMO2),
        small(pattern=EXPERTS),
        small(pattern=ONE_EXPERT, tied_embeddings=False, norm_epsilon=1e-2),
        small(pattern=EXPERTS, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
        small(pattern=EXPERTS, qk_norm=False),
        small(pattern=ONE_EXPERT, qk_norm=False, tied_embeddings=False, head_dim=64),
        small(
            pattern=EXPERTS,
            qk_norm=False,
            rope_scaling=RopeScaling(original_max_position_embeddings=64),
        ),
    ],
    ids=[
        "qwen3",
        "qwen3-untied-linear",
        "llama",
        "llama-untied-wide-heads",
        "llama-llama3",
        "llama-yarn",
        "qwen3-yarn",
        "gemma3",
        "gemma3-untied-linear-of-another-pattern",
        "olmo2",
        "olmo2-grouped",
        "qwen3-moe",
        "qwen3-moe-one-expert-untied",
        "qwen3-moe-linear",
        "mixtral",
        "mixtral-one-expert-untied-wide-heads",
        "mixtral-llama3",
    ],
)
def test_logits_are_ours(model: ModelConfig, tmp_path: Path) -> None:
    """Up to llama.cpp's products, whose activations are float16 where weights are."""
    params = draw(model)
    tokenizer = train(["the cat sat on the mat " * 20], 300)
    gguf.write(tmp_path / "a.gguf", params, model, tokenizer, gguf.File(512))
    tokens = np.random.default_rng(1).integers(0, 300, 200, np.int32)
    expected = np.asarray(our_logits(params, tokens[None], model))[0]
    difference = np.abs(Theirs(tmp_path / "a.gguf").logits(tokens) - expected)
    if decoder.has_experts(model):
        count = decided(params, tokens, model)
        assert count >= 20
        difference, expected = difference[:count], expected[:count]
    print(
        f"largest difference {difference.max():.1e} of logits of deviation {expected.std():.2f}, "
        f"of {len(difference)} tokens"
    )
    assert expected.std() > 0.5 and difference.max() < 0.02


def decided(params: Tree, tokens: np.ndarray, model: ModelConfig) -> int:
    """How many tokens come before the first that a router might send elsewhere for its rounding.

    Noise in all weights of the size of float16's rounding moves the logits of such a token by far
    more than those of others, and after it those of all.
    """
    expected, generator = our_logits(params, tokens[None], model)[0], np.random.default_rng(2)
    count = len(tokens)
    for _ in range(4):
        noisy = jax.tree.map(
            lambda leaf: (leaf * generator.normal(1, 5e-4, leaf.shape)).astype(np.float32), params
        )
        moved = np.abs(our_logits(noisy, tokens[None], model)[0] - expected).max(-1)
        count = min([count, *np.flatnonzero(moved > 10 * np.median(moved))])
    return count


@FAMILIES
def test_perplexity_of_float16_and_eight_bits(
    family: str, core: Callable[[str], Path], files: Callable[[str, str], Path]
) -> None:
    ours = load(core(family))
    tokens = windows(ours.tokenizer)
    reference = perplexity(np.asarray(our_logits(ours.params, tokens, ours.model)), tokens)
    found = {kind: perplexity_of(files(family, kind), tokens) for kind in ("f16", "q8_0", "q4_0")}
    changes = {kind: value / found["f16"] - 1 for kind, value in found.items()}
    print(
        f"\n{family}: perplexity {reference:.4f} here, {found['f16']:.4f} in llama.cpp with "
        f"float16; over that"
    )
    print(f"Q8_0 {changes['q8_0']:+.3%}, Q4_0 {changes['q4_0']:+.3%}")
    assert abs(found["f16"] / reference - 1) < 1e-3
    assert abs(changes["q8_0"]) < 0.005


def test_four_bits_need_training_with_them(recipe: Path, core: Callable[[str], Path]) -> None:
    """Both models make the same steps from the same weights, one of them with rounded weights in
    the last stage.
    """
    for name in ("plain", "rounded"):
        shutil.copytree(core("qwen3"), recipe.with_name(name))
    plain, rounded = trained(recipe, "plain"), trained(recipe, "rounded")
    found = {
        "F16": exported(plain, "f16"),
        "Q8_0": exported(plain, "q8_0"),
        "Q4_0": exported(plain, "q4_0"),
        "Q4_0 after quantisation-aware training": exported(rounded, "q4_0"),
        "F16 of the same": exported(rounded, "f16"),
    }
    tokens, changes, reference = windows(load(plain).tokenizer), {}, 0.0
    for name, path in found.items():
        value = perplexity_of(path, tokens)
        reference = reference or value
        changes[name] = value / reference - 1
        print(
            f"{name:40} {path.stat().st_size:9,} bytes  perplexity {value:.4f}  "
            f"{changes[name]:+.3%}"
        )
    assert abs(changes["Q8_0"]) < 0.005
    assert changes["Q4_0"] > 0.05 > changes["Q4_0 after quantisation-aware training"]
    # The weights that are left lie on the grid already: shipping them in four bits costs nothing
    # but llama.cpp's own rounding of activations.
    assert (
        abs(changes["Q4_0 after quantisation-aware training"] - changes["F16 of the same"]) < 2e-3
    )
