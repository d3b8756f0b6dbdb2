"""The plan of a job after training: targets side by side, as plain data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from braeburn.config import Run
from braeburn.hardware.catalogue import Figure, weakest
from braeburn.hardware.targets import Target
from braeburn.layers.spec import count
from braeburn.plan.export_cost import ExportEstimate, estimate_export
from braeburn.plan.job_cost import ASSUMED, JobEstimate, Timed
from braeburn.plan.job_search import MOST_MESHES, JobCandidate, job_candidates, why_no_mesh_fits
from braeburn.plan.jobs import Evaluate, Export, Generate, Job, JobOn, model_after
from braeburn.plan.ranking import SECONDS_PER_HOUR
from braeburn.plan.storage import specs_of


def compare_jobs(
    name: str, runs: Sequence[tuple[Run, Target]], stage: str, job: Job
) -> dict[str, Any]:
    """The plan of a job on each target.

    Args:
        name: of the recipe.
        runs: the run as it is set for each target, and the target.
        stage: after which the job works on the model; "" of a run without stages.
        job: with its settings.
    """
    model = model_after(runs[0][0], stage)[0]
    return {
        "recipe": name,
        "job": job.name,
        "stage": stage,
        "settings": dataclasses.asdict(job),
        "parameters": count(specs_of(model)),
        "targets": [_plan(run, stage, target, job) for run, target in runs],
    }


def _plan(run: Run, stage: str, target: Target, job: Job) -> dict[str, Any]:
    chip = target.facts
    plan: dict[str, Any] = {"target": str(target), "chip": chip.title, "refused": None}
    if isinstance(job, Export):
        found = estimate_export(job, model_after(run, stage)[0])
        if found.fits is False:
            return plan | {"refused": _no_memory(found)}
        # The chips of the host wait meanwhile.
        total = _total(found.seconds, ASSUMED, target, target.chips_per_node)
        return plan | {"host": _described_export(found), "total": total}
    if chip.refused:
        return plan | {"refused": chip.refused}
    on = JobOn(job, run, stage, target)
    candidates = job_candidates(on)
    if not (candidates and candidates[0].estimate.fits):
        return plan | {"refused": why_no_mesh_fits(on, candidates)}
    best = candidates[0].estimate
    used = math.prod(candidates[0].sizes.sizes.values()) // chip.devices_per_chip
    return plan | {
        "idle_chips": target.chips - used,
        "layouts": [_described(each, job) for each in candidates[:MOST_MESHES]],
        "total": _total(
            best.reading + best.working, weakest(best.confidence, ASSUMED), target, target.chips
        )
        | {"least": best.unknown, "reading_seconds": _figure(best.reading, ASSUMED)},
    }


def _no_memory(found: ExportEstimate) -> str:
    assert found.room is not None
    return (
        f"export needs {found.peak / 1e9:.1f} GB of a host's memory and {found.room / 1e9:g} are "
        f"there; run it on a host of {math.ceil(found.peak / 1e9)} GB or more"
    )


def _total(seconds: float, confidence: str, target: Target, chips: int) -> dict[str, Any]:
    """Time, money and energy of a job that takes some chips for so long."""
    hours = seconds / SECONDS_PER_HOUR * chips
    chip = target.facts

    def priced(figure: Figure | None, scale: float) -> dict[str, Any] | None:
        if figure is None:
            return None
        return _figure(hours * figure.value * scale, weakest(confidence, figure))

    return {
        "seconds": _figure(seconds, confidence),
        "chip_hours": _figure(hours, confidence),
        "cost_usd": priced(chip.price, 1.0),
        "energy_mwh": priced(chip.watts, 1e-6),
    }


def _described_export(found: ExportEstimate) -> dict[str, Any]:
    return {
        "fits": found.fits,
        "peak_gb": _figure(found.peak / 1e9, "D"),
        "fullest_at": found.tensor,
        "read_gb": found.read / 1e9,
        "written_gb": found.written / 1e9,
        "reading_seconds": _figure(found.reading, ASSUMED),
        "writing_seconds": _figure(found.writing, ASSUMED),
    }


def _described(candidate: JobCandidate, job: Evaluate | Generate) -> dict[str, Any]:
    found = candidate.estimate
    return {
        "mesh": candidate.sizes.sizes,
        "torus": found.torus,
        "mesh_option": candidate.mesh_option,
        "fits": found.fits,
        "total_gib": _figure(found.total_gib, "D"),
        "usable_gib": _figure(found.usable_gib, found.memory_confidence),
        "programs": [described_program(program, found.confidence) for program in found.programs],
        "least": found.unknown,
        "working_seconds": _figure(found.working, found.confidence),
        **_speeds(found, job),
    }


def _speeds(found: JobEstimate, job: Evaluate | Generate) -> dict[str, Any]:
    """What users ask of a job: tokens a second; of generation also how soon the first comes."""
    if isinstance(job, Evaluate):
        return {"tokens_per_second": _figure(job.tokens / found.working, found.confidence)}
    by_name = {program.name: program for program in found.programs}
    prefill = by_name["prefill"]
    # Of a batch, once its prompts are read; of one token each there is nothing to wait for then.
    step = by_name.get("token", prefill)
    return {
        "tokens_per_second": _figure(job.batch / step.seconds, found.confidence),
        "first_token_seconds": _figure(prefill.seconds, found.confidence),
    }


def described_program(program: Timed, confidence: str) -> dict[str, Any]:
    """A program of a job as plain data."""
    return {
        "name": program.name,
        "rounds": program.rounds,
        "seconds": _figure(program.seconds, confidence),
        "computing": program.compute,
        "memory_gib": program.memory,
        "total_gib": program.total_gib,
        "collectives": [
            {
                "axis": total.axis,
                "kind": total.kind,
                "link": link,
                "bytes": round(total.bytes),
                "seconds": spent,
            }
            for total, link, spent in program.collectives
        ],
    }


def _figure(value: float, confidence: str) -> dict[str, Any]:
    return {"value": value, "confidence": confidence}
