"""What a compiled program exchanges between devices, read out of its HLO text.

The text is taken apart by brackets and quotes, not by lines: what kernels write into it may hold line breaks, and lines
that begin with `}`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

# Quotes and brackets, and the one character at which a text is split.
_TOKENS = {mark: re.compile(rf'"(?:[^"\\]|\\.)*"|[\[\](){{}}{mark}]', re.DOTALL) for mark in "\n ,"}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# Instructions that exchange something or run another computation.
_RELEVANT = re.compile(rf" (?:{'|'.join(KINDS)}|while)|(?:calls|to_apply|computations?)=")
_CALLS = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation", "called_computations")


@dataclass(frozen=True)
class Collective:
    """One array that is exchanged; an operation that combines several of them appears once for each.

    Attributes:
        name: of the instruction.
        kind: one of `KINDS`.
        dtype: as HLO writes it, "f32".
        shape: of what an all-gather leaves on each device, and of what each device puts into all others.
        axes: of the mesh, those that it runs over and that have more than one device; None where its groups are not
            those of any axes.
        times: how often it runs: the product of the trip counts of the loops around it.
        conditional: whether it is in a branch that may not be taken.
        source: the operation of the traced program that it comes from.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] | None
    times: int
    conditional: bool
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the array on one device, each time that it runs."""
        width = re.search(r"\d+", self.dtype)
        return -(-math.prod(self.shape) * (int(width[0]) if width else 8) // 8)


def traffic(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...] | None], int]:
    """Bytes on one device over one run of the program, by kind and axes."""
    sums: Counter[tuple[str, tuple[str, ...] | None]] = Counter()
    for collective in found:
        sums[collective.kind, collective.axes] += collective.bytes * collective.times
    return dict(sums)


def collectives(hlo_text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every exchange of a compiled program, in the order of its text within each computation.

    One that is started and awaited apart appears once. Branches appear as if each of them was taken.

    Args:
        hlo_text: the compiled module, as `compiled.as_text()` writes it.
        mesh_shape: size of each axis; the program's device i is the i-th of `mesh.devices.flatten()`.

    Raises:
        ValueError: the text is not a whole module, has groups of an unknown form, or exchanges in a loop of unknown
            length.
    """
    computations, entry = _computations(hlo_text)

    def walk(name: str, conditional: bool) -> Iterator[Collective]:
        for line in computations[name]:
            if not _RELEVANT.search(line):
                continue
            instruction = _instruction(line)
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            if kind in KINDS:
                # TPUs write a reduce-scatter as a fusion: the sum of everything, of which a part is kept.
                hidden = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                yield from _exchanged(instruction, kind, "reduce-scatter" if hidden else kind, mesh_shape, conditional)
            elif kind == "while":
                condition = instruction.attributes["condition"].lstrip("%")
                body = instruction.attributes["body"].lstrip("%")
                inside = [*walk(body, conditional), *walk(condition, conditional)]
                trips = _trip_count(instruction, computations[condition]) if inside else 0
                yield from (replace(collective, times=collective.times * trips) for collective in inside)
            else:
                branches = conditional or kind == "conditional"
                for key in _CALLS:
                    for called in re.findall(r"[\w.\-]+", instruction.attributes.get(key, "")):
                        yield from walk(called, branches)

    return list(walk(entry, False))


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    attributes: Mapping[str, str]


def _split(text: str, mark: str) -> Iterator[str]:
    """The parts of a text between marks that stand outside all brackets and quotes."""
    depth = start = 0
    for token in _TOKENS[mark].finditer(text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif token[0] == mark and depth == 0:
            yield text[start : token.start()]
            start = token.end()
    if depth:
        raise ValueError(f"unbalanced brackets in HLO text that begins {text[:80]!r}")
    yield text[start:]


def _computations(hlo_text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation by its name, and the name of the one that the program begins with."""
    computations, entry = {}, ""
    for statement in _split(hlo_text, "\n"):
        # `%name (parameters) -> type {`, instructions, `}`
        head, _, body = statement.partition(" {\n")
        if " -> " not in head or not body:
            continue
        name = head.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        computations[name] = [line for line in _split(body[: body.rindex("}")], "\n") if line.strip()]
        entry = name if head.startswith("ENTRY ") else entry
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not that of a whole HLO module")
    return computations, entry


def _instruction(line: str) -> _Instruction:
    """`[ROOT] %name = type opcode(operands), key=value, ...` taken apart."""
    words = list(_split(line.strip().removeprefix("ROOT "), " "))
    name, _, type_, call, *rest = words
    pairs = (part.strip().partition("=") for part in _split(" ".join(rest), ","))
    attributes = {key: value for key, _, value in pairs}
    return _Instruction(name.lstrip("%"), type_, call.partition("(")[0], attributes)


def _exchanged(
    instruction: _Instruction, opcode: str, kind: str, mesh_shape: Mapping[str, int], conditional: bool
) -> Iterator[Collective]:
    attributes, types = instruction.attributes, instruction.type
    num_devices = math.prod(mesh_shape.values())
    pairs = attributes.get("source_target_pairs")
    written = pairs or attributes.get("replica_groups", "{}")
    if "device_ids" in attributes:  # replica_groups=mesh[...], device_ids=(...) {...}
        written += f", device_ids={attributes['device_ids']}"
    groups = _groups(written, num_devices)
    started = instruction.opcode.endswith("-start") and opcode != "all-reduce"
    if started:  # (what is put in, what comes out, ...)
        types = list(_split(types[1:-1], ","))[opcode == "all-gather"]
    source = re.search(r'op_name="([^"]*)"', attributes.get("metadata", ""))
    for dtype, dims in _ARRAY.findall(types):
        shape = [int(size) for size in dims.split(",") if size]
        if opcode == "reduce-scatter" and not started:
            shape[int(attributes["dimensions"].strip("{}"))] *= groups.shape[1]
        axes = _axes(groups, mesh_shape, whole=not pairs)
        yield Collective(instruction.name, kind, dtype, tuple(shape), axes, 1, conditional, source[1] if source else "")


def _groups(text: str, num_devices: int) -> np.ndarray:
    """The devices of each group [groups, devices in each], from any of the forms in which they are written."""
    if iota := re.fullmatch(r"(\[[\d,]+\])<=(.*)", text):
        return _numbering(iota[2]).reshape(_integers(iota[1]))
    if mesh := re.fullmatch(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? *\{((?:'[^']*',?)*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        devices = _numbering(mesh[2] or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        along = [list(sizes).index(name) for name in re.findall(r"'([^']*)'", mesh[3])]
        rest = [i for i in range(len(sizes)) if i not in along]
        return devices.transpose(rest + along).reshape(math.prod(devices.shape[i] for i in rest), -1)
    if text == "{}":
        return np.arange(num_devices)[None]
    if re.fullmatch(r"\{(\{[\d, ]+\},? ?)+\}", text):
        return np.array([_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)])
    raise ValueError(f"groups of devices in an unknown form: {text}")


def _numbering(text: str) -> np.ndarray:
    """Devices in the order that `[2,4]T(1,0)` stands for: 0, 1, ... in an array of that shape, transposed."""
    if not (parts := re.fullmatch(r"(\[[\d,]+\])(?:T\(([\d,]+)\))?", text)):
        raise ValueError(f"an order of devices in an unknown form: {text}")
    shape = _integers(parts[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_integers(parts[2] or "") or None)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int], *, whole: bool) -> tuple[str, ...] | None:
    """The axes along which the devices of a group differ, if they are all the devices there are along these axes.

    Args:
        groups: [groups, devices in each].
        mesh_shape: size of each axis.
        whole: whether groups must be whole; those of a permutation are pairs of a source and its target.
    """
    places = np.unravel_index(groups, tuple(mesh_shape.values()))
    axes = tuple(axis for axis, place in zip(mesh_shape, places, strict=True) if (place != place[:, :1]).any())
    return axes if not whole or groups.shape[1] == math.prod(mesh_shape[axis] for axis in axes) else None


def _trip_count(loop: _Instruction, condition: list[str]) -> int:
    """How often a loop runs: XLA's own account of it, or else the one constant that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes.get("backend_config", "")):
        return int(known[1])
    constants = [found[1] for line in condition if (found := re.search(r"= s(?:32|64)\[\]\S* constant\((\d+)\)", line))]
    if len(constants) != 1:
        raise ValueError(f"the loop {loop.name} has collectives, and its length cannot be told from its condition")
    return int(constants[0])
