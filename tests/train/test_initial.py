"""Runs that start from weights: of an import, a checkpoint, a Hugging Face model."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.config import ModelConfig, Run, override
from braeburn.data.tokenizer import train as train_tokenizer
from braeburn.errors import UserError
from braeburn.interop.exchange import find_teacher
from braeburn.train.loop import train
from braeburn.train.trained import load
from support import TRAINS_ON, braeburn, rows


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    assert braeburn("export", finished, "--out", out).code == 0
    return out


@pytest.fixture(scope="module")
def imported(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "run"
    answer = braeburn("import", exported, "--out", out)
    assert answer.code == 0, answer.err
    assert (
        f"model=ModelConfig.from_directory({str(out)!r}) and initial_weights={str(out)!r}"
        in answer.out
    )
    return out


def test_a_recipe_trains_on_from_an_import(
    imported: Path, finished: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(imported, tmp_path / "imported")
    (tmp_path / "recipe.py").write_text(TRAINS_ON.format(path=str(copy)))
    out = tmp_path / "out"
    arguments = ["train", f"{tmp_path / 'recipe.py'}:more", *tiny_arguments[1:], "--out", out]
    answer = braeburn(*arguments, "--stop-after-steps", 1)
    assert answer.code == 0, answer.err
    # The first step's loss is that of the imported weights; random ones have 6.75.
    assert rows(out)[0]["loss"] < 6.3
    assert load(out).tokenizer.to_json() == load(imported).tokenizer.to_json()
    answer = braeburn(*arguments, "--stop-after-steps", 1)
    assert answer.code == 0, answer.err
    assert [row["step"] for row in rows(out)] == [1, 2]


def started(tiny: Run, path: Path, **fields: Any) -> Run:
    model = (
        ModelConfig.from_directory(path)
        if (path / "checkpoints").exists() or path.name.isdigit()
        else None
    )
    values = {"initial_weights": str(path), **fields}
    run = override(tiny, values)
    return run.model_copy(update={"model": model}) if model else run


def test_all_kinds_of_directory_give_the_same_first_step(
    tiny: Run, finished: Path, exported: Path, imported: Path, tmp_path: Path
) -> None:
    losses = {}
    of_import = ModelConfig.from_directory(imported)
    for name, path in {
        "run": finished,
        "checkpoint": finished / "checkpoints" / "14",
        "import": imported,
        "hf": exported,
    }.items():
        run = override(tiny, {"initial_weights": str(path)}).model_copy(update={"model": of_import})
        train(run, tmp_path / name, stop_after_steps=1, find_teacher=find_teacher)
        losses[name] = rows(tmp_path / name)[0]["loss"]
    assert len(set(losses.values())) == 1


@pytest.mark.deep
def test_a_started_run_goes_on_without_the_directory(
    tiny: Run, imported: Path, tmp_path: Path
) -> None:
    """Bit for bit as without an interruption; on a mesh that splits the weights."""
    copy = shutil.copytree(imported, tmp_path / "imported")
    run = started(tiny, copy, **{"mesh.fsdp": 2, "mesh.tensor": 2})
    train(run, tmp_path / "whole", stop_after_steps=3, find_teacher=find_teacher)
    train(run, tmp_path / "halves", stop_after_steps=2, find_teacher=find_teacher)
    shutil.rmtree(copy)
    train(run, tmp_path / "halves", stop_after_steps=1, find_teacher=find_teacher)
    whole, halves = load(tmp_path / "whole"), load(tmp_path / "halves")
    assert whole.step == halves.step == 3
    jax.tree.map(np.testing.assert_array_equal, whole.params, halves.params)


def test_models_of_directories(tiny: Run, finished: Path, imported: Path, exported: Path) -> None:
    """The last stage of the run has another RoPE base and longer sequences than the run's own
    model.
    """
    model = ModelConfig.from_directory(finished)
    assert (model.rope_base, model.max_position_embeddings) == (6_315_089.0, 256)
    assert ModelConfig.from_directory(finished / "checkpoints" / "14") == model
    assert (
        ModelConfig.from_directory(finished / "checkpoints" / "10").rope_base
        == tiny.model.rope_base
    )
    assert ModelConfig.from_directory(imported).model_copy(update={"z_loss": model.z_loss}) == model
    with pytest.raises(
        UserError, match=r"a Hugging Face directory is made one by `braeburn import`"
    ):
        ModelConfig.from_directory(exported)
    with pytest.raises(UserError, match="there is no such checkpoint"):
        ModelConfig.from_directory(finished / "checkpoints" / "13")
    with pytest.raises(UserError, match="is not a run directory"):
        ModelConfig.from_directory("/nowhere")


def test_what_does_not_fit(tiny: Run, imported: Path, finished: Path, tmp_path: Path) -> None:
    def refused(run: Run, words: str, out: str = "out") -> None:
        with pytest.raises(UserError, match=words):
            train(run, tmp_path / out, find_teacher=find_teacher)

    run = started(tiny, imported)
    narrow = run.model_copy(update={"model": run.model.model_copy(update={"ffn_dim": 96})})
    refused(
        narrow, r"has ffn_dim=160, not model.ffn_dim=96; set model to ModelConfig.from_directory\("
    )
    refused(
        override(run, {"model.rope_base": 1e4}),
        "has rope_base=6315089.0, not model.rope_base=10000.0",
    )
    refused(
        override(run, {"initial_weights": "/nowhere"}),
        "initial_weights='/nowhere': '/nowhere' is not a run",
    )
    train_tokenizer(["other words"], 300).save(tmp_path / "tokenizer.json")
    other = override(run, {"data.tokenizer": str(tmp_path / "tokenizer.json")})
    refused(other, "is not the tokenizer of initial_weights=")
    assert not (tmp_path / "out" / "config.json").exists()

    # Weights that lie in the folder already would win in silence.
    shutil.copytree(imported, tmp_path / "begun")
    refused(
        override(run, {"initial_weights": str(finished)}),
        "holds weights of its own already",
        "begun",
    )
    own = override(run, {"initial_weights": str(tmp_path / "begun")})
    assert train(own, tmp_path / "begun", stop_after_steps=1, find_teacher=find_teacher).step == 1


def test_the_command_line_alone(finished: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    """Where the model is the recipe's own, naming the weights is all."""
    answer = braeburn(
        *(
            "train",
            *tiny_arguments,
            "--set",
            f"initial_weights={finished}",
            "--set",
            "model.rope_base=6315089.0",
        ),
        *("--out", tmp_path / "out", "--stop-after-steps", 1),
    )
    assert answer.code == 0, answer.err
    assert rows(tmp_path / "out")[0]["loss"] < 6.3


def test_an_import_is_pruned_on_files(imported: Path, corpus: Path, tmp_path: Path) -> None:
    """It has neither text nor an optimizer's state of its own."""
    arguments = (
        "prune",
        imported,
        "--ffn",
        96,
        "--data",
        f"{corpus}/*.py",
        "--tokens",
        8192,
        "--set",
        "mesh.fsdp=1",
    )
    answer = braeburn(*arguments, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert load(tmp_path / "out").params["layers"]["down"].shape == (2, 96, 64)
    assert load(tmp_path / "out").run.optimizer.kind == "adamw"


def test_an_import_leaves_alone_what_it_did_not_make(exported: Path, tmp_path: Path) -> None:
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "work.txt").write_text("years of it")
    assert braeburn("import", exported, "--out", tmp_path / "run").code == 0
    assert (tmp_path / ".run.partial" / "work.txt").read_text() == "years of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.partial", "run"]
