"""Hugging Face directories as teachers: an exported run teaches what the run itself does."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from braeburn.config import MeshConfig, Run, override
from braeburn.errors import UserError
from braeburn.hardware.targets import parse_target
from braeburn.interop.exchange import find_teacher
from braeburn.layers.spec import walk
from braeburn.plan.cost import estimate
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import abstract_params
from support import braeburn, contents, rows


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a Hugging Face directory; not to be changed."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    answer = braeburn("export", finished, "--out", out)
    assert answer.code == 0, answer.err
    return out


@pytest.mark.deep
def test_an_exported_run_teaches_what_the_run_does(
    finished: Path, exported: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    """On a mesh that splits the teacher's weights too."""
    changes = [
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "precision.compute=float32",
        "stages.core.distillation.target=top_k",
    ]
    curves = {}
    for name, teacher in {"run": finished, "hf": exported}.items():
        arguments = [
            part
            for field in [*changes, f"stages.core.teacher={teacher}"]
            for part in ("--set", field)
        ]
        answer = braeburn(
            "train", *tiny_arguments, *arguments, "--stop-after-steps", 3, "--out", tmp_path / name
        )
        assert answer.code == 0, answer.err
        curves[name] = np.array(
            [(row["loss"], row["distillation_loss"]) for row in rows(tmp_path / name)]
        )
    assert curves["run"].shape == (3, 2)
    np.testing.assert_allclose(curves["hf"], curves["run"], rtol=0, atol=1e-6)


def test_weights_lie_where_and_as_they_are_wanted(
    finished: Path, exported: Path, tiny: Run
) -> None:
    run = tiny.model_copy(update={"mesh": MeshConfig(fsdp=2, tensor=2)})
    theirs, ours = find_teacher(exported), find_teacher(finished)
    assert (
        theirs.model.model_copy(update={"max_position_embeddings": 0, "z_loss": ours.model.z_loss})
        == ours.model
    )
    assert theirs.tokenizer.hash == ours.tokenizer.hash
    stage = resolve_stage(run, "core", jax.devices()[:4])
    wanted = abstract_params(stage.layout_of(theirs.model))
    found, expected = (dict(walk(teacher.read(wanted))) for teacher in (theirs, ours))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert (value.sharding, value.dtype) == (expected[path].sharding, expected[path].dtype), (
            path
        )
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_it_is_planned_like_the_run(finished: Path, exported: Path, tiny: Run) -> None:
    target = parse_target("h100:8")
    runs = {
        path: override(tiny, {"stages.core.teacher": str(path)}) for path in (finished, exported)
    }
    ours, theirs = (estimate(run, "core", target) for run in runs.values())
    assert theirs == ours and ours.memory["teacher"] > 0


def test_other_weights_are_another_teacher(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    teacher = find_teacher(copy)
    before = teacher.identity()
    assert before == find_teacher(copy).identity()
    os.utime(copy / "model.safetensors")
    assert teacher.identity() != before


def test_folders_that_cannot_teach(
    exported: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    before = contents(tmp_path)
    arguments = [*tiny_arguments, "--out", tmp_path / "out", "--set"]
    assert (
        "holds no model.safetensors"
        in braeburn("train", *arguments, f"stages.core.teacher={copy}").error
    )
    # An ordinary folder is taken for a run.
    with pytest.raises(UserError, match="is not a run directory"):
        find_teacher(tmp_path)
    (copy / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json"):
        find_teacher(copy)
    assert contents(tmp_path).keys() == before.keys()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(UserError, match="entries but the model only 256 rows"):
        find_teacher(copy)
