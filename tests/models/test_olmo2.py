"""OLMo 2 beyond its logits, which tests/interop compares with transformers: a norm over heads that
several devices hold, pruning, generation, size.
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
from braeburn.layers.spec import count
from braeburn.models import decoder
from braeburn.models.families import family_of, olmo2

# On four tensor shards two of them share a key head.
MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    qk_norm=False,
    tied_embeddings=False,
    pattern=(olmo2.LAYER,),
)


def test_a_cache_gives_the_hidden_states_of_the_whole_sequence() -> None:
    assert_a_cache_gives_the_same(MODEL)


def test_how_it_is_computed_changes_no_number() -> None:
    assert_ways_agree(MODEL, scan=False, remat="full")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_loss_and_gradients(name: str) -> None:
    assert_layouts_agree(MODEL, MESHES[name])


@pytest.mark.parametrize("keep", [{"ffn": 20, "heads": 2}, {"embed": 16}], ids=str)
def test_a_pruned_model_gives_what_the_masked_one_does(keep: dict[str, int]) -> None:
    # The epsilon of a norm weighs more where less is kept (see `pruning.masked`).
    assert_pruned_is_masked(MODEL.model_copy(update={"norm_epsilon": 1e-9}), keep)


def test_its_size_is_as_published() -> None:
    model = olmo2.olmo2_7b()
    assert family_of(model) is olmo2.FAMILY
    assert count(decoder.param_specs(model)) == pytest.approx(7.3e9, rel=1e-3)
