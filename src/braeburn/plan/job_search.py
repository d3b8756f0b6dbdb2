"""The meshes that a job after training fits on, the fastest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from braeburn.config import Execution, MeshConfig
from braeburn.errors import UserError
from braeburn.hardware.links import Links
from braeburn.hardware.targets import Target
from braeburn.layers.spec import count
from braeburn.parallel.rules import batch_shards
from braeburn.plan.cost import EFFICIENCY, GIB, hidden_fractions, memory_bandwidth
from braeburn.plan.job_cost import JobEstimate, estimate_job, job_work
from braeburn.plan.jobs import WIDTHS, Evaluate, JobOn
from braeburn.plan.search import NOMINAL_BYTES_PER_S, Sequences, divides, meshes
from braeburn.plan.storage import held_bytes, specs_of

# Of which the best are sure to be among those that are looked at.
MOST_MESHES = 8
# Twice as many chips each time that more of them are looked for.
MOST_DOUBLINGS = 10


@dataclass(frozen=True)
class JobCandidate:
    """A mesh and what is predicted of a job on it.

    Attributes:
        sizes: of the mesh, resolved.
        estimate: what the job takes.
    """

    sizes: MeshConfig
    estimate: JobEstimate

    @property
    def mesh_option(self) -> str:
        """The mesh as `--mesh` takes it, its axes of one device left out, and how tokens reach
        experts where that is not the usual way.
        """
        named = [f"{axis}={size}" for axis, size in self.sizes.sizes.items() if size > 1]
        usual = MeshConfig.model_fields["expert_dispatch"].default
        if self.sizes.expert_dispatch != usual:
            named.append(f"expert_dispatch={self.sizes.expert_dispatch}")
        return ",".join(named) or "fsdp=1"


def job_candidates(on: JobOn) -> list[JobCandidate]:
    """Every mesh of a target that divides a job, the fastest first; those that do not fit come
    last, by what they lack. All chips are used if any mesh divides them.
    """
    job, model, target = on.job, on.model, on.target
    room = target.facts.device_memory_gib
    assert room  # the catalogue refuses chips without it
    length = job.sequence_length if isinstance(job, Evaluate) else job.prompt_tokens
    every = [
        sizes
        for sizes in meshes([model], Sequences(0, length), target)
        if divides([model], on.run.rules, sizes)
    ]
    possible = [sizes for sizes in every if weights_gib(on, sizes) <= room.value]
    # Where weights alone do not fit, the mesh that divides them most tells what is lacking.
    if not possible and every:
        possible = [min(every, key=lambda sizes: weights_gib(on, sizes))]
    found: list[JobCandidate] = []
    # A mesh whose least time is beyond what the best so many take is not looked at.
    for sizes in sorted(possible, key=lambda sizes: least_seconds(on, sizes)):
        worst = found[MOST_MESHES - 1].estimate if len(found) >= MOST_MESHES else None
        least = least_seconds(on, sizes)
        if worst and worst.fits and least > worst.working:
            break
        try:
            works = job_work(on, sizes)
        except UserError:  # it does not divide the job
            continue
        # Laid over a torus as `--mesh` lays it, which names no places on it.
        estimate = estimate_job(on, works, sizes, Links(target, sizes))
        found.append(JobCandidate(sizes, estimate))
        found.sort(key=lambda candidate: _rank(candidate.estimate))
    return found


def least_seconds(on: JobOn, sizes: MeshConfig) -> float:
    """Seconds that a job takes at least on a mesh: those of the products of its weights alone, and
    of what comes over links to make them whole.

    It decides which meshes are looked at, and no result shows it.
    """
    job, model, target = on.job, on.model, on.target
    chip = target.facts
    efficiency, peak = EFFICIENCY[chip.family], chip.peak_flops
    assert peak  # the catalogue refuses chips without it
    weights = count(specs_of(model), ("matrix",)) / sizes.tensor
    shards = batch_shards(Execution(sizes, on.run.rules))
    if isinstance(job, Evaluate):
        windows = max(1, -(-job.tokens // job.sequence_length))
        tokens = -(-windows // shards) * job.sequence_length / sizes.context
        return 2 * weights * tokens / (peak * efficiency.matrix)
    moved = WIDTHS[job.dtype] * weights
    once = moved / (memory_bandwidth(chip) * efficiency.memory)
    sharded = math.prod(sizes.sizes[axis] for axis in sizes.sharded)
    # Experts that are split are not gathered, so that less may come over links.
    if sharded > 1 and sizes.expert == 1 and chip.link_gb_per_s:
        gathered = moved * (sharded - 1) / sharded
        links = chip.link_gb_per_s.value * 1e9 / chip.devices_per_chip
        once = max(once, gathered / links * (1 - hidden_fractions(chip).weights))
    return once * (job.max_new_tokens - 1)


def weights_gib(on: JobOn, sizes: MeshConfig) -> float:
    """GiB of a model's weights on each device of a mesh."""
    held = held_bytes(on.model, on.run.rules, sizes, on.job.dtype)
    return sum(size for _, size in held) / GIB


def _rank(estimate: JobEstimate) -> tuple[float, float]:
    """What orders meshes: memory that is lacking, then seconds, links of unknown speed counted at a
    nominal one.
    """
    unknown = 0.0
    for program in estimate.programs:
        slow = sum(total.bytes for total, _, spent in program.collectives if spent is None)
        unknown += slow * program.rounds
    lacking = 0.0 if estimate.fits else estimate.total_gib - estimate.usable_gib
    return lacking, estimate.working + unknown / NOMINAL_BYTES_PER_S


def targets_with_room(on: JobOn) -> Iterator[tuple[Target, JobCandidate]]:
    """Targets of twice as many chips each time, each with the fastest mesh that leaves a tenth of
    the memory free; sizes that no slice has are passed over.
    """
    target = on.target
    largest = target.facts.max_slice or 2**16
    count = target.chips
    for _ in range(MOST_DOUBLINGS):
        count *= 2
        slices = max(1, -(-count // largest))
        more = Target(target.chip, slices, count // slices, target.facts)
        if not more.exists:
            continue
        for candidate in job_candidates(replace(on, target=more)):
            if candidate.estimate.total_gib <= 0.9 * candidate.estimate.usable_gib:
                yield more, candidate
                break


def why_no_mesh_fits(on: JobOn, found: list[JobCandidate]) -> str:
    """One sentence on why a job does not run on a target, and what it would run with or on.

    Args:
        on: the job, and the target on which nothing fits.
        found: the meshes that were tried, the nearest to fitting first; none where no mesh divides
            the model.
    """
    job, target = on.job, on.target
    if not found:
        return f"no mesh of {target.chips} chips divides the model; take a power of two of chips"
    nearest = found[0].estimate
    needs = (
        f"{job.name} needs {nearest.total_gib:.1f} GiB on each chip and {nearest.usable_gib:.1f} "
        f"are there"
    )
    remedies = []
    if isinstance(job, Evaluate) and job.dtype == "float32":
        halved = job_candidates(replace(on, job=replace(job, dtype="bfloat16")))
        if halved and halved[0].estimate.fits:
            remedies.append(
                f"--dtype bf16 has room ({halved[0].mesh_option}, "
                f"{halved[0].estimate.total_gib:.1f} GiB)"
            )
    if enough := next(targets_with_room(on), None):
        remedies.append(
            f"{enough[0]} has room ({enough[1].mesh_option}, "
            f"{enough[1].estimate.total_gib:.1f} GiB)"
        )
    if not remedies:
        return f"{needs}; no number of {target.chip} chips that divides the model has room"
    return f"{needs}; {', and '.join(remedies)}"
