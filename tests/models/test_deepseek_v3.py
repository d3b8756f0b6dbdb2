"""DeepSeek-V3 beyond its logits, which tests/interop compares with transformers: generation from
latents, layouts, pruning, size.
"""

import jax
import numpy as np
import pytest
from checks import (
    LAYOUTS,
    MESHES,
    assert_a_cache_gives_the_same,
    assert_layouts_agree,
    assert_pruned_is_masked,
    assert_ways_agree,
)

from braeburn.config import Execution, MeshConfig, ModelConfig, Precision
from braeburn.config.sublayers.experts import Experts
from braeburn.config.sublayers.latent import LatentAttention
from braeburn.layers.spec import count, count_active
from braeburn.models import cached, decoder
from braeburn.models.families import deepseek_v3, family_of
from braeburn.parallel.rules import partition
from braeburn.recipes import load
from braeburn.train.metrics import flops_per_token

ATTENTION = LatentAttention(latent_dim=12, query_latent_dim=20, plain_dim=8, rotated_dim=4)
EXPERTS = Experts(
    num_experts=4,
    experts_per_token=2,
    expert_dim=24,
    scores="sigmoid",
    scale=2.5,
    bias=True,
    groups=2,
    groups_per_token=1,
    shared_dim=24,
)
MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    ffn_dim=48,
    qk_norm=False,
    tied_embeddings=False,
    **deepseek_v3.layers(ATTENTION, EXPERTS, num_layers=3, dense=1),
)
# Without experts, whose choice of a token hangs on rounding where two scores are close.
DENSE = MODEL.model_copy(update={"tail_layers": 0, "tail_pattern": ()})


def test_a_cache_of_latents_gives_the_hidden_states_of_the_whole_sequence() -> None:
    assert_a_cache_gives_the_same(MODEL)


def test_a_cache_holds_latents_alone() -> None:
    cache = cached.empty_cache(MODEL, 2, 10, Execution(precision=Precision(compute="float32")))
    sizes = {np.shape(leaf) for leaf in jax.tree.leaves(cache)}
    assert sizes == {(2, 1, 10, ATTENTION.latent_dim + ATTENTION.rotated_dim)}


@pytest.mark.parametrize("remat", ["full", pytest.param("save_named", marks=pytest.mark.deep)])
def test_how_it_is_computed_changes_no_number(remat: str) -> None:
    assert_ways_agree(MODEL, scan=False, remat=remat)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_loss_and_gradients(name: str) -> None:
    assert_layouts_agree(DENSE, MESHES[name])


def test_experts_behind_dense_layers_on_a_mesh_give_the_same() -> None:
    assert_layouts_agree(MODEL, {"expert": 2, "tensor": 2, "fsdp": 2})


@pytest.mark.parametrize(
    "keep", [{"ffn": 20, "heads": 2}, pytest.param({"embed": 16}, marks=pytest.mark.deep)], ids=str
)
def test_a_pruned_model_gives_what_the_masked_one_does(keep: dict[str, int]) -> None:
    # The epsilon of a norm weighs more where less is kept (see `pruning.masked`).
    assert_pruned_is_masked(DENSE.model_copy(update={"norm_epsilon": 1e-9}), keep)


def test_latents_are_stored_split_where_a_mesh_divides_them() -> None:
    execution = Execution(MeshConfig(fsdp=4, tensor=2))
    specs = decoder.param_specs(MODEL)["layers"]
    partitions = {
        name: tuple(partition(spec.axes, spec.shape, "parameters", execution, spec.role))
        for name, spec in specs.items()
        if name in ("query_down", "query_up", "latent_norm")
    }
    assert partitions == {
        # The other dimension has the devices already.
        "query_down": (None, "fsdp", None),
        "query_up": (None, "fsdp", "tensor", None),
        "latent_norm": (None, "fsdp"),
    }


def test_its_size_is_as_published() -> None:
    model = load("deepseek-v3").model
    specs = decoder.param_specs(model)
    assert family_of(model) is deepseek_v3.FAMILY
    assert count(specs) == pytest.approx(671e9, rel=1e-3)
    assert count_active(specs) - model.vocab_size * model.d_model == pytest.approx(37e9, rel=2e-2)
    # MaxText counts 152.4 TFLOP/s of a device that trains on 542 tokens a second.
    assert flops_per_token(model, specs, 4096) == pytest.approx(152.4e12 / 542, rel=2e-3)
