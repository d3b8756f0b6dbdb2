"""Several processes prune what one prunes."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from braeburn.train.trained import load
from support import braeburn, process

KEEP = 96  # of the 160 of afm-tiny


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("activation", ()),
        pytest.param("magnitude", (), marks=pytest.mark.deep),
        pytest.param("soft_top_k", ("--tokens", "4096"), marks=pytest.mark.deep),
    ],
)
def test_several_processes_prune_as_one(
    method: str, options: tuple[str, ...], finished: Path, tmp_path: Path
) -> None:
    """On a mesh of two devices, which belong to one process or to two."""
    common = ("prune", finished, "--ffn", KEEP, "--method", method, *options)
    common = (*common, "--set", "mesh.fsdp=2")
    assert braeburn(*common, "--out", tmp_path / "one").code == 0
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    launch = ("launch", "local", "--processes", "2", "--")
    answer = process(*launch, *common, "--out", tmp_path / "two", env=environment)
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    assert two.model == one.model
    # What is trained is summed over processes in another way than over devices, and here compiled
    # in another way.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if method == "soft_top_k" else {"rtol": 0}
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **tolerance),
        two.params,
        one.params,
    )
    assert answer.out.count("pruned ") == 1


def test_several_processes_refuse_a_url(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braeburn.parallel.processes.joined", lambda: True)
    url = "memory://bucket/pruned"
    refused = braeburn("prune", finished, "--ffn", KEEP, "--method", "random", "--out", url).error
    assert f"--out {url!r} is a URL, and several processes write into one folder" in refused
    assert "name a folder that all of them see, or run one process" in refused
