"""A model with experts computes on every layout what one device computes."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from test_layouts import WIDE, losses

from braeburn.config import Run, override
from braeburn.data.prepare import Prepared, prepare
from braeburn.layers.sublayers import experts
from support import deep_but

EXPERTS = {
    "kind": "experts",
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_dim": 48,
    "balance_loss": 0.02,
    "router_z_loss": 1e-3,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"mesh.data": 8},
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.tensor": 4},
    "gathered context": {"mesh.context": 8},
    "replica x fsdp": {"mesh.replica": 2, "mesh.fsdp": 4},
    "data x tensor": {"mesh.data": 4, "mesh.tensor": 2},
    "fsdp x tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
    "fsdp x ring": {"mesh.fsdp": 2, "mesh.context": 4, "mesh.context_attention": "ring"},
    "replica x fsdp x tensor": {"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "fsdp x context x tensor": {"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2},
    "fsdp, unrolled, named remat": {
        "mesh.fsdp": 4,
        "model.scan_layers": False,
        "remat.policy": "save_named",
    },
}
OFTEN = ("fsdp x context x tensor",)
ALL_TO_ALL = {"mesh.expert_dispatch": "all_to_all"}
# Buffers of an even share, so that every step has further rounds.
NARROW = {"mesh.expert_room": 1.0}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "expert": {"mesh.expert": 8},
    "expert, all to all": {"mesh.expert": 8, **ALL_TO_ALL},
    "fsdp x expert": {"mesh.fsdp": 2, "mesh.expert": 4},
    "data x expert, all to all": {"mesh.data": 2, "mesh.expert": 4, **ALL_TO_ALL},
    "replica x expert, narrow": {"mesh.replica": 2, "mesh.expert": 2, **NARROW},
    "expert x context": {"mesh.expert": 2, "mesh.context": 4},
    "expert x tensor, all to all": {"mesh.expert": 4, "mesh.tensor": 2, **ALL_TO_ALL},
    "fsdp x expert x tensor, narrow": {
        "mesh.fsdp": 2,
        "mesh.expert": 2,
        "mesh.tensor": 2,
        "remat.policy": "full",
        **NARROW,
    },
    "fsdp x expert x context, all to all, narrow": {
        "mesh.fsdp": 2,
        "mesh.expert": 2,
        "mesh.context": 2,
        "remat.policy": "save_named",
        **ALL_TO_ALL,
        **NARROW,
    },
    "expert, unrolled": {"mesh.expert": 4, "model.scan_layers": False},
}
EXPERTS_OFTEN = ("fsdp x expert x tensor, narrow", "fsdp x expert x context, all to all, narrow")
# As DeepSeek-V3 has it: without a loss that is counted by microbatch.
BY_BIAS: dict[str, Any] = {
    f"model.pattern.0.feed_forward.{name}": value
    for name, value in {
        "scores": "sigmoid",
        "bias": True,
        "balance_loss": 0.0,
        "groups": 4,
        "groups_per_token": 2,
        "shared_dim": 32,
        "scale": 1.5,
    }.items()
}
BY_BIAS_LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp x tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
    "data x fsdp, accumulated": {
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "stages.core.accumulation_steps": 2,
    },
    "expert, accumulated": {"mesh.expert": 8, "stages.core.accumulation_steps": 2},
    "fsdp x expert, all to all, accumulated": {
        "mesh.fsdp": 2,
        "mesh.expert": 2,
        "stages.core.accumulation_steps": 2,
        **ALL_TO_ALL,
    },
    "expert x pipeline": {
        "mesh.expert": 2,
        "mesh.pipeline": 2,
        "mesh.data": 2,
        "mesh.expert_dispatch": "all_to_all",
        "stages.core.accumulation_steps": 4,
    },
    "fsdp x pipeline": {"mesh.fsdp": 2, "mesh.pipeline": 2, "stages.core.accumulation_steps": 2},
    "context x tensor, accumulated": {
        "mesh.context": 2,
        "mesh.tensor": 2,
        "stages.core.accumulation_steps": 4,
    },
}


@pytest.fixture(scope="module")
def prepared(tiny: Run) -> Prepared:
    return prepare(tiny, lambda line: None)


def with_experts(run: Run, **changes: Any) -> Run:
    fields = {f"model.pattern.0.feed_forward.{name}": value for name, value in EXPERTS.items()}
    # Far above what gradients are rounded by: else rounding alone decides the first updates of
    # parameters whose gradients are near zero, and these the experts of tokens near a tie.
    optimizer = {
        "optimizer.kind": "adamw",
        "optimizer.epsilon": 1e-4,
        "stages.core.learning_rate": 3e-3,
    }
    length = {"stages.core.tokens": 20 * 1024, "stages.core.weight_decay": 0.1}
    return override(run, {"mesh.fsdp": 1, **WIDE, **fields, **optimizer, **length, **changes})


@pytest.fixture(scope="module")
def one_device(tiny: Run, prepared: Prepared) -> Any:
    return cache(lambda: losses(with_experts(tiny), prepared)[0])


@pytest.fixture(scope="module")
def by_bias(tiny: Run, prepared: Prepared) -> Any:
    return cache(lambda: losses(with_experts(tiny, **BY_BIAS), prepared))


@pytest.mark.parametrize("name", deep_but((*OFTEN, *EXPERTS_OFTEN), {**LAYOUTS, **EXPERT_LAYOUTS}))
def test_experts_follow_one_device(
    name: str, tiny: Run, prepared: Prepared, one_device: Any
) -> None:
    layout = {**LAYOUTS, **EXPERT_LAYOUTS}[name]
    found, _ = losses(with_experts(tiny, **layout), prepared)
    reference = one_device()
    assert reference[-1] < reference[0] - 0.5
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))
    print(f"{name}: largest relative difference {difference:.2e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("name", deep_but(("data x fsdp, accumulated",), BY_BIAS_LAYOUTS))
def test_biases_follow_one_device(name: str, tiny: Run, prepared: Prepared, by_bias: Any) -> None:
    """Those of all microbatches together, and the losses."""
    found, state = losses(with_experts(tiny, **BY_BIAS, **BY_BIAS_LAYOUTS[name]), prepared)
    reference, expected = by_bias()
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))
    print(f"{name}: largest relative difference {difference:.2e}")
    assert difference <= 1e-5
    biases, wanted = (s.params["layers"]["router_bias"] for s in (state, expected))
    np.testing.assert_allclose(biases, wanted, rtol=0, atol=1e-6)
    assert np.abs(wanted).max() > 0.005


@pytest.mark.deep
def test_a_fault_in_the_routing_is_found(
    tiny: Run, prepared: Prepared, one_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assignments that each device counts for itself give other losses."""
    monkeypatch.setattr(experts, "token_axes", lambda execution: ())
    found, _ = losses(with_experts(tiny, **{"mesh.fsdp": 8}), prepared)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, one_device(), strict=True)) > 1e-4
