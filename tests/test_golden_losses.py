"""The golden losses: equal to the last bit where they were written, to 1e-5 elsewhere."""

import json
from typing import Any

import pytest

from golden_losses import FILE, cases, losses, machine

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def test_every_case_is_kept_and_no_other(golden: dict[str, Any]) -> None:
    assert list(golden["losses"]) == list(cases())


@pytest.mark.parametrize("name", cases())
def test_losses_are_those_that_were_kept(name: str, golden: dict[str, Any]) -> None:
    found, expected = losses(cases()[name]), golden["losses"][name]
    assert expected[-1] < expected[0] - 0.1  # it learns, or the comparison would say little
    if golden["machine"] == machine():
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-5)
