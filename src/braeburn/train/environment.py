"""What XLA and JAX read from the environment as they start, and cannot be told later. Without JAX."""

import os
from importlib.metadata import PackageNotFoundError, version

# XLA's own kernels in place of NCCL's. JAX 0.12's compiler aborts on that for all-reduce in steps over 64 GPUs ("size
# mismatch when packing elements for LLVM struct"). Earlier versions do not know the option.
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
