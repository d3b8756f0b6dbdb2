"""Which source a training position draws from, as a pure function: no state, so resuming needs one
integer.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np

from braeburn.config import Stage

BLOCK = 1024  # positions over which the proportions are exact
_ROUNDS = 8
_WORD = (1 << 64) - 1


@functools.lru_cache(maxsize=1024, typed=True)  # many sequences share an epoch or a block
def derive_key(*parts: int | str) -> int:
    """64 bits that the parts determine, the same in every process and version of Python."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a bijection of range(size) that the 64-bit `key` chooses, in
    constant memory.

    A Feistel network permutes the next power of four; values beyond `size` are sent round again
    until they fall inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = (
                right,
                left ^ (_mix(right, (key + turn * 0x9E3779B97F4A7C15) & _WORD) & mask),
            )
        index = left << half | right
        if index < size:
            return index


def _mix(x: int, key: int) -> int:
    """MurmurHash3's finaliser of x under a key, in 64 bits."""
    x = ((x ^ key) * 0xFF51AFD7ED558CCD) & _WORD
    x = ((x ^ x >> 33) * 0xC4CEB9FE1A85EC53) & _WORD
    return x ^ x >> 33


def rounded_shares(stages: Mapping[str, Stage]) -> list[str]:
    """A warning for each source whose share of a stage, rounded, is a tenth or more off what its
    weight asks for.
    """
    lines = []
    for name, stage in stages.items():
        mixture = Mixture(stage.mixture, 0)
        total = math.fsum(weight / max(stage.mixture.values()) for weight in stage.mixture.values())
        for source, count in zip(mixture.names, mixture.counts, strict=True):
            asked = stage.mixture[source] / max(stage.mixture.values()) / total
            got = count / mixture.block
            if abs(got - asked) >= 0.1 * asked:
                lines.append(
                    f"warning: stages.{name}.mixture.{source}={stage.mixture[source]:g} asks for "
                    f"{asked:.2g} of the sequences but gets {count} of each {mixture.block}, which "
                    f"is {got:.2g}; raise it, or set it to 0"
                )
    return lines


class Mixture:
    """Positions 0, 1, 2, ... shared among sources in proportion to their weights, in a seeded
    order.

    In each block of 1024 positions a source has its share, rounded but at least one; within a
    source the indices 0, 1, 2, ... are used once each.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        """Weights are of any scale, at least one above zero; the seed is a 64-bit key."""
        self.seed = seed
        # Sorted, so that the order in which a recipe names its sources changes nothing.
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        self.block = max(BLOCK, len(self.names))
        self.counts = _apportion([weights[name] for name in self.names], self.block)
        self._ends = np.cumsum(self.counts)

    def at(self, position: int) -> tuple[str, int]:
        """The source that position draws from, and the index within that source."""
        block, index = divmod(position, self.block)
        slot = permute(index, self.block, derive_key(self.seed, "mixture", block))
        source = int(np.searchsorted(self._ends, slot, side="right"))
        count = self.counts[source]
        return self.names[source], block * count + slot - (int(self._ends[source]) - count)


def _apportion(weights: list[float], total: int) -> list[int]:
    """Positive integers in proportion to the weights that sum to `total`, by largest remainder."""
    scale = max(weights)  # weights near the largest float must not overflow their sum
    shares = [weight / scale for weight in weights]
    quotas = [share / sum(shares) * total for share in shares]
    counts = [max(1, int(quota)) for quota in quotas]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(able, key=lambda i: step * (quotas[i] - counts[i]))] += step
    return counts
