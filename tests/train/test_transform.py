"""A transform is one module and its configuration: here a low-rank adapter, which the test brings.

It trains, is saved, resumed and merged by what its definition declares; no other module knows it.
"""

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_resume import curve, stage_ends

from braeburn.config import Name, Run, Schedule, Size, Stage, StageModels, TransformConfig
from braeburn.config import run as run_module
from braeburn.layers.spec import ParamSpec, Tree, abstract, initialize, walk
from braeburn.models.decoder import param_specs
from braeburn.plan.cost import work_of
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.loop import train
from braeburn.train.trained import load
from braeburn.transforms.definition import ADDED, Found, Transform, merged, without
from braeburn.verify.shrink import shrink
from support import rows

BEFORE, AFTER = 2, 6
RANK = 2


class Adapter(TransformConfig):
    """A product of two thin matrices is added to each gate, and nothing else trains."""

    rank: Size = RANK


class AdaptedStage(Stage):
    adapter: Adapter | None = None


class AdaptedRun(Run):
    stages: dict[Name, AdaptedStage]  # type: ignore[assignment]


def adapter(config: Adapter, models: StageModels, steps: int) -> Transform:
    (layers, width, ffn), axes, rank = *_gate(models.trained), config.rank
    extras = {
        "adapter": {
            "down": ParamSpec((layers, width, rank), (*axes[:2], "rank"), "matrix", axes[1:2]),
            "up": ParamSpec((layers, rank, ffn), (axes[0], "rank", axes[2]), "matrix", ("rank",)),
        }
    }

    def effective(params: Tree, step: Any) -> Tree:
        added = params["adapter"]["down"] @ params["adapter"]["up"]
        weights = without(params, extras)
        return weights | {"layers": weights["layers"] | {"gate": weights["layers"]["gate"] + added}}

    def measure(found: Found) -> Tree:
        values = initialize(extras, found.seed)["adapter"]
        return {"adapter": values | {"up": jnp.zeros_like(values["up"])}}

    return Transform(
        extra_specs=extras,
        trains=lambda path, _: path.startswith("adapter/"),
        effective=effective,
        measure=measure,
        enter=ADDED,
        leave=merged(effective, steps, extras),
    )


def _gate(model: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    spec = param_specs(model)["layers"]["gate"]
    return spec.shape, spec.axes


@pytest.fixture
def adapted(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose second stage trains an adapter, as if its field and module were Braeburn's."""
    module = ModuleType("braeburn.transforms.adapter")
    module.DEFINITION = adapter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(run_module, "Run", AdaptedRun)
    core = tiny.stages["core"].model_dump() | {"schedule": Schedule(warmup_steps=1)}
    tokens = tiny.stages["core"].batch_tokens
    stages = {
        "before": core | {"tokens": BEFORE * tokens},
        "adapted": core | {"tokens": (AFTER - BEFORE) * tokens, "adapter": {}},
    }
    fields = tiny.model_dump() | {"stages": stages, "checkpoint": {"every_steps": 1}}
    fields["checkpoint"]["keep_last"] = AFTER
    fields["mesh"] = {"fsdp": 2, "tensor": 2}
    return run_module.validate(fields)


@pytest.mark.deep
def test_an_adapter_of_ones_own_trains_resumes_and_merges(adapted: Run, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(adapted, whole).finished
    assert train(adapted, stopped, stop_after_steps=BEFORE + 2).step == BEFORE + 2
    middle = shutil.copytree(stopped, tmp_path / "middle")
    assert train(adapted, stopped).finished
    assert curve(stopped) == curve(whole) and stage_ends(stopped) == stage_ends(whole)
    assert all(np.isfinite(row["loss"]) for row in rows(whole))

    # In the middle of the stage the adapter is saved at its path, with moments of its own.
    extras = adapter(Adapter(), adapted.models()["adapted"], AFTER - BEFORE).extra_specs
    specs = param_specs(adapted.model)
    read = Checkpoints(whole).restore_params
    saved = read(BEFORE + 2, abstract(specs | extras))
    assert np.abs(np.asarray(saved["adapter"]["up"])).max() > 0
    effective = dict(walk(load(middle).params))
    expected = dict(walk(specs_applied(saved)))
    assert effective.keys() == expected.keys()
    for path, value in effective.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-6, atol=1e-6, err_msg=path)

    # What does not train is as it was, weight decay or not; the gates differ by a thin product.
    first, last = (dict(walk(read(step, abstract(specs)))) for step in (BEFORE, AFTER))
    for path, value in last.items():
        if path != "layers/gate":
            np.testing.assert_array_equal(value, first[path], err_msg=path)
    change = np.asarray(last["layers/gate"]) - np.asarray(first["layers/gate"])
    assert np.abs(change).max() > 0
    singular = np.linalg.svd(change, compute_uv=False)
    assert (singular[:, RANK:] < 1e-3 * singular[:, :1]).all()


def test_jobs_around_training_take_what_it_declares(adapted: Run) -> None:
    shape, _ = _gate(adapted.model)
    assert work_of(adapted, "adapted", adapted.mesh).transformed == np.prod(shape)
    assert work_of(adapted, "before", adapted.mesh).transformed == 0
    assert list(shrink(adapted, 4).stages["adapted"].transforms) == ["adapter"]
    assert [config.summary for config in adapted.stages["adapted"].transforms.values()] == [
        "applies Adapter"
    ]


def specs_applied(params: Tree) -> Tree:
    """The model's weights with the adapter merged, by hand."""
    product = np.asarray(params["adapter"]["down"]) @ np.asarray(params["adapter"]["up"])
    merged_layers = params["layers"] | {"gate": np.asarray(params["layers"]["gate"]) + product}
    return jax.device_get({k: v for k, v in params.items() if k != "adapter"}) | {
        "layers": merged_layers
    }
