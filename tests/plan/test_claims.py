"""Claims about accelerators, whose figures and verdicts must follow from the catalogue."""

from pathlib import Path

import pytest

from braeburn.hardware.catalogue import Figure, catalogue, facts
from braeburn.plan.claims import TOLERANCE, Check, Claim, claims


def checked(path: Path | None = None) -> list[Claim]:
    return claims(catalogue(path), facts(path))


# Beginnings of the claims, in order, with what follows by hand and what the verdict begins with.
NINE = [
    (
        "v5p: 459 TFLOP/s",
        [459, 918, 95, 2.765],
        "bf16 correct; int8 correct; memory correct; bandwidth correct",
        "V",
    ),
    ("v5p has 2x the FLOP/s", [459 / 275], "wrong: bf16 1.67x, not 2x", "V"),
    (
        "v5p has 3x",
        [2765 / 1228, 95 / 32],
        "wrong: bandwidth 2.25x, not 3x; true of capacity 2.97x",
        "S",
    ),
    (
        "v5p trains",
        [459 / 275, 918 / 275],
        "2.8x is beyond the peak in bf16 1.67x; 2.8x is within the peak with",
        "V",
    ),
    (
        "v5p has 2.1x",
        [2.8 / (4.20 / 3.22)],
        "speed for the price correct (tolerance 5%; with the vendor's claim",
        "S",
    ),
    (
        "Gaudi 3",
        [1835 / 989, 3700 / 3350, 1835 / 989 / (900 / 700)],
        "1.4x is within the peak in bf16 1.86x; 1.5x is beyond the memory bandwidth 1.1x; true of "
        "peak per watt 1.44x",
        "S",
    ),
    (
        "MTT S4000",
        [48, 768, 100, 48_000],
        "memory correct; bandwidth correct; fp16 correct; 112 GB is within",
        "S",
    ),
    (
        "Chana",
        [None, None, None],
        "the peak in bf16 cannot be checked; energy of the same work cannot be checked",
        None,
    ),
    (
        "about 8% of Frontier",
        [1536 / 37_888 * 100, 3072 / 37_888 * 100],
        "wrong: modules 4.05%, not 8%; true of GCDs counted as modules 8.11% (tolerance 5%; "
        "throughput was measured",
        "S",
    ),
]


def test_the_nine_claims() -> None:
    found = checked()
    assert len(found) == len(NINE)
    for claim, (beginning, values, verdict, confidence) in zip(found, NINE, strict=True):
        assert claim.claim.startswith(beginning)
        assert [check.found and check.found.value for check in claim.checks] == pytest.approx(
            values
        )
        assert claim.verdict.startswith(verdict)
        assert claim.confidence == confidence


@pytest.mark.parametrize(
    ("index", "text", "figure", "verdict"),
    [
        (
            0,
            "[v5p]\nmemory_gb = 80",
            "memory 80 GB",
            "bf16 correct; int8 correct; wrong: memory 80 GB, not 95 GB",
        ),
        (1, "[v4]\nbf16_tflops = 230", "bf16 2x", "bf16 correct"),
        (
            2,
            "[v5p]\nmemory_gb_per_s = 3684",
            "bandwidth 3x",
            "bandwidth correct; true of capacity 2.97x",
        ),
        (2, "[v5p]\nmemory_gb = 64", "capacity 2x", "wrong: bandwidth 2.25x, not 3x"),
        (
            3,
            "[v5p]\nint8_tops = 459",
            "on v5p 1.67x",
            "2.8x is beyond the peak in bf16 1.67x; 2.8x is beyond",
        ),
        (
            4,
            "[v5p]\nprice = 8.4",
            "speed for the price 1.07x",
            "wrong: speed for the price 1.07x, not 2.1x",
        ),
        (4, "[facts]\nv5p_over_v4_speed = 1.4", "speed for the price 1.07x", "wrong"),
        (
            5,
            "[gaudi3]\nbf16_tflops = 1000",
            "peak in bf16 1.01x",
            "1.4x is beyond the peak in bf16 1.01x",
        ),
        (6, "[s4000]\nmemory_gb = 0.1", "memory of 1000 100 GB", "wrong: memory 0.1 GB, not 48 GB"),
        (8, "[facts]\nfrontier_gcds_used = 6144", "modules 8.11%", "modules correct"),
        (8, "[mi250x]\ndevices_per_chip = 1", "modules 8.11%", "modules correct"),
    ],
)
def test_claims_follow_the_catalogue(
    tmp_path: Path, index: int, text: str, figure: str, verdict: str
) -> None:
    path = tmp_path / "chips.toml"
    path.write_text(text)
    claim = checked(path)[index]
    assert figure in ", ".join(map(str, claim.checks))
    assert claim.verdict.startswith(verdict)
    assert claim.verdict != checked()[index].verdict


def test_a_claim_can_be_checked_once_its_chip_is_known(tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    path.write_text("[chana]\nbf16_tflops = 468\nwatts = 420\nprice = 1.44\n")
    claim = checked(path)[7]
    assert (
        claim.verdict
        == "1.5x is within the peak in bf16 1.5x; energy of the same work correct; price correct "
        "(tolerance 5%)"
    )
    assert claim.confidence == "S"  # that of A100's watts


def test_a_verdict_says_its_tolerance_where_it_depends_on_one() -> None:
    for claim in checked():
        known = any(check.found for check in claim.checks)
        assert ("(tolerance 5%" in claim.verdict) == known, claim.claim
        assert all(check.tolerance == TOLERANCE == 0.05 for check in claim.checks)

    def verdict(claimed: float, tolerance: float) -> str:
        return Check("speed", claimed, "", Figure(1.0), tolerance=tolerance).verdict

    # The same numbers, and another tolerance.
    assert verdict(1.1, 0.05) == "wrong: speed 1x, not 1.1x"
    assert verdict(1.1, 0.15) == "speed correct"


def test_every_formula_names_known_fields() -> None:
    fields = [
        term for claim in checked() for check in claim.checks for term in check.follows.split()
    ]
    chips = catalogue()
    for table, _, name in (
        term.partition(".") for term in fields if term.isascii() and term[0].isalpha()
    ):
        assert name in facts() if table == "facts" else hasattr(chips[table], name)
