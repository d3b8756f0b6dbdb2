"""What a traced program is for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

from braeburn.hardware.catalogue import chip_of

# An int, or the symbol of jax.export for a size that is not known while a program is traced.
Size = int | Any

# The platform of a program that is to run on all of them.
PORTABLE = "portable"
_PORTABLE: ContextVar[bool] = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """Within it, programs are traced for all platforms at once, without the kernels of any."""
    before = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(before)


def traced_for() -> tuple[str, tuple[int, int] | None]:
    """The platform of the devices that the traced program is for, and of NVIDIA GPUs their compute
    capability.

    The devices need not be there. JAX calls the GPUs of all makers "gpu": what is installed here
    tells which they are, and the catalogue knows those that are not here by their names. GPUs that
    it lacks are taken for NVIDIA's. Within `portable` it is no platform of JAX, but `PORTABLE`.
    """
    if _PORTABLE.get():
        return PORTABLE, None
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = (device and device.platform) or jax.default_backend()
    if platform not in ("gpu", "cuda", "rocm"):
        return platform, None
    here = jax.local_devices()[0] if jax.default_backend() == "gpu" else None
    if here and "rocm" in here.client.platform_version.lower():
        return "rocm", None
    if here and (device is None or device.device_kind == here.device_kind):
        major, minor = here.compute_capability.split(".")
        return "cuda", (int(major), int(minor))
    chip = chip_of(device.device_kind) if device else None
    if chip and chip.family == "amd":
        return "rocm", None
    return platform.replace("gpu", "cuda"), chip.compute_capability if chip else None
