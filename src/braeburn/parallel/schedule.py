"""Schedules of a pipeline: which device works on which microbatch, and when.

A pipeline of P devices splits the layers into V = v P stages, of which device s has the v stages s,
s + P, s + 2 P and so on. Each microbatch goes forward through all stages, and backward through all
of them in reverse. A schedule is a table of tasks: the columns are devices, the rows are slots, and
what a task needs was sent to its device at the end of an earlier slot. The table is plain data. The
program of a step carries it out, and the plan's memory, its time and its picture are read from it.

* **GPipe** (arXiv 1811.06965): all microbatches go forward, and then all go backward. A device
  holds the activations of all of them.
* **1F1B** (PipeDream-Flush, arXiv 2006.09503): a microbatch goes backward as soon as it can. Device
  s holds those of at most P - s microbatches, however many there are.
* **Interleaved 1F1B** (arXiv 2104.04473, section 2.2) is 1F1B with v > 1 stages on each device:
  less idle time, for v times the messages, and for activations of (v + 1) P - 2 s - 1 passes
  through stages that are v times shorter.

In 1F1B device s makes its n-th forward task at slot s + 2 n, and the backward tasks follow likewise
from the other end. While a device is at a forward task, its neighbours are at backward ones, and
they exchange results in pairs. A slot does not take the same time everywhere, and no device waits
for any but the one that it exchanges with. Interleaved, messages go round a ring, on which such
differences would add up: there all devices make a forward task and then a backward one, in step. In
neither is any time lost that the formula of `Schedule.bubble` does not have.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from braeburn.config import MeshConfig, PipelineSchedule

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Task:
    """One pass of one microbatch through one stage.

    Attributes:
        kind: "forward" or "backward".
        microbatch: counted from 0.
        stage: counted from 0, in the order of the layers.
    """

    kind: Kind
    microbatch: int
    stage: int


@dataclass(frozen=True)
class Span:
    """Slots that a program works through in one loop.

    Attributes:
        first: the slot that it begins with.
        count: how many slots it has, a multiple of `period`.
        period: how many slots one round of the loop has.
    """

    first: int
    count: int
    period: int


@dataclass(frozen=True)
class Schedule:
    """What every device does at every slot.

    Attributes:
        num_devices: P.
        num_stages: V, a multiple of P.
        num_microbatches: M.
        slots: of each slot, the task of each device; None where it is idle.
        spans: the loops that the slots are worked through in.
    """

    num_devices: int
    num_stages: int
    num_microbatches: int
    slots: tuple[tuple[Task | None, ...], ...]
    spans: tuple[Span, ...]

    @cached_property
    def slot_of(self) -> dict[Task, int]:
        """The slot of each task."""
        return {task: slot for slot, row in enumerate(self.slots) for task in row if task}

    def tasks(self, device: int) -> list[Task]:
        """The tasks of a device, in order."""
        return [task for row in self.slots if (task := row[device])]

    def held(self, device: int) -> int:
        """The passes through a stage whose activations a device holds at once, at most."""
        now = most = 0
        for task in self.tasks(device):
            now += 1 if task.kind == "forward" else -1
            most = max(most, now)
        return most

    def times(self, forward: float = 1.0, backward: float = 2.0) -> dict[Task, tuple[float, float]]:
        """When each task begins and ends, if devices wait for nothing but what they need.

        Args:
            forward: how long a microbatch takes forward through one stage.
            backward: how long it takes backward.
        """
        duration = {"forward": forward, "backward": backward}
        ends: dict[Task, float] = {}
        found = {}
        free = [0.0] * self.num_devices
        for row in self.slots:
            for device, task in enumerate(row):
                if task is None:
                    continue
                needed = [ends[one] for one in self.needs(task)]
                begins = max([free[device], *needed])
                ends[task] = free[device] = begins + duration[task.kind]
                found[task] = begins, ends[task]
        return found

    def needs(self, task: Task) -> list[Task]:
        """The tasks whose results a task works on."""
        m, stage = task.microbatch, task.stage
        if task.kind == "forward":
            return [Task("forward", m, stage - 1)] if stage else []
        last = stage == self.num_stages - 1
        own = Task("forward", m, stage)
        return [own] if last else [own, Task("backward", m, stage + 1)]

    def bubble(self, forward: float = 1.0, backward: float = 2.0) -> float:
        """The part of the time that a device is idle.

        It is (P - 1) / (v M + P - 1) in all of these schedules, whatever the durations.
        """
        times = self.times(forward, backward)
        total = max(end for _, end in times.values())
        busy = self.num_microbatches * self.num_stages * (forward + backward)
        return 1 - busy / (total * self.num_devices)

    @property
    def taken(self) -> float:
        """The part of the branches that a program has for tasks which a device takes."""
        branches = sum(
            span.count // span.period * len(self.kinds(span, position))
            for span in self.spans
            for position in range(span.period)
        )
        return len(self.tasks(0)) / branches

    def destination(self, device: int, task: Task) -> int | None:
        """The device that the result of a task is sent to; None where it stays or is needed by
        none.
        """
        if task.kind == "forward":
            there = task.stage + 1 < self.num_stages
            return (device + 1) % self.num_devices if there else None
        return (device - 1) % self.num_devices if task.stage else None

    def exchanges(self, span: Span, position: int) -> list[tuple[tuple[int, int], ...]]:
        """The pairs (from, to) of devices that send something at one position of a span's rounds:
        one list of pairs where no device receives twice, and otherwise one for each direction.
        """
        pairs: dict[Kind, set[tuple[int, int]]] = {"forward": set(), "backward": set()}
        for slot in range(span.first + position, span.first + span.count, span.period):
            for device, task in enumerate(self.slots[slot]):
                if task and (to := self.destination(device, task)) is not None:
                    pairs[task.kind].add((device, to))
        both = pairs["forward"] | pairs["backward"]
        receivers, senders = Counter(to for _, to in both), Counter(source for source, _ in both)
        if all(count == 1 for count in (*receivers.values(), *senders.values())):
            return [tuple(sorted(both))] if both else []
        return [tuple(sorted(one)) for one in pairs.values() if one]

    def kinds(self, span: Span, position: int) -> tuple[Kind, ...]:
        """The kinds of tasks that there are at one position of a span's rounds."""
        found = {
            task.kind
            for slot in range(span.first + position, span.first + span.count, span.period)
            for task in self.slots[slot]
            if task
        }
        return tuple(kind for kind in ("forward", "backward") if kind in found)


def schedule_of(mesh: MeshConfig, num_microbatches: int) -> Schedule:
    """The schedule by which a mesh with a pipeline carries out a batch.

    Args:
        mesh: of resolved sizes.
        num_microbatches: of the batch.
    """
    kind, each = mesh.pipeline_schedule, mesh.stages_per_device
    return schedule(kind, mesh.pipeline, num_microbatches, each)


def schedule(
    kind: PipelineSchedule, num_devices: int, num_microbatches: int, stages_per_device: int = 1
) -> Schedule:
    """The schedule of a kind.

    Args:
        kind: "gpipe" or "1f1b".
        num_devices: P, two or more.
        num_microbatches: M; a multiple of P where devices have several stages.
        stages_per_device: v.
    """
    count = num_microbatches * stages_per_device
    num_stages = num_devices * stages_per_device
    # Slots from one task of a kind to the next, and from one device to its neighbour; and the slot
    # of the first backward task, that of the last stage, once the first microbatch is through.
    if kind == "gpipe":
        pace, hop, first_backward = 1, 1, num_devices - 1 + count
    elif stages_per_device == 1:
        pace, hop, first_backward = 2, 1, num_devices
    else:
        pace, hop, first_backward = 2, 2, 2 * num_stages - 1
    placed: dict[int, list[tuple[int, Task]]] = {}
    for device in range(num_devices):
        from_last = num_devices - 1 - device
        for number in range(count):
            forward = _nth(number, device, num_devices, stages_per_device)
            mirrored = _nth(number, from_last, num_devices, stages_per_device)
            backward = Task("backward", mirrored.microbatch, num_stages - 1 - mirrored.stage)
            placed.setdefault(hop * device + pace * number, []).append((device, forward))
            slot = first_backward + hop * from_last + pace * number
            placed.setdefault(slot, []).append((device, backward))
    rounds = -(-(max(placed) + 1) // pace)
    slots: list[list[Task | None]] = [[None] * num_devices for _ in range(rounds * pace)]
    for slot, tasks in placed.items():
        for device, task in tasks:
            slots[slot][device] = task
    spans = [Span(0, len(slots), pace)]
    if kind == "gpipe":
        spans = [Span(0, first_backward, 1), Span(first_backward, len(slots) - first_backward, 1)]
    return Schedule(
        num_devices, num_stages, num_microbatches, tuple(map(tuple, slots)), tuple(spans)
    )


def _nth(number: int, device: int, num_devices: int, stages_per_device: int) -> Task:
    """The forward task that a device makes as the n-th: P microbatches go through its first stage,
    then the same through its second, and so on, before the next P come.
    """
    if stages_per_device == 1:
        return Task("forward", number, device)
    group, within = divmod(number, num_devices * stages_per_device)
    turn, microbatch = divmod(within, num_devices)
    return Task("forward", group * num_devices + microbatch, turn * num_devices + device)
