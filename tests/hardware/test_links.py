"""The links along the axes of a mesh, against figures worked out by hand from the catalogue's."""

import math

import pytest

from braeburn.config import MeshConfig
from braeburn.errors import UserError
from braeburn.hardware.links import DCN_HOP_SECONDS, HOP_SECONDS, OTHER_HOP_SECONDS, Links
from braeburn.hardware.targets import parse_target
from braeburn.hardware.torus import placements

GB = 1e9
SLICES = parse_target("v4:8x1024")  # of 8 x 8 x 16 chips, each with six links of 50 GB/s one way
TORUS = {"fsdp": (8, 8, 4), "tensor": (1, 1, 4)}
SERVER = MeshConfig(replica=8, fsdp=256, tensor=4, torus=TORUS)


def test_axes_of_a_torus_have_the_links_of_its_dimensions() -> None:
    links = Links(SLICES, SERVER)
    # A line of four has one link in each direction, of which 0.9 can be had.
    assert links.seconds("all-gather", GB, ("tensor",)) == pytest.approx(
        0.75 / 45 + 3 * HOP_SECONDS
    )
    # Two whole rings, and a quarter of a third, whose links the four chips between neighbours
    # share.
    hops = 4 + 4 + 2
    gathered = links.seconds("all-gather", GB, ("fsdp",))
    assert gathered == pytest.approx(255 / 256 / (45 * 4.5) + hops * HOP_SECONDS)
    assert links.seconds("reduce-scatter", GB, ("fsdp",)) == gathered
    assert links.seconds("all-reduce", GB, ("fsdp",)) == pytest.approx(2 * gathered)
    assert links.seconds("collective-permute", GB, ("tensor",)) == pytest.approx(1 / 45, rel=1e-3)
    assert (links.name(("fsdp",)), links.name(("tensor",)), links.name(("replica",))) == (
        "ICI",
        "ICI",
        "DCN",
    )
    assert links.name(("fsdp", "replica")) == "DCN"


def test_what_crosses_slices_is_shared_out_by_the_chips_of_each() -> None:
    links = Links(SLICES, SERVER)
    speed = 6.25 * 0.8
    reduced = links.seconds("all-reduce", GB, ("replica",))
    assert reduced == pytest.approx(2 * (7 / 8 / speed + DCN_HOP_SECONDS * 3))
    wide = Links(SLICES, MeshConfig(fsdp=2048, tensor=4, torus=TORUS))
    across = wide.seconds("all-gather", 1000 * GB, ("fsdp",))
    assert across == pytest.approx(
        max(1000 / 256 * 7 / 8 / speed, 1000 * 255 / 256 / (45 * 4.5)), rel=0.01
    )
    assert wide.name(("fsdp",)) == "DCN"


def test_axes_of_gpus_stay_within_a_node_as_far_as_it_goes() -> None:
    links = Links(parse_target("h100:64"), MeshConfig(fsdp=16, tensor=4))
    assert links.seconds("all-gather", GB, ("tensor",)) == pytest.approx(
        0.75 / (450 * 0.8) + OTHER_HOP_SECONDS
    )
    # Of 16 shards two are in a node; what the network brings each node is shared by them.
    slow, latency = GB / 2 * 7 / 8 / (50 * 0.8 * GB), OTHER_HOP_SECONDS * (1 + math.log2(8))
    assert links.seconds("all-gather", GB, ("fsdp",)) == pytest.approx(slow + latency)
    assert (links.name(("tensor",)), links.name(("fsdp",))) == ("NVLink", "network")


def test_unknown_networks_stay_unknown() -> None:
    links = Links(parse_target("s4000:16"), MeshConfig(data=2, fsdp=8))
    assert links.seconds("all-reduce", GB, ("data",)) is None
    assert links.seconds("all-reduce", GB, ("data", "fsdp")) is None
    assert links.seconds("all-reduce", GB, ("fsdp",)) is not None
    assert links.confidence(("fsdp",)) == "M"


def test_confidence_is_that_of_the_weakest_link() -> None:
    links = Links(SLICES, SERVER)
    assert (links.confidence(("fsdp",)), links.confidence(("replica",))) == ("S", "M")


def test_a_mesh_without_a_torus_gets_the_best_one() -> None:
    ways = placements(
        (("replica", 1), ("data", 1), ("fsdp", 256), ("context", 1), ("tensor", 4)), (8, 8, 16)
    )
    assert all(math.prod(map(math.prod, way.values())) == 1024 for way in ways)
    assert all(
        [math.prod(side) for side in zip(*way.values(), strict=True)] == [8, 8, 16] for way in ways
    )
    assert len({str(way) for way in ways}) == len(ways)
    # Two dimensions give four chips twice the links of one.
    assert sorted(ways[0]["tensor"]) == [1, 2, 2]
    assert Links(SLICES, SERVER.model_copy(update={"torus": None})).torus == ways[0]
    whole = placements((("fsdp", 128), ("tensor", 8)), (8, 8, 16))
    assert sorted(whole[0]["tensor"]) == [2, 2, 2]


def test_what_does_not_fill_a_slice_is_refused() -> None:
    with pytest.raises(UserError, match="does not fill a slice of 8 x 8 x 16 chips"):
        Links(SLICES, MeshConfig(replica=8, fsdp=8))
