"""Targets and what they amount to in nodes and slices."""

import pytest

from braeburn.errors import UserError
from braeburn.parallel.target import CHIPS, Target, parse_target


@pytest.mark.parametrize(
    ("text", "target", "nodes_per_slice", "chips_per_node"),
    [
        ("v4:8x1024", Target("v4", 8, 1024), 256, 4),
        ("V5P:256", Target("v5p", 1, 256), 64, 4),
        ("h100: 512", Target("h100", 1, 512), 64, 8),
        ("h100:4", Target("h100", 1, 4), 1, 4),
        ("mi300x:2 x 8", Target("mi300x", 2, 8), 1, 8),
        ("cpu:8", Target("cpu", 1, 8), 8, 1),
        ("v5e:1", Target("v5e", 1, 1), 1, 1),
    ],
)
def test_targets(text: str, target: Target, nodes_per_slice: int, chips_per_node: int) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target
    assert (target.nodes_per_slice, target.chips_per_node) == (nodes_per_slice, chips_per_node)
    assert target.slices * target.nodes_per_slice * target.chips_per_node == target.chips


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
        with pytest.raises(UserError, match=rf"--on '{text}': there is no slice of {target.chips_per_slice} .*; use "):
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


def test_the_table_is_whole() -> None:
    for chip in CHIPS.values():
        assert (chip.dimensions in (2, 3) and chip.max_slice > 0) == (chip.maker == "google")
        assert chip.extra == {"google": "tpu", "nvidia": "cuda", "amd": "rocm", "cpu": ""}[chip.maker]
