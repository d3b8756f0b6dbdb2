"""The devices of targets that are not there, as their compilers describe them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What plug-ins of JAX are told to call to make themselves known; there is no other name for it.
from jax._src.xla_bridge import register_plugin
from jax.experimental.topologies import TopologyDescription, get_topology_desc

from braeburn.errors import UserError
from braeburn.hardware.targets import Target
from braeburn.plan import stubs
from braeburn.plan.child import COMPILERS

# The package of the compiler of each family of chips.
PACKAGES = {"tpu": "libtpu", "nvidia": "jax-cuda13-pjrt", "amd": "jax-rocm7-pjrt"}
# GPUs whose collectives XLA's cost model has no table of: with it compiling ends with "Cannot find
# key" in JAX 0.12.
_WITHOUT_COST_MODEL = "gfx90a"


@dataclass(frozen=True)
class Topology:
    """What programs are compiled for.

    Attributes:
        devices: those of a target.
        stubs: the names of the libraries that the compiler lacks here, and that stubs stand in for:
            see `stubs.load`.
        has_cost_model: whether XLA has a model of the time that they take.
    """

    devices: Sequence[Any]
    stubs: tuple[str, ...] = ()
    has_cost_model: bool = False


def topology(target: Target) -> Topology:
    """The devices of a target of TPUs or GPUs, none of which needs to be there.

    Raises:
        UserError: the installed compiler does not know the chip, or cannot be loaded.
    """
    if target.facts.family == "tpu":
        return Topology(_torus(target).devices)
    platform = {"nvidia": "cuda", "amd": "rocm"}[target.facts.family]
    library = _plugin(target)
    missing = _register_rocm(library, target) if platform == "rocm" else ()
    nodes = target.slices * target.nodes_per_slice
    devices = target.chips_per_node * target.facts.devices_per_chip
    shape = f"1x{nodes}x{devices}"
    config = _description(target, library)
    found = get_topology_desc("", platform, topology=shape, target_config=config)
    return Topology(found.devices, missing, _WITHOUT_COST_MODEL not in config)


def _torus(target: Target) -> TopologyDescription:
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.facts.dimensions == 3 or target.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1) if target.chips == 1 else (2, 2, 1)
    if target.chip == "v4":
        options["chip_config_name"] = "megacore"  # two cores as one device, as v5p has it by itself
    return get_topology_desc(f"{target.chip}:{target.topology}", "tpu", **options)


def _plugin(target: Target) -> Path:
    """The library of the plug-in of JAX that compiles for a GPU."""
    plugin = find_spec(COMPILERS[target.facts.family])
    assert plugin and plugin.origin  # looked for before this process was started
    (library,) = Path(plugin.origin).parent.glob("*.so")
    return library


def _register_rocm(library: Path, target: Target) -> tuple[str, ...]:
    """Makes the ROCm plug-in known to JAX, which it leaves out where there is no AMD GPU.

    Returns:
        The names of the libraries of ROCm that are not here.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        missing = stubs.load(library)
    except OSError as error:
        raise UserError(
            f"--on {str(target)!r}: the ROCm plug-in cannot be loaded ({error}); install ROCm 7, "
            f"which it is linked to, or update jax-rocm7-pjrt"
        ) from None
    register_plugin("rocm", library_path=str(library), options={"platform_name": "ROCM"})
    return tuple(missing)


def _description(target: Target, library: Path) -> str:
    """XLA's description of a GPU, a text proto which the plug-in carries within it."""
    known = {}
    for found in re.finditer(rb"(?<=\0)[^\0]*gpu_device_info \{[^\0]*", library.read_bytes()):
        if name := re.search(r'device_description_str: "([^"]*)"', text := found[0].decode()):
            known[name[1]] = text
    # Of several forms the one on a board of its own and with the most memory, as the catalogue has
    # it.
    words = {name: {*name.upper().replace("-", " ").split()} for name in known}
    wanted = (target.facts.described_as or target.chip).upper()
    fits = [name for name in known if wanted in words[name] and not {"MIG", "PCIE"} & words[name]]
    if not fits:
        described = ", ".join(known) or "no GPU, as that of JAX 0.12 does"
        raise UserError(
            f"--on {str(target)!r}: {library.parent.name} describes {described}; choose one, or "
            f"update JAX"
        )
    return max(
        (known[name] for name in fits),
        key=lambda text: int(re.findall(r"device_memory_size: (\d+)", text)[0]),
    )
