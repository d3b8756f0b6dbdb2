"""The mesh of devices: its sizes worked out, and its axes laid over slices and links."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from braeburn.config import MeshConfig, divisors, some
from braeburn.errors import UserError
from braeburn.hardware.torus import Factors, across_slices, placements


def resolve(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh with its inferred size worked out for `num_devices`.

    Raises:
        UserError: the sizes do not come to the number of devices, or to fewer of them.
    """
    known = math.prod(size for size in mesh.sizes.values() if size > 0)
    inferred = [axis for axis, size in mesh.sizes.items() if size == -1]
    named = " x ".join(f"{axis}={size}" for axis, size in mesh.sizes.items() if size > 1)
    if inferred:
        if num_devices % known:
            raise UserError(
                f"mesh.{named.replace(' x ', ' x mesh.')} does not divide the {num_devices} "
                f"devices; choose sizes whose product is one of {some(divisors(num_devices))}"
            )
        return mesh.model_copy(update={inferred[0]: num_devices // known})
    if known > num_devices:
        raise UserError(
            f"mesh ({named}) needs {known} devices but {num_devices} "
            f"{'is' if num_devices == 1 else 'are'} there; "
            f"lower a size, or set one to -1 to have it inferred"
        )
    return mesh


def arrange(mesh: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Devices in an array of the mesh's shape. The axes that send most get the best links, in the
    order of `MeshConfig.by_traffic`.

    Where devices belong to several slices, the axes that send least take the slices: with as many
    replicas as slices, each replica is exactly one slice. Within a slice of TPUs axes are laid over
    the torus as `mesh.torus` says, or the first of `placements`.

    Args:
        mesh: resolved sizes.
        devices: as many as the mesh has, of JAX or of the same form: with `id`, and with
            `slice_index` and `coords` where there are any.

    Raises:
        UserError: slices of unequal size, or a torus that is not the devices'.
    """
    order = mesh.by_traffic
    slices: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: device.id):
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if len({len(members) for members in slices.values()}) > 1:
        counts = ", ".join(f"{len(members)} in slice {index}" for index, members in slices.items())
        raise UserError(
            f"the mesh's {len(devices)} devices lie unevenly ({counts}); use all devices of each "
            f"slice"
        )
    across = across_slices(mesh, len(slices))
    within = {axis: size // across[axis] for axis, size in order.items()}
    parts = [_arrange_slice(mesh, within, members) for _, members in sorted(slices.items())]
    # [slices along each axis..., places along each axis...] interleaved: the slice is the slower
    # part of each axis.
    whole = np.array(parts, dtype=object).reshape(*across.values(), *within.values())
    interleaved = [axis + part for axis in range(len(order)) for part in (0, len(order))]
    whole = whole.transpose(interleaved).reshape(tuple(order.values()))
    return whole.transpose([list(order).index(axis) for axis in mesh.sizes])


def build(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of JAX with the axes of `mesh`, resolved, over `devices` (the first of all, by
    default).

    Raises:
        UserError: see `arrange`; or several processes of which some would be left without a device
            of the mesh.
    """
    size = math.prod(mesh.sizes.values())
    everything = jax.devices() if devices is None else devices
    num_processes = len({device.process_index for device in everything})
    check_processes(mesh, len(everything), num_processes)
    return jax.sharding.Mesh(arrange(mesh, everything[:size]), tuple(mesh.sizes))


def check_processes(mesh: MeshConfig, num_devices: int, num_processes: int) -> None:
    """Refuses a mesh that would leave some of several processes without a device of it.

    Args:
        mesh: resolved sizes.
        num_devices: of all processes together.
        num_processes: that the devices belong to.

    Raises:
        UserError: it has fewer devices than are there.
    """
    size = math.prod(mesh.sizes.values())
    if size < num_devices and num_processes > 1:
        raise UserError(
            f"mesh has {size} device{'s' * (size > 1)} but the {num_processes} processes have "
            f"{num_devices}; set one of its sizes to -1 to use them all, as --set mesh.fsdp=-1 or, "
            f"after training, --mesh fsdp=-1"
        )


def abstract_mesh(mesh: MeshConfig, device: AbstractDevice | None = None) -> AbstractMesh:
    """The mesh without its devices, for programs that are traced before there are any, or that
    take their devices from their arguments.

    Args:
        mesh: resolved sizes.
        device: what every device is taken to be; None where the program does not depend on it.
    """
    # From JAX 0.12 on the axes are explicit by default: arguments would need the sharding that
    # `shard_map` names in their types.
    return AbstractMesh(
        tuple(mesh.sizes.values()),
        tuple(mesh.sizes),
        axis_types=(AxisType.Auto,) * len(mesh.sizes),
        abstract_device=device,
    )


def _arrange_slice(mesh: MeshConfig, within: dict[str, int], devices: list[Any]) -> np.ndarray:
    """The devices of a slice, in an array of its sizes of the axes."""
    shape = tuple(within.values())
    places = np.array([getattr(device, "coords", ()) for device in devices])
    sides = tuple(int(n) for n in np.ptp(places, axis=0) + 1) if places.size else ()
    if mesh.torus:
        flat = len(
            next(iter(mesh.torus.values()))
        )  # tori of two dimensions have a third of one chip
        places, sides = (
            (places[:, :flat], sides[:flat]) if math.prod(sides[flat:]) == 1 else (places, sides)
        )
        factors = _factors(mesh.torus, mesh, sides)
        _check_torus(mesh, factors, shape, sides)
        return _lay_over_torus(factors, devices, places, sides)
    if getattr(devices[0], "platform", "") != "tpu" or len(devices) == 1:
        return np.array(devices, dtype=object).reshape(shape)
    if len(np.unique(places, axis=0)) == len(devices) == math.prod(sides):
        torus = placements(tuple(within.items()), sides)[0]
        return _lay_over_torus(_factors(torus, mesh, sides), devices, places, sides)
    # Several devices to a chip, or chips that fill no box.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _factors(torus: Factors, mesh: MeshConfig, extent: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The size of each axis of the mesh along each dimension of a torus."""
    return [torus.get(axis, (1,) * len(extent)) for axis in mesh.by_traffic]


def _check_torus(
    mesh: MeshConfig,
    factors: list[tuple[int, ...]],
    shape: tuple[int, ...],
    extent: tuple[int, ...],
) -> None:
    if not extent:
        raise UserError(
            "mesh.torus is set, but these devices have no place on a torus; remove mesh.torus"
        )
    for axis, own, size in zip(mesh.by_traffic, factors, shape, strict=True):
        if math.prod(own) != size:
            raise UserError(
                f"mesh.torus.{axis}={list(own)} has {math.prod(own)} chips, but mesh.{axis} has "
                f"{size} within a slice; make their product {size}"
            )
    if tuple(map(math.prod, zip(*factors, strict=True))) != extent:
        raise UserError(
            f"mesh.torus multiplies to {list(map(math.prod, zip(*factors, strict=True)))} along "
            f"the dimensions of the torus, but a slice is {' x '.join(map(str, extent))}; make the "
            f"sizes along each dimension multiply to it"
        )


def _lay_over_torus(
    factors: list[tuple[int, ...]], devices: list[Any], places: np.ndarray, extent: tuple[int, ...]
) -> np.ndarray:
    shape = tuple(map(math.prod, factors))
    grid = np.empty(extent, dtype=object)
    for device, place in zip(devices, places - places.min(axis=0), strict=True):
        grid[tuple(place)] = device
    # Each dimension of the torus is cut into its factors; those of one axis are then brought
    # together.
    dims, axes = len(extent), len(factors)
    grid = grid.reshape([factors[axis][dim] for dim in range(dims) for axis in range(axes)])
    return grid.transpose(
        [dim * axes + axis for axis in range(axes) for dim in range(dims)]
    ).reshape(shape)
