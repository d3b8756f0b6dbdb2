"""Targets and what they amount to in nodes and slices."""

from dataclasses import replace

import pytest

from braeburn.errors import UserError
from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.targets import Target, parse_target


@pytest.mark.parametrize(
    ("text", "target", "nodes_per_slice", "chips_per_node"),
    [
        ("v4:8x1024", ("v4", 8, 1024), 256, 4),
        ("V5P:256", ("v5p", 1, 256), 64, 4),
        ("h100: 512", ("h100", 1, 512), 64, 8),
        ("h100:4", ("h100", 1, 4), 1, 4),
        ("mi300x:2 x 8", ("mi300x", 2, 8), 1, 8),
        ("cpu:8", ("cpu", 1, 8), 8, 1),
        ("v5e:1", ("v5e", 1, 1), 1, 1),
        ("S4000:1000", ("s4000", 1, 1000), 125, 8),
        ("mi250x:128", ("mi250x", 1, 128), 32, 4),
        ("ascend-910b3:64", ("ascend-910b3", 1, 64), 8, 8),
        ("groq-lpu:7", ("groq-lpu", 1, 7), 7, 1),
    ],
)
def test_targets(
    text: str, target: tuple[str, int, int], nodes_per_slice: int, chips_per_node: int
) -> None:
    parsed = parse_target(text)
    assert parsed == Target(*target, catalogue()[target[0]])
    assert parse_target(str(parsed)) == parsed
    assert (parsed.nodes_per_slice, parsed.chips_per_node) == (nodes_per_slice, chips_per_node)
    assert parsed.slices * parsed.nodes_per_slice * parsed.chips_per_node == parsed.chips


# As the tables of GKE have them.
@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("v5p:4", "2x2x1"),
        ("v5p:32", "2x4x4"),
        ("v5p:64", "4x4x4"),
        ("v5p:256", "4x8x8"),
        ("v5p:768", "8x8x12"),
        ("v4:8x1024", "8x8x16"),
        ("v5p:6144", "16x16x24"),
        ("v5p:244", None),
        ("tpu7x:9216", "16x24x24"),
        ("v6e:256", "16x16"),
        ("v5e:8", "2x4"),
        ("v6e:512", None),
        ("v4:8192", None),
    ],
)
def test_topologies(text: str, topology: str | None) -> None:
    target = parse_target(text)
    if topology:
        assert target.topology == topology
    else:
        with pytest.raises(
            UserError,
            match=rf"--on '{text}': there is no slice of {target.chips_per_slice} .*; use ",
        ):
            _ = target.topology


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("h10:8", "'h10' is not a chip; did you mean 'h100'"),
        ("h100", "'h100' is not a target; write h100:COUNT or h100:SLICESxCHIPS, as in h100:2x8"),
        ("h100:0", "is not a target"),
        ("v4:8x", "is not a target"),
        ("h100:12", "--on 'h100:12': 12 chips do not fill nodes of 8; use 8 or 16"),
        ("", "'' is not a chip; it must be one of a100, "),
    ],
)
def test_mistakes(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse_target(text)
    assert sentence in str(error.value)


def test_chips_of_another_catalogue() -> None:
    mine = replace(catalogue()["h100"], name="mine", per_node=2)
    target = parse_target("mine:6", {"mine": mine})
    assert target.facts is mine and target.nodes_per_slice == 3
    with pytest.raises(UserError, match="'h100' is not a chip; it must be one of mine"):
        parse_target("h100:8", {"mine": mine})


def test_chips_for_which_no_jax_can_be_installed() -> None:
    for text in ("cpu:8", "mi250x:4", "v5p:8", "h100:8"):
        parse_target(text).check_installable()
    for text, why in (
        ("gaudi3:8", "none is known"),
        ("trainium2:16", "Neuron PJRT plugin is no extra of Braeburn"),
    ):
        with pytest.raises(UserError) as error:
            parse_target(text).check_installable()
        assert str(error.value).startswith(
            f"--on '{text}': no JAX for {catalogue()[text.split(':')[0]].title} can be"
        )
        assert why in str(error.value)
