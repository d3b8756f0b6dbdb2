"""How fast a chip forms products of matrices in 8 bits, and which chips do not."""

from braeburn.config import Matmul, Precision
from braeburn.errors import UserError
from braeburn.hardware.catalogue import Chip, Figure


def peak_of(chip: Chip, matmul: Matmul) -> Figure | None:
    """The dense peak of a chip in the products of `precision.matmul`; None where it has none, or
    none that is known.
    """
    return {
        "compute": chip.bf16_tflops,
        "fp8": chip.fp8_tflops,
        "fp8_rows": chip.fp8_tflops,
        "int8": chip.int8_tops,
    }[matmul]


def speedup(chip: Chip, matmul: Matmul) -> float:
    """How many times faster such products are at the chip's peak than those in bf16; 1 where that
    is not known.
    """
    peak = peak_of(chip, matmul)
    return peak.value / chip.bf16_tflops.value if peak and chip.bf16_tflops else 1.0


def check_matmul(precision: Precision, chip: Chip | None) -> None:
    """Refuses products that a chip does not form.

    Args:
        precision: of the run.
        chip: None for devices that the catalogue lacks, as CPUs, whose compiler has to know.

    Raises:
        UserError: naming what the chip has.
    """
    matmul = precision.matmul
    if chip is None or matmul == "compute" or peak_of(chip, matmul):
        return
    others: tuple[Matmul, ...] = ("int8", "fp8", "compute")
    has = [other for other in others if peak_of(chip, other)]
    name = "int8" if matmul == "int8" else "fp8"
    raise UserError(
        f"precision.matmul={matmul!r} needs products in {name}, which {chip.title} "
        f"has not, or the catalogue does not know; set precision.matmul to "
        f"{' or '.join(map(repr, has))}"
    )
