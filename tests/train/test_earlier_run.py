"""A run directory of an earlier version, from the middle of a stage that prunes, still loads and
goes on: `earlier_run.tar.xz` holds it as commit c8e5949 left it, and its text.
"""

import json
import tarfile
from pathlib import Path

import pytest

from braeburn.jsonfile import json_lines
from support import braeburn

ARCHIVE = Path(__file__).with_name("earlier_run.tar.xz")
# The recipe, as it is written today.
RECIPE = """
from braeburn.config import (
    AdamW, Checkpoint, Data, ModelConfig, Precision, Run, Schedule, Source, Stage,
)

COMMON = dict(sequence_length=32, batch_tokens=256, mixture={"text": 1.0})


def small():
    return Run(
        name="earlier",
        model=ModelConfig(
            vocab_size=288, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
            ffn_dim=24,
        ),
        stages={
            "first": Stage(
                tokens=4096, learning_rate=1e-2, schedule=Schedule(warmup_steps=2), **COMMON
            ),
            "second": Stage(
                tokens=2048, learning_rate=1e-3, pruning={"keep": {"ffn": 16}}, **COMMON
            ),
        },
        data=Data(sources={"text": Source(paths=("text.txt",))}, held_out=0.1, workers=0),
        optimizer=AdamW(),
        precision=Precision(compute="float32"),
        checkpoint=Checkpoint(every_steps=6, keep_last=1),
    )
"""
# What that commit said of it: the loss on its text at step 20, and of the steps to the end.
EVALUATED = 4.062845467737264
LOSSES = {
    21: 4.164038181304932,
    22: 4.131322860717773,
    23: 4.040254592895508,
    24: 3.9928622245788574,
}


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_an_earlier_run_is_evaluated(earlier: Path) -> None:
    answer = braeburn("evaluate", earlier, "--data", "text.txt", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["step"] == 20
    assert result["results"]["text.txt"]["loss"] == pytest.approx(EVALUATED, rel=1e-5)


def test_an_earlier_run_goes_on(earlier: Path) -> None:
    answer = braeburn("train", "recipe.py:small", "--out", earlier, "--set", "mesh.fsdp=1")
    assert answer.code == 0, answer.err
    rows = list(json_lines(earlier / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 25))
    found = {row["step"]: row["loss"] for row in rows if row["step"] in LOSSES}
    assert found == pytest.approx(LOSSES, rel=1e-5)
