"""Schedules of a pipeline: order, memory, idle time, and the table that programs carry out."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from braeburn.parallel.schedule import Schedule, Task, schedule
from braeburn.train.pipelined import BACKWARD, FORWARD, Work, tabled

CASES = [
    (kind, devices, microbatches, each)
    for kind, devices, each, microbatches in product(
        ("1f1b", "gpipe"), (2, 3, 4, 8), (1, 2, 3), (1, 5, 8, 24)
    )
    if each == 1 or microbatches % devices == 0
]
SOME = [case for case in CASES if case[1] in (2, 4)]


def made(case: Any) -> Schedule:
    return schedule(*case)


@pytest.mark.parametrize("case", CASES)
def test_every_task_is_done_once_and_after_what_it_needs(case: Any) -> None:
    _, devices, microbatches, each = case
    plan = made(case)
    tasks = [task for row in plan.slots for task in row if task]
    assert len(tasks) == len(set(tasks)) == 2 * microbatches * devices * each
    for task, slot in plan.slot_of.items():
        assert all(plan.slot_of[needed] < slot for needed in plan.needs(task))
    for row in plan.slots:
        assert all(task is None or task.stage % devices == i for i, task in enumerate(row))


@pytest.mark.parametrize("case", CASES)
def test_a_device_holds_as_few_microbatches_as_the_schedule_allows(case: Any) -> None:
    kind, devices, microbatches, each = case
    plan = made(case)
    for device in range(devices):
        all_of_them = microbatches * each
        fewest = devices - device if each == 1 else (each + 1) * devices - 1 - 2 * device
        fewest = min(fewest, all_of_them)
        assert plan.held(device) == (all_of_them if kind == "gpipe" else fewest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 2.0), (1.0, 3.0), (1.0, 1.0)])
def test_devices_are_idle_as_long_as_the_formula_says(
    case: Any, forward: float, backward: float
) -> None:
    _, devices, microbatches, each = case
    expected = (devices - 1) / (each * microbatches + devices - 1)
    assert made(case).bubble(forward, backward) == pytest.approx(expected)


def paired(plan: Schedule, forward: float, backward: float) -> float:
    """The time of a schedule whose devices wait for each other wherever they exchange something."""
    clock = [0.0] * plan.num_devices
    duration = {"forward": forward, "backward": backward}
    for span in plan.spans:
        for slot in range(span.first, span.first + span.count):
            for device, task in enumerate(plan.slots[slot]):
                clock[device] += duration[task.kind] if task else 0.0
            before = list(clock)
            for pairs in plan.exchanges(span, (slot - span.first) % span.period):
                for source, to in pairs:
                    clock[to] = max(clock[to], before[source])
    return max(clock)


@pytest.mark.parametrize("case", [case for case in SOME if case[0] == "1f1b"])
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_no_time_is_lost_by_exchanging_in_pairs(case: Any, backward: float) -> None:
    _, devices, microbatches, each = case
    busy = microbatches * each * (1 + backward)
    assert paired(made(case), 1.0, backward) == busy + (devices - 1) * (1 + backward)
    if each > 1:  # not even where all devices were to wait for each other
        assert in_step(made(case), backward) == busy + (devices - 1) * (1 + backward)


def in_step(plan: Schedule, backward: float) -> float:
    """The time of a schedule if every slot takes as long as its longest task."""
    duration = {"forward": 1.0, "backward": backward}
    return sum(max([duration[task.kind] for task in row if task], default=0) for row in plan.slots)


def test_neighbours_exchange_in_pairs() -> None:
    plan = schedule("1f1b", 4, 6)
    (span,) = plan.spans
    assert plan.exchanges(span, 0) == [((0, 1), (1, 0), (2, 3), (3, 2))]
    assert plan.exchanges(span, 1) == [((1, 2), (2, 1))]


def replayed(plan: Schedule, table: Work, places: Any) -> None:
    """Carries the table out with names in place of arrays, and checks what each task reads."""
    size = {"inputs": places.inputs + 1, "gradients": places.gradients + 1, "kept": places.kept}
    buffers = {name: np.full((plan.num_devices, n), None, object) for name, n in size.items()}
    for span in plan.spans:
        for slot in range(span.first, span.first + span.count):
            sent: dict[int, Task] = {}
            for device, task in enumerate(plan.slots[slot]):
                work = Work(*(column[slot, device] for column in table))
                if task is None:
                    assert work.kind == 0
                    continue
                stage = task.stage
                assert (work.microbatch, work.turn * plan.num_devices + device) == (
                    task.microbatch,
                    stage,
                )
                own = Task("forward", task.microbatch, stage)
                if task.kind == "forward":
                    assert work.kind == FORWARD and work.is_first == (stage == 0)
                    if stage:
                        read = buffers["inputs"][device, work.input]
                        assert read == Task("forward", task.microbatch, stage - 1)
                    buffers["kept"][device, work.kept] = own
                    buffers["gradients"][device, work.result] = own
                else:
                    assert work.kind == BACKWARD
                    assert buffers["kept"][device, work.kept] == own
                    assert work.is_last == (stage == plan.num_stages - 1)
                    wanted = own if work.is_last else Task("backward", task.microbatch, stage + 1)
                    assert buffers["gradients"][device, work.input] == wanted
                sent[device] = task
            arrived = [
                {to: sent.get(source) for source, to in pairs}
                for pairs in plan.exchanges(span, (slot - span.first) % span.period)
            ]
            for device in range(plan.num_devices if arrived else 0):
                work = Work(*(column[slot, device] for column in table))
                buffers["inputs"][device, work.next_input] = arrived[0].get(device)
                buffers["gradients"][device, work.next_gradient] = arrived[-1].get(device)


@pytest.mark.parametrize("case", CASES)
def test_the_table_hands_every_task_what_it_needs(case: Any) -> None:
    plan = made(case)
    table, places = tabled(plan)
    assert places.kept == plan.held(0)
    replayed(plan, table, places)


@pytest.mark.parametrize("field", ["input", "kept", "next_input", "next_gradient", "result"])
def test_a_fault_in_the_table_is_found(field: str) -> None:
    plan = schedule("1f1b", 4, 8, 2)
    table, places = tabled(plan)
    column = getattr(table, field).copy()
    busy = np.flatnonzero(table.kind[:, -1] == FORWARD)
    middle = len(plan.slots) // 2 if field != "result" else busy[len(busy) // 2]
    column[middle : middle + 2] = (column[middle : middle + 2] + 1) % column.max().clip(2)
    with pytest.raises(AssertionError):
        replayed(plan, table._replace(**{field: column}), places)
