"""Every layout computes what one device computes: 20 steps on eight simulated devices, packed
documents.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from braeburn.config import MeshConfig, Run, override
from braeburn.config.optimizers import KINDS
from braeburn.data.loader import Batches
from braeburn.data.prepare import Prepared, prepare
from braeburn.layers.spec import walk
from braeburn.optim.guard import begin_stage
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage, initial_state
from support import deep_but

STEPS = 20
WIDE = {"model.num_heads": 8, "model.num_kv_heads": 4, "model.head_dim": 8}
# Sizes by axis; `accumulate`, `ring` and other settings besides.
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"mesh.data": 8},
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.tensor": 4},
    "tensor, fewer key heads than shards": {"mesh.tensor": 8},
    "ring": {"mesh.context": 8, "mesh.context_attention": "ring"},
    "gathered context": {"mesh.context": 8},
    "replica x data": {"mesh.replica": 2, "mesh.data": 4},
    "replica x fsdp": {"mesh.replica": 2, "mesh.fsdp": 4},
    "data x tensor": {"mesh.data": 4, "mesh.tensor": 2},
    "fsdp x tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
    "fsdp x ring": {"mesh.fsdp": 2, "mesh.context": 4, "mesh.context_attention": "ring"},
    "ring x tensor": {"mesh.context": 4, "mesh.tensor": 2, "mesh.context_attention": "ring"},
    "replica x fsdp x tensor": {"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "fsdp x gathered context x tensor": {"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2},
    "data x fsdp, accumulated": {
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "stages.core.accumulation_steps": 2,
    },
    "data, accumulated, full remat": {
        "mesh.data": 4,
        "stages.core.accumulation_steps": 4,
        "remat.policy": "full",
    },
    "fsdp, unrolled, named remat": {
        "mesh.fsdp": 4,
        "model.scan_layers": False,
        "remat.policy": "save_named",
    },
    "fsdp, offloaded": {
        "mesh.fsdp": 4,
        "offload.optimizer": True,
        "remat.policy": "save_named",
        "offload.activations": ["query", "ffn_gate"],
    },
    "fsdp x tensor, untied": {"mesh.fsdp": 2, "mesh.tensor": 4, "model.tied_embeddings": False},
}
FEWER = ["data", "fsdp", "fsdp x tensor", "ring x tensor", "replica x fsdp x tensor"]
# Offloading is tested here alone. The golden losses and `tests/models` have the parts that the
# others combine: fsdp with tensor, a ring, and fewer key heads than shards.
OFTEN = ("fsdp, offloaded",)


@pytest.fixture(scope="module")
def prepared(tiny: Run) -> Prepared:
    return prepare(tiny, lambda line: None)


def with_optimizer(run: Run, kind: str, **changes: Any) -> Run:
    changes = {"mesh.fsdp": 1, **WIDE, "stages.core.tokens": STEPS * 1024, **changes}
    if kind == "adamw":
        changes |= {"stages.core.learning_rate": 3e-3, "stages.core.weight_decay": 0.1}
    return override(run, changes | {"optimizer.kind": kind})


def losses(run: Run, prepared: Prepared) -> tuple[list[float], Any]:
    """The loss of each step of the first stage, and the state after the last."""
    resolved = resolve_stage(run, "core")
    layout, stage = resolved.layout.of_step, resolved.stage
    rows = layout.rows(stage.batch_size)
    batches = Batches(stage, "core", run.seed, prepared.train, rows)
    program, state = compile_stage(resolved), initial_state(resolved)
    state = state._replace(optimizer=begin_stage(state.optimizer))
    result = []
    for step in range(STEPS):
        state, metrics = program.step(state, layout.place(batches[step], rows, stage.batch_size))
        result.append(float(metrics["loss"]))
    return result, state


@pytest.fixture(scope="module")
def one_device(tiny: Run, prepared: Prepared) -> Any:
    @cache
    def losses_of(kind: str, tied: bool) -> tuple[list[float], Any]:
        return losses(with_optimizer(tiny, kind, **{"model.tied_embeddings": tied}), prepared)

    return losses_of


def assert_follows(
    name: str, kind: str, tolerance: float, tiny: Run, prepared: Prepared, one_device: Any
) -> Any:
    changes = LAYOUTS[name]
    run = with_optimizer(tiny, kind, **changes)
    reference, _ = one_device(kind, changes.get("model.tied_embeddings", True))
    found, state = losses(run, prepared)
    assert reference[-1] < reference[0] - 0.5  # it learns, or the comparison would say little
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))
    print(f"{name}, {kind}: largest relative difference {difference:.2e}")
    assert difference <= tolerance
    return run, state


@pytest.mark.parametrize("name", deep_but(OFTEN, LAYOUTS))
def test_adamw_follows_one_device(
    name: str, tiny: Run, prepared: Prepared, one_device: Any
) -> None:
    run, state = assert_follows(name, "adamw", 1e-5, tiny, prepared, one_device)
    # Parameters and moments are stored once over fsdp and tensor, and no device holds more than its
    # share.
    shards = run.mesh.fsdp * run.mesh.tensor
    for tree in (state.params, state.optimizer.direction.mu, state.optimizer.direction.nu):
        for path, leaf in walk(tree):
            own = leaf.addressable_shards[0].data.nbytes
            whole_on_tensor = (
                path in ("layers/key", "layers/value") and run.mesh.tensor > run.model.num_kv_heads
            )
            assert own * (run.mesh.fsdp if whole_on_tensor else shards) == leaf.nbytes, path
    if run.offload.optimizer:
        assert state.optimizer.direction.mu["embedding"].sharding.memory_kind == "pinned_host"


# The golden losses and tests/optim have each of them on a mesh.
@pytest.mark.deep
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adamw"])
@pytest.mark.parametrize("name", FEWER)
def test_other_optimizers_follow_one_device(
    name: str, kind: str, tiny: Run, prepared: Prepared, one_device: Any
) -> None:
    assert_follows(name, kind, KINDS[kind].tolerance, tiny, prepared, one_device)


def test_layouts_differ_where_they_should(tiny: Run, prepared: Prepared) -> None:
    """Each process reads the rows that its devices work on; those of all make up the batch."""
    run = with_optimizer(tiny, "adamw", **LAYOUTS["fsdp x tensor"])
    layout = resolve_stage(run, "core").layout
    assert layout.rows(16) == list(range(16))
    batch = {"inputs": np.arange(16 * 64, dtype=np.int32).reshape(16, 64)}
    placed = layout.place(batch, range(16), 16)["inputs"]
    assert np.array_equal(np.asarray(placed), batch["inputs"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 64)}
    assert len(jax.devices()) >= MeshConfig(fsdp=8).fsdp
