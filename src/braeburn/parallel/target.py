"""Targets, `chip:count` or `chip:slices x chips`, and what a launcher needs to know of each chip."""

import re
from dataclasses import dataclass
from itertools import product

from braeburn.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Chip:
    """An accelerator as schedulers see it.

    Attributes:
        maker: "google", "nvidia", "amd", or "cpu" for processes without an accelerator.
        per_node: accelerators in one node.
        extra: the extra of the package that brings JAX for it, or "".
        gke_accelerator: value of GKE's node label for it, or "" where GKE has none.
        dimensions: of a TPU slice's torus.
        max_slice: chips in the largest slice of TPUs.
    """

    maker: str
    per_node: int
    extra: str = ""
    gke_accelerator: str = ""
    dimensions: int = 0
    max_slice: int = 0


# TPUs: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, hosts of four chips;
# GPUs: https://cloud.google.com/compute/docs/gpus and the makers' eight-way nodes.
CHIPS = {
    "v4": Chip("google", 4, "tpu", "tpu-v4-podslice", 3, 4096),
    "v5e": Chip("google", 4, "tpu", "tpu-v5-lite-podslice", 2, 256),
    "v5p": Chip("google", 4, "tpu", "tpu-v5p-slice", 3, 6144),
    "v6e": Chip("google", 4, "tpu", "tpu-v6e-slice", 2, 256),
    "tpu7x": Chip("google", 4, "tpu", "tpu7x", 3, 9216),
    "a100": Chip("nvidia", 8, "cuda", "nvidia-a100-80gb"),
    "h100": Chip("nvidia", 8, "cuda", "nvidia-h100-80gb"),
    "h200": Chip("nvidia", 8, "cuda", "nvidia-h200-141gb"),
    "b200": Chip("nvidia", 8, "cuda", "nvidia-b200"),
    "gb200": Chip("nvidia", 4, "cuda", "nvidia-gb200"),
    "mi300x": Chip("amd", 8, "rocm"),
    "mi325x": Chip("amd", 8, "rocm"),
    "mi355x": Chip("amd", 8, "rocm"),
    "cpu": Chip("cpu", 1),
}
_SMALL = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"},
}


@dataclass(frozen=True)
class Target:
    """The accelerators that a run is meant for: `slices` of `chips_per_slice` each, one slice where there are none."""

    chip: str
    slices: int
    chips_per_slice: int

    def __str__(self) -> str:
        if self.slices == 1:
            return f"{self.chip}:{self.chips_per_slice}"
        return f"{self.chip}:{self.slices}x{self.chips_per_slice}"

    @property
    def facts(self) -> Chip:
        """What is known of the chip."""
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return self.slices * self.chips_per_slice

    @property
    def chips_per_node(self) -> int:
        """Chips that the run uses in each of its nodes."""
        return min(self.facts.per_node, self.chips_per_slice)

    @property
    def nodes_per_slice(self) -> int:
        """Nodes, or hosts of TPUs, in one slice."""
        return self.chips_per_slice // self.chips_per_node

    @property
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
            shapes = ((a, b, blocks // (a * b)) for a, b in product(sides, sides) if a <= b and blocks % (a * b) == 0)
            best = min((shape for shape in shapes if shape[1] <= shape[2]), key=sum)
            return "x".join(str(4 * side) for side in best)
        largest = max(small) if dimensions == 2 else self.facts.max_slice // 64 * 64
        fits = [n for n in (*small, *range(64, largest + 1, 64)) if dimensions == 3 or n in small]
        near = sorted(sorted(fits, key=lambda n: abs(n - count))[:2])
        raise UserError(
            f"--on {str(self)!r}: there is no slice of {count} {self.chip} chips; use {' or '.join(map(str, near))}"
        )


def parse_target(text: str) -> Target:
    """Reads `h100:512`, or `v4:8x1024` for 8 slices of 1024 chips.

    Raises:
        UserError: it is not of that form, the chip is unknown, or chips would not fill their nodes.
    """
    chip, _, count = (part.strip().lower() for part in text.partition(":"))
    if chip not in CHIPS:
        raise UserError(f"--on {text!r}: {chip!r} is not a chip; {did_you_mean(chip, CHIPS)}")
    match = re.fullmatch(r"(?:([1-9]\d*)\s*[x×]\s*)?([1-9]\d*)", count)
    if not match:
        raise UserError(f"--on {text!r} is not a target; write {chip}:COUNT or {chip}:SLICESxCHIPS, as in {chip}:2x8")
    target = Target(chip, int(match[1] or 1), int(match[2]))
    per_node = target.facts.per_node
    if target.chips_per_slice > per_node and target.chips_per_slice % per_node:
        below = target.chips_per_slice // per_node * per_node
        raise UserError(
            f"--on {text!r}: {target.chips_per_slice} chips do not fill nodes of {per_node}; "
            f"use {below} or {below + per_node}"
        )
    return target
