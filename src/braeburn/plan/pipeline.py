"""What a pipeline makes of a stage's step: the part of the model that its busiest device works on,
how long devices are idle, what they hold, and what they send each other.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from braeburn.config import (
    Execution,
    MeshConfig,
    ModelConfig,
    PipelineSchedule,
    Precision,
    Run,
    ShardingRules,
)
from braeburn.layers.spec import walk
from braeburn.models.staged import divided, layer_costs, travels_in
from braeburn.parallel.rules import mesh_axes
from braeburn.parallel.schedule import schedule, schedule_of
from braeburn.plan.identity import by_identity
from braeburn.plan.storage import FLOAT, specs_of
from braeburn.train.pipelined import Places, tabled


@dataclass(frozen=True)
class Part:
    """What the busiest device of a pipeline has, in parts of what one device without it has.

    Attributes:
        layers: of the work of all layers on a microbatch.
        around: of the work around them, which the last device has: 1 or 0.
        idle: seconds that it waits, for each second of work on microbatches.
        held: of what all layers keep of a microbatch for its backward pass, at once.
        fresh: of the same, that one forward task has just computed.
        messages: the hidden states of a microbatch that it has at hand in buffers, and the like of
            them.
        sent: messages that it sends in a step.
    """

    layers: float = 1.0
    around: float = 1.0
    idle: float = 0.0
    held: float = 1.0
    fresh: float = 0.0
    messages: int = 0
    sent: int = 0


WHOLE = Part()
# Forward tasks in the picture of a schedule, of all devices.
MOST_DRAWN = 600


def part_of(model: ModelConfig, mesh: MeshConfig, num_microbatches: int) -> Part:
    """The part of a model that the busiest device of a pipeline has.

    Args:
        model: that is trained.
        mesh: of resolved sizes.
        num_microbatches: of a batch.
    """
    if mesh.pipeline == 1:
        return WHOLE
    return _part(
        model, mesh.pipeline_schedule, mesh.pipeline, num_microbatches, mesh.stages_per_device
    )


@by_identity
def _part(model: ModelConfig, kind: PipelineSchedule, devices: int, steps: int, each: int) -> Part:
    lengths, head = layer_costs(model, devices * each)
    whole = sum(lengths)
    of_device = [sum(lengths[device::devices]) for device in range(devices)]
    is_last = of_device[-1] + head >= max(of_device)
    longest = max(lengths)
    places = places_of(kind, devices, steps, each)
    return Part(
        layers=(of_device[-1] if is_last else max(of_device)) / whole,
        around=float(is_last),
        idle=(devices - 1) / (each * steps),
        held=places.kept * longest / whole,
        fresh=longest / whole,
        # One place of each kind is for what nobody needs.
        messages=places.inputs + places.gradients + 3,
        sent=2 * steps * each,
    )


@cache
def places_of(kind: PipelineSchedule, devices: int, steps: int, each: int) -> Places:
    """How many places the buffers of a schedule have.

    In 1F1B they are as many for any number of microbatches that fill the pipeline twice.

    Args:
        kind: of the schedule.
        devices: of the pipeline.
        steps: microbatches.
        each: stages of each device.
    """
    if kind == "1f1b":
        steps = min(steps, 2 * devices + steps % devices)
    return tabled(schedule(kind, devices, steps, each))[1]


def drawn(mesh: MeshConfig, num_microbatches: int, recomputes: bool) -> dict[str, Any]:
    """The schedule of a pipeline as plain data, for a picture of it.

    Args:
        mesh: of resolved sizes, with a pipeline.
        num_microbatches: of a batch, of which as many are drawn as are told apart.
        recomputes: whether the backward pass does the forward pass's work again.

    Returns:
        Its kind and numbers; for each device that is drawn, rows [begin, end, kind, microbatch,
        stage] of its tasks, in units of a microbatch's forward pass through one stage; and the part
        of the time that a device is idle, of all microbatches.
    """
    devices, each = mesh.pipeline, mesh.stages_per_device
    shown = min(num_microbatches, max(devices, MOST_DRAWN // (devices * each) // devices * devices))
    plan = schedule_of(mesh, shown)
    times = plan.times(1.0, 3.0 if recomputes else 2.0)
    return {
        "kind": "interleaved 1F1B" if each > 1 else mesh.pipeline_schedule.replace("f1b", "F1B"),
        "devices": devices,
        "stages_per_device": each,
        "microbatches": num_microbatches,
        "drawn_microbatches": shown,
        "idle": (devices - 1) / (each * num_microbatches + devices - 1),
        "end": max(end for _, end in times.values()),
        "tasks": [
            [[*times[task], task.kind, task.microbatch, task.stage] for task in plan.tasks(device)]
            for device in range(devices)
        ],
    }


@dataclass(frozen=True)
class Dealt:
    """The weights that a device of a pipeline holds during a step.

    Attributes:
        layers: numbers of the matrices of its layers, with padding.
        layer_bytes: of these.
        table: numbers of the embedding or the head.
        tables: how many such tables are joined for it.
        norms: numbers of all norms of the model, which are joined whole.
        is_padded: whether stages have unequal numbers of layers.
    """

    layers: float
    layer_bytes: float
    table: float
    tables: int
    norms: float
    is_padded: bool

    @property
    def is_ready(self) -> bool:
        """Whether they have the type that they are multiplied in."""
        return self.layer_bytes < FLOAT * self.layers


def dealt(run: Run, model: ModelConfig, mesh: MeshConfig) -> Dealt:
    """The weights that a device of a pipeline holds during a step of a run.

    Args:
        run: whose rules and types hold.
        model: that is trained.
        mesh: of resolved sizes, with a pipeline.
    """
    return _dealt(run.rules, run.precision, model, mesh, mesh.stages_per_device)


@by_identity
def _dealt(
    rules: ShardingRules, precision: Precision, model: ModelConfig, mesh: MeshConfig, each: int
) -> Dealt:
    within = Execution(mesh, rules, precision).of_stage
    division = divided(model, mesh.pipeline * each)
    layers = layer_bytes = table = norms = 0.0
    for path, spec in walk(specs_of(model)):
        stored = mesh_axes(spec.axes, spec.shape, "parameters", within, spec.role)
        split = math.prod(mesh.sizes[axis] for along in stored for axis in along)
        name = path.split("/")[0]
        if spec.role == "embedding":
            table = max(table, spec.size / split)
        elif spec.role == "norm":
            norms += spec.size
        else:
            own = each * division.longest(name) / spec.shape[0]
            layers += spec.size * own / split
            layer_bytes += spec.size * own / split * travels_in(spec, within).itemsize
    tables = 1 if model.tied_embeddings else 2
    is_padded = not all(division.is_even(segment) for segment in division.rows)
    return Dealt(layers, layer_bytes, table, tables, norms, is_padded)
