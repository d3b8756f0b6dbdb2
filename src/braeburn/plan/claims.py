"""Claims about accelerators (`claims.toml`), checked against the catalogue: figures and verdicts
change with it.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braeburn.hardware.catalogue import Chip, Figure, weakest

# By how much a claimed number may be off and still hold. Claims are rounded: 2.76 stands for 2.765,
# and 8% for 8.1%.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """A claimed number and what was found by the catalogue, None where that is unknown; see
    `claims.toml`. The two may differ by `tolerance`, relative to what was found.
    """

    what: str
    claimed: float
    follows: str
    found: Figure | None
    unit: str = "x"
    kind: str = "equal"
    tolerance: float = TOLERANCE

    def __str__(self) -> str:
        return f"{self.what} {self._number(self.found.value) if self.found else 'unknown'}"

    def _number(self, value: float) -> str:
        return f"{value:,.2f}".rstrip("0").rstrip(".") + self.unit

    @property
    def verdict(self) -> str:
        """What it makes of the claim; nothing where the claim cannot have been meant of it."""
        if self.found is None:
            return "" if self.kind == "instead" else f"{self.what} cannot be checked"
        off = self.claimed / self.found.value - 1
        holds = off <= self.tolerance and (self.kind == "limit" or off >= -self.tolerance)
        if self.kind == "limit":
            return f"{self._number(self.claimed)} is {'within' if holds else 'beyond'} {self}"
        if self.kind == "instead":
            return f"true of {self}" if holds else ""
        return (
            f"{self.what} correct" if holds else f"wrong: {self}, not {self._number(self.claimed)}"
        )


@dataclass(frozen=True)
class Claim:
    """A claim, what it comes to by the catalogue and at which tolerance, and the confidence of the
    weakest figure there, None without any.
    """

    claim: str
    checks: tuple[Check, ...]
    verdict: str
    confidence: str | None


def claims(chips: Mapping[str, Chip], facts: Mapping[str, Figure]) -> list[Claim]:
    """All claims by a catalogue and its facts (see `braeburn.hardware.catalogue`)."""
    checked = []
    for row in tomllib.loads((Path(__file__).parent / "claims.toml").read_text("utf-8"))["claims"]:
        checks = tuple(
            Check(found=_evaluate(check["follows"], chips, facts), **check)
            for check in row["checks"]
        )
        figures = [check.found for check in checks if check.found]
        verdict = "; ".join(check.verdict for check in checks if check.verdict)
        tolerances = sorted({check.tolerance for check in checks if check.found})
        allowed = " or ".join(f"{tolerance:.0%}" for tolerance in tolerances)
        remarks = [f"tolerance {allowed}"] if allowed else []
        remarks += [row["note"]] if "note" in row else []
        verdict += f" ({'; '.join(remarks)})" if remarks else ""
        checked.append(Claim(row["claim"], checks, verdict, weakest(*figures) if figures else None))
    return checked


def _evaluate(
    formula: str, chips: Mapping[str, Chip], facts: Mapping[str, Figure]
) -> Figure | None:
    """What a formula of `claims.toml` amounts to; None where one of its figures is unknown."""
    value, confidence = 1.0, weakest("V")
    for operator, term in re.findall(r"([*/]?) ?([\w.-]+)", formula):
        table, _, name = term.partition(".")
        operand: Any = (
            facts[name]
            if table == "facts"
            else getattr(chips[table], name)
            if name
            else float(term)
        )
        if operand is None:
            return None
        if isinstance(operand, Figure):
            confidence = weakest(confidence, operand)
        number = getattr(operand, "value", operand)
        value = value / number if operator == "/" else value * number
    return Figure(value, confidence)
