"""The collectives of the compiled train step, against formulas: bytes on one device by kind and
axes, to the byte.
"""

import math
import re
from collections import Counter
from typing import Any

import jax
import pytest

from braeburn.config import MeshConfig, Run, override
from braeburn.config.optimizers import KINDS
from braeburn.layers import linear
from braeburn.layers.spec import walk
from braeburn.layers.weights import gathered
from braeburn.models import decoder
from braeburn.objectives import vocabulary
from braeburn.optim.definition import Parameters, update_cost
from braeburn.plan.collectives import Collective, collectives, traffic
from braeburn.plan.cost import work_of
from braeburn.train.resolved import resolve_stage
from braeburn.train.stages import compile_stage
from support import deep_but

# Sizes whose products differ, so that an array tells by its size what it is. Floats in collectives
# are float32.
L, D, N, K, H, F, V = 5, 56, 8, 4, 8, 176, 520
B, T = 16, 48
SIZES = {
    "model.num_layers": L,
    "model.d_model": D,
    "model.num_heads": N,
    "model.num_kv_heads": K,
    "model.head_dim": H,
    "model.ffn_dim": F,
    "model.vocab_size": V,
    "stages.core.sequence_length": T,
    "stages.core.batch_tokens": B * T,
    "stages.core.tokens": 10 * B * T,
    "stages.core.learning_rate": 1e-3,
}
FLOAT = 4
MATRICES = FLOAT * L * (2 * D * N * H + 2 * D * K * H + 3 * D * F)
NORMS = FLOAT * (L * (2 * D + 2 * H) + D)
HEAD = FLOAT * V * D
GRADIENT = MATRICES + NORMS + HEAD
HIDDEN = FLOAT * B * T * D
KEYS_AND_VALUES = FLOAT * 2 * L * B * T * K * H


def fully_sharded(fsdp: int, batch_shards: int) -> dict[tuple[str, str], int]:
    """Along fsdp, which has `fsdp` devices, of a batch that is split over `batch_shards`."""
    return {
        # Weights before each layer and before its backward pass, norms once, the head for log Z and
        # for its gradient.
        ("all-gather", "fsdp"): 2 * MATRICES + NORMS + 2 * HEAD,
        ("reduce-scatter", "fsdp"): GRADIENT,
        # Each device's tokens, a slice of whose embeddings each device looks up; and their
        # gradients.
        ("all-to-all", "fsdp"): 2 * HIDDEN // batch_shards,
    }


def tensor_parallel(gradients: int) -> dict[tuple[str, str], int]:
    """Along tensor, of which `gradients` are for copies of weights.

    Each layer gathers the tokens before attention and FFN and scatters them after, as do loss and
    embedding once; the backward pass does it the other way round.
    """
    return {
        ("all-gather", "tensor"): (4 * L + 2) * HIDDEN + NORMS,
        ("reduce-scatter", "tensor"): (4 * L + 2) * HIDDEN + NORMS,
        # For each token: the largest logit, the sum of exponentials, and the logit of the target.
        ("all-reduce", "tensor"): 3 * FLOAT * B * T + gradients,
    }


# Mesh, bytes by kind and axes.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[tuple[str, str], int]]] = {
    "data": ({"data": 8}, {("all-reduce", "data"): GRADIENT}),
    "fsdp": ({"fsdp": 8}, fully_sharded(8, 8)),
    "replica x fsdp": (
        {"replica": 2, "fsdp": 4},
        fully_sharded(4, 8) | {("all-reduce", "replica"): GRADIENT // 4},
    ),
    "ring": (
        {"context": 8, "context_attention": "ring"},
        # Forward and backward 7 ring steps, and 8 of the gradients.
        {
            ("all-reduce", "context"): GRADIENT,
            ("collective-permute", "context"): (7 + 7 + 8) * KEYS_AND_VALUES // 8,
        },
    ),
    "gathered context": (
        {"context": 8},
        {
            ("all-reduce", "context"): GRADIENT,
            ("all-gather", "context"): 2 * KEYS_AND_VALUES,
            ("reduce-scatter", "context"): KEYS_AND_VALUES,
        },
    ),
    "tensor": ({"tensor": 4}, tensor_parallel(0)),
    "tensor, fewer key heads than shards": (
        {"tensor": 8},
        tensor_parallel(FLOAT * 2 * L * D * K * H),
    ),
}


def test_a_pipeline_exchanges_weights_once_and_a_message_a_slot(tiny: Run) -> None:
    """Along `pipeline`: the matrices dealt out and their gradients back, the table and the norms
    joined and their gradients scattered; and hidden states at each slot, forward and backward.
    """
    devices, steps, layers = 4, 8, 8
    changes = {
        **SIZES,
        "model.num_layers": layers,
        "mesh.fsdp": 1,
        "mesh.pipeline": devices,
        "stages.core.accumulation_steps": steps,
        "optimizer.kind": "adamw",
    }
    stage = resolve_stage(override(tiny, changes), "core")
    text = compile_stage(stage).step.as_text()
    found = [
        one
        for one in collectives(text, stage.layout.sizes.sizes)
        if one.axes == ("pipeline",) and math.prod(one.shape) > 1
    ]
    matrices, norms = MATRICES * layers // L, FLOAT * (layers * (2 * D + 2 * H) + D)
    slots = 2 * (steps + devices - 1)
    assert traffic(found) == {
        ("all-to-all", ("pipeline",)): 2 * matrices // devices,
        ("all-gather", ("pipeline",)): HEAD + norms,
        ("reduce-scatter", ("pipeline",)): HEAD + norms,
        ("collective-permute", ("pipeline",)): slots * HIDDEN // steps,
    }


def compiled(
    tiny: Run,
    mesh: dict[str, Any],
    accumulation_steps: int = 1,
    kind: str = "adamw",
    matmul: str = "compute",
) -> tuple[str, list[Collective]]:
    """The text of the train step on a mesh under a kind of optimizer, and its collectives."""
    changes = {"mesh.fsdp": 1, "stages.core.accumulation_steps": accumulation_steps}
    changes["precision.matmul"] = matmul
    changes |= {f"mesh.{axis}": size for axis, size in mesh.items()} | {"optimizer.kind": kind}
    run = override(tiny, SIZES | changes)
    stage = resolve_stage(run, "core")
    text = compile_stage(stage).step.as_text()
    return text, collectives(text, stage.layout.sizes.sizes)


@pytest.fixture(scope="module")
def compiled_once(tiny: Run) -> Any:
    results: dict[str, Any] = {}

    def result(mesh: dict[str, Any]) -> tuple[str, list[Collective]]:
        if str(mesh) not in results:
            results[str(mesh)] = compiled(tiny, mesh)
        return results[str(mesh)]

    return result


# The others are parts of these.
OFTEN = LAYOUTS.keys() - {"data", "fsdp", "tensor"}


@pytest.mark.parametrize("name", deep_but(OFTEN, LAYOUTS))
def test_bytes_are_those_of_the_formula(name: str, compiled_once: Any) -> None:
    mesh, expected = LAYOUTS[name]
    _, found = compiled_once(mesh)
    assert not [c for c in found if c.conditional]
    # Metrics and the gradient's norm; tokens and segments, which the compiler may gather once for
    # all layers.
    scalars = [c for c in found if c.shape == ()]
    integers = [c for c in found if c.dtype == "s32"]
    assert sum(c.bytes * c.times for c in scalars) <= 128
    assert sum(c.bytes * c.times for c in integers) <= 2 * L * 4 * B * T
    rest = [c for c in found if c not in scalars + integers]
    assert traffic(rest) == {(kind, (axis,)): size for (kind, axis), size in expected.items()}


def test_accumulated_gradients_cross_replicas_once_a_step(tiny: Run) -> None:
    _, found = compiled(tiny, {"replica": 2, "fsdp": 4}, accumulation_steps=2)
    rest = [c for c in found if c.shape and c.dtype != "s32"]
    # Within the replica gradients are never whole, so their sum is formed part by part; norms do
    # not change between.
    expected = {(kind, (axis,)): 2 * size for (kind, axis), size in fully_sharded(4, 16).items()}
    expected["all-gather", ("fsdp",)] -= NORMS
    assert traffic(rest) == expected | {("all-reduce", ("replica",)): GRADIENT // 4}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adamw"])
@pytest.mark.parametrize("mesh", [{"replica": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_an_update_adds_what_its_optimizer_declares(
    kind: str, mesh: dict[str, Any], tiny: Run, compiled_once: Any
) -> None:
    """To the collectives of AdamW, whose update is element-wise; but for a number a layer."""
    plain, found = (
        Counter(traffic(c for c in collectives if math.prod(c.shape) > L))
        for collectives in (compiled_once(mesh)[1], compiled(tiny, mesh, kind=kind)[1])
    )
    run = override(tiny, SIZES | {"optimizer.kind": kind})
    sizes = MeshConfig.model_validate({"fsdp": 1} | mesh)
    execution = run.execution("core", sizes)
    parameters = Parameters(decoder.param_specs(run.model), run.model, execution)
    declared: Counter[tuple[str, tuple[str, ...] | None]] = Counter()
    for collective in update_cost(run.optimizer, parameters).collectives:
        declared[collective.kind, (collective.axis,)] += collective.bytes
    assert found == plain + declared


# In int8 the largest number of each row that tensor shards have a part of: of tokens and weights,
# forward of the two products that sum over heads and hidden units, backward of the five others.
UNITS = {"fp8": 0, "int8": FLOAT * 7 * L * (B * T + D)}


@pytest.mark.parametrize("matmul", deep_but(("int8",), UNITS))
def test_products_in_8_bits_add_the_units_of_split_rows(matmul: str, tiny: Run) -> None:
    mesh, expected = LAYOUTS["tensor"]
    _, found = compiled(tiny, mesh, matmul=matmul)
    rest = [c for c in found if c.shape and c.dtype != "s32"]
    expected = expected | {
        ("all-reduce", "tensor"): expected["all-reduce", "tensor"] + UNITS[matmul]
    }
    assert traffic(rest) == {(kind, (axis,)): size for (kind, axis), size in expected.items()}
    sizes = MeshConfig.model_validate({"fsdp": 1} | mesh)
    planned = [
        sum(
            total.bytes
            for total in work_of(
                override(tiny, SIZES | {"precision.matmul": kind, "remat.policy": "none"}),
                "core",
                sizes,
            ).microbatch_collectives
            if (total.axis, total.kind) == ("tensor", "all-reduce")
        )
        for kind in ("compute", matmul)
    ]
    assert planned[1] - planned[0] == UNITS[matmul]


def whole_arrays(text: str, mesh: dict[str, int]) -> list[tuple[int, ...]]:
    """Arrays as large as a parameter of all layers, the head or the logits, where fsdp does not
    split them.
    """
    tensor, batch_shards = mesh.get("tensor", 1), mesh.get("replica", 1) * mesh["fsdp"]
    matrices = [L * D * N * H // tensor, L * D * K * H // tensor, L * D * F // tensor]
    sizes = {*matrices, V // tensor * D, V // tensor * B * T // batch_shards}
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}
    return [shape for shape in arrays if math.prod(shape) in sizes]


SHARDED = [{"fsdp": 8}, {"replica": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize("mesh", SHARDED, ids=str)
def test_nothing_whole_is_ever_held(mesh: dict[str, int], compiled_once: Any) -> None:
    text, found = compiled_once(mesh)
    assert whole_arrays(text, mesh) == []
    gathered = [c.bytes for c in found if c.kind == "all-gather" and c.axes == ("fsdp",)]
    assert max(gathered) == FLOAT * D * F // mesh.get("tensor", 1)


# Deliberately wrong programs, for the checks to notice.


def test_weights_gathered_before_the_layers_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tiny: Run
) -> None:
    def all_at_once(params: Any, specs: Any, execution: Any) -> Any:
        return jax.tree.map(
            lambda leaf, spec: (
                leaf if spec.role == "embedding" else gathered(leaf, spec, execution)
            ),
            params,
            specs,
        )

    monkeypatch.setattr(decoder, "gathered_norms", all_at_once)
    monkeypatch.setattr(linear, "gathered", lambda weight, spec, execution: weight)
    text, found = compiled(tiny, {"fsdp": 8})
    assert (L, D, F) in whole_arrays(text, {"fsdp": 8})
    assert max(c.bytes for c in found) == FLOAT * L * D * F
    assert traffic(found)["all-gather", ("fsdp",)] < LAYOUTS["fsdp"][1]["all-gather", "fsdp"]


def test_a_whole_head_is_noticed(monkeypatch: pytest.MonkeyPatch, tiny: Run) -> None:
    monkeypatch.setattr(vocabulary, "block_length", lambda tokens, width, vocab_size: vocab_size)
    assert (V, D) in whole_arrays(compiled(tiny, {"fsdp": 8})[0], {"fsdp": 8})


def test_sizes_are_those_of_the_model(tiny: Run) -> None:
    specs = dict(walk(decoder.param_specs(override(tiny, SIZES).model)))
    assert FLOAT * sum(math.prod(spec.shape) for spec in specs.values()) == GRADIENT
