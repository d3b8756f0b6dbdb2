"""What XLA and JAX read from the environment as they start, and cannot be told later.

Without JAX.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from braeburn.extras import how_to_install

# XLA's own kernels in place of NCCL's. JAX 0.12's compiler aborts on that for all-reduce in steps
# over 64 GPUs ("size mismatch when packing elements for LLVM struct"). Earlier versions do not know
# the option.
COLLECTIVE_KERNELS = "--xla_gpu_experimental_use_collective_kernels"


def gpu_environment() -> dict[str, str]:
    """Variables for NVIDIA GPUs, but for those that are set already; harmless without any."""
    found: dict[str, str] = {}
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # Of a GPU's memory, as the plan has it; JAX alone would take three quarters.
        found["XLA_CLIENT_MEM_FRACTION"] = os.environ.get("XLA_CLIENT_MEM_FRACTION", "0.92")
    flags = os.environ.get("XLA_FLAGS", "")
    try:
        known = tuple(map(int, version("jax-cuda13-pjrt").split(".")[:2])) >= (0, 12)
    except PackageNotFoundError:
        known = False
    if known and COLLECTIVE_KERNELS not in flags:
        found["XLA_FLAGS"] = f"{flags} {COLLECTIVE_KERNELS}=-ALL_REDUCE".strip()
    return found


# What the kernel's drivers of accelerators put into /dev, and the extra that makes JAX use them.
DRIVERS = {
    "nvidia[0-9]*": ("an NVIDIA GPU", "cuda"),
    "kfd": ("an AMD GPU", "rocm"),
    "accel[0-9]*": ("a TPU", "tpu"),
    "vfio/[0-9]*": ("a TPU", "tpu"),
}


def unused_accelerator(backend: str, devices: Path = Path("/dev")) -> str | None:
    """The warning that JAX computes on the CPU though this machine has an accelerator; None where
    all is well.

    Args:
        backend: the platform that JAX has taken.
        devices: where drivers show what there is.
    """
    if backend != "cpu" or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    for pattern, (what, extra) in DRIVERS.items():
        if any(devices.glob(pattern)):
            return (
                f"warning: this machine has {what}, but JAX computes on the CPU, many times "
                f"slower; {how_to_install(extra)}, or set JAX_PLATFORMS=cpu if the CPU is meant"
            )
    return None
