"""How the axes of a mesh lie over the slices of a cluster and the torus of TPUs within each."""

import math
from functools import cache
from itertools import product
from typing import Any

from braeburn.config import MeshConfig, divisors
from braeburn.errors import UserError
from braeburn.hardware.targets import Target

# Of each axis, its size along each dimension of a torus.
Factors = dict[Any, tuple[int, ...]]


def across_slices(mesh: MeshConfig, num_slices: int) -> dict[str, int]:
    """How many slices each axis crosses."""
    across, left = {}, num_slices
    for axis, size in mesh.by_traffic.items():
        across[axis] = math.gcd(size, left)
        left //= across[axis]
    if left > 1:
        raise UserError(
            f"mesh.replica={mesh.replica} does not fit the {num_slices} slices of the devices; "
            f"set mesh.replica to {num_slices} or a multiple of it"
        )
    return across


@cache
def placements(sizes: tuple[tuple[str, int], ...], sides: tuple[int, ...]) -> list[Factors]:
    """The ways to lay axes over the dimensions of a torus, those first that give the innermost axes
    the best links.

    Args:
        sizes: of each axis within a slice, the innermost last.
        sides: of the slice.

    Raises:
        UserError: the axes do not fill the slice.
    """
    if math.prod(size for _, size in sizes) != math.prod(sides):
        named = " x ".join(f"{axis}={size}" for axis, size in sizes if size > 1)
        raise UserError(
            f"mesh ({named or 'one device'}) does not fill a slice of "
            f"{' x '.join(map(str, sides))} chips"
        )

    def lay(left: tuple[tuple[str, int], ...], free: tuple[int, ...]) -> list[Factors]:
        if not left:
            return [{}] if math.prod(free) == 1 else []
        axis, size = left[-1]
        choices = [f for f in product(*map(divisors, free)) if math.prod(f) == size]
        # Whole sides first, as rings; then over as many dimensions as there are, each with links of
        # its own.
        choices.sort(
            key=lambda f: -sum(1 + (n == side) for n, side in zip(f, free, strict=True) if n > 1)
        )
        found = []
        for factors in choices:
            rest = tuple(side // n for side, n in zip(free, factors, strict=True))
            found += [{**other, axis: factors} for other in lay(left[:-1], rest)]
        return found

    ways = lay(tuple((axis, size) for axis, size in sizes if size > 1), sides)
    if not ways:
        raise UserError(
            f"no axis of the mesh can be laid over a torus of {' x '.join(map(str, sides))} chips"
        )
    return ways


def extent(target: Target) -> tuple[int, ...]:
    """The sides of a slice of TPUs, in devices: chips that JAX takes for several have those as one
    more side.
    """
    sides = tuple(map(int, target.topology.split("x")))
    devices = target.facts.devices_per_chip
    return (*sides, devices) if devices > 1 else sides


def closes(side: int, dimensions: int) -> bool:
    """Whether a side of a slice is a ring: a multiple of 4 chips in 3 dimensions, all 16 in 2."""
    return side % 4 == 0 if dimensions == 3 else side == 16
