"""A pipeline computes on every layout what one device computes."""

from functools import cache
from typing import Any

import jax
import pytest
from test_layouts import losses, with_optimizer

from braeburn.config import Run, override
from braeburn.data.prepare import Prepared, prepare
from braeburn.errors import UserError
from braeburn.models.staged import divided, layer_costs
from braeburn.train import pipelined
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import lower_stage
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
OFTEN = ("interleaved x tensor",)


REFUSED = [
    (
        {"mesh.stages_per_device": 2},
        "stages_per_device=2 deals the layers of a pipeline out in turns, and pipeline=1 is none",
        {"mesh.stages_per_device": 1},
    ),
    (
        {"mesh.pipeline": 4, "mesh.context": 2, "mesh.context_attention": "ring"},
        "context_attention='ring' cannot go round within the stages of pipeline=4",
        {"mesh.context_attention": "all_gather"},
    ),
    (
        {"mesh.pipeline": 8, "mesh.stages_per_device": 2},
        "mesh.pipeline=8 x mesh.stages_per_device=2 is more stages than the 8 repeats of the "
        "model's pattern of layers; set mesh.pipeline to at most 4",
        {"mesh.pipeline": 4},
    ),
    (
        {"mesh.pipeline": 4, "mesh.stages_per_device": 2, "stages.core.accumulation_steps": 2},
        "accumulation_steps=2 is not a multiple of mesh.pipeline=4, which "
        "mesh.stages_per_device=2 needs for microbatches to take turns; set "
        "stages.core.accumulation_steps to one of [4, 8, 16]",
        {"stages.core.accumulation_steps": 8},
    ),
    (
        {"mesh.pipeline": 4, "offload.activations": ["query"], "remat.policy": "save_named"},
        "offload.activations=['query'] cannot wait on the host in a pipeline (mesh.pipeline=4)",
        {"offload.activations": []},
    ),
    (
        {
            "mesh.pipeline": 4,
            "mesh.data": 2,
            "rules.embed.parameters": [],
            "rules.ffn.parameters": ["tensor", "fsdp", "data"],
        },
        "rules.ffn.parameters=['tensor', 'fsdp', 'data'] must name 'fsdp' last for "
        "mesh.pipeline=4 to deal layers out; move it to the end",
        {"rules.ffn.parameters": ["tensor", "data", "fsdp"]},
    ),
]


@pytest.mark.parametrize(("changes", "sentence", "advice"), REFUSED)
def test_what_a_pipeline_cannot_do_is_refused(
    changes: dict[str, Any], sentence: str, advice: dict[str, Any], tiny: Run
) -> None:
    """In one sentence, whose advice is followed."""
    with pytest.raises(UserError) as refusal:
        resolve_stage(with_optimizer(tiny, "adamw", **{**DEEP, **changes}), "core")
    assert sentence in str(refusal.value)
    resolve_stage(with_optimizer(tiny, "adamw", **{**DEEP, **changes, **advice}), "core")


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "counts"),
    [(8, 4, [2, 2, 2, 2]), (7, 4, [2, 2, 2, 1]), (10, 4, [3, 3, 2, 2]), (9, 2, [5, 4])],
)
def test_layers_are_divided_evenly(
    num_layers: int, num_stages: int, counts: list[int], tiny: Run
) -> None:
    model = override(tiny, {"model.num_layers": num_layers}).model
    found = [count for _, count in divided(model, num_stages).rows["layers"]]
    assert sorted(found, reverse=True) == counts and found[-1] == min(counts)


def test_a_large_head_counts_as_layers(tiny: Run) -> None:
    fields = {"model.num_layers": 16, "model.vocab_size": 2048}
    model = override(tiny, fields).model
    found = [count for _, count in divided(model, 2).rows["layers"]]
    lengths, head = layer_costs(model, 2)
    assert sum(found) == 16 and found[0] > found[1]
    one = lengths[0] // found[0]
    assert abs(lengths[0] - lengths[1] - head) <= one


@pytest.mark.parametrize(
    "changes", [{}, {"mesh.fsdp": 2}, {"model.num_layers": 7, "remat.policy": "save_named"}]
)
def test_weights_are_not_kept_with_each_microbatch(
    changes: dict[str, Any], tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for the way back has no matrix of a stage in it."""
    kept: list[Any] = []
    begin = pipelined._Device._begin

    def recording(device: Any) -> Any:
        state = begin(device)
        matrices = {leaf.shape[1:] for leaf in jax.tree.leaves(device.weights.layers)}
        kept.append(({leaf.shape[1:] for leaf in state.kept}, matrices))
        return state

    monkeypatch.setattr(pipelined._Device, "_begin", recording)
    run = with_optimizer(tiny, "adamw", **{**DEEP, "mesh.pipeline": 4, **changes})
    lower_stage(resolve_stage(run, "core"))
    ((shapes, matrices),) = kept
    assert shapes and not shapes & {shape for shape in matrices if len(shape) > 2}


@pytest.mark.parametrize(("schedule", "grows"), [("1f1b", False), ("gpipe", True)])
def test_memory_grows_with_microbatches_as_the_schedule_says(
    schedule: str, grows: bool, tiny: Run
) -> None:
    """By the compiler: flat within 5% in 1F1B, and in GPipe by what one more microbatch keeps."""
    sizes = []
    for steps in (4, 16):
        run = with_optimizer(
            tiny,
            "adamw",
            **{
                **DEEP,
                "mesh.pipeline": 4,
                "mesh.pipeline_schedule": schedule,
                "stages.core.sequence_length": 256,
                "stages.core.batch_tokens": 256 * steps,
                "stages.core.accumulation_steps": steps,
                "remat.policy": "save_named",
            },
        )
        compiled = lower_stage(resolve_stage(run, "core")).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] > 1.5 * sizes[0] if grows else sizes[1] < 1.05 * sizes[0]


@pytest.mark.deep
def test_a_fault_in_the_schedule_is_found(
    tiny: Run, prepared: Prepared, one_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that finds what another one has kept gives other losses."""
    real = pipelined.tabled

    def faulty(plan: Any) -> Any:
        table, places = real(plan)
        kept = table.kept.copy()
        backward = table.kind == pipelined.BACKWARD
        kept[backward] = (kept[backward] + 1) % places.kept
        return table._replace(kept=kept), places

    monkeypatch.setattr(pipelined, "tabled", faulty)
    found, _ = losses(with_optimizer(tiny, "adamw", **{**DEEP, "mesh.pipeline": 4}), prepared)
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, one_device(), strict=True))
    assert not difference <= 1e-5


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
