"""With which options programs are compiled, and where they are kept between processes."""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from braeburn.config import Precision
from braeburn.hardware.catalogue import Chip, Flag, chip_of


def cache_compilations() -> None:
    """Keeps compiled programs below the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names
    another place.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "braeburn" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# Of NVIDIA's GPUs, for products in 8 bits.
IN_EIGHT_BITS = (
    Flag(
        "xla_gpu_enable_triton_gemm",
        False,
        "has cuBLASLt multiply; kernels of Triton would widen the operands to bf16 first",
    ),
    Flag(
        "xla_gpu_dot_merger_threshold_mb",
        0,
        "keeps products of one array apart, as those of keys and values: made one, whose matrices "
        "have different scales, they are multiplied in bf16",
    ),
)


def compiler_flags(device_kind: str, precision: Precision) -> dict[str, str | bool]:
    """The options of XLA for a device as JAX calls it, by name; none where it is not known."""
    return options(flags_for(chip, precision)) if (chip := chip_of(device_kind)) else {}


def flags_for(chip: Chip, precision: Precision) -> tuple[Flag, ...]:
    """The catalogue's options of XLA for a chip, with what products in 8 bits need."""
    more = chip.family == "nvidia" and precision.matmul != "compute"
    return chip.flags + (IN_EIGHT_BITS if more else ())


def options(flags: Iterable[Flag]) -> dict[str, str | bool]:
    """Options of XLA as JAX takes them, by name."""
    return {
        flag.name: flag.value if isinstance(flag.value, bool) else str(flag.value) for flag in flags
    }
