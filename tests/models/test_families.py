"""Which family a model is one of, and which models none describes."""

import itertools

import pytest

from braeburn.config import LayerConfig, ModelConfig
from braeburn.errors import UserError
from braeburn.models.families import FAMILIES, family_of
from braeburn.models.families.definition import KNOWN_FIELDS
from braeburn.models.families.fields import repeating_fields
from braeburn.models.families.mixtures import pattern

SIZES = {
    "vocab_size": 64,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "ffn_dim": 32,
}


class Capped(ModelConfig):
    """A model with a field that changes its logits and that no family has heard of."""

    logit_cap: float | None = None


def test_a_field_that_no_family_describes_is_refused() -> None:
    assert family_of(Capped(**SIZES)).model_type == "qwen3"
    with pytest.raises(UserError, match=r"model\.logit_cap=30\.0 .*type qwen3") as refusal:
        family_of(Capped(**SIZES, logit_cap=30.0))
    assert "train with model.logit_cap=None" in str(refusal.value)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_field_of_another_family_is_refused(qk_norm: bool) -> None:
    with pytest.raises(UserError, match=r"train with model\.scaled_embedding=False"):
        family_of(ModelConfig(**SIZES, qk_norm=qk_norm, scaled_embedding=True))
    assert family_of(ModelConfig(**SIZES, qk_norm=qk_norm, scaled_embedding=False))


def test_the_fields_that_families_name_exist() -> None:
    named = KNOWN_FIELDS.union(*(family.more_fields for family in FAMILIES))
    assert named <= ModelConfig.model_fields.keys()


DENSE, SPARSE = LayerConfig(), *pattern()


def spelled(layers: str) -> tuple[LayerConfig, ...]:
    return tuple(SPARSE if layer == "S" else DENSE for layer in layers)


def test_any_layers_are_told_as_patterns() -> None:
    for length in range(1, 8):
        for layers in map("".join, itertools.product("DS", repeat=length)):
            fields = {**SIZES, "num_layers": length, **repeating_fields(spelled(layers))}
            assert ModelConfig(**fields).layer_configs == spelled(layers), layers


@pytest.mark.parametrize(
    ("layers", "repeated", "tail"),
    [
        ("SSSS", "S", ""),
        ("DSDSD", "DS", ""),
        ("DDDS", "D", "S"),
        ("DSSSSS", "D", "S"),
        ("DSDSSSS", "DS", "S"),
        ("DDDSDS", "D", "DS"),
        ("DSSDDSDS", "DSS", "DS"),  # the last repeat of the former is cut short
        ("DDDSDDDSDD", "DDDS", ""),
        ("DDDDDSDD", "D", "SDD"),
    ],
)
def test_few_layers_are_left_to_compile(layers: str, repeated: str, tail: str) -> None:
    fields = repeating_fields(spelled(layers))
    assert fields["pattern"] == spelled(repeated)
    assert fields.get("tail_pattern", ()) == spelled(tail)
