"""The links along each axis of a mesh, and how long a collective over them takes."""

import math
from dataclasses import dataclass

from braeburn.config import MeshConfig
from braeburn.hardware.catalogue import Figure, weakest
from braeburn.hardware.targets import Target
from braeburn.hardware.torus import Factors, across_slices, closes, extent, placements

# The fraction of a link's rated bandwidth that can be had, and the latency of one hop. TPU: about
# 90 of 100 GB/s of a v5p's link in each direction, and 45 of 50 of a v4's, make the compiler's
# cycles agree with published step times; the latency of one hop, a microsecond, is that of
# https://jax-ml.github.io/scaling-book. Others: what NCCL's tests reach over NVLink and InfiniBand.
ICI_EFFICIENCY, OTHER_EFFICIENCY = 0.9, 0.8
HOP_SECONDS, OTHER_HOP_SECONDS = 1e-6, 4e-6
# Data between slices goes through the memory of hosts.
DCN_HOP_SECONDS = 2e-4


@dataclass(frozen=True)
class Segment:
    """A link segment: the part of a mesh axis that runs over one kind of link.

    Attributes:
        link: "ICI", "DCN", "NVLink", "scale-up" or "network".
        size: chips that it joins.
        gb_per_s: what one chip sends while all do, None if unknown.
        neighbour_gb_per_s: what one chip sends to its neighbour alone, None if unknown.
        latency: seconds until data from the farthest chip arrives.
        detour: the factor by which an all-to-all takes longer because links also carry data
            between other chips.
        confidence: of the bandwidth.
    """

    link: str
    size: int
    gb_per_s: float | None
    neighbour_gb_per_s: float | None
    latency: float
    detour: float
    confidence: str


class Links:
    """The links along the axes of a mesh on a target."""

    def __init__(self, target: Target, mesh: MeshConfig, torus: Factors | None = None):
        """Lays a mesh of resolved sizes over a target: over the torus as `torus` or `mesh.torus`
        says, or the best way.

        Raises:
            UserError: the mesh does not fit the target's slices.
        """
        self._target, self._names, chip = target, list(mesh.by_traffic), target.facts
        self._known: dict[tuple[str, ...], tuple[str, str]] = {}
        self._joined: dict[tuple[str, ...], list[Segment]] = {}
        if chip.family == "tpu":
            outer = across_slices(mesh, target.slices)
            within = {axis: size // outer[axis] for axis, size in mesh.by_traffic.items()}
            sides = extent(target)
            self.torus: Factors | None = (
                torus or mesh.torus or placements(tuple(within.items()), sides)[0]
            )
            self._segments = {
                axis: (*self._network(k), *self._along_torus(axis, within[axis], sides))
                for axis, k in outer.items()
            }
        else:
            self.torus, self._segments, stride = None, {}, 1
            domain = int(chip.domain.value) * chip.devices_per_chip if chip.domain else 1
            for axis, size in reversed(mesh.by_traffic.items()):
                near = math.gcd(size, max(1, domain // stride))
                self._segments[axis] = (*self._network(size // near), *self._within_node(near))
                stride *= size

    def name(self, axes: tuple[str, ...]) -> str:
        """The slowest kind of link along axes."""
        return self._facts(axes)[0]

    def confidence(self, axes: tuple[str, ...]) -> str:
        """The confidence of the bandwidths that a collective along axes depends on."""
        return self._facts(axes)[1]

    def _facts(self, axes: tuple[str, ...]) -> tuple[str, str]:
        if axes not in self._known:
            segments = self._along(axes)
            slowest = min(segments, key=lambda one: one.gb_per_s or 0).link if segments else "-"
            self._known[axes] = slowest, weakest(*(one.confidence for one in segments))
        return self._known[axes]

    def _along(self, axes: tuple[str, ...]) -> list[Segment]:
        """The link segments of axes, from the outermost inwards."""
        if axes not in self._joined:
            self._joined[axes] = [each for axis in axes for each in self._segments[axis]]
        return self._joined[axes]

    def seconds(self, kind: str, bytes_: float, axes: tuple[str, ...]) -> float | None:
        """How long a collective takes by the bandwidth of links; None where it is unknown.

        Link segments of several kinds all work at the same time, each on what it must carry: chips
        that fast links join share out what comes over the slow ones.

        Args:
            kind: as HLO names it, "all-gather".
            bytes_: of the array that an all-gather leaves, and that each chip puts into the others.
            axes: of the mesh.
        """
        segments = self._along(axes)
        total, joined = 0.0, 1
        for segment in reversed(segments):
            if segment.gb_per_s is None or segment.neighbour_gb_per_s is None:
                return None
            moved = bytes_ / joined * (segment.size - 1) / segment.size
            if kind == "collective-permute":
                seconds = bytes_ / segment.neighbour_gb_per_s
            elif kind == "all-to-all":
                seconds = moved / segment.gb_per_s * segment.detour
            else:
                seconds = moved / segment.gb_per_s * (2 if kind == "all-reduce" else 1)
            total = max(total, seconds / 1e9)
            joined *= segment.size
        return total + sum(one.latency for one in segments) * (1 + (kind == "all-reduce"))

    def _network(self, size: int) -> tuple[Segment, ...]:
        chip = self._target.facts
        link, of_hop = (
            ("DCN", DCN_HOP_SECONDS) if chip.family == "tpu" else ("network", OTHER_HOP_SECONDS)
        )
        return self._switched(link, size, chip.network_gb_per_s, of_hop * math.log2(size))

    def _within_node(self, size: int) -> tuple[Segment, ...]:
        chip = self._target.facts
        link = "NVLink" if chip.family == "nvidia" else "scale-up"
        return self._switched(link, size, chip.link_gb_per_s, OTHER_HOP_SECONDS)

    def _switched(
        self, link: str, size: int, figure: Figure | None, latency: float
    ) -> tuple[Segment, ...]:
        """Links through switches, where any chip reaches any other at the same speed."""
        if size == 1:
            return ()
        speed = (
            figure.value / self._target.facts.devices_per_chip * OTHER_EFFICIENCY
            if figure
            else None
        )
        confidence = figure.confidence if figure else "M"
        return (Segment(link, size, speed, speed, latency, 1, confidence),)

    def _along_torus(self, axis: str, size: int, sides: tuple[int, ...]) -> tuple[Segment, ...]:
        if size == 1:
            return ()
        assert self.torus is not None
        chip = self._target.facts
        figure = chip.link_gb_per_s
        assert figure is not None  # the catalogue has it of every TPU
        one = figure.value / (2 * chip.dimensions * chip.devices_per_chip) * ICI_EFFICIENCY
        later = self._names[self._names.index(axis) + 1 :]
        inner = [
            math.prod(self.torus[other][dim] for other in later if other in self.torus)
            for dim in range(len(sides))
        ]
        links, hops, nearest = 0.0, 0.0, 0.0
        for factor, stride, side in zip(self.torus[axis], inner, sides, strict=True):
            if factor > 1:
                ring = factor * stride == side and closes(side, chip.dimensions)
                # Chips in between carry on what passes them: `stride` rings or lines share each
                # link.
                links += (2 if ring else 1) / stride
                hops += factor / 2 if ring else factor - 1
                nearest = max(nearest, 1 / stride)
        return (
            Segment(
                "ICI",
                size,
                one * links,
                one * nearest,
                hops * HOP_SECONDS,
                max(1, hops / 2),
                figure.confidence,
            ),
        )
