"""How long the devices compute in a compiled program: by the compiler's own account, and kernels by
their FLOPs.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from braeburn.hardware.catalogue import Chip
from braeburn.hardware.products import speedup
from braeburn.layers.attention.splash import SPLASH
from braeburn.layers.grouped.triton import BLOCK
from braeburn.plan.collectives import arrays
from braeburn.plan.cost import EFFICIENCY, memory_bandwidth
from braeburn.plan.hlo import Execution, Instruction, Module

# What the compiler writes for a time that it does not know.
UNKNOWN_CYCLES = 2**63 - 1
_SPEED_OF_LIGHT = re.compile(r'"exec_time_us":([\d.e+\-]+),[^{}]*"name":"sol"')
# Products over the numbers of keys, and over those of values, that each of the attention kernels
# forms.
_SPLASH = {"splash_mha_fwd": (1, 1), "splash_mha_dkv": (2, 2), "splash_mha_dq": (2, 1)}
_CUDNN_FORWARD, _CUDNN_BACKWARD = 2, 5
# Of the product of experts: products, and sums over the rows of a group.
_GROUPED = re.compile(r"/(grouped_(?:outer_)?products)/")


@dataclass(frozen=True)
class Kernel:
    """A kernel that is not the compiler's own: calls in a step, and seconds of all, None if its
    work is not known.
    """

    name: str
    calls: int
    seconds: float | None


@dataclass(frozen=True)
class Computing:
    """Seconds in which the devices compute in a step, those of kernels included, and the names of
    what has no time.
    """

    seconds: float
    kernels: list[Kernel]
    untimed: list[str]


def computing(module: Module, chip: Chip) -> Computing:
    """Seconds of computing in a run of a compiled program.

    TPU: the compiler's `estimated_cycles`. GPU: of matrix products their FLOPs at the plan's
    fraction of the peak, of what else there is the `sol` entry of XLA's cost model (which takes
    bf16 products with a float32 result for products of float32) or, where XLA has no such model of
    the GPU, the bytes that it reads and writes. Attention kernels: their FLOPs, of
    which causality leaves half, at the plan's fraction of the peak. Kernels for experts: as matrix
    products.

    Raises:
        UserError: something runs in a loop of unknown length.
    """
    total, untimed = 0.0, []
    kernels: dict[str, tuple[float, float | None]] = {}
    for run in module.walk():
        instruction = run.known_length().instruction
        if not run.times or not (work := work_of(module, run, chip)):
            continue
        if work.kernel:
            calls, before = kernels.get(work.kernel, (0, 0.0))
            known = work.seconds is not None and before is not None
            spent = before + run.times * work.seconds if known else None  # type: ignore
            kernels[work.kernel] = calls + run.times, spent
        elif work.seconds is None:
            untimed.append(instruction.name)
        else:
            total += run.times * work.seconds
    found = [Kernel(name, round(calls), seconds) for name, (calls, seconds) in kernels.items()]
    untimed += [kernel.name for kernel in found if kernel.seconds is None]
    return Computing(total + sum(kernel.seconds or 0.0 for kernel in found), found, untimed)


class Computed(NamedTuple):
    """What an instruction computes.

    Attributes:
        kernel: its name, where it is a kernel that is not the compiler's own; "" elsewhere.
        seconds: of running it once; None where that is not known.
    """

    kernel: str
    seconds: float | None


def work_of(module: Module, run: Execution, chip: Chip) -> Computed | None:
    """What an instruction computes by itself, without the computations that it runs; None where
    nothing is known to take time.

    Args:
        module: that it is in.
        run: the instruction.
        chip: that it is compiled for.
    """
    instruction, efficiency, peak = run.instruction, EFFICIENCY[chip.family], chip.peak_flops
    assert peak  # the catalogue refuses chips without it
    if kernel := re.search(
        r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w*)"', instruction.rest
    ):
        name = re.sub(r"(_segmented|_no_residuals|_residuals)*[.\d]*$", "", instruction.name)
        name = name if kernel[1] == "tpu_custom_call" else kernel[1].removeprefix("__")
        flops = _attention_flops(name, instruction)
        return Computed(name, None if flops is None else flops / (peak * efficiency.attention))
    if "__gpu$xla.gpu.triton" in instruction.rest:
        if grouped := _GROUPED.search(instruction.source):
            return Computed(grouped[1], _grouped_seconds(instruction, chip))
        return Computed(instruction.name, None)
    if instruction.cycles is not None:
        if instruction.cycles == UNKNOWN_CYCLES:
            return Computed("", None)
        clock = chip.clock_ghz.value * 1e9 if chip.clock_ghz else math.inf
        return Computed("", instruction.cycles / clock)
    if chip.family in ("nvidia", "amd"):
        return Computed("", _gpu_seconds(module, run, chip))
    return None


def _grouped_seconds(instruction: Instruction, chip: Chip) -> float:
    """Seconds of one call of a kernel for experts: the longer of those of its FLOPs, with what the
    last block of each group multiplies in vain, and of its bytes.
    """
    efficiency, peak = EFFICIENCY[chip.family], chip.peak_flops
    assert peak
    operands = [
        (dtype, shape)
        for dtype, shape in arrays(instruction.attributes["operand_layout_constraints"])
        if "f" in dtype
    ]
    results = list(arrays(instruction.type))
    # Rows are one of the operands, and a matrix of each group another or the result.
    rows = operands[0][1][0]
    (groups, *matrix) = next(shape for _, shape in (*operands, *results) if len(shape) == 3)
    multiplied = rows + groups * BLOCK / 2
    moved = sum(_size(dtype, shape) for dtype, shape in (*operands, *results))
    return max(
        2 * multiplied * math.prod(matrix) / (peak * efficiency.matrix),
        moved / (memory_bandwidth(chip) * efficiency.memory),
    )


def _attention_flops(name: str, instruction: Instruction) -> float | None:
    """FLOPs of one call of a known attention kernel, forward or backward, over the half that
    causality leaves, of which Splash's windows leave less.
    """
    operands = list(arrays(instruction.attributes["operand_layout_constraints"]))
    # Queries [..., positions, head_dim] and keys come before all other floats.
    shapes = [shape for dtype, shape in operands if "f" in dtype]
    if name in _SPLASH and len(shapes) > 2:
        by_keys, by_values = _SPLASH[name]
        queries, keys, values = shapes[:3]
        width = by_keys * SPLASH.filled(keys[-1]) + by_values * SPLASH.filled(values[-1])
        flops = width * math.prod(queries[:-1]) * keys[-2]
        reached = _reached(name, operands[0][1], shapes[0][-2], shapes[1][-2])
        return flops * reached * (2 - reached)
    scores = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', instruction.rest
    )
    if not scores or not shapes:
        return None
    products = _CUDNN_BACKWARD if name.endswith("Backward") else _CUDNN_FORWARD
    return products * math.prod(int(size) for size in re.findall(r"\d+", scores[1])) * shapes[0][-1]


def _reached(name: str, blocks: tuple[int, ...], queries: int, keys: int) -> float:
    """The part of all keys that a query of a call of Splash reaches through its window.

    Args:
        name: of the kernel.
        blocks: its first operand, for each head and block of queries the blocks of keys that are
            visited; for gradients of keys and values, for each block of keys those of queries,
            along the last dimension but one. They are square.
        queries: of the call.
        keys: of the call.
    """
    if len(blocks) != 3:
        return 1.0
    rows, columns = blocks[1:]
    visited = columns / rows * queries / keys
    return min(1.0, 1 / visited if name.endswith("dkv") else visited)


def _gpu_seconds(module: Module, run: Execution, chip: Chip) -> float:
    """Seconds of one instruction of a GPU program that runs by itself."""
    instruction, body = run.instruction, module.computations[run.computation]
    efficiency, peak = EFFICIENCY[chip.family], chip.peak_flops
    assert peak
    speed = peak * efficiency.matrix
    # At which products read their operands, which few rows wait for.
    bandwidth = memory_bandwidth(chip) * efficiency.memory
    products, inner = [], body
    if "__cublas" in instruction.rest:
        products = [instruction]
    elif instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        products = [found for found in inner.values() if found.opcode == "dot"]
    if products:
        return sum(
            _product_seconds(found, inner, speed * _speedup(found, inner, chip), bandwidth)
            for found in products
        )
    if microseconds := _SPEED_OF_LIGHT.search(instruction.rest):
        return float(microseconds[1]) / 1e6
    if instruction.opcode != "fusion":
        return 0.0
    # XLA has no cost model of the GPU, which would count bytes at the peak as well.
    moved = _moved_bytes(module.computations[instruction.called("calls")[0]])
    return moved / memory_bandwidth(chip)


def _moved_bytes(fusion: Mapping[str, Instruction]) -> float:
    """What a fusion reads of its parameters and writes, once each: of those that it takes slices
    of, or writes slices into, the slices alone.
    """
    users: dict[str, list[Instruction]] = {}
    for found in fusion.values():
        for name in found.arguments:
            users.setdefault(name, []).append(found)
    moved = 0.0
    for found in fusion.values():
        if found.opcode == "parameter":
            parts = [_slice_of(user, found.name) for user in users.get(found.name, [])]
            whole = _bytes_of(found)
            moved += min(whole, sum(whole if part is None else part for part in parts))
        if found.is_root:
            results = [found]
            if found.opcode == "tuple":
                results = [fusion[name] for name in found.arguments]
            moved += sum(_written(result, fusion) for result in results)
    return moved


def _slice_of(user: Instruction, name: str) -> float | None:
    """Bytes that an instruction reads of an operand that it takes a slice of, or writes one into;
    None where it may read all of it.
    """
    if user.opcode == "dynamic-slice":
        return _bytes_of(user)
    if user.opcode == "dynamic-update-slice" and user.arguments[0] == name:
        return 0.0
    return None


def _written(result: Instruction, fusion: Mapping[str, Instruction]) -> float:
    if result.opcode == "dynamic-update-slice":
        return _bytes_of(fusion[result.arguments[1]])
    return _bytes_of(result)


def _bytes_of(instruction: Instruction) -> float:
    return sum(_size(dtype, shape) for dtype, shape in arrays(instruction.type))


def _speedup(product: Instruction, body: Mapping[str, Instruction], chip: Chip) -> float:
    """How many times faster a product is than one in bf16, by the types of its operands."""
    types = {arrays(body[name].type)[0][0] for name in product.arguments[:2]}
    if types == {"s8"}:
        return speedup(chip, "int8")
    return speedup(chip, "fp8") if all(name.startswith("f8") for name in types) else 1.0


def _product_seconds(
    product: Instruction, body: Mapping[str, Instruction], speed: float, bandwidth: float
) -> float:
    """The longer of the time of a product's FLOPs and of that of its bytes."""
    both = [array for name in product.arguments[:2] for array in arrays(body[name].type)[:1]]
    (result, *_) = arrays(product.type)
    moved = sum(_size(dtype, shape) for dtype, shape in [*both, result])
    return max(_product_flops(product, body) / speed, moved / bandwidth)


def _size(dtype: str, shape: tuple[int, ...]) -> float:
    """Bytes of an array whose type is as HLO writes it, "bf16"."""
    width = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(width[0]) if width else 8) / 8


def _product_flops(product: Instruction, body: Mapping[str, Instruction]) -> float:
    """2 x elements of the result x length of what is summed over.

    Where matrices of groups are the result, as of the gradients of experts, the groups share out
    what is summed over.
    """
    (_, result), *_ = arrays(product.type)
    (_, left), *_ = arrays(body[product.arguments[0]].type)
    summed = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:] ?[{\[]([\d,"]*)', product.rest)
    if "groupedMatmul" in product.rest and '"rhs_group_dimensions":[]' in product.rest:
        result = result[1:]
    return (
        2
        * math.prod(result)
        * math.prod(left[int(dim)] for dim in re.findall(r"\d+", summed[1] if summed else ""))
    )
