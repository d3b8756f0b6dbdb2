"""A dense run becomes a mixture of experts."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import Execution, LayerConfig, ModelConfig, Precision
from braeburn.config.mesh import ONE_DEVICE
from braeburn.config.sublayers.experts import Experts
from braeburn.config.sublayers.geglu import GeGLU
from braeburn.config.sublayers.reused import ReusedAttention
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.config.upcycling import Upcycling
from braeburn.layers import dispatch
from braeburn.layers.spec import initialize, walk
from braeburn.models.decoder import forward, param_specs
from braeburn.train.state import TrainState
from braeburn.train.trained import Trained, found_run, load
from braeburn.upcycle.run_directory import upcycle
from support import TRAINS_ON, braeburn, contents, deep_but, events, process, rows

EXECUTION = Execution(ONE_DEVICE, precision=Precision(compute="float32"))
GEGLU = LayerConfig(feed_forward=GeGLU())
SLIDING = LayerConfig(attention=SlidingAttention(window=8))
REUSED = LayerConfig(attention=ReusedAttention())


@pytest.fixture(scope="module")
def upcycled(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny run with four experts in every layer, without noise."""
    out, before = tmp_path_factory.mktemp("upcycled") / "run", contents(finished)
    answer = braeburn("upcycle", finished, "--experts", 4, "--noise", 0, "--out", out)
    assert answer.code == 0, answer.err
    assert f"upcycled {str(finished)!r} to 4 experts in {str(out)!r}" in answer.out
    assert contents(finished) == before
    return out


def hidden(trained: Trained) -> np.ndarray:
    """Final hidden states of the model on some tokens."""
    ids = np.random.default_rng(0).integers(0, trained.model.vocab_size, (2, 48))
    positions, segments = np.broadcast_to(np.arange(48), ids.shape), np.ones_like(ids)
    inputs = tuple(jnp.asarray(each, jnp.int32) for each in (ids, positions, segments))
    return np.asarray(forward(trained.params, inputs, trained.model, EXECUTION))


def layer_of(trained: Trained, path: str) -> np.ndarray:
    return np.asarray(dict(walk(trained.params))[path])


def test_without_noise_it_computes_what_the_dense_model_does(
    upcycled: Path, finished: Path
) -> None:
    """Each expert is the dense layer, and the weights of a token's experts sum to one."""
    sparse, dense = load(upcycled), load(finished)
    for name in ("gate", "up", "down"):
        experts = layer_of(sparse, f"layers/expert_{name}")
        wanted = np.repeat(layer_of(dense, f"layers/{name}")[:, None], 4, axis=1)
        np.testing.assert_array_equal(experts, wanted)
    for name in ("query", "key"):
        np.testing.assert_array_equal(
            layer_of(sparse, f"layers/{name}"), layer_of(dense, f"layers/{name}")
        )
    np.testing.assert_allclose(hidden(sparse), hidden(dense), rtol=1e-5, atol=1e-6)


def test_it_is_an_ordinary_run(
    upcycled: Path, finished: Path, corpus: Path, tmp_path: Path
) -> None:
    sparse, dense = load(upcycled), load(finished)
    (layer,) = sparse.model.pattern
    expected = Experts(num_experts=4, experts_per_token=2, expert_dim=160)
    assert layer == LayerConfig(feed_forward=expected)
    assert (sparse.step, sparse.sequence_length, sparse.run.stages) == (0, 256, {})
    assert sparse.run.name == f"{dense.run.name}-upcycled"
    assert sparse.tokenizer.hash == dense.tokenizer.hash
    assert [event["source"] for event in events(upcycled, "upcycle")] == [str(finished)]

    file = next(corpus.glob("*.py"))
    losses = []
    for folder in (upcycled, finished):
        answer = braeburn("evaluate", folder, "--data", file, "--json")
        assert answer.code == 0, answer.err
        losses.append(next(iter(json.loads(answer.out)["results"].values()))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert braeburn("generate", upcycled, "--prompt", "def", "--max-new-tokens", 4).code == 0
    assert braeburn("export", upcycled, "--out", tmp_path / "hf").code == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3_moe"


@pytest.mark.parametrize("how", ["gather", "all_to_all"])
def test_devices_share_out_its_experts(
    how: str, upcycled: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both ways to reach them, with the losses and the text of one device."""
    travelled = []
    for way in ("gather", "all_to_all"):
        function = getattr(dispatch, f"_by_{way}")

        def recorded(*arguments: Any, way: str = way, function: Any = function) -> Any:
            travelled.append(way)
            return function(*arguments)

        monkeypatch.setattr(dispatch, f"_by_{way}", recorded)
    evaluate = ("evaluate", upcycled, "--data", next(corpus.glob("*.py")), "--json")
    generate = ("generate", upcycled, "--prompt", "def", "--greedy", "--max-new-tokens", 8)
    losses, texts = [], []
    for options in ((), ("--mesh", f"expert=4,expert_dispatch={how}")):
        results = json.loads(braeburn(*evaluate, *options).out)["results"]
        losses.append(next(iter(results.values()))["loss"])
        texts.append(braeburn(*generate, *options).out)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert texts[0] == texts[1]
    assert set(travelled) == {how}


def test_routers_are_drawn_as_those_of_a_new_model(upcycled: Path) -> None:
    sparse = load(upcycled)
    new = initialize(param_specs(sparse.model), sparse.run.seed)
    np.testing.assert_array_equal(layer_of(sparse, "layers/router"), new["layers"]["router"])


def test_a_recipe_trains_on(upcycled: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    copy, out = shutil.copytree(upcycled, tmp_path / "upcycled"), tmp_path / "out"
    (tmp_path / "recipe.py").write_text(TRAINS_ON.format(path=str(copy)))
    arguments = ("train", f"{tmp_path / 'recipe.py'}:more", *tiny_arguments[1:], "--out", out)
    answer = braeburn(*arguments, "--stop-after-steps", 3)
    assert answer.code == 0, answer.err
    found = rows(out)
    assert found[0]["loss"] < 6.3  # that of the dense run's weights; random ones have 6.75
    assert found[0]["router_largest_load"] > 1.0
    experts = layer_of(load(out), "layers/expert_up")
    assert np.abs(experts[:, 0] - experts[:, 1]).max() > 1e-4  # each has learned from its tokens


def test_experts_differ_by_noise(finished: Path, tmp_path: Path) -> None:
    """Of the deviation that was asked for, and the same each time."""
    arguments = ("upcycle", finished, "--experts", 3, "--every", 2, "--noise", 0.05)
    for name in ("one", "two"):
        assert braeburn(*arguments, "--out", tmp_path / name).code == 0
    one, two, dense = (load(path) for path in (tmp_path / "one", tmp_path / "two", finished))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert [layer.feed_forward.kind for layer in one.model.layer_configs] == ["swiglu", "experts"]
    np.testing.assert_array_equal(layer_of(one, "layers/0/up")[0], layer_of(dense, "layers/up")[0])
    for name in ("gate", "up", "down"):
        wanted = layer_of(dense, f"layers/{name}")[1]
        noise = layer_of(one, f"layers/1/expert_{name}")[0] - wanted
        scale = 0.05 * np.sqrt(np.mean(wanted**2))
        np.testing.assert_allclose(noise.std(axis=(1, 2)), [scale] * 3, rtol=0.05)
        assert np.abs(np.corrcoef(noise.reshape(3, -1)) - np.eye(3)).max() < 0.05


def test_experts_in_some_layers_are_exported(finished: Path, tmp_path: Path) -> None:
    """As a model of transformers, which comes back as it was."""
    sparse, hf, back = tmp_path / "sparse", tmp_path / "hf", tmp_path / "back"
    arguments = ("upcycle", finished, "--experts", 3, "--every", 2, "--out", sparse)
    assert braeburn(*arguments).code == 0
    assert braeburn("export", sparse, "--out", hf).code == 0
    config = json.loads((hf / "config.json").read_text())
    assert (config["model_type"], config["decoder_sparse_step"]) == ("qwen3_moe", 2)
    assert braeburn("import", hf, "--out", back).code == 0
    np.testing.assert_array_equal(hidden(load(back)), hidden(load(sparse)))


def made(model: ModelConfig, finished: Path, out: Path) -> Trained:
    """A run directory of a model with random weights."""
    whole = load(finished)
    run = whole.run.model_copy(update={"model": model, "stages": {}})
    state = TrainState(jnp.zeros((), jnp.int32), initialize(param_specs(model), 3), None)
    found_run(out, run, state, whole.tokenizer, "import", finished)
    return load(out)


PATTERNS: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "a cut repeat": ({"num_layers": 7, "pattern": (SLIDING, GEGLU)}, 3, [2, 5]),
    "one repeat": ({"num_layers": 3, "pattern": (SLIDING, SLIDING, GEGLU)}, 2, [1]),
    "a tail of repeats": (
        {"num_layers": 8, "tail_layers": 4, "pattern": (GEGLU,), "tail_pattern": (REUSED,)},
        2,
        [1, 3, 5, 7],
    ),
    "a tail of one": (
        {"num_layers": 6, "tail_layers": 3, "pattern": (SLIDING, GEGLU), "tail_pattern": (REUSED,)},
        2,
        [1, 3, 5],
    ),
}


@pytest.mark.parametrize("name", deep_but(("a tail of one",), PATTERNS))
def test_every_layer_keeps_its_weights(name: str, finished: Path, tmp_path: Path) -> None:
    """Whatever the patterns of the dense model and of the sparse one."""
    layers, every, sparse = PATTERNS[name]
    model = ModelConfig.model_validate({**load(finished).model.model_dump(), **layers})
    dense = made(model, finished, tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", Upcycling(experts=3, every=every, noise=0))
    found = load(tmp_path / "out")
    kinds = [layer.feed_forward for layer in found.model.layer_configs]
    experts = {number: each for number, each in enumerate(kinds) if isinstance(each, Experts)}
    assert sorted(experts) == sparse
    for number, each in experts.items():
        was = model.layer_configs[number].feed_forward.kind
        assert each.activation == {"swiglu": "silu", "geglu": "gelu"}[was]
    np.testing.assert_allclose(hidden(found), hidden(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--experts", 1), "--experts=1 is not valid: it should be greater than 1"),
        (("--experts", 100_000), "--experts=100000 is not valid: it should be less than or equal"),
        (("--experts", 4, "--noise", "nan"), "--noise=nan is not valid: it should be a finite"),
        (("--experts", 4, "--balance-loss", "-1"), "--balance-loss=-1.0 is not valid: it should"),
        (
            ("--experts", 2, "--experts-per-token", 3),
            "--experts-per-token=3 is more than experts=2; give at most 2",
        ),
        (
            ("--experts", 4, "--every", 3),
            "--every 3 gives none of the 2 layers experts; use --every 2 or less",
        ),
    ],
)
def test_mistakes(arguments: tuple, sentence: str, finished: Path, tmp_path: Path) -> None:
    answer = braeburn("upcycle", finished, "--out", tmp_path / "out", *arguments)
    assert sentence in answer.error
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_upcycled(upcycled: Path, finished: Path, tmp_path: Path) -> None:
    answer = braeburn("upcycle", upcycled, "--experts", 4, "--out", tmp_path / "out")
    assert (
        "layer 0 has feed_forward.kind='experts', and experts are copies of 'swiglu' or 'geglu'; "
        "upcycle a dense run"
    ) in answer.error
    answer = braeburn("upcycle", finished, "--experts", 4, "--out", finished)
    assert "is in use; choose a new or empty folder" in answer.error
    answer = braeburn("upcycle", tmp_path, "--experts", 4, "--out", tmp_path / "out")
    assert "is not a run directory" in answer.error


def test_layers_with_experts_can_be_left_alone(finished: Path, tmp_path: Path) -> None:
    """The layers between those that get experts may be of any kind, and keep their routers."""
    experts = Experts(num_experts=4, expert_dim=24, bias=True, shared_dim=16)
    layers = {"num_layers": 4, "pattern": (LayerConfig(feed_forward=experts), GEGLU)}
    model = ModelConfig.model_validate({**load(finished).model.model_dump(), **layers})
    mixed = made(model, finished, tmp_path / "mixed")
    upcycle(tmp_path / "mixed", tmp_path / "out", Upcycling(experts=2, every=2, noise=0))
    found = load(tmp_path / "out")
    assert [layer.feed_forward.num_experts for layer in found.model.layer_configs] == [4, 2, 4, 2]
    np.testing.assert_array_equal(
        layer_of(found, "layers/0/router"), layer_of(mixed, "layers/0/router")
    )
    np.testing.assert_allclose(hidden(found), hidden(mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.deep
def test_several_processes_upcycle_as_one(finished: Path, tmp_path: Path) -> None:
    arguments = ("upcycle", finished, "--experts", 4)
    assert braeburn(*arguments, "--out", tmp_path / "one").code == 0
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    launch = ("launch", "local", "--processes", "2", "--")
    answer = process(*launch, *arguments, "--out", tmp_path / "two", env=environment)
    assert answer.code == 0, answer.err
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
