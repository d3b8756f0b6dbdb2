"""gpt-oss beyond its logits, which tests/interop compares with transformers: sinks and biases on
several devices, generation, pruning, size.
"""

import pytest
from checks import (
    LAYOUTS,
    MESHES,
    assert_a_cache_gives_the_same,
    assert_layouts_agree,
    assert_pruned_is_masked,
    assert_ways_agree,
)

from braeburn.config import ModelConfig
from braeburn.layers.spec import count, count_active
from braeburn.models import decoder
from braeburn.models.families import family_of, gpt_oss

# On four tensor shards two of them share a key head.
MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=16,
    qk_norm=False,
    tied_embeddings=False,
    pattern=gpt_oss.layers(16, num_experts=4, experts_per_token=2, expert_dim=16),
)


def test_a_cache_gives_the_hidden_states_of_the_whole_sequence() -> None:
    assert_a_cache_gives_the_same(MODEL)


@pytest.mark.deep
def test_how_it_is_computed_changes_no_number() -> None:
    assert_ways_agree(MODEL, scan=False, remat="full")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_loss_and_gradients(name: str) -> None:
    assert_layouts_agree(MODEL, MESHES[name])


@pytest.mark.deep
def test_experts_on_other_devices_give_the_same_loss_and_gradients() -> None:
    assert_layouts_agree(MODEL, {"expert": 2, "tensor": 2, "expert_dispatch": "all_to_all"})


def test_a_pruned_model_gives_what_the_masked_one_does() -> None:
    # The epsilon of a norm weighs more where less is kept (see `pruning.masked`).
    keep = {"heads": 2, "embed": 16}
    assert_pruned_is_masked(MODEL.model_copy(update={"norm_epsilon": 1e-9}), keep)


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [(gpt_oss.gpt_oss_20b(), 20.9e9, 3.6e9), (gpt_oss.gpt_oss_120b(), 116.8e9, 5.1e9)],
    ids=["20b", "120b"],
)
def test_its_size_is_as_published(model: ModelConfig, total: float, active: float) -> None:
    specs = decoder.param_specs(model)
    assert family_of(model) is gpt_oss.FAMILY
    assert count(specs) == pytest.approx(total, rel=1e-3)
    # As published, without the table that tokens are looked up in.
    table = model.vocab_size * model.d_model
    assert count_active(specs) - table == pytest.approx(active, rel=1e-2)
