"""What a job after training takes on a target, in memory and time, by arithmetic on its traced
programs.
"""

from dataclasses import dataclass

from braeburn.config import MeshConfig
from braeburn.hardware.catalogue import weakest
from braeburn.hardware.links import Links
from braeburn.hardware.targets import Target
from braeburn.hardware.torus import Factors
from braeburn.layers.spec import count
from braeburn.plan.cost import EFFICIENCY, GIB, memory_bandwidth, timed
from braeburn.plan.device_work import DeviceMemory, DeviceWork, work_of_program
from braeburn.plan.few_layers import Term, sum_of_memory, sum_of_work, terms_of
from braeburn.plan.forward import CollectiveTotal, accelerator_of
from braeburn.plan.job_programs import JobProgram, job_layout, programs_of
from braeburn.plan.jobs import Generate, JobOn
from braeburn.plan.storage import FLOAT, held_bytes, specs_of

# How far what is assumed of disks and networks is to be trusted.
ASSUMED = "M"
# What comes before the programs of generation.
UNSTACKING = "unstack"


@dataclass(frozen=True)
class ProgramWork:
    """A program of a job on a mesh, before it is laid over links.

    Attributes:
        program: which.
        work: of a device, in one round of its loop if it is one.
        memory: of a device.
    """

    program: JobProgram
    work: DeviceWork
    memory: DeviceMemory


@dataclass(frozen=True)
class Timed:
    """What is predicted of a program of a job.

    Attributes:
        name: of the program.
        rounds: how often the job runs what the seconds are of.
        compute: seconds of computing, by part.
        collectives: each with its link and its seconds, None where the link's speed is unknown.
        seconds: of one round, or of the program where it is no loop; a lower bound where a link's
            speed is unknown.
        memory: GiB on each device by part.
    """

    name: str
    rounds: int
    compute: dict[str, float]
    collectives: list[tuple[CollectiveTotal, str, float | None]]
    seconds: float
    memory: dict[str, float]

    @property
    def unknown(self) -> bool:
        """Whether the speed of a link is not known."""
        return any(spent is None for *_, spent in self.collectives)

    @property
    def total_gib(self) -> float:
        """GiB on each device while it runs."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class JobEstimate:
    """What is predicted of a job on a target.

    Attributes:
        programs: that it runs, in order.
        usable_gib: what a program may take of each device.
        reading: seconds in which the hosts read the checkpoint.
        confidence: of the seconds of the programs.
        memory_confidence: of the usable memory.
        torus: how the mesh lies on it.
    """

    programs: list[Timed]
    usable_gib: float
    reading: float
    confidence: str
    memory_confidence: str
    torus: Factors | None

    @property
    def fullest(self) -> Timed:
        """The program that takes the most memory."""
        return max(self.programs, key=lambda program: program.total_gib)

    @property
    def total_gib(self) -> float:
        """Memory of a device that the job takes."""
        return self.fullest.total_gib

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.total_gib <= self.usable_gib

    @property
    def working(self) -> float:
        """Seconds of all programs."""
        return sum(program.seconds * program.rounds for program in self.programs)

    @property
    def unknown(self) -> bool:
        """Whether the speed of a link is not known."""
        return any(program.unknown for program in self.programs)


def job_work(on: JobOn, sizes: MeshConfig) -> list[ProgramWork]:
    """The programs of a job on a mesh of resolved sizes, each as a device works on it.

    Raises:
        UserError: the mesh does not divide what the job works on.
    """
    accelerator = accelerator_of(on.target.facts)
    # Where layers are written out, those of a few tell what all do.
    terms = terms_of(on.model) if isinstance(on.job, Generate) else [Term(1, on.model)]
    traced = []
    for term in terms:
        layout = job_layout(on.run, term.model, sizes, None)
        programs = programs_of(on.job, term.model, layout)
        each = [(program, *work_of_program(program, accelerator)) for program in programs]
        traced.append((term.factor, each))
    _, first = traced[0]
    found = []
    for index, (program, _, _) in enumerate(first):
        works = [(factor, each[index][1]) for factor, each in traced]
        memories = [(factor, each[index][2]) for factor, each in traced]
        found.append(ProgramWork(program, sum_of_work(works), sum_of_memory(memories)))
    return found


def estimate_job(
    on: JobOn, works: list[ProgramWork], sizes: MeshConfig, links: Links
) -> JobEstimate:
    """Predicts a job of which the programs are known.

    Args:
        on: the job.
        works: see `job_work`.
        sizes: of the mesh, resolved.
        links: of the mesh on the target.
    """
    job, target = on.job, on.target
    chip = target.facts
    room = chip.device_memory_gib
    assert room  # the catalogue refuses chips without it
    programs = [_timed(each, sizes, target, links) for each in works]
    if isinstance(job, Generate):
        programs.insert(0, _unstacking(on, sizes, programs[0].memory["weights"]))
    figures = [figure for figure in (chip.bf16_tflops, chip.memory_gb_per_s) if figure]
    along = [links.confidence(total.axes) for each in programs for total, *_ in each.collectives]
    return JobEstimate(
        programs,
        room.value,
        reading_seconds(on),
        weakest(EFFICIENCY[chip.family].confidence, *figures, *along),
        room.confidence,
        links.torus,
    )


def _unstacking(on: JobOn, sizes: MeshConfig, weights: float) -> Timed:
    """The layers of each parameter, which are read stacked, made arrays of their own: see
    `generate.ready`.

    It goes parameter by parameter, and a parameter is given up when its layers are there. They are
    read in the type that they are generated from.

    Args:
        on: the job.
        sizes: of the mesh, resolved.
        weights: GiB of all parameters on each device.
    """
    chip = on.target.facts
    held = held_bytes(on.model, on.run.rules, sizes, on.job.dtype)
    stacked = [size for spec, size in held if spec.stacked]
    bandwidth = memory_bandwidth(chip) * EFFICIENCY[chip.family].memory
    spent = 2 * sum(stacked) / bandwidth
    memory = {"weights": weights, "results": max(stacked) / GIB}
    return Timed(UNSTACKING, 1, {"memory_bound": spent}, [], spent, memory)


def reading_seconds(on: JobOn) -> float:
    """Seconds in which the hosts of a target read the float32 weights of a checkpoint, each its
    part of them.
    """
    hosts = on.target.slices * on.target.nodes_per_slice
    return FLOAT * count(specs_of(on.model)) / (hosts * on.job.read_gb_per_s * 1e9)


def _timed(each: ProgramWork, sizes: MeshConfig, target: Target, links: Links) -> Timed:
    program, work, memory = each.program, each.work, each.memory
    compute = _computing(work, target)
    collectives, hidden = timed(work.collectives, sizes, target, links)
    computing = sum(compute.values())
    communication = sum(spent or 0.0 for *_, spent in collectives)
    parts = {
        "weights": memory.weights,
        **memory.held,
        "arguments": memory.arguments,
        "results": memory.results,
        "workspace": memory.workspace,
        **({"relaid": memory.relaid} if memory.relaid else {}),
    }
    return Timed(
        program.name,
        program.rounds or program.calls,
        compute,
        collectives,
        max(computing, communication, computing + communication - hidden),
        {name: value / GIB for name, value in parts.items()},
    )


def _computing(work: DeviceWork, target: Target) -> dict[str, float]:
    """Seconds in which a device computes, by part: a product takes the longer of its FLOPs at the
    peak and of its bytes at the memory's bandwidth.
    """
    chip = target.facts
    efficiency, peak = EFFICIENCY[chip.family], chip.peak_flops
    assert peak  # the catalogue refuses chips without it
    bandwidth = memory_bandwidth(chip)
    matrix = moving = 0.0
    for product in work.products:
        spent = product.flops / (peak * efficiency.matrix)
        fetched = product.bytes / (bandwidth * efficiency.memory)
        matrix += spent * product.times
        moving += max(0.0, fetched - spent) * product.times
    attention = sum(kernel.flops(efficiency.tile) for kernel in work.kernels)
    return {
        "matrix": matrix,
        "attention": attention / (peak * efficiency.attention),
        "memory_bound": moving + work.element_wise / (bandwidth * efficiency.memory),
    }
