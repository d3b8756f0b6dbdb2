"""Whether a recipe, shrunk, trains the same on every layout, and loses nothing when killed, resumed
or resharded.

Everything runs on simulated devices, eight at most; JAX must be started with them.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Literal

from braeburn.config import ONE_DEVICE, Checkpoint, MeshConfig, Run
from braeburn.data.prepare import Prepared, prepare
from braeburn.errors import UserError
from braeburn.hardware.targets import Target
from braeburn.jsonfile import json_lines
from braeburn.models.decoder import has_experts
from braeburn.parallel.collectives import EXPERT
from braeburn.train.loop import train
from braeburn.train.resolved import resolve_stage, resolve_stages
from braeburn.train.stage_run import batches_of, equip
from braeburn.train.stages import Program, compile_stage, initial_state
from braeburn.verify.following import Curve, followed_curve
from braeburn.verify.shrink import DEVICES, ENVIRONMENT, STAND_IN, shrink

KILL_AFTER_STEP = 6
KILL_SECONDS = 300
# What a child trains; the user's file is imported for what it may do besides making a run.
CHILD = """
import json
from pathlib import Path
from braeburn.config import Run, validate
from braeburn.recipes import load

load({recipe!r})


def run() -> Run:
    return validate(json.loads(Path({fields!r}).read_text()))
"""

FIGURES = ("loss", "grad_norm")

Say = Callable[[str], None]
Kind = Literal["layout", "stages", "resume", "reshard"]
Verdict = Literal["same", "different", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        check: "layout", "stages", "resume" or "reshard".
        layout: the meshes that it ran on.
        steps: optimizer steps compared.
        difference: the largest relative difference of a loss; None where it is not a number.
        tolerance: what it may be.
        verdict: "same", "different", "failed" (it could not run to its end) or "skipped" (the
            recipe cannot have it).
        reason: of any verdict but "same".
    """

    check: Kind
    layout: str
    steps: int
    difference: float | None
    tolerance: float
    verdict: Verdict
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict in ("same", "skipped")


def verify(run: Run, recipe: str, target: Target, say: Say) -> list[Check]:
    """All checks of a run, shrunk, on the layouts that a target allows.

    Args:
        run: the run as resolved.
        recipe: the name that it was loaded by.
        target: where it is to run.
        say: takes a line of progress.
    """
    num_devices = _devices(target)
    on_disk = sorted(
        {
            str(stage.teacher)
            for stage in run.stages.values()
            if stage.teacher not in (None, *run.stages)
        }
    )
    run = shrink(run, num_devices)
    if STAND_IN in run.stages:
        say(
            f"a first stage {STAND_IN!r} trains what teaches in the place of "
            f"{' and '.join(on_disk)}"
        )
    with (
        tempfile.TemporaryDirectory(prefix="braeburn-verify-") as name,
        ThreadPoolExecutor(1) as pool,
    ):
        folder = Path(name)
        run = run.model_copy(
            update={"data": run.data.model_copy(update={"cache": str(folder / "data")})}
        )
        prepared = prepare(run, lambda line: None)
        runs = layouts(run, target)
        possible = [other for other in runs.values() if not refusal(other)]
        if refusal(run):
            run = possible[0] if possible else on_mesh(run, ONE_DEVICE)
        # A process takes seconds to start, in which the layouts can be compared.
        killed = pool.submit(train_and_kill, run, recipe, folder)
        checks = compare(on_mesh(run, ONE_DEVICE), runs, prepared, say) if runs else []
        checks.append(resume(run, folder, killed, say))
        if compresses(run):
            checks += compare_stages(run, _devices(target), folder, say)
        if others := elsewhere(run, possible):
            checks.append(reshard(run, others[-1], folder, say))
    return checks


def layouts(run: Run, target: Target) -> dict[str, Run]:
    """The run on every mesh to compare with one device, by a name for it; its own meshes first.

    They are those of one, two and three axes that take all devices of the target, eight at most;
    with replicas where it has several slices. Sequences are split in both ways, and gradients
    accumulated in one of them. Experts are split in layouts of that axis alone and with each other
    one, tokens reaching them in both ways. A pipeline of two is combined with each other axis, in
    all its schedules.
    """
    splits = ("replica", "data", "fsdp", "context", "tensor")[target.slices == 1 :]
    meshes = [stage.mesh or run.mesh for stage in run.stages.values()]
    for axes in (axes for count in (1, 2, 3) for axes in combinations(splits, count)):
        meshes += _meshes(axes, _devices(target))
    if has_experts(run.model):
        for axes in ((EXPERT,), *((axis, EXPERT) for axis in splits)):
            meshes += _meshes(axes, _devices(target))
    runs = {
        describe(mesh): on_mesh(run, mesh) for mesh in meshes if math.prod(mesh.sizes.values()) > 1
    }
    for mesh in _pipelines(splits, _devices(target)):
        runs[describe(mesh)] = _accumulating(on_mesh(run, mesh), 2)
    if runs and all(stage.accumulation_steps == 1 for stage in run.stages.values()):
        name = next(iter(runs))
        runs[f"{name}, 2 accumulated"] = _accumulating(runs[name], 2)
    return runs


def by_microbatch(run: Run) -> bool:
    """Whether a loss of the run hangs on how batches are divided into microbatches."""
    return any(layer.feed_forward.is_by_microbatch for layer in run.model.layer_configs)


def elsewhere(run: Run, others: Sequence[Run]) -> list[Run]:
    """Those that a run can be resharded from: on other meshes, and with the same microbatches where
    a loss hangs on them.
    """

    def microbatches(run: Run) -> list[int]:
        return [stage.accumulation_steps for stage in run.stages.values()]

    found = [other for other in others if _place(other) != _place(run)]
    if not by_microbatch(run):
        return found
    return [other for other in found if microbatches(other) == microbatches(run)]


def _accumulating(run: Run, steps: int) -> Run:
    """The run with all its stages accumulating gradients over at least so many microbatches."""
    stages = {
        name: stage.model_copy(update={"accumulation_steps": max(steps, stage.accumulation_steps)})
        for name, stage in run.stages.items()
    }
    return run.model_copy(update={"stages": stages})


def _pipelines(splits: Sequence[str], num_devices: int) -> Iterator[MeshConfig]:
    """Meshes of a pipeline of two: with every other axis, or by itself in all schedules where there
    are two devices.
    """
    ways: list[dict[str, Any]] = [{}, {"pipeline_schedule": "gpipe"}, {"stages_per_device": 2}]
    if num_devices == 2:
        for way in ways:
            yield MeshConfig.model_validate({"fsdp": 1, "pipeline": 2, **way})
    if num_devices >= 4:
        for axis, way in zip(splits, itertools.cycle(ways)):
            sizes = {"fsdp": 1, "pipeline": 2, axis: num_devices // 2}
            yield MeshConfig.model_validate(sizes | way)


def _devices(target: Target) -> int:
    """The largest power of two of simulated devices that the target can stand for."""
    return 1 << (min(target.chips, DEVICES).bit_length() - 1)


def _meshes(axes: Sequence[str], num_devices: int) -> Iterator[MeshConfig]:
    """Meshes of all of `axes`, the last the largest, in both ways to split sequences and to reach
    experts; none where devices are few.
    """
    sizes = dict.fromkeys(axes, 2) | {axes[-1]: num_devices >> (len(axes) - 1)}
    if sizes[axes[-1]] > 1:
        for method in ("ring", "all_gather") if "context" in axes else ("all_gather",):
            for dispatch in ("gather", "all_to_all") if EXPERT in axes else ("gather",):
                how = {"context_attention": method, "expert_dispatch": dispatch}
                yield MeshConfig.model_validate({"fsdp": 1, **sizes, **how})


def on_mesh(run: Run, mesh: MeshConfig) -> Run:
    """The run with all its stages on one mesh."""
    stages = {name: stage.model_copy(update={"mesh": None}) for name, stage in run.stages.items()}
    return run.model_copy(update={"mesh": mesh, "stages": stages})


def describe(mesh: MeshConfig) -> str:
    """A mesh in words: "fsdp 4 x context 2 (ring)"."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1)
    ways: list[str] = [mesh.context_attention] if mesh.context > 1 else []
    ways += [mesh.expert_dispatch] if mesh.expert > 1 else []
    if mesh.pipeline > 1:
        ways.append("interleaved" if mesh.stages_per_device > 1 else mesh.pipeline_schedule)
    how = f" ({', '.join(way.replace('_', '-') for way in ways)})" if ways else ""
    return axes + how or "one device"


def refusal(run: Run) -> str:
    """Why a stage of the run cannot have its mesh; empty where all can."""
    try:
        resolve_stages(run)
    except UserError as error:
        return str(error)
    return ""


def tolerance(run: Run) -> float:
    """What losses in float32 may differ by, relatively."""
    return run.optimizer.tolerance


def compare(reference: Run, runs: dict[str, Run], prepared: Prepared, say: Say) -> list[Check]:
    """Compares the first stage on several layouts with that of one run.

    Where a loss is of each microbatch, one that accumulates is compared with one device that
    accumulates as well.

    Args:
        reference: the run to compare with.
        runs: the same run on other layouts, by a name for each.
        prepared: the text.
        say: takes a line of progress.

    Returns:
        A check of each layout.
    """
    first = next(iter(reference.stages))
    refused = {name: refusal(run) for name, run in runs.items()}
    is_counted = by_microbatch(reference)

    def likewise(run: Run) -> Run:
        """What a run is compared with."""
        return reference.model_copy(update={"stages": run.stages}) if is_counted else reference

    references = {
        likewise(run).stages[first].accumulation_steps: likewise(run) for run in runs.values()
    }
    with ThreadPoolExecutor(
        2
    ) as pool:  # compiling takes nine tenths of the time, most of it of one core
        expecting = {
            steps: pool.submit(compile_stage, resolve_stage(run, first))
            for steps, run in references.items()
        }
        programs = {
            name: pool.submit(compile_stage, resolve_stage(run, first))
            for name, run in runs.items()
            if not refused[name]
        }
        try:
            expected = {
                steps: _first_stage(program.result(), prepared)
                for steps, program in expecting.items()
            }
            checks = []
            for name, run in runs.items():
                if refused[name]:
                    verdict: Verdict = "skipped" if programs else "failed"
                    checks.append(
                        Check("layout", name, 0, None, tolerance(run), verdict, refused[name])
                    )
                else:
                    with _failing("layout", name, tolerance(run), checks):
                        curve = _first_stage(programs[name].result(), prepared)
                        steps = likewise(run).stages[first].accumulation_steps
                        checks.append(
                            _judge("layout", name, curve, expected[steps], tolerance(run))
                        )
                _tell(checks[-1], say)
        finally:
            pool.shutdown(cancel_futures=True)
    return checks


def _first_stage(program: Program, prepared: Prepared) -> Curve:
    """The curve of a run's first stage; of one that rounds, only the figures of its first step can
    be compared.
    """
    first = program.stage
    stage = equip(program, batches_of(first, prepared.train), None)
    state = stage.enter(initial_state(first))
    curve = []
    for step in range(first.stage.steps):
        state, metrics = stage.step(state, stage.place(stage.batches[step]))
        curve += [(f"step {step + 1} {figure}", float(metrics[figure])) for figure in FIGURES]
    return _compared_until(curve, steps_alike(first.run) or 1)


def compresses(run: Run) -> bool:
    """Whether a stage of the run distils, or does something to its model besides training it."""
    return any(stage.transforms or stage.teacher for stage in run.stages.values())


def steps_alike(run: Run) -> int:
    """Steps before the first stage that rounds weights, or learns the top tokens of a
    teacher.

    Up to there curves on different layouts stay together. Then a weight half-way between two
    levels, or a label of two that are as likely, goes one way or the other by its last bit: runs
    part that are equal but for rounding errors.
    """
    for name, stage in run.stages.items():
        rounds = any(transform.rounds for transform in stage.transforms.values())
        if rounds or (stage.teacher and stage.distillation.target != "distribution"):
            return run.first_steps[name]
    return run.total_steps


def compare_stages(run: Run, num_devices: int, folder: Path, say: Say) -> list[Check]:
    """Compares all stages on several meshes with those on one device.

    From `steps_alike` on, each step is made from the state that the one device had before it, and
    with its teachers.

    Args:
        run: the run, shrunk.
        num_devices: that the meshes take.
        folder: for run directories.
        say: takes a line of progress.

    Returns:
        A check of each mesh.
    """
    checks: list[Check] = []
    others = {_place(other): other for other in all_stages_split(run, num_devices)}
    all_kept = Checkpoint(every_steps=1, keep_last=run.total_steps)
    reference, allowed = folder / "one device, all stages", tolerance(run)
    one = on_mesh(run, ONE_DEVICE).model_copy(update={"checkpoint": all_kept})
    with _failing("stages", _place(one), allowed, checks):
        expected = _train(one, reference) if others else []
    if checks:
        _tell(checks[-1], say)
        return checks
    for place, other in others.items():
        if refused := refusal(other):
            checks.append(Check("stages", place, 0, None, allowed, "skipped", refused))
        else:
            with _failing("stages", place, allowed, checks):
                found = followed_curve(other, reference, steps_alike(run), FIGURES)
                checks.append(_judge("stages", place, found, expected, allowed))
        _tell(checks[-1], say)
    return checks


def all_stages_split(run: Run, num_devices: int) -> list[Run]:
    """The run on meshes of four devices, or of two where it cannot have four: fully sharded,
    tensor, and both; and on a pipeline of two.
    """
    runs = []
    for axes in (("fsdp",), ("tensor",), ("fsdp", "tensor")):
        sizes = [size for size in (4, 2) if size <= num_devices]
        tried = [on_mesh(run, mesh) for size in sizes for mesh in _meshes(axes, size)]
        runs += [other for other in tried if not refusal(other)][:1] or tried[:1]
    return runs + [on_mesh(run, mesh) for mesh in _pipelines((), 2)][: num_devices >= 2]


def train_and_kill(run: Run, recipe: str, folder: Path) -> None:
    """Trains a run in `folder / "killed"`, in a process that is killed some steps after a
    checkpoint.
    """
    fields, file, out = folder / "run.json", folder / "recipe.py", folder / "killed"
    fields.write_text(json.dumps(run.model_dump(mode="json")))
    file.write_text(CHILD.format(recipe=recipe, fields=str(fields)))
    program = [sys.executable, "-c", "from braeburn.cli import main; main()"]
    with (folder / "log").open("w+") as log:
        child = subprocess.Popen(
            [*program, "train", f"{file}:run", "--out", str(out)],
            stdout=log,
            stderr=log,
            env=os.environ | ENVIRONMENT,
        )
        try:
            deadline = time.monotonic() + KILL_SECONDS
            saved, metrics = (
                out / "checkpoints" / str(run.checkpoint.every_steps),
                out / "metrics.jsonl",
            )
            while not (saved.exists() and metrics.read_text().count("\n") >= KILL_AFTER_STEP):
                if child.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = log.read().strip().rpartition("\n")[2]
                    raise RuntimeError(
                        f"the process to be killed ended or hung before step {KILL_AFTER_STEP}: "
                        f"{last}"
                    )
                time.sleep(0.005)
        finally:
            child.kill()
            child.wait()


def resume(run: Run, folder: Path, killed: Future[None], say: Say) -> Check:
    """Compares a run that is killed and resumed with one that is left alone.

    Args:
        run: the run, shrunk.
        folder: for run directories: the latter run is made in "whole" there.
        killed: done when the run in "killed" there has been killed.
        say: takes a line of progress.

    Returns:
        A check whose tolerance is 0.
    """
    checks: list[Check] = []
    with _failing("resume", _place(run), 0.0, checks):
        expected = _train(run, folder / "whole")
        killed.result()
        found = _train(run, folder / "killed")
        steps = [
            event["step"]
            for event in json_lines(folder / "killed" / "events.jsonl")
            if event["event"] == "resume"
        ]
        if not steps:
            raise RuntimeError("after the kill it began again instead of resuming")
        name = f"{_place(run)}, killed, resumed from step {steps[0]}"
        checks.append(_judge("resume", name, found, expected, 0.0))
    _tell(checks[-1], say)
    return checks[-1]


def reshard(run: Run, other: Run, folder: Path, say: Say) -> Check:
    """Compares a run that is stopped and resumed on other layouts with one that is left alone.

    Args:
        run: the run, shrunk.
        other: the same on another mesh, where the run begins.
        folder: for run directories: "whole" there holds the run that was left alone.
        say: takes a line of progress.

    Returns:
        A check of all the steps.
    """
    places = [other, run, on_mesh(run, ONE_DEVICE)]
    name = " -> ".join(dict.fromkeys(_place(place) for place in places))
    checks: list[Check] = []
    with _failing("reshard", name, tolerance(run), checks):
        for place in places[:2]:
            _train(place, folder / "resharded", stop_after_steps=run.total_steps // 3)
        found = _train(places[2], folder / "resharded")
        expected = _curve(folder / "whole")
        comparable = steps_alike(run)
        found, expected = (_compared_until(curve, comparable) for curve in (found, expected))
        checks.append(_judge("reshard", name, found, expected, tolerance(run)))
    _tell(checks[-1], say)
    return checks[-1]


def _train(run: Run, out: Path, stop_after_steps: int | None = None) -> Curve:
    """Trains without a word, and returns the curve so far."""
    with contextlib.redirect_stderr(io.StringIO()):
        outcome = train(run, out, stop_after_steps=stop_after_steps)
    if not outcome.finished and stop_after_steps is None:
        raise KeyboardInterrupt  # which training takes as a request to save and stop
    return _curve(out)


def _curve(directory: Path) -> Curve:
    """The curve that a run directory tells: of each step in order, then of held-out text after each
    stage.
    """
    curve = [
        (f"step {row['step']} {figure}", math.nan if row[figure] is None else row[figure])
        for row in json_lines(directory / "metrics.jsonl")
        for figure in FIGURES
    ]
    ends = {
        f"held-out {source} after step {event['step']}": result["loss"]
        for event in json_lines(directory / "events.jsonl")
        if event["event"] == "stage_end"
        for source, result in event["held_out"].items()
    }
    return curve + list(ends.items())


def _compared_until(curve: Curve, steps: int) -> Curve:
    """The curve with nothing but its points' names after some steps."""
    after = {name: int(re.findall(r"step (\d+)", name)[-1]) > steps for name, _ in curve}
    return [(name, 0.0 if after[name] else value) for name, value in curve]


def _judge(check: Kind, layout: str, found: Curve, expected: Curve, tolerance: float) -> Check:
    """Whether two curves have the same points in the same order, and values within a relative
    tolerance.
    """
    steps = sum(name.endswith(FIGURES[0]) for name, _ in found)
    largest, reason = 0.0, ""
    for (name, value), (due, right) in zip_longest(
        found, expected, fillvalue=("nothing", math.nan)
    ):
        if name != due:
            return Check(
                check, layout, steps, None, tolerance, "different", f"{name} where {due} was due"
            )
        difference = (
            0.0 if value == right else abs(value - right) / abs(right) if right else math.inf
        )
        if not difference <= tolerance and not reason:  # not a number is no better than too large
            reason = f"{name} is {value:.7g} instead of {right:.7g}"
        largest = max(largest, difference) if math.isfinite(difference) else math.inf
    verdict: Verdict = "different" if reason else "same"
    return Check(
        check,
        layout,
        steps,
        largest if math.isfinite(largest) else None,
        tolerance,
        verdict,
        reason,
    )


@contextlib.contextmanager
def _failing(check: Kind, layout: str, tolerance: float, checks: list[Check]) -> Iterator[None]:
    """Turns an exception into a failed check: whatever it is, the recipe does not run there."""
    try:
        yield
    except Exception as error:
        sentence = str(error).strip().partition("\n")[0]
        reason = (
            sentence
            if isinstance(error, UserError | RuntimeError)
            else f"{type(error).__name__}: {sentence}"
        )
        checks.append(Check(check, layout, 0, None, tolerance, "failed", reason))


def _place(run: Run) -> str:
    """The meshes of a run's stages in words."""
    return " -> ".join(
        dict.fromkeys(describe(stage.mesh or run.mesh) for stage in run.stages.values())
    )


def _tell(check: Check, say: Say) -> None:
    difference = (
        ""
        if check.difference is None
        else f" ({check.difference:.1e}, tolerance {check.tolerance:g})"
    )
    say(
        f"{check.check} {check.layout}: {check.verdict}{difference}"
        + (f": {check.reason}" if check.reason else "")
    )
