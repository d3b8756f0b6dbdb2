"""Which chips form products in 8 bits, and how fast."""

import pytest

from braeburn.config import Matmul, Precision
from braeburn.errors import UserError
from braeburn.hardware.catalogue import catalogue
from braeburn.hardware.products import check_matmul, speedup


@pytest.mark.parametrize(
    ("chip", "matmul", "faster"),
    [
        ("h100", "fp8", 1979 / 989),
        ("h100", "fp8_rows", 1979 / 989),
        ("v5p", "int8", 2.0),
        ("v4", "int8", 1.0),
        ("tpu7x", "fp8", 2.0),
        ("b200", "compute", 1.0),
    ],
)
def test_speedup(chip: str, matmul: Matmul, faster: float) -> None:
    assert speedup(catalogue()[chip], matmul) == pytest.approx(faster, rel=1e-6)
    check_matmul(Precision(matmul=matmul), catalogue()[chip])


@pytest.mark.parametrize(
    ("chip", "matmul", "advice"),
    [
        ("v6e", "fp8", "'int8' or 'compute'"),
        ("a100", "fp8_rows", "'int8' or 'compute'"),
        ("mi300x", "fp8", "'int8' or 'compute'"),
        ("tpu7x", "int8", "'fp8' or 'compute'"),
    ],
)
def test_what_a_chip_lacks_is_refused(chip: str, matmul: Matmul, advice: str) -> None:
    facts = catalogue()[chip]
    with pytest.raises(UserError) as refused:
        check_matmul(Precision(matmul=matmul), facts)
    assert str(refused.value) == (
        f"precision.matmul={matmul!r} needs products in {matmul[:4].rstrip('_')}, which "
        f"{facts.title} has not, or the catalogue does not know; set precision.matmul to {advice}"
    )
    for other in ("int8", "fp8", "compute"):
        if repr(other) in advice:
            check_matmul(Precision(matmul=other), facts)


def test_devices_that_the_catalogue_lacks_are_let_try() -> None:
    check_matmul(Precision(matmul="fp8"), None)
