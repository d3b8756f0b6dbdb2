"""Gemma 3 beyond its logits, which tests/interop compares with transformers: windows, patterns that
are cut short, layouts, pruning, generation and the size of the published models.
"""

from typing import Any

import jax
import numpy as np
import pytest
from checks import (
    FLOAT32,
    LAYOUTS,
    LENGTH,
    MESHES,
    assert_a_cache_gives_the_same,
    assert_layouts_agree,
    assert_pruned_is_masked,
    assert_ways_agree,
)

from braeburn.config import ModelConfig
from braeburn.config.sublayers.sliding import SlidingAttention
from braeburn.layers.spec import count, initialize
from braeburn.models import decoder
from braeburn.models.families import family_of, gemma3
from braeburn.recipes import load
from braeburn.verify.shrink import shrink

LOCAL, ALL = gemma3.layers(12)
# Three layers that see the last tokens and one that sees all, then two of the former.
MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    pattern=(LOCAL, LOCAL, LOCAL, ALL),
    scaled_embedding=True,
)


def test_a_token_beyond_the_windows_of_all_layers_changes_nothing() -> None:
    model = MODEL.model_copy(update={"num_layers": 3})
    assert [layer.attention.kind for layer in model.layer_configs] == ["sliding"] * 3
    params = initialize(decoder.param_specs(model), 0)
    tokens = np.random.default_rng(0).integers(0, 96, (1, LENGTH), dtype=np.int32)
    other = tokens.copy()
    other[0, 10] += 1
    positions, segments = np.arange(LENGTH)[None], np.ones((1, LENGTH), np.int32)

    @jax.jit
    def forward(tokens: Any) -> Any:
        return decoder.forward(params, (tokens, positions, segments), model, FLOAT32)

    differs = np.abs(np.asarray(forward(tokens) - forward(other))[0]).max(axis=-1) > 0
    # Each of three layers hands on what it saw of the last twelve tokens.
    assert differs[10:44].all() and not differs[:10].any() and not differs[44:].any()


def test_a_cache_gives_the_hidden_states_of_the_whole_sequence() -> None:
    assert_a_cache_gives_the_same(MODEL)


@pytest.mark.parametrize(
    ("scan", "remat"), [(False, "none"), pytest.param(True, "full", marks=pytest.mark.deep)]
)
def test_how_it_is_computed_changes_no_number(scan: bool, remat: str) -> None:
    assert_ways_agree(MODEL, scan=scan, remat=remat)


@pytest.mark.deep
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_loss_and_gradients(name: str) -> None:
    assert_layouts_agree(MODEL, MESHES[name])


def test_a_pruned_model_gives_what_the_masked_one_does() -> None:
    assert_pruned_is_masked(MODEL, {"ffn": 20, "heads": 2})


def test_sizes_are_as_published() -> None:
    """Without the embedding 698M and 3,209M (arXiv 2503.19786, table 1: 698M, 3,209M)."""
    for model, embedding, others in (
        (gemma3.gemma3_1b(), 302e6, 698e6),
        (gemma3.gemma3_4b(), 675e6, 3209e6),
    ):
        size = model.vocab_size * model.d_model
        assert size == pytest.approx(embedding, rel=6e-3)
        assert count(decoder.param_specs(model)) - size == pytest.approx(others, rel=1e-3)
        assert family_of(model) is gemma3.FAMILY


def test_a_shrunken_recipe_keeps_its_kinds_of_layers() -> None:
    run: Run = shrink(load("gemma3-1b"), 8)
    kinds = [layer.attention.kind for layer in run.model.layer_configs]
    assert kinds == ["sliding"] * 5 + ["full"] + ["sliding"] * 2
    window = run.model.layer_configs[0].attention
    assert isinstance(window, SlidingAttention) and window.window == 16
