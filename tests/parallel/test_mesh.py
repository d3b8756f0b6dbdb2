"""How devices are laid out: sizes inferred, one slice to each replica, axes over the dimensions of
a torus.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from braeburn.config import AXES, MeshConfig
from braeburn.errors import UserError
from braeburn.hardware.torus import placements
from braeburn.parallel.mesh import arrange, build, resolve


@dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0


def slices(number: int, extent: tuple[int, int, int]) -> list[Chip]:
    # Processes are numbered as they come: ids tell nothing of slices.
    places = list(itertools.product(range(number), *(range(size) for size in extent)))
    order = np.random.default_rng(0).permutation(len(places))
    return [Chip(int(order[i]), tuple(place[1:]), place[0]) for i, place in enumerate(places)]


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (MeshConfig(), 8, {"fsdp": 8}),
        (MeshConfig(tensor=2), 8, {"fsdp": 4, "tensor": 2}),
        (MeshConfig(fsdp=1, data=-1), 8, {"data": 8}),
        (
            MeshConfig(replica=8, data=2, fsdp=-1, tensor=4),
            8192,
            {"replica": 8, "data": 2, "fsdp": 128, "tensor": 4},
        ),
        (MeshConfig(fsdp=2), 8, {"fsdp": 2}),
    ],
)
def test_one_size_is_inferred(mesh: MeshConfig, devices: int, sizes: dict[str, int]) -> None:
    found = resolve(mesh, devices).sizes
    assert {axis: size for axis, size in found.items() if size > 1} == sizes


@pytest.mark.parametrize(
    ("mesh", "devices", "sentence"),
    [
        (
            MeshConfig(tensor=3),
            8,
            "mesh.tensor=3 does not divide the 8 devices; choose sizes whose product is one of "
            "[1, 2",
        ),
        (
            MeshConfig(fsdp=4, tensor=4),
            8,
            "mesh (fsdp=4 x tensor=4) needs 16 devices but 8 are there; lower a size, or set",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(mesh: MeshConfig, devices: int, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(mesh, devices)
    assert sentence in str(refusal.value)


def test_each_replica_is_exactly_one_slice() -> None:
    mesh = arrange(MeshConfig(replica=4, fsdp=8, tensor=2), slices(4, (2, 2, 4)))
    assert mesh.squeeze().shape == (4, 8, 2)
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh] == [{0}, {1}, {2}, {3}]


def test_replicas_within_a_slice_stay_within_it() -> None:
    mesh = arrange(MeshConfig(replica=4, fsdp=4, tensor=2), slices(2, (2, 2, 4)))
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh] == [{0}, {0}, {1}, {1}]


def test_an_axis_larger_than_a_slice_crosses_slices_by_its_slowest_part() -> None:
    mesh = arrange(MeshConfig(fsdp=16, tensor=2), slices(2, (2, 2, 4)))
    assert [{chip.slice_index for chip in row.flat} for row in mesh.squeeze()] == [{0}] * 8 + [
        {1}
    ] * 8


def test_slices_that_no_axis_can_cross_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"mesh.replica=1 does not fit the 3 slices .* set mesh.replica to 3"
    ):
        arrange(MeshConfig(fsdp=16, tensor=1), slices(3, (2, 2, 4)))
    with pytest.raises(UserError, match="lie unevenly"):
        arrange(MeshConfig(fsdp=20), slices(2, (2, 2, 4))[:20])


def neighbours(a: Chip, b: Chip) -> bool:
    return sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) == 1


def test_axes_lie_over_the_dimensions_of_the_torus_as_told() -> None:
    torus: Any = {"fsdp": (2, 2, 2), "tensor": (1, 1, 2)}
    mesh = arrange(MeshConfig(fsdp=8, tensor=2, torus=torus), slices(1, (2, 2, 4)))
    mesh = mesh.squeeze()
    assert mesh.shape == (8, 2)
    assert {chip.id for chip in mesh.flat} == set(range(16))
    # Tensor shards are neighbours along the last dimension; fsdp has every place of the other two.
    assert all(neighbours(*pair) for pair in mesh)
    assert {chip.coords[:2] for chip in mesh[:, 0]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    other: Any = {"fsdp": (2, 1, 4), "tensor": (1, 2, 1)}
    mesh = arrange(MeshConfig(fsdp=8, tensor=2, torus=other), slices(1, (2, 2, 4)))
    assert {(a.coords[1], b.coords[1]) for a, b in mesh.squeeze()} == {(0, 1)}


@pytest.mark.parametrize(
    ("torus", "sentence"),
    [
        (
            {"fsdp": (2, 2, 1), "tensor": (1, 1, 2)},
            "mesh.torus.fsdp=[2, 2, 1] has 4 chips, but mesh.fsdp has 8",
        ),
        (
            {"fsdp": (2, 4, 1), "tensor": (1, 1, 2)},
            "mesh.torus multiplies to [2, 4, 2] along the dimensions of the",
        ),
    ],
)
def test_a_torus_that_is_not_the_devices_is_refused(torus: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        arrange(MeshConfig(fsdp=8, tensor=2, torus=torus), slices(1, (2, 2, 4)))
    assert sentence in str(refusal.value)


def test_devices_without_a_torus_have_none_to_lay_axes_over() -> None:
    with pytest.raises(UserError, match=r"have no place on a torus; remove mesh.torus"):
        build(MeshConfig(fsdp=8, torus={"fsdp": (2, 2, 2)}))


def test_devices_alike_are_taken_in_order() -> None:
    mesh = build(MeshConfig(fsdp=4, tensor=2))
    assert mesh.axis_names == AXES
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_no_process_may_be_left_without_a_device() -> None:
    chips = [replace(chip, process_index=chip.id // 4) for chip in slices(1, (2, 2, 4))]
    with pytest.raises(
        UserError,
        match=r"mesh has 2 devices but the 4 processes have 16; set one of its sizes to -1",
    ):
        build(MeshConfig(fsdp=2), chips)


def test_a_torus_of_two_dimensions_is_set_by_two_numbers() -> None:
    mesh = MeshConfig(fsdp=16, tensor=4, torus={"fsdp": (2, 8), "tensor": (4, 1)})
    placed = arrange(mesh, slices(1, (8, 8, 1)))
    assert [chip.coords for chip in placed.squeeze()[0]] == [(x, 0, 0) for x in range(4)]


def test_without_a_torus_the_first_placement_is_taken() -> None:
    sizes = (("replica", 1), ("data", 1), ("fsdp", 256), ("context", 1), ("tensor", 4))
    first = placements(sizes, (8, 8, 16))[0]
    own = arrange(MeshConfig(fsdp=256, tensor=4), slices(1, (8, 8, 16)))
    assert (
        own == arrange(MeshConfig(fsdp=256, tensor=4, torus=first), slices(1, (8, 8, 16)))
    ).all()
