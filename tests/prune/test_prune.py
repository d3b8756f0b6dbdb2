import json
from pathlib import Path

import jax
import numpy as np
import pytest

from braeburn.config import override, read_run
from braeburn.jsonfile import json_lines
from braeburn.layers.spec import walk
from braeburn.recipes import load as recipe
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.loop import train
from braeburn.train.trained import load
from support import braeburn, contents

KEEP = 96  # of the 160 of afm-tiny
METHODS = ("soft_top_k", "activation", "magnitude")


@pytest.fixture(scope="module")
def pruned(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The finished tiny run, pruned by each method."""
    folder, before = tmp_path_factory.mktemp("pruned"), contents(finished)
    for method in METHODS:
        extra = ("--tokens", 4096) if method == "soft_top_k" else ()
        answer = braeburn(
            "prune", finished, "--ffn", KEEP, "--method", method, "--out", folder / method, *extra
        )
        assert answer.code == 0, answer.err
    assert contents(finished) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        METHODS
    )  # no folder is left beside them
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_run_is_an_ordinary_smaller_one(
    pruned: dict[str, Path], method: str, finished: Path
) -> None:
    small, large = load(pruned[method]), load(finished)
    assert small.model.ffn_dim == KEEP
    changed = {"ffn_dim": KEEP, "max_position_embeddings": 256}
    assert small.model == large.model.model_copy(update=changed)
    assert (small.step, small.sequence_length, small.run.stages) == (0, 256, {})
    assert small.params["layers"]["down"].shape == (2, KEEP, 64)
    assert small.tokenizer.hash == large.tokenizer.hash


@pytest.mark.parametrize("method", ["activation", "magnitude"])
def test_what_is_cut_without_training_is_a_part_of_what_was(
    pruned: dict[str, Path], method: str, finished: Path
) -> None:
    small, large = load(pruned[method]).params["layers"], load(finished).params["layers"]
    for layer in range(2):
        units = [
            np.flatnonzero((large["up"][layer] == column[:, None]).all(0)).item()
            for column in small["up"][layer].T
        ]
        assert units == sorted(set(units))
        np.testing.assert_array_equal(small["down"][layer], large["down"][layer][np.array(units)])
        np.testing.assert_array_equal(
            small["gate"][layer], large["gate"][layer][:, np.array(units)]
        )
    np.testing.assert_array_equal(small["query"], large["query"])


def test_the_optimizer_is_cut_alike(pruned: dict[str, Path], finished: Path) -> None:
    small, large = (_checkpoint(path) for path in (pruned["magnitude"], finished))
    large_up, small_up = large["params"]["layers"]["up"][0], small["params"]["layers"]["up"][0]
    units = np.array(
        [np.flatnonzero((large_up == column[:, None]).all(0)).item() for column in small_up.T]
    )
    moments = [
        (
            dict(walk(small["optimizer"]["direction"][name])),
            dict(walk(large["optimizer"]["direction"][name])),
        )
        for name in ("second_moment", "momentum")
    ]
    for after, before in moments:
        np.testing.assert_array_equal(after["layers/up"][0], before["layers/up"][0][:, units])
        np.testing.assert_array_equal(after["layers/down"][0], before["layers/down"][0][units])
        np.testing.assert_array_equal(after["embedding"], before["embedding"])


def _checkpoint(directory: Path) -> dict:
    """Parameters and optimizer of the newest checkpoint as orbax has them, told nothing of their
    structure.
    """
    import orbax.checkpoint as ocp

    folder = directory / "checkpoints" / str(Checkpoints(directory).newest())
    with ocp.StandardCheckpointer() as reader:
        items = {name: reader.restore(folder.absolute() / name) for name in ("params", "optimizer")}
    return jax.tree.map(np.asarray, items)


def test_a_recipe_of_the_smaller_model_trains_on(
    pruned: dict[str, Path], tiny_fields: dict, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(pruned["activation"], tmp_path / "run")
    run = override(
        recipe("afm-tiny"), tiny_fields | {"model.ffn_dim": KEEP, "model.rope_base": 6_315_089.0}
    )
    outcome = train(run, tmp_path / "run", stop_after_steps=2)
    assert outcome.step == 2
    first = next(json_lines(tmp_path / "run" / "metrics.jsonl"))
    scratch = train(run, tmp_path / "scratch", stop_after_steps=1)
    assert scratch.step == 1
    assert first["loss"] < next(json_lines(tmp_path / "scratch" / "metrics.jsonl"))["loss"] - 0.1


def test_an_interrupted_pruning_goes_on(
    finished: Path, pruned: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    from braeburn.prune import run_directory as module

    def stopped(run, out):
        return train(run, out, stop_after_steps=2)

    arguments = ("prune", finished, "--ffn", KEEP, "--tokens", 4096, "--out", tmp_path / "out")
    monkeypatch.setattr(module, "train", stopped)
    monkeypatch.setattr("braeburn.train.progress.SECONDS_BETWEEN_LINES", 0.0)
    answer = braeburn(*arguments)
    assert answer.code == 130 and not (tmp_path / "out").exists()
    lines = answer.err.splitlines()
    assert "beginning from the weights of checkpoint 0, with 4 steps to make" in lines
    # What may take longer than a step is told before the first.
    measured, first = (
        next(n for n, line in enumerate(lines) if line.startswith(beginning))
        for beginning in ("measuring activations: 3 of 4", "step 1/4")
    )
    assert measured < first
    monkeypatch.undo()
    answer = braeburn(*arguments)
    assert answer.code == 0 and "resuming from step 2 of 4" in answer.err
    whole, resumed = load(pruned["soft_top_k"]).params, load(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "method", [pytest.param("soft_top_k", marks=pytest.mark.deep), "activation"]
)
def test_what_has_no_text_of_its_own_learns_from_files(
    pruned: dict[str, Path], method: str, corpus: Path, tmp_path: Path
) -> None:
    """As an import has none, and a run that was pruned."""
    arguments = (
        "prune",
        pruned["magnitude"],
        "--ffn",
        32,
        "--method",
        method,
        "--data",
        f"{corpus}/*.py",
    )
    extra = ("--tokens", 8192) if method == "soft_top_k" else ()
    mesh = ("--set", "mesh.fsdp=1")
    answer = braeburn(*arguments, "--out", tmp_path / "out", *mesh, *extra)
    assert answer.code == 0, answer.err
    assert load(tmp_path / "out").model.ffn_dim == 32
    assert read_run(tmp_path / "out").data.sources.keys() == {"text"}


def test_files_take_the_place_of_the_runs_own_text(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = (
        "prune",
        finished,
        "--ffn",
        32,
        "--method",
        "activation",
        "--data",
        corpus / "abc.py",
    )
    answer = braeburn(*arguments, "--out", tmp_path / "out", "--set", "data.held_out=0.0001")
    assert answer.code == 0, answer.err
    (source,) = read_run(tmp_path / "out").data.sources.values()
    assert source.paths == (str(corpus / "abc.py"),)


def test_a_pruned_run_can_be_pruned_again(pruned: dict[str, Path], tmp_path: Path) -> None:
    answer = braeburn(
        "prune",
        pruned["magnitude"],
        "--ffn",
        32,
        "--method",
        "magnitude",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["model"]["ffn_dim"] == 32
    assert read_run(tmp_path / "out").model.max_position_embeddings == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ffn", 160), "--ffn=160 is not less than the model's ffn_dim=160; set --ffn below 160"),
        (("--ffn", 80, "--method", "best"), "--method='best' is not valid"),
        (
            ("--ffn", 80, "--method", "magnitude", "--tokens", 10),
            "--tokens 10 is for learned masks",
        ),
        (
            ("--ffn", 80, "--set", "stages.prune.pruning.keep.width=3"),
            "stages.prune.pruning.keep.width",
        ),
        (("--ffn", 80, "--set", "stages.prune.learning_rat=3"), "did you mean"),
    ],
)
def test_mistakes(finished: Path, tmp_path: Path, arguments: tuple, words: str) -> None:
    answer = braeburn("prune", finished, "--out", tmp_path / "out", *arguments)
    assert words in answer.error
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_or_written(
    pruned: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    answer = braeburn("prune", pruned["magnitude"], "--ffn", 32, "--out", tmp_path / "out")
    assert (
        "names no text to measure activations on; name some with --data FILE, or use --method"
        in answer.error
    )
    missing = (
        "prune",
        pruned["magnitude"],
        "--ffn",
        32,
        "--out",
        tmp_path / "out",
        "--data",
        "/nowhere/a.txt",
    )
    assert "--data" in braeburn(*missing).error and "data.sources" not in braeburn(*missing).error
    answer = braeburn(*missing, "--method", "random")
    assert (
        "--data is for --method soft_top_k and activation, and --method random reads no text"
        in answer.error
    )
    answer = braeburn("prune", finished, "--ffn", 32, "--out", finished)
    assert "is in use" in answer.error
    answer = braeburn("prune", tmp_path, "--ffn", 32, "--out", tmp_path / "out")
    assert "is not a run directory" in answer.error
