"""The table of what lies where, and the sentences about a mesh that does not divide a run."""

import json
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from braeburn.config import Execution, MeshConfig, Placement, Run, ShardingRules, override
from braeburn.config.mesh import AXES
from braeburn.errors import UserError
from braeburn.parallel.rules import partition
from braeburn.recipes import load
from braeburn.train.resolved import resolve_stage
from support import braeburn


def test_each_kind_of_array_has_its_own_mapping() -> None:
    mesh = Execution(MeshConfig(replica=2, data=2, fsdp=4, context=2, tensor=2))
    axes, shape = ("layers", "embed", "ffn"), (2, 64, 160)
    assert partition(axes, shape, "parameters", mesh, "matrix") == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert partition(axes, shape, "optimizer", mesh, "matrix") == PartitionSpec(
        None, "fsdp", "tensor"
    )
    assert partition(axes, shape, "activations", mesh, "matrix") == PartitionSpec(
        None, None, "tensor"
    )
    batch = partition(("batch", "length"), (16, 64), "activations", mesh)
    assert batch == PartitionSpec(("replica", "data", "fsdp"), "context")


def test_what_does_not_divide_stays_whole_only_where_the_rule_says_so() -> None:
    mesh = Execution(MeshConfig(fsdp=8, tensor=4))
    assert partition(("layers", "embed"), (2, 96), "parameters", mesh, "norm") == PartitionSpec(
        None, ("fsdp", "tensor")
    )
    assert partition(("head_dim",), (48,), "parameters", mesh, "norm") == PartitionSpec(None)
    assert partition(("kv_heads",), (2,), "parameters", mesh, "matrix") == PartitionSpec(None)
    with pytest.raises(
        UserError,
        match=r"the 6 of 'heads' cannot be split into 4 .*set mesh.tensor to one of \[1, 2",
    ):
        partition(("heads",), (6,), "parameters", mesh, "matrix")


def test_two_dimensions_along_one_axis_clash() -> None:
    heads = Placement(parameters=("fsdp",), optimizer=("fsdp",))
    execution = Execution(MeshConfig(fsdp=4), ShardingRules(head_dim=heads))
    with pytest.raises(
        UserError,
        match="'embed' and 'head_dim' of one array of parameters along the mesh axis 'fsdp'; give",
    ):
        partition(("embed", "head_dim"), (64, 160), "parameters", execution, "matrix")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"mesh.fsdp": 3},
            "'embedding': the 64 of 'embed' cannot be split into 3 equal parts (mesh.fsdp=3); set "
            "mesh.f",
        ),
        (
            {"mesh.tensor": 3},
            "model parameter 'embedding': the 512 of 'vocab' cannot be split into 3 equal parts",
        ),
        (
            {"mesh.tensor": 8},
            "'layers/query': the 4 of 'heads' cannot be split into 8 equal parts (mesh.tensor=8); "
            "set",
        ),
        (
            {"model.num_heads": 12, "model.num_kv_heads": 6, "mesh.tensor": 4},
            "neither divides nor is a multiple of",
        ),
        (
            {"mesh.fsdp": 32},
            "the 16 sequences of a batch cannot be split into 32 equal parts (mesh.fsdp=32); set "
            "mesh",
        ),
        (
            {"mesh.data": 2, "mesh.fsdp": 4, "stages.core.accumulation_steps": 4},
            "the 4 sequences of a batch over accumulation_steps=4 cannot be split into 8 equal "
            "parts (mesh.data=2 x "
            "mesh.fsdp=4); set mesh.fsdp to one of [1, 2] or mesh.data to one of [1]",
        ),
        (
            {"mesh.context": 64},
            "mesh.context=64 splits sequences of 64 tokens into 128 pieces, which do not come out",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_one_sentence(
    changes: dict[str, Any], sentence: str, tiny: Run
) -> None:
    with pytest.raises(UserError) as refusal:
        resolve_stage(override(tiny, {"mesh.fsdp": 1, **changes}), "core")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_sizes_that_it_names_work(tiny: Run) -> None:
    with pytest.raises(UserError) as refusal:
        resolve_stage(override(tiny, {"mesh.fsdp": 1, "mesh.tensor": 8}), "core")
    for size in json.loads(str(refusal.value).partition("one of ")[2]):
        resolve_stage(override(tiny, {"mesh.fsdp": 1, "mesh.tensor": size}), "core")


def test_experts_are_refused_with_sizes_that_work(tiny: Run) -> None:
    sparse = override(
        tiny, {"model.pattern.0.feed_forward.kind": "experts", "mesh.fsdp": 1, "mesh.data": 1}
    )
    with pytest.raises(UserError, match=r"the 8 of 'experts' cannot be split into 3") as refusal:
        resolve_stage(override(sparse, {"mesh.expert": 3}), "core")
    sizes = json.loads(str(refusal.value).partition("set mesh.expert to one of ")[2])
    assert sizes == [1, 2, 4, 8]
    for size in sizes:
        resolve_stage(override(sparse, {"mesh.expert": size}), "core")


def test_a_model_without_experts_takes_the_axis_as_more_of_fsdp(tiny: Run) -> None:
    found = resolve_stage(override(tiny, {"mesh.fsdp": 2, "mesh.expert": 4}), "core").layout
    both = resolve_stage(override(tiny, {"mesh.fsdp": 8}), "core").layout
    assert found.batch_partition()[0] == ("fsdp", "expert")
    placed = (jax.tree.leaves(layout.parameters()) for layout in (found, both))
    for spec, one, other in zip(jax.tree.leaves(found.specs), *placed, strict=True):
        assert one.shard_shape(spec.shape) == other.shard_shape(spec.shape)


def test_a_stage_may_have_a_mesh_of_its_own(tiny: Run) -> None:
    run = override(
        tiny, {"mesh.fsdp": 8, "stages.context.mesh.context": 2, "stages.context.mesh.fsdp": 4}
    )
    assert resolve_stage(run, "core").layout.sizes.fsdp == 8
    assert resolve_stage(run, "context").layout.sizes.context == 2
    with pytest.raises(
        UserError, match=r"stages.context: the 4 sequences of a batch cannot be split into 8"
    ):
        resolve_stage(override(tiny, {"mesh.fsdp": 8}), "context")


def test_the_command_line_tells_it_before_anything_is_written(tmp_path: Any) -> None:
    answer = braeburn("train", "afm-tiny", "--out", tmp_path / "out", "--set", "mesh.tensor=3")
    assert answer.code == 2 and answer.err.startswith("error: ") and "mesh.tensor" in answer.err
    assert not (tmp_path / "out").exists()


def test_the_recipes_have_meshes_that_their_targets_take() -> None:
    assert load("quickstart").mesh.sizes == dict.fromkeys(AXES, 1)
