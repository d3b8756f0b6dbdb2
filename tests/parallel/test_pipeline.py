"""A pipeline computes on every layout what one device computes."""

from functools import cache
from typing import Any

import pytest
from test_layouts import losses, with_optimizer

from braeburn.config import Run
from braeburn.data.prepare import Prepared, prepare
from support import deep_but

# Eight layers, so that four devices can have two stages each.
DEEP = {"model.num_layers": 8, "stages.core.accumulation_steps": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1f1b": {"mesh.pipeline": 4},
    "gpipe": {"mesh.pipeline": 4, "mesh.pipeline_schedule": "gpipe"},
    "interleaved": {"mesh.pipeline": 4, "mesh.stages_per_device": 2},
    "more stages than microbatches": {"mesh.pipeline": 8},
    "fsdp": {"mesh.pipeline": 4, "mesh.fsdp": 2},
    "gpipe x fsdp": {"mesh.pipeline": 2, "mesh.fsdp": 4, "mesh.pipeline_schedule": "gpipe"},
    "interleaved x data": {"mesh.pipeline": 4, "mesh.data": 2, "mesh.stages_per_device": 2},
    "tensor": {"mesh.pipeline": 4, "mesh.tensor": 2},
    "interleaved x tensor": {"mesh.pipeline": 2, "mesh.tensor": 4, "mesh.stages_per_device": 2},
    "replica x fsdp": {"mesh.pipeline": 2, "mesh.replica": 2, "mesh.fsdp": 2},
    "context": {"mesh.pipeline": 4, "mesh.context": 2},
    "context x tensor": {"mesh.pipeline": 2, "mesh.context": 2, "mesh.tensor": 2},
    "stages of unequal depth": {"mesh.pipeline": 4, "mesh.fsdp": 2, "model.num_layers": 7},
    "interleaved stages of unequal depth, named remat": {
        "mesh.pipeline": 2,
        "mesh.stages_per_device": 2,
        "model.num_layers": 7,
        "remat.policy": "save_named",
    },
    "untied": {"mesh.pipeline": 4, "mesh.fsdp": 2, "model.tied_embeddings": False},
    "fsdp, full remat": {"mesh.pipeline": 4, "mesh.fsdp": 2, "remat.policy": "full"},
    "unrolled, named remat": {
        "mesh.pipeline": 4,
        "model.scan_layers": False,
        "remat.policy": "save_named",
    },
}
# What a run on one device has to have as well.
OF_MODEL = ("model.num_layers", "model.tied_embeddings")
OFTEN = ("fsdp", "interleaved x tensor")


@pytest.fixture(scope="module")
def prepared(tiny: Run) -> Prepared:
    return prepare(tiny, lambda line: None)


@pytest.fixture(scope="module")
def one_device(tiny: Run, prepared: Prepared) -> Any:
    @cache
    def losses_of(**model: Any) -> list[float]:
        return losses(with_optimizer(tiny, "adamw", **{**DEEP, **model}), prepared)[0]

    return losses_of


@pytest.mark.parametrize("name", deep_but(OFTEN, LAYOUTS))
def test_pipelines_follow_one_device(
    name: str, tiny: Run, prepared: Prepared, one_device: Any
) -> None:
    changes = LAYOUTS[name]
    found, _ = losses(with_optimizer(tiny, "adamw", **{**DEEP, **changes}), prepared)
    reference = one_device(
        **{field: value for field, value in changes.items() if field in OF_MODEL}
    )
    assert reference[-1] < reference[0] - 0.5
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))
    print(f"{name}: largest relative difference {difference:.2e}")
    assert difference <= 1e-5
