"""The programs of a job after training, compiled by the real compiler of hardware that is not
there.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from braeburn.config import Execution, MeshConfig
from braeburn.errors import UserError
from braeburn.hardware.links import Links
from braeburn.layers.spec import walk
from braeburn.models.decoder import param_specs
from braeburn.parallel.mesh import resolve
from braeburn.parallel.rules import check_model
from braeburn.plan.child import compile_in_child
from braeburn.plan.hlo import Module
from braeburn.plan.job_cost import UNSTACKING, JobEstimate, Timed, estimate_job, job_work
from braeburn.plan.job_search import JobCandidate, job_candidates, targets_with_room
from braeburn.plan.jobs import JobOn
from braeburn.plan.program import MOST_CHANGES, Compiled


@dataclass(frozen=True)
class JobCompilation(Compiled):
    """What the compiler says of a program of a job.

    Attributes:
        planned: what the plan says of it.
    """

    planned: Timed

    @cached_property
    def module(self) -> Module:
        """The compiled program; where it is a loop that is told when to stop, one round of it."""
        return dataclasses.replace(super().module, one_round=True)

    def summary(self) -> dict[str, Any]:
        """All that is known, as JSON has it."""
        planned = self.planned
        axes = [axis for axis, size in self.answer["mesh"].items() if size > 1]
        computing = sum(planned.compute.values())
        communication = sum(spent or 0.0 for *_, spent in planned.collectives)
        known = {
            "name": planned.name,
            "rounds": planned.rounds,
            "fits": self.fits,
            "memory_gib": self.memory,
            "plan": {
                "memory_gib": planned.total_gib,
                "compute_seconds": computing,
                "step_seconds": planned.seconds,
                "overlapped": max(computing, communication),
                "serial": None if planned.unknown else computing + communication,
                "bytes": {
                    axis: sum(
                        total.bytes for total, *_ in planned.collectives if axis in total.axes
                    )
                    for axis in axes
                },
            },
            "compiler": self.effort,
        }
        return known | self.measured if "memory" in self.answer else known


def job_mesh(on: JobOn, mesh: MeshConfig | None) -> JobCandidate:
    """The mesh that is asked for with what is predicted on it, or else the best by the plan.

    Args:
        on: the job.
        mesh: sizes, of which one may be -1; None for the best.

    Raises:
        UserError: the mesh does not fit the target, or divide the model or the job.
    """
    target = on.target
    if mesh is None:
        found = job_candidates(on)
        if not found:
            raise UserError(
                f"no mesh of the {target.chips} chips of --on {str(target)!r} divides the model; "
                f"take a power of two of chips"
            )
        return found[0]
    sizes = resolve(mesh, target.devices)
    specs = {path: (spec.axes, spec.shape, spec.role) for path, spec in walk(param_specs(on.model))}
    check_model(on.model, Execution(sizes, on.run.rules), specs)
    works = job_work(on, sizes)
    return JobCandidate(sizes, estimate_job(on, works, sizes, Links(target, sizes)))


def compile_job(
    on: JobOn, candidate: JobCandidate, chips: Path | None = None, memory_gb: float = 5.0
) -> Iterator[JobCompilation]:
    """The programs of a job compiled for a target, now or before.

    Args:
        on: the job; none of the chips needs to be there.
        candidate: the mesh.
        chips: a catalogue of the user's.
        memory_gb: what the compiler may take of this machine's memory.

    Raises:
        UserError: as `compile_in_child` does.
    """
    estimate: JobEstimate = candidate.estimate
    for planned in estimate.programs:
        if planned.name == UNSTACKING:
            continue  # a small program for each parameter
        of_job = {
            "job": on.job.name,
            "settings": dataclasses.asdict(on.job),
            "mesh": candidate.sizes.sizes,
            "program": planned.name,
        }
        answer = compile_in_child(on.run, on.stage, on.target, chips, memory_gb, of_job)
        yield JobCompilation(on.run, on.stage, on.target, answer, planned)


def planned_alone(candidate: JobCandidate) -> list[dict[str, Any]]:
    """What a job does beside the programs that `compile_job` compiles, with its memory by the plan,
    as JSON.

    Args:
        candidate: the mesh.
    """
    usable = candidate.estimate.usable_gib
    return [
        {
            "name": planned.name,
            "fits": planned.total_gib <= usable,
            "memory_gib": planned.total_gib,
            "usable_gib": usable,
        }
        for planned in candidate.estimate.programs
        if planned.name == UNSTACKING
    ]


def meshes_that_fit(
    on: JobOn, *, verify: bool, chips: Path | None = None, memory_gb: float = 5.0
) -> list[dict[str, Any]]:
    """The fastest meshes for a job that fit by the plan, on more chips where none does on the
    target's, as JSON.

    Args:
        on: the job, which does not fit as it was compiled.
        verify: whether to compile them, the best first, until one is known to fit; "verified" is
            None of the others.
        chips: a catalogue of the user's.
        memory_gb: as of `compile_job`.
    """
    fits = [(on.target, found) for found in job_candidates(on) if found.estimate.fits]
    if not fits:
        more = next(targets_with_room(on), None)
        fits = [more] if more else []
    changes: list[dict[str, Any]] = []
    for where, found in fits[:MOST_CHANGES]:
        verified = None
        if verify and not any(change["verified"] for change in changes):
            compiled = compile_job(dataclasses.replace(on, target=where), found, chips, memory_gb)
            verified = all(each.fits for each in compiled)
        changes.append(
            {
                "target": str(where),
                "mesh_option": found.mesh_option,
                "total_gib": found.estimate.total_gib,
                "verified": verified,
            }
        )
    return changes
