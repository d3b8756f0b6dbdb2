"""Models as programs that plain JAX runs, without Braeburn and on any platform."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import MODELS, make, our_logits, random_params
from jax import export

from braeburn.config import ModelConfig
from braeburn.errors import UserError
from braeburn.interop import stablehlo
from braeburn.interop.stablehlo import Program, lowered, programs
from braeburn.models import cached
from braeburn.models.families import gemma3
from braeburn.recipes import load
from braeburn.train.state import TrainState
from braeburn.train.trained import found_run
from braeburn.train.trained import load as load_run
from support import braeburn

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
NEW = 64


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as programs."""
    out = tmp_path_factory.mktemp("portable") / "model"
    answer = braeburn("export", finished, "--format", "stablehlo", "--out", out, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["format"] == "stablehlo" and facts["step"] == 14
    assert facts["platforms"] == list(PLATFORMS)
    return out


def without_braeburn(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of Python in a process that cannot import braeburn."""
    (folder / "braeburn.py").write_text("raise ImportError('braeburn is not installed')\n")
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kept = [path for path in paths if not (Path(path) / "braeburn" / "__init__.py").exists()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, kept))}
    environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def windowed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has layers that see the last 16 tokens, as Gemma 3 has, and random weights;
    the last repeat of its pattern is cut short.
    """
    whole = load_run(finished)
    fields = {"num_layers": 8, "pattern": gemma3.pattern(16), "scaled_embedding": True}
    model = ModelConfig.model_validate({**whole.model.model_dump(), **fields})
    out = tmp_path_factory.mktemp("windowed") / "run"
    run = whole.run.model_copy(update={"model": model, "stages": {}})
    state = TrainState(np.int32(0), random_params(model), None)
    found_run(out, run, state, whole.tokenizer, "import", finished)
    return out


def check_same_text(directory: Path, portable: Path, folder: Path) -> None:
    """The example among the programs of a run writes what `braeburn generate` writes, after prompts
    of two lengths, one of which is padded to more tokens than the other.
    """
    for prompt in ("def read(", "import os\n" * 40):
        answer = braeburn(
            *("generate", directory, "--prompt", prompt, "--temperature", 0),
            *("--max-new-tokens", NEW, "--json"),
        )
        expected = json.loads(answer.out)["samples"][0]
        asked = ["--prompt", prompt, "--max-new-tokens", str(NEW)]
        found = without_braeburn(folder, str(portable / "generate.py"), *asked, "--ids")
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout) == expected["tokens"]
        assert len(expected["tokens"]) == NEW or expected["end"] == "stop"
    text = without_braeburn(folder, str(portable / "generate.py"), *asked).stdout
    assert text.rstrip("\n") == (prompt + expected["text"]).rstrip("\n")


def test_the_example_writes_what_generate_writes(
    exported: Path, finished: Path, tmp_path: Path
) -> None:
    told = without_braeburn(tmp_path, "-c", "import braeburn")
    assert "braeburn is not installed" in told.stderr
    check_same_text(finished, exported, tmp_path)


def test_layers_with_a_window_keep_no_more_than_that(windowed: Path, tmp_path: Path) -> None:
    """Of prompts that are shorter than the window and longer, and of what is written."""
    out = tmp_path / "portable"
    answer = braeburn("export", windowed, "--format", "stablehlo", "--out", out)
    assert answer.code == 0, answer.err
    step = json.loads((out / "program.json").read_text())["programs"]["step"]
    slots = [each["shape"][2] for each in step["arguments"]["cache"]]
    # A key and a value of each layer; the sixth sees all tokens.
    assert slots == [16] * 10 + ["s"] * 2 + [16] * 4
    check_same_text(windowed, out, tmp_path)


def test_programs_are_for_all_platforms_and_hold_no_weights(exported: Path) -> None:
    about = json.loads((exported / "program.json").read_text())
    assert about["platforms"] == list(PLATFORMS) and about["jax"] == jax.__version__
    assert list(about["programs"]) == ["forward", "prefill", "step"]
    for program in about["programs"].values():
        data = (exported / program["file"]).read_bytes()
        found = export.deserialize(bytearray(data))
        assert found.platforms == PLATFORMS
        assert set(stablehlo.calls(found.mlir_module())) <= {"shape_assertion"}
        assert len(data) < 100_000 < (exported / about["weights_file"]).stat().st_size
    tokens = about["programs"]["forward"]["arguments"]["tokens"]
    assert tokens == {"shape": ["b", "128*n"], "dtype": "int32"}
    weights = about["weights"]
    assert weights["layers/1/attention_norm"] == {"shape": [64], "dtype": "float32"}


CASES = {
    **{name: model for name, (model, _) in MODELS.items()},
    # Windows that are longer than the prompts, to the end of their padding.
    "gemma3-long-windows": make(
        num_layers=2, scaled_embedding=True, pattern=gemma3.layers(300), rope_base=1e6
    ),
    # Keys and values that later layers share, and windows.
    "afm-on-device-2025": make(
        num_layers=5,
        pattern=load("afm-on-device-2025").model.pattern,
        tail_pattern=load("afm-on-device-2025").model.tail_pattern,
        tail_layers=2,
    ),
}
# One of each family, and what differs most.
CHOSEN = (
    "llama",
    "qwen3",
    "gemma3",
    "gemma3-long-windows",
    "olmo2",
    "mixtral",
    "qwen3-moe-one-expert",
    "gpt-oss",
    "afm",
    "afm-on-device-2025",
)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_family_computes_what_it_computes_here(name: str) -> None:
    model = CASES[name]
    params = random_params(model)
    whole = cached.apart(model, params, lambda leaf, layer: leaf[layer])
    weights = stablehlo._named(whole)
    length, new = 150, 3
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 256), np.int32)
    expected = np.concatenate([our_logits(params, row[None], model) for row in tokens])
    forward, prefill, step = (
        jax.jit(lowered(each, PLATFORMS).call) for each in programs(model, "float32")
    )
    np.testing.assert_allclose(forward(weights, tokens), expected, atol=2e-4)
    # One prompt is shorter than the other.
    lengths = np.array([length, length - 40], np.int32)
    _, logits, cache = prefill(weights, tokens, lengths)
    rows = np.arange(2)
    np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=2e-4)
    slots = [each.shape[2] for each in programs(model, "float32")[2].arguments["cache"]]
    for each, wanted in zip(cache, slots, strict=True):
        assert each.shape[2] == (wanted if isinstance(wanted, int) else 256)
    cache = [
        each if isinstance(wanted, int) else jnp.pad(each, ((0, 0), (0, 0), (0, 7), (0, 0)))
        for each, wanted in zip(cache, slots, strict=True)
    ]
    for number in range(new):
        positions = lengths + number
        token, logits, cache = step(weights, tokens[rows, positions], positions, cache)
        np.testing.assert_allclose(logits, expected[rows, positions], atol=2e-4)
        np.testing.assert_array_equal(token, np.argmax(logits, -1))


def test_bfloat16_halves_matrices_and_leaves_norms(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    answer = braeburn(
        *("export", finished, "--format", "stablehlo", "--dtype", "bf16"),
        *("--platforms", "rocm,cpu", "--out", out),
    )
    assert answer.code == 0, answer.err
    about = json.loads((out / "program.json").read_text())
    assert about["dtype"] == "bfloat16" and about["platforms"] == ["rocm", "cpu"]
    dtypes = {name: each["dtype"] for name, each in about["weights"].items()}
    assert dtypes["layers/0/attention_norm"] == "float32"
    assert dtypes["embedding"] == "bfloat16"
    asked = ["--prompt", "def ", "--max-new-tokens", "5", "--ids"]
    found = without_braeburn(tmp_path, str(out / "generate.py"), *asked)
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)) <= 5


def planted(function: Any) -> Program:
    return Program("forward", function, {"x": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, ("y",))


def kernel(x: Any) -> Any:
    return jax.ffi.ffi_call("acme_flash_attention", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@pytest.mark.parametrize(
    ("function", "platforms", "name"),
    [
        # JAX itself does not know that one, but takes LAPACK's for one that stays as it is.
        (kernel, PLATFORMS, "acme_flash_attention"),
        (jnp.linalg.cholesky, ("cpu",), "lapack_spotrf_ffi"),
    ],
)
def test_a_kernel_of_one_maker_is_refused_by_name(
    function: Any, platforms: tuple[str, ...], name: str
) -> None:
    with pytest.raises(UserError, match=f"'forward' would call {name}, which not every platform"):
        lowered(planted(function), platforms)


def test_nothing_is_left_of_what_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stablehlo, "programs", lambda *_: [planted(kernel)])
    out = tmp_path / "model"
    answer = braeburn("export", finished, "--format", "stablehlo", "--out", out)
    assert answer.code == 2 and "would call acme_flash_attention" in answer.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--format", "stablehlo", "--platforms", "cpu,cdua"],
            "--platforms 'cpu,cdua' names 'cdua', which is no platform of JAX; name some of cpu, "
            "cuda, rocm, tpu",
        ),
        (["--format", "stablehlo", "--platforms", ""], "names '', which is no platform of JAX"),
        (["--platforms", "cpu"], "--platforms 'cpu' is one of --format stablehlo; leave it out"),
        (
            ["--format", "stablehlo", "--type", "q4_0"],
            "of portable programs it is --dtype fp32 or --dtype bf16",
        ),
        (["--format", "onnx"], "use --format hf, --format gguf or --format stablehlo"),
    ],
)
def test_mistakes(arguments: list[str], sentence: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert sentence in braeburn("export", finished, "--out", out, *arguments).error
    # A launcher says the same ahead.
    launched = [
        "launch",
        "local",
        "--processes",
        2,
        "--",
        "export",
        finished,
        "--out",
        out,
        *arguments,
    ]
    assert sentence in braeburn(*launched).error
    assert not out.exists()


def test_a_folder_in_use_and_a_missing_package(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    to_programs = ["export", finished, "--format", "stablehlo", "--out"]
    assert "is in use; choose a new or empty folder" in braeburn(*to_programs, tmp_path).error
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    error = braeburn(*to_programs, tmp_path / "model").error
    assert "--format stablehlo needs the flatbuffers package; run `make extra-stablehlo" in error
