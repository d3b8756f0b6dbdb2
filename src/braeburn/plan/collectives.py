"""The collectives of a compiled program, read out of its HLO text."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from braeburn.plan.hlo import Execution, Module, parse, split, unread

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# Transfers that the runtime of TPU slices carries over the data-centre network.
_ACROSS_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


@dataclass(frozen=True)
class Collective:
    """A collective on one array; an operation that combines several arrays appears once for each.

    Attributes:
        name: of the instruction.
        kind: one of `KINDS`.
        dtype: as HLO writes it, "f32".
        shape: of what an all-gather leaves on each device, and of what each device puts into all
            others.
        axes: of the mesh, those that it runs over and that have more than one device; None where
            its groups are not those of any axes. Of what crosses slices, the axes that were said
            to.
        times: how often it runs: the product of the trip counts of the loops around it.
        conditional: whether it is in a branch that may not be taken.
        source: the operation of the traced program that it comes from.
        computation: the name of the computation that it stands in.
        direction: of a permute that goes one way along an axis "+" or "-"; "" of all others, whose
            data goes both ways.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    times: float
    conditional: bool
    source: str
    computation: str
    direction: str = ""

    @property
    def site(self) -> tuple[str, str]:
        """Where in the program it is: its computation and its instruction."""
        return self.computation, self.name

    @property
    def bytes(self) -> int:
        """Bytes of the array on one device, each time that it runs."""
        width = re.search(r"\d+", self.dtype)
        return -(-math.prod(self.shape) * (int(width[0]) if width else 8) // 8)


def traffic(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...] | None], float]:
    """Bytes on one device over one run of the program, by kind and axes."""
    sums: dict[tuple[str, tuple[str, ...] | None], float] = {}
    for collective in found:
        key = collective.kind, collective.axes
        sums[key] = sums.get(key, 0) + collective.bytes * collective.times
    return sums


def collectives(program: str | Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a compiled program, in the order of its text within each computation.

    One that is started and awaited apart appears once. Branches appear as if each of them was
    taken.

    Args:
        program: the compiled module, or its text as `compiled.as_text()` writes it.
        mesh_shape: size of each axis; the program's device i is the i-th of
            `mesh.devices.flatten()`. A program for several slices is compiled for one of them: of
            each axis, the part within a slice.

    Raises:
        UserError: the text is not a whole module, has groups of an unknown form, or a collective in
            a loop of unknown length.
    """
    module = parse(program) if isinstance(program, str) else program
    found: list[Collective] = []
    chains = set()
    for run in module.walk():
        opcode = run.instruction.opcode.removesuffix("-start")
        if opcode in KINDS:
            # TPUs carry one out piece by piece beside other work, and write it into each fusion
            # that does a piece.
            chain = re.search(r'chain_id="(\d+)"', run.instruction.rest)
            if not chain or chain[1] not in chains:
                found += _arrays_of(run.known_length(), opcode, mesh_shape)
            chains |= {chain[1]} if chain else set()
    return found


def transfers(module: Module, axes: tuple[str, ...]) -> list[Collective]:
    """Every transfer between slices of a program compiled for several: pairs of `send` and `recv`,
    each counted once.

    Args:
        module: the compiled module.
        axes: of the mesh that cross slices.

    Raises:
        UserError: a transfer of unknown type, or in a loop of unknown length.
    """
    found: list[Collective] = []
    whole: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    runs = [run for run in module.walk() if _ACROSS_SLICES in run.instruction.rest]
    for run in sorted(
        runs, key=lambda run: run.instruction.opcode
    ):  # what is received before what is sent
        instruction = run.instruction
        if instruction.opcode not in ("send", "recv"):
            continue
        kind, name = (
            re.search(rf'_xla_{key}="([^"]*)"', instruction.rest)
            for key in ("megascale_transfer_type", "host_transfer_rendezvous")
        )
        if not kind or not name:
            raise unread(
                f"{instruction.name} leaves the slice in an unknown way: {instruction.rest[:200]}"
            )
        # What is sent of a gather, and received of a scatter, is a part of the whole.
        (dtype, shape), *_ = arrays(instruction.type)
        pair = (run.computation, name[1])
        _, whole[pair] = max(
            (math.prod(array[1]), array) for array in {(dtype, shape), whole.get(pair, ("", ()))}
        )
        if instruction.opcode == "send":
            body = module.computations[run.computation]
            source = instruction.source or body[instruction.arguments[0]].source or name[1]
            written = kind[1].lower().replace("_", "-")
            times = run.known_length().times
            found.append(
                Collective(
                    instruction.name,
                    written,
                    *whole[pair],
                    axes,
                    times,
                    run.conditional,
                    source,
                    run.computation,
                )
            )
    return found


def arrays(types: str) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of each array of an HLO type."""
    return [(dtype, _integers(dims)) for dtype, dims in _ARRAY.findall(types)]


def _arrays_of(run: Execution, opcode: str, mesh_shape: Mapping[str, int]) -> Iterator[Collective]:
    instruction, attributes, types = (
        run.instruction,
        run.instruction.attributes,
        run.instruction.type,
    )
    pairs = attributes.get("source_target_pairs")
    written = pairs or attributes.get("replica_groups", "{}")
    if "device_ids" in attributes:  # replica_groups=mesh[...], device_ids=(...) {...}
        written += f", device_ids={attributes['device_ids']}"
    axes, size = _axes(written, tuple(mesh_shape.items()), whole=not pairs)
    parts = list(split(types[1:-1], ",")) if types.startswith("(") else []
    # (what is put in, what comes out, ...), each perhaps of several arrays; of a sum on TPUs what
    # comes out alone
    both = opcode != "all-reduce" or types.startswith("((")
    started = instruction.opcode.endswith("-start") and both
    if started:
        types = parts[opcode == "all-gather"]
    # TPUs write a reduce-scatter as a fusion: the sum of everything, of which a part is kept.
    hidden = opcode == "all-reduce" and run.computation.startswith("all-reduce-scatter")
    kind = "reduce-scatter" if hidden else opcode
    for dtype, shape in arrays(types):
        if opcode == "reduce-scatter" and not started:
            along = int(attributes["dimensions"].strip("{}"))
            shape = (*shape[:along], shape[along] * size, *shape[along + 1 :])
        yield Collective(
            instruction.name,
            kind,
            dtype,
            shape,
            axes,
            run.times,
            run.conditional,
            instruction.source,
            run.computation,
            _direction(pairs, tuple(mesh_shape.items())) if pairs else "",
        )


def _groups(text: str, num_devices: int) -> np.ndarray:
    """The devices of each group [groups, devices in each], from any of the forms in which they are
    written.
    """
    if iota := re.fullmatch(r"(\[[\d,]+\])<=(.*)", text):
        return _numbering(iota[2]).reshape(_integers(iota[1]))
    if mesh := re.fullmatch(
        r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? *\{((?:'[^']*',?)*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        devices = _numbering(mesh[2] or f"[{math.prod(sizes.values())}]").reshape(
            tuple(sizes.values())
        )
        along = [list(sizes).index(name) for name in re.findall(r"'([^']*)'", mesh[3])]
        rest = [i for i in range(len(sizes)) if i not in along]
        return devices.transpose(rest + along).reshape(
            math.prod(devices.shape[i] for i in rest), -1
        )
    if text == "{}":
        return np.arange(num_devices)[None]
    if re.fullmatch(r"\{(\{[\d, ]+\},? ?)+\}", text):
        return np.array([_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)])
    raise unread(f"groups of devices in an unknown form: {text}")


def _numbering(text: str) -> np.ndarray:
    """Devices in the order that `[2,4]T(1,0)` stands for: 0, 1, ... in an array of that shape,
    transposed.
    """
    if not (parts := re.fullmatch(r"(\[[\d,]+\])(?:T\(([\d,]+)\))?", text)):
        raise unread(f"an order of devices in an unknown form: {text}")
    shape = _integers(parts[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_integers(parts[2] or "") or None)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


@cache
def _axes(
    written: str, mesh: tuple[tuple[str, int], ...], *, whole: bool
) -> tuple[tuple[str, ...] | None, int]:
    """The axes along which the devices of a group differ, if they are all that there are along
    these, and their number.

    Args:
        written: the groups, in any of their forms.
        mesh: axes and their sizes.
        whole: whether groups must be whole; those of a permutation are pairs of a source and its
            target.
    """
    sizes = dict(mesh)
    groups = _groups(written, math.prod(sizes.values()))
    coordinates = zip(sizes, np.unravel_index(groups, tuple(sizes.values())), strict=True)
    axes = tuple(axis for axis, along in coordinates if (along != along[:, :1]).any())
    known = not whole or groups.shape[1] == math.prod(sizes[axis] for axis in axes)
    return (axes if known else None), groups.shape[1]


@cache
def _direction(pairs: str, mesh: tuple[tuple[str, int], ...]) -> str:
    """Which way along an axis a permute goes that moves every part as far as any other: "+" towards
    the next devices, "-" towards those before, as the shorter way round is; "" where neither is
    shorter, or parts go different ways.
    """
    sizes = dict(mesh)
    groups = _groups(pairs, math.prod(sizes.values()))
    ways = set()
    for size, along in zip(
        sizes.values(), np.unravel_index(groups, tuple(sizes.values())), strict=True
    ):
        steps = (along[:, 1] - along[:, 0]) % size
        ways |= {int(np.sign(size - 2 * step)) for step in np.unique(steps) if step}
    return {1: "+", -1: "-"}[ways.pop()] if len(ways) == 1 and 0 not in ways else ""
