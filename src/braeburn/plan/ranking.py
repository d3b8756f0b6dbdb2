"""The plan of a run: targets side by side, each with its layouts, days, cost and energy, as plain
data.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from braeburn.config import MeshConfig, Run
from braeburn.errors import UserError
from braeburn.hardware.catalogue import Chip, Figure, weakest
from braeburn.hardware.links import Links
from braeburn.hardware.targets import Target
from braeburn.plan.cost import Estimate, divided_work, estimate_work, labelling_seconds
from braeburn.plan.forward import Pass
from braeburn.plan.goodput import Interruptions, goodput
from braeburn.plan.pipeline import drawn
from braeburn.plan.search import Candidate, candidates, larger_targets
from braeburn.plan.storage import FLOAT

HOURS_PER_DAY, SECONDS_PER_HOUR = 24, 3600

# What vendors say of one chip against another in training GPT-3 175B: speed, or speed for the
# money.
CLAIMS = (
    ("Gaudi 3 trains 1.4 times as fast as H100", "gaudi3", "h100", "speed", 1.4),
    ("TPU v5p trains 2.8 times as fast as TPU v4", "v5p", "v4", "speed", 2.8),
    (
        "TPU v5p trains 2.1 times as much for the money as TPU v4",
        "v5p",
        "v4",
        "speed per dollar",
        2.1,
    ),
)
# (run, stage, target, layouts) -> layouts in order, each with what a compiler says of it, if it was
# asked.
Ranking = Callable[
    [Run, str, Target, list[Candidate]], Sequence[tuple[Candidate, dict[str, Any] | None]]
]
MOST_LAYOUTS = 20
# A claim is borne out where the plan's own ratio is within this of it: ten of the sixteen published
# step times are predicted as well as that (benchmarks/published.py).
CLAIM_TOLERANCE = 0.15


def _as_planned(
    run: Run, stage: str, target: Target, found: list[Candidate]
) -> list[tuple[Candidate, None]]:
    return [(candidate, None) for candidate in found]


def compare(
    name: str,
    runs: Sequence[tuple[Run, Target]],
    chips: Mapping[str, Chip],
    stages: Sequence[str],
    failures: Mapping[str, Any],
    ranked: Ranking = _as_planned,
) -> dict[str, Any]:
    """The plan of a run on each target.

    Args:
        name: of the recipe.
        runs: the run as it is set for each target, and the target.
        chips: the catalogue.
        stages: of the run that are planned.
        failures: fields of `Interruptions` that take the place of its defaults.
        ranked: orders the layouts of a stage anew, with what a compiler says of them.
    """
    planned = [_plan(run, target, failures, stages, ranked) for run, target in runs]
    return {"recipe": name, "targets": planned, "claims": _claims(runs, chips, stages[0])}


def _plan(
    run: Run, target: Target, failures: Mapping[str, Any], names: Sequence[str], ranked: Ranking
) -> dict[str, Any]:
    chip = target.facts
    plan: dict[str, Any] = {
        "target": str(target),
        "chip": chip.title,
        "refused": chip.refused or None,
    }
    if chip.refused:
        return plan
    stages, seconds, confidences, state = {}, 0.0, [], 0.0
    for name in names:
        found = candidates(run, name, target)
        if not (found and found[0].estimate.fits):
            return plan | {"refused": why_nothing_fits(run, name, target, found)}
        layouts = ranked(run, name, target, found)
        first, stage = layouts[0][0], run.stages[name]
        best = first.estimate
        labelling = labelling_seconds(first.run, name, first.sizes, target)
        seconds += best.step * stage.steps + labelling
        confidences.append(best.confidence)
        stored = Pass(run, stage, first.sizes, run.models()[name].trained)
        state = max(state, FLOAT * stored.shard + stored.optimizer_bytes)
        described = [
            describe(candidate, name) | {"compiled": said}
            for candidate, said in layouts[:MOST_LAYOUTS]
        ]
        own = _own(run, name, target)
        stages[name] = {
            "layouts": described,
            "own": describe(own, name) if own else None,
            "schedules": _schedules([candidate for candidate, _ in layouts], own, name),
            "days": _days(best.step * stage.steps, best.confidence),
            "labelling_days": _days(labelling, best.confidence) if labelling else None,
            "tokens": stage.steps * stage.batch_tokens,
            "steps": stage.steps,
            "idle_chips": target.chips
            - math.prod(first.sizes.sizes.values()) // chip.devices_per_chip,
        }
    expected = goodput(target.chips, seconds, state, Interruptions(**failures))
    hours = expected.wall_seconds / SECONDS_PER_HOUR
    confidence = weakest(*confidences)

    def priced(figure: Figure | None, scale: float) -> dict[str, Any] | None:
        if figure is None:
            return None
        return _figure(hours * target.chips * figure.value * scale, weakest(confidence, figure))

    total = {
        "days": _figure(hours / HOURS_PER_DAY, confidence),
        "chip_hours": _figure(hours * target.chips, confidence),
        "cost_usd": priced(chip.price, 1.0),
        "energy_mwh": priced(chip.watts, 1e-6),
        "goodput": dataclasses.asdict(expected),
    }
    return plan | {"stages": stages, "total": total}


def _schedules(
    layouts: Sequence[Candidate], own: Candidate | None, name: str
) -> list[dict[str, Any]]:
    """The schedules to be drawn: of the best layout that is a pipeline and of the run's own, if
    they are, by their ranks.
    """
    ranked: list[tuple[int | str, Candidate]] = [*enumerate(layouts[:MOST_LAYOUTS], 1)]
    pipelines = [(rank, each) for rank, each in ranked if each.sizes.pipeline > 1][:1]
    if own and own.sizes.pipeline > 1:
        pipelines.append(("own", own))
    found = []
    for rank, each in pipelines:
        stage = each.run.stages[name]
        remat = stage.remat or each.run.remat
        recomputes = remat.policy == "full"
        found.append({"rank": rank} | drawn(each.sizes, stage.accumulation_steps, recomputes))
    return found


def _own(run: Run, name: str, target: Target) -> Candidate | None:
    """The layout that the run itself has, or None where it does not divide the target."""
    try:
        work = divided_work(run, name, target)
        found = estimate_work(work, target, Links(target, work.mesh))
        return Candidate({}, run, work.mesh, found)
    except UserError:
        return None


def why_nothing_fits(run: Run, name: str, target: Target, found: Sequence[Candidate]) -> str:
    """One sentence on why a stage does not run on a target, and what it would run on.

    Args:
        run: the run.
        name: of the stage.
        target: on which nothing fits.
        found: the layouts that were tried, the nearest to fitting first; none where no mesh
            divides the model.
    """
    batch = run.stages[name].batch_size
    if not found:
        return (
            f"no mesh of {target.chips} chips divides the model and the {batch} sequences of a "
            f"batch of stage "
            f"{name!r}; take another number of chips, or set stages.{name}.batch_tokens"
        )
    nearest = found[0].estimate
    enough = next(larger_targets(run, name, target), None)
    needs = (
        f"stage {name!r} needs {nearest.total_gib:.1f} GiB on each chip and "
        f"{nearest.usable_gib:.1f} are there"
    )
    if enough is None:
        return (
            f"{needs}; no number of {target.chip} chips that divides its batch has room: "
            f"lower the batch or the model"
        )
    return (
        f"{needs}; {enough[0]} has room ({describe_layout(enough[1], name)}, "
        f"{enough[1].estimate.total_gib:.1f} GiB)"
    )


def describe_layout(candidate: Candidate, name: str) -> str:
    """A layout in a few words: its mesh, and what is kept for the backward pass."""
    mesh = (
        " x ".join(f"{axis} {size}" for axis, size in candidate.sizes.sizes.items() if size > 1)
        or "one chip"
    )
    return f"{mesh}, remat {_remat(candidate.run, name)}"


def _remat(run: Run, name: str) -> str:
    remat = run.stages[name].remat or run.remat
    return "+".join(remat.names) if remat.policy == "save_named" else remat.policy


def _ways(mesh: MeshConfig) -> list[str]:
    """How the axes of a mesh are used, where there are several ways."""
    found = []
    if mesh.expert > 1:
        found.append(f"experts by {mesh.expert_dispatch.replace('_', '-')}")
    if mesh.pipeline > 1 and mesh.pipeline_schedule != "1f1b":
        found.append(mesh.pipeline_schedule)
    if mesh.stages_per_device > 1:
        found.append(f"{mesh.stages_per_device} stages each")
    return found


def describe(candidate: Candidate, name: str) -> dict[str, Any]:
    """A layout of a stage and its estimate as plain data."""
    run, found = candidate.run, candidate.estimate
    offload = [*(["optimizer"] if run.offload.optimizer else []), *run.offload.activations]
    return {
        "mesh": candidate.sizes.sizes,
        "ways": _ways(candidate.sizes),
        "torus": found.torus,
        "remat": _remat(run, name),
        "accumulation_steps": run.stages[name].accumulation_steps,
        "offload": offload,
        "assignments": candidate.assignments,
        **describe_estimate(found),
    }


def describe_estimate(found: Estimate) -> dict[str, Any]:
    """What is predicted of a step, as plain data."""
    collectives = [
        {
            "axis": total.axis,
            "kind": total.kind,
            "link": link,
            "bytes": round(total.bytes),
            "seconds": seconds,
        }
        for total, link, seconds in found.collectives
    ]
    return {
        "fits": found.fits,
        "memory_gib": found.memory,
        "total_gib": _figure(found.total_gib, "D"),
        "usable_gib": _figure(found.usable_gib, found.memory_confidence),
        "seconds": found.seconds,
        "collectives": collectives,
        "overlapped": found.overlapped,
        "serial": found.serial,
        "step_seconds": _figure(found.step, found.confidence),
        "mfu": _figure(found.mfu, found.confidence),
        "tokens_per_second": _figure(found.tokens_per_second, found.confidence),
    }


def _days(seconds: float, confidence: str) -> dict[str, Any]:
    return _figure(seconds / SECONDS_PER_HOUR / HOURS_PER_DAY, confidence)


def _figure(value: float, confidence: str) -> dict[str, Any]:
    return {"value": value, "confidence": confidence}


def _claims(
    runs: Sequence[tuple[Run, Target]], chips: Mapping[str, Chip], stage: str
) -> list[dict[str, Any]]:
    """What vendors claim of the chips that are compared, beside the plan's own ratio on the same
    number of chips.
    """
    first = {target.chip: (run, target) for run, target in reversed(runs)}

    @cache
    def speed(chip: str, like: str) -> float | None:
        """Tokens per second of a chip, as many as there are of another; None where no layout of
        them fits.
        """
        run, target = first[like]
        try:
            best = candidates(
                run, stage, dataclasses.replace(target, chip=chip, facts=chips[chip])
            )[:1]
        except UserError:  # there is no slice of so many
            return None
        return best[0].estimate.tokens_per_second if best and best[0].estimate.fits else None

    def worth(chip: str, like: str, quantity: str) -> float | None:
        """Speed, or speed per dollar, of a chip."""
        price, tokens = chips[chip].price, speed(chip, like)
        if quantity == "speed" or tokens is None:
            return tokens
        return tokens / price.value if price else None

    rows = []
    for claim, chip, against, quantity, claimed in CLAIMS:
        if chip not in first:
            continue
        here, there = (worth(each, chip, quantity) for each in (chip, against))
        ratio = here / there if here and there else None
        rows.append(
            {
                "claim": claim,
                "claimed": claimed,
                "planned": ratio,
                "tolerance": CLAIM_TOLERANCE,
                "verdict": _verdict(claimed, ratio),
            }
        )
    return rows


def _verdict(claimed: float, planned: float | None) -> str:
    """What the plan's own ratio, if it has one, makes of a claimed one."""
    if planned is None:
        return "cannot be planned"
    off = planned / claimed - 1
    found = "borne out" if abs(off) <= CLAIM_TOLERANCE else "not borne out"
    size = f"{abs(off):.1%} {'less' if off < 0 else 'more'}"
    return f"{found}: the plan has {size}, with a tolerance of {CLAIM_TOLERANCE:.0%}"
