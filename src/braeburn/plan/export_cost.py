"""What an export takes of one host: it runs on no accelerator, and streams the checkpoint from disk
to the files, one tensor after the other.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from braeburn.config import ModelConfig, WeightType
from braeburn.interop.tensors import Joint, family_tensors, joint, tensors_of
from braeburn.models.families import family_of
from braeburn.plan.jobs import WIDTHS, Export
from braeburn.plan.storage import FLOAT

# What the process takes before it has read a weight: Python, JAX, TensorStore, the tokenizer.
PROCESS_BYTES = 0.4e9
# Pieces of the checkpoint that are on their way from the disk.
READING_BYTES = 0.05e9
# Bits of a value in the files; of q8_0 and q4_0 with the scale of each 32 of them.
BITS = {"float32": 32.0, "bfloat16": 16.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


@dataclass(frozen=True)
class ExportEstimate:
    """What is predicted of an export.

    Attributes:
        tensor: the name of the tensor that takes the most of the memory when it is fullest.
        peak: bytes of the host's memory then.
        read: bytes of the checkpoint that are read.
        written: bytes of the weights in the files.
        reading: seconds in which they are read.
        writing: seconds in which they are written.
        room: bytes of the host's memory; None where it is not known.
    """

    tensor: str
    peak: float
    read: float
    written: float
    reading: float
    writing: float
    room: float | None

    @property
    def seconds(self) -> float:
        """Seconds of the export: a tensor is read and then written."""
        return self.reading + self.writing

    @property
    def fits(self) -> bool | None:
        """Whether the memory is there; None where that is not known."""
        return None if self.room is None else self.peak <= self.room


class Held(NamedTuple):
    """Bytes of a tensor while it is exported.

    Attributes:
        fullest: at the fullest moment.
        left: what is given up when the next tensor has been read.
    """

    fullest: float
    left: float


def held_of(tensor: Joint, job: Export, stored: WeightType) -> Held:
    """What an export holds of a tensor: as it is read, in float32 and in the order of the files,
    and as it is written.

    Args:
        tensor: of the other software.
        job: the export.
        stored: the type of the checkpoint's weights.
    """
    count, parts = math.prod(tensor.shape), len(tensor.parts)
    read = WIDTHS[stored] * count / parts
    # A checkpoint in float32 whose order is that of the files is not copied.
    is_copied = tensor.parts[0].transposed or stored != "float32"
    copied = FLOAT * count / parts if is_copied else 0.0
    # Where parameters share a tensor, it is made beside them, one after the other.
    shared = FLOAT * count if parts > 1 else 0.0
    values = shared or copied or read
    if job.format != "gguf":
        made = float(WIDTHS[job.type] * count) if job.type != "float32" else 0.0
        left = made or values
    else:
        # In groups of rows, which are then joined.
        made = BITS[job.type] / 8 * count * (1 if job.type == "f16" else 2)
        left = values
    return Held(max(shared + read + copied, values + made), left)


def in_order(model: ModelConfig, job: Export) -> Iterator[Joint]:
    """The tensors of a model in the order in which they are written."""
    family = family_of(model)
    if job.format != "gguf":
        yield from sorted(joint(family_tensors(model)), key=lambda tensor: tensor.name)
        return
    names = family.gguf.names if family.gguf else family.names
    yield from joint(tensors_of(model, names))


def estimate_export(
    job: Export, model: ModelConfig, stored: WeightType = "float32"
) -> ExportEstimate:
    """Predicts an export.

    Args:
        job: its settings.
        model: whose weights are exported.
        stored: the type of the checkpoint's weights, float32 after training.
    """
    peak, left, count = 0.0, 0.0, 0
    at = before = ""
    for tensor in in_order(model, job):
        held = held_of(tensor, job, stored)
        if left + held.fullest > peak:
            peak = left + held.fullest
            at = before if left > held.fullest else tensor.name
        left, before = held.left, tensor.name
        count += math.prod(tensor.shape)
    read, written = WIDTHS[stored] * count, BITS[job.type] / 8 * count
    return ExportEstimate(
        at,
        PROCESS_BYTES + READING_BYTES + peak,
        read,
        written,
        read / (job.read_gb_per_s * 1e9),
        written / (job.write_gb_per_s * 1e9),
        None if job.host_memory_gb is None else job.host_memory_gb * 1e9,
    )
