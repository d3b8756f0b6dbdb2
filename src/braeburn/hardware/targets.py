"""Targets, `chip:count` or `chip:slices x chips`, and what they amount to in nodes and slices."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from braeburn.errors import UserError, did_you_mean
from braeburn.hardware.catalogue import Chip, catalogue

# More than have ever been in one place; with more, the search for layouts would not end.
MOST_CHIPS = 2**20

_SMALL = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"},
}


@dataclass(frozen=True)
class Target:
    """Accelerators that a run is meant for: `slices` of `chips_per_slice`, or one; `facts` is what
    is known of each.
    """

    chip: str
    slices: int
    chips_per_slice: int
    facts: Chip

    def __str__(self) -> str:
        if self.slices == 1:
            return f"{self.chip}:{self.chips_per_slice}"
        return f"{self.chip}:{self.slices}x{self.chips_per_slice}"

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return self.slices * self.chips_per_slice

    @property
    def devices(self) -> int:
        """Devices of JAX in all slices."""
        return self.chips * self.facts.devices_per_chip

    @property
    def chips_per_node(self) -> int:
        """Chips that the run uses in each of its nodes."""
        return min(self.facts.per_node, self.chips_per_slice)

    @property
    def nodes_per_slice(self) -> int:
        """Nodes, or hosts of TPUs, in one slice."""
        return self.chips_per_slice // self.chips_per_node

    @cached_property
    def topology(self) -> str:
        """The shape of a slice of TPUs as GKE names it, of several the most cubic: "8x8x16".

        Raises:
            UserError: there is no slice of that many chips.
        """
        dimensions, count = self.facts.dimensions, self.chips_per_slice
        small = _SMALL[dimensions]
        if count in small:
            return small[count]
        if dimensions == 3 and count % 64 == 0 and count <= self.facts.max_slice:
            blocks = count // 64  # larger tori are made of cubes of 4 x 4 x 4
            sides = [n for n in range(1, blocks + 1) if blocks % n == 0]
            shapes = (
                (a, b, blocks // (a * b))
                for a, b in product(sides, sides)
                if a <= b and blocks % (a * b) == 0
            )
            best = min((shape for shape in shapes if shape[1] <= shape[2]), key=sum)
            return "x".join(str(4 * side) for side in best)
        largest = max(small) if dimensions == 2 else self.facts.max_slice // 64 * 64
        fits = [n for n in (*small, *range(64, largest + 1, 64)) if dimensions == 3 or n in small]
        near = sorted(sorted(fits, key=lambda n: abs(n - count))[:2])
        raise UserError(
            f"--on {str(self)!r}: there is no slice of {count} {self.chip} chips; use "
            f"{' or '.join(map(str, near))}"
        )

    @property
    def exists(self) -> bool:
        """Whether there are such slices, which is asked of TPUs alone."""
        if self.facts.family != "tpu":
            return True
        try:
            return bool(self.topology)
        except UserError:
            return False

    def check_installable(self) -> None:
        """Raises a UserError where the package has no extra that brings JAX for the chip."""
        if not self.facts.extra and self.chip != "cpu":
            why = (
                f"{self.facts.back_end} is no extra of Braeburn"
                if self.facts.back_end
                else "none is known"
            )
            raise UserError(
                f"--on {str(self)!r}: no JAX for {self.facts.title} can be installed: {why}; use "
                f"another chip"
            )


def parse_target(text: str, chips: Mapping[str, Chip] | None = None) -> Target:
    """Reads `h100:512`, or `v4:8x1024` for 8 slices of 1024 chips of a catalogue, by default the
    built-in one.

    Raises:
        UserError: it is not of that form, the chip is unknown, or chips would not fill their nodes.
    """
    chips = catalogue() if chips is None else chips
    chip, _, count = (part.strip().lower() for part in text.partition(":"))
    if chip not in chips:
        raise UserError(f"--on {text!r}: {chip!r} is not a chip; {did_you_mean(chip, chips)}")
    match = re.fullmatch(r"(?:([1-9]\d*)\s*[x×]\s*)?([1-9]\d*)", count)
    if not match:
        raise UserError(
            f"--on {text!r} is not a target; write {chip}:COUNT or {chip}:SLICESxCHIPS, as in "
            f"{chip}:2x8"
        )
    if len(count) > 20 or int(match[1] or 1) * int(match[2]) > MOST_CHIPS:
        raise UserError(
            f"--on {text[:60]!r}: there are no targets of more than {MOST_CHIPS:,} chips; name "
            f"fewer"
        )
    target = Target(chip, int(match[1] or 1), int(match[2]), chips[chip])
    per_node = target.facts.per_node
    if target.chips_per_slice > per_node and target.chips_per_slice % per_node:
        below = target.chips_per_slice // per_node * per_node
        raise UserError(
            f"--on {text!r}: {target.chips_per_slice} chips do not fill nodes of {per_node}; "
            f"use {below} or {below + per_node}"
        )
    return target
