"""The on-device model of 2025: layers that reuse the keys and values of an earlier one."""

import dataclasses
from pathlib import Path

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
    batch_of,
    params_of,
)

from braeburn.config import ModelConfig, Remat
from braeburn.errors import UserError
from braeburn.layers.spec import count, walk
from braeburn.models import cached, decoder
from braeburn.models.families import FAMILIES, family_of
from braeburn.objectives import cross_entropy
from braeburn.recipes import load
from support import braeburn

# Three layers with keys and values of their own and two that reuse those of the third.
MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    pattern=load("afm-on-device-2025").model.pattern,
    tail_pattern=load("afm-on-device-2025").model.tail_pattern,
    tail_layers=2,
)


def test_its_size_is_as_published() -> None:
    """3.11B: 153,600 rows, 35 layers of all matrices and 21 without those of keys and values."""
    run = load("afm-on-device-2025")
    specs = decoder.param_specs(run.model)
    assert count(specs) == pytest.approx(3.11e9, rel=1e-3)
    paths = {path: spec.shape for path, spec in walk(specs)}
    assert paths["layers/key"] == (35, 2048, 2, 128)
    assert paths["tail/query"] == (21, 2048, 16, 128)
    assert "tail/key" not in paths and "tail/value" not in paths and "tail/key_norm" not in paths


def test_the_last_layers_attend_to_the_third_ones_keys() -> None:
    params = params_of(MODEL)
    tokens = batch_of(MODEL)["inputs"][:1]
    inputs = (tokens, np.arange(LENGTH)[None], np.ones_like(tokens))
    forward = jax.jit(lambda params: decoder.forward(params, inputs, MODEL, FLOAT32))

    def without(layer: int) -> np.ndarray:
        """Hidden states where a layer's values are zero and its own attention adds nothing."""
        layers = dict(params["layers"])
        for name in ("value", "attention_output"):
            layers[name] = layers[name].at[layer].set(0.0)
        return np.asarray(forward(params | {"layers": layers}))

    def without_reuse(layer: int) -> np.ndarray:
        """The same where the reusing layers' attention adds nothing either."""
        layers, tail = dict(params["layers"]), dict(params["tail"])
        for name in ("value", "attention_output"):
            layers[name] = layers[name].at[layer].set(0.0)
        tail["attention_output"] = tail["attention_output"] * 0
        return np.asarray(forward(params | {"layers": layers, "tail": tail}))

    # Values of the third layer alone reach the last layers, which without them add nothing.
    np.testing.assert_array_equal(without(2), without_reuse(2))
    assert np.abs(without(1) - without_reuse(1)).max() > 1e-2


def test_a_cache_gives_the_hidden_states_of_the_whole_sequence() -> None:
    cache = cached.empty_cache(MODEL, 1, 8, FLOAT32, stacked=True)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(3, 1, 2, 8, 8)] * 2
    assert_a_cache_gives_the_same(MODEL)


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full")])
def test_how_it_is_computed_changes_no_number(scan: bool, remat: str) -> None:
    assert_ways_agree(MODEL, scan=scan, remat=remat)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_same_loss_and_gradients(name: str) -> None:
    assert_layouts_agree(MODEL, MESHES[name])


@pytest.mark.deep
def test_a_pruned_model_gives_what_the_masked_one_does() -> None:
    assert_pruned_is_masked(
        MODEL.model_copy(update={"norm_epsilon": 1e-9}), {"ffn": 20, "heads": 2}
    )


def test_keys_and_values_of_other_layers_are_not_kept() -> None:
    """Memory grows by a layer's input, and not by keys and values that nobody reuses."""

    def temporary_bytes(layers: int) -> int:
        model = MODEL.model_copy(update={"num_layers": layers + 2, "head_dim": 64})
        execution = dataclasses.replace(FLOAT32, remat=Remat(policy="full"))
        gradient = jax.grad(lambda p, b: cross_entropy.loss(p, b, model, execution)[0])
        params, batch = params_of(model), batch_of(model)
        compiled = jax.jit(gradient).lower(params, batch).compile()
        parameters = 4 * count(decoder.param_specs(model))
        return compiled.memory_analysis().temp_size_in_bytes - parameters

    per_layer = (temporary_bytes(24) - temporary_bytes(8)) / 16
    tokens = batch_of(MODEL)["inputs"].size
    assert per_layer < 4 * tokens * (MODEL.d_model + 64)  # keys and values alone are 256 a token


@pytest.mark.deep
def test_a_toy_trains_and_generates(tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ("--set", "stages.core.tokens=16384", "--set", "checkpoint.every_steps=8")
    answer = braeburn("train", "afm-on-device-2025-tiny", "--out", out, *changes)
    assert answer.code == 0, answer.err
    text = braeburn("generate", out, "--prompt", "def ", "--max-new-tokens", "8")
    assert text.code == 0 and text.out.startswith("def "), text.err
    refused = braeburn("export", out, "--out", tmp_path / "hf")
    assert refused.code == 2 and "no other software has a model of these layers" in refused.err


def test_other_software_has_no_such_model() -> None:
    known = ", ".join(family.model_type for family in FAMILIES)
    with pytest.raises(UserError, match=f"known are {known}"):
        family_of(MODEL)
