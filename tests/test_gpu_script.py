"""The script that measures a GPU runs to its end without one, at toy size."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def run(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(
        [str(SCRIPT), str(out)], env=environment, text=True, capture_output=True, check=False
    )


def rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SIZE": "small"}, "SIZE is small; choose whole or toy"),
        ({"SIZE": "toy", "PARTS": "prodct"}, "PARTS has prodct; choose from product, speed"),
    ],
)
def test_what_it_does_not_know_is_refused(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    done = run(tmp_path, **variables)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.deep
def test_every_part_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(out, SIZE="toy", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    (product,) = rows(out / "product.json")
    assert product["width"] == 256
    assert product["flops_per_second"] > 0

    (speed,) = rows(out / "toy.json")
    assert speed["attention"] == "blocked"
    assert speed["tokens_per_second"] > 0
    assert math.isfinite(speed["last_loss"])
    assert (out / "profile.xplane.pb").stat().st_size
    (kernels,) = rows(out / "kernels.json")
    assert kernels["device"] == "CPU"
    assert 0 < sum(kernel["share"] for kernel in kernels["kernels"]) <= 1.0001

    (kind,) = rows(out / "kinds.json")
    assert kind["run"] == "qwen3, adamw"
    assert kind["difference"] <= kind["limit"]

    train = rows(out / "train.json")
    assert {row["signal"] for row in train if "signal" in row} == {"SIGKILL", "SIGTERM"}
    (result,) = (row for row in train if "bfloat16 twice, any step" in row)
    assert result["killed, stopped and resumed, deterministic, any step"] == 0
    assert result["float32 against the CPU, any step"] == 0
    assert result["bfloat16 against float32 on the CPU, last ten"] < 0.01

    checked = [row for row in rows(out / "attention.json") if "shape" in row]
    assert [row["back_end"] for row in checked if "output" in row] == ["blocked"]
    lowered = {row["back_end"]: row["not run"] for row in checked if "not run" in row}
    assert lowered.keys() >= {"cudnn", "cudnn-masked", "cudnn over 4 shards"}
    assert all(text.startswith("lowered for a GPU, with ") for text in lowered.values())

    summary = (out / "summary.txt").read_text()
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        assert rows(out / "torch-tiny.json")[0]["tokens_per_second"] > 0
    else:
        assert "torch is left out: PyTorch or transformers is not installed" in summary
    assert "qwen3, adamw" in summary
    assert "toy" in summary
