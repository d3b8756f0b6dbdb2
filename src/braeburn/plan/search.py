"""The layouts of a stage that a target allows, the fastest first."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from braeburn.config import (
    Execution,
    MeshConfig,
    ModelConfig,
    Offload,
    Remat,
    Run,
    ShardingRules,
    Stage,
)
from braeburn.errors import UserError
from braeburn.hardware.links import Links
from braeburn.hardware.products import check_matmul
from braeburn.hardware.targets import Target
from braeburn.hardware.torus import extent, placements
from braeburn.layers.spec import ParamSpec, walk
from braeburn.parallel.collectives import TENSOR
from braeburn.parallel.rules import batch_shards
from braeburn.plan.cost import (
    Estimate,
    Waiting,
    Work,
    computing_seconds,
    estimate_work,
    least_seconds,
    waiting,
    work_of,
)
from braeburn.plan.forward import accelerator_of
from braeburn.plan.storage import axes_of_parameters, specs_of

# What the backward pass may find kept, from all that has a name to nothing. Not "none", which keeps
# norms and more in float32: compiled steps take twice the memory then, and longer.
REMATS = (
    *(
        Remat(policy="save_named", names=names)
        for names in (
            ("query", "key", "value", "attention", "attention_output", "ffn_gate", "ffn_up"),
            ("value", "attention", "attention_output", "ffn_gate", "ffn_up"),
            ("query", "key", "value", "attention", "ffn_gate", "ffn_up"),
            ("query", "key", "value", "attention", "attention_output", "ffn_gate"),
            ("query", "key", "value", "attention", "ffn_gate"),
            ("query", "key", "value", "attention", "attention_output"),
            ("query", "key", "value", "attention"),
            ("attention", "attention_output"),
            ("attention",),
        )
    ),
    Remat(policy="full"),
)
OFFLOADS = (
    Offload(),
    Offload(optimizer=True),
    Offload(activations=("query", "key", "value", "attention"), optimizer=True),
)
MOST_ACCUMULATION = 64
MOST_EXPERT_SHARDS = 64
# Of a network of unknown speed, to tell a layout that needs it much from one that does not; no
# result shows it.
NOMINAL_BYTES_PER_S = 25e9
# Ways to lay one mesh over a torus that are looked at, those with the best links for the innermost
# axes first.
MOST_PLACEMENTS = 12


@dataclass(frozen=True)
class Candidate:
    """A layout and what is predicted of it.

    Attributes:
        assignments: of the run's fields, by dotted paths.
        run: with these.
        sizes: of the mesh, resolved.
        estimate: what it takes.
    """

    assignments: dict[str, Any]
    run: Run
    sizes: MeshConfig
    estimate: Estimate


def candidates(run: Run, name: str, target: Target) -> list[Candidate]:
    """Every mesh that divides a stage on a target, each with what suits it best, the fastest first.

    For each mesh: the placement on the torus with the least communication, and of accumulation,
    remat and offload the fastest that fits. Meshes that fit in no way come last, by what they lack;
    those whose parameters and gradients alone do not fit only where no other does.

    Raises:
        UserError: the stage's teacher is not there.
    """
    check_matmul(run.precision, target.facts)
    own = run.stages[name].mesh or run.mesh
    work = work_of(run, name, own, accelerator_of(target.facts))
    models = [*run.models()[name], *([work.teacher] if work.teacher else [])]
    distinct = list(dict.fromkeys(models))
    every = [
        sizes.model_copy(update={"expert_room": own.expert_room})
        for sizes in meshes(models, work.stage, target)
        if divides(distinct, run.rules, sizes)
    ]
    room = target.facts.device_memory_gib
    assert room  # the catalogue refuses chips without it
    possible = [sizes for sizes in every if replace(work, mesh=sizes).least_gib <= room.value]
    return _best_of(possible, work, name, target) or _best_of(every, work, name, target)


def _dispatches(models: Sequence[ModelConfig], sizes: MeshConfig) -> list[MeshConfig]:
    """A mesh with each way in which tokens may reach experts, where it splits some.

    A gather brings each device the tokens of all expert shards; an all-to-all sends each token as
    often as it has experts, and the buffer's room besides. It is tried where that is less.
    """
    if sizes.expert == 1:
        return [sizes]
    shares = [spec.share * spec.num_experts for spec in _of_experts(models) if spec.num_experts]
    if not shares:
        return [sizes]
    less = sizes.expert > sizes.expert_room * min(shares)
    ways = ("gather", "all_to_all") if less else ("gather",)
    return [sizes.model_copy(update={"expert_dispatch": how}) for how in ways]


def _of_experts(models: Sequence[ModelConfig]) -> list[ParamSpec]:
    """The specs of all parameters that experts have one each of."""
    return [spec for model in models for _, spec in walk(specs_of(model)) if spec.num_experts]


def divides(models: Sequence[ModelConfig], rules: ShardingRules, sizes: MeshConfig) -> bool:
    """Whether a mesh divides all parameters as the rules split them."""
    try:
        for model in models:
            axes_of_parameters(model, rules, "parameters", sizes)
            axes_of_parameters(model, rules, "optimizer", sizes)
    except UserError:
        return False
    return True


def _best_of(every: Sequence[MeshConfig], work: Work, name: str, target: Target) -> list[Candidate]:
    """Each of some meshes with what suits it best, the fastest first."""
    run, found = work.run, []
    for sizes in every:
        best: tuple[Work, Estimate] | None = None
        for torus in _placements(sizes, target):
            links = Links(target, sizes, torus)
            # Of chips that are several devices JAX alone lays the mesh.
            placed = sizes.model_copy(
                update={"torus": torus if target.facts.devices_per_chip == 1 else None}
            )
            if best is None:
                models = [work.model, *([work.teacher] if work.teacher else [])]
                ways = (_fastest(work, way, target, links) for way in _dispatches(models, placed))
                best = min(filter(None, ways), key=lambda found: _rank(found[1]), default=None)
                continue
            # The same work on other links.
            other = estimate_work(best[0], target, links)
            if _rank(other) < _rank(best[1]):
                best = _changed(best[0], {"mesh": placed}), other
        if best:
            found.append(_candidate(run, name, _run_of(best[0], name), best[1]))
    found.sort(key=lambda candidate: _rank(candidate.estimate))
    return found


def _computed(estimate: Estimate) -> dict[str, float]:
    """The seconds of computing of an estimate, as `computing_seconds` gives them."""
    return {part: spent for part, spent in estimate.seconds.items() if part != "bubble"}


def larger_targets(run: Run, name: str, target: Target) -> Iterator[tuple[Target, Candidate]]:
    """Targets of twice as many chips each time, each with the fastest layout that leaves a tenth of
    the memory free.

    Sizes that no slice has are passed over.
    """
    count, largest = target.chips, target.facts.max_slice or 2**16
    while count < run.stages[name].batch_size * 64:
        count *= 2
        slices = max(1, -(-count // largest))
        more = Target(target.chip, slices, count // slices, target.facts)
        if not more.exists:
            continue
        for candidate in candidates(run, name, more):
            if candidate.estimate.total_gib <= 0.9 * candidate.estimate.usable_gib:
                yield more, candidate
                break


@dataclass(frozen=True)
class Sequences:
    """What a mesh divides beside a model, where there is no stage.

    Attributes:
        batch_size: sequences that are worked on at once; 0 where a batch is filled up to any
            number.
        sequence_length: tokens of each.
    """

    batch_size: int
    sequence_length: int


def meshes(
    models: Sequence[ModelConfig], stage: Stage | Sequences, target: Target
) -> list[MeshConfig]:
    """The meshes that divide all models of a stage and its batch over the devices of a target.

    Nodes of other chips than TPUs may stay idle where no mesh of all of them divides: the most that
    do are used.
    """
    chip = target.facts
    if chip.family == "tpu":
        return list(_meshes(models, stage, target, target.devices // target.slices, target.slices))
    for count in range(target.chips, 0, -chip.per_node if target.chips > chip.per_node else -1):
        if found := list(_meshes(models, stage, target, count * chip.devices_per_chip, 1)):
            return found
    return []


def _split_over_tensor(model: ModelConfig) -> set[int]:
    """The sizes of a model that the axis `tensor` must divide."""
    rules = ShardingRules()
    found = set()
    for _, spec in walk(specs_of(model)):
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            placement = rules.of(axis, spec.role)
            if TENSOR in placement.activations and not placement.whole_if_uneven:
                found.add(size)
    return found


def _expert_sizes(models: Sequence[ModelConfig]) -> list[int]:
    """The sizes of the axis `expert` that are tried: those that divide the experts of all models
    that have some.
    """
    common = math.gcd(*(spec.num_experts or 0 for spec in _of_experts(models)))
    return [size for size in _powers(MOST_EXPERT_SHARDS) if common and common % size == 0] or [1]


def _meshes(
    models: Sequence[ModelConfig],
    stage: Stage | Sequences,
    target: Target,
    within: int,
    slices: int,
) -> Iterator[MeshConfig]:
    """The meshes of `slices` slices of `within` devices."""
    chip = target.facts
    domain = (
        int(chip.domain.value) * chip.devices_per_chip
        if chip.domain and chip.family != "tpu"
        else 64
    )
    over_tensor = {size for model in models for size in _split_over_tensor(model)}
    pipelines, expert_sizes = _pipelines(models, stage), _expert_sizes(models)
    for replica in (slices, 1) if slices > 1 else (1,):
        total = within * slices // replica
        for tensor, context in itertools.product(_powers(min(domain, 64)), _powers(64)):
            if total % (tensor * context) or stage.sequence_length % (
                (2 if context > 1 else 1) * context * tensor
            ):
                continue
            if any(size % tensor for size in over_tensor):
                continue
            if any(m.num_kv_heads % tensor and tensor % m.num_kv_heads for m in models):
                continue
            for pipeline in pipelines:
                if total % (tensor * context * pipeline) or (pipeline > 1 and context > 1):
                    continue
                rest = total // (tensor * context * pipeline)
                if stage.batch_size % (replica * rest):
                    continue
                # Too few microbatches: devices would be idle for a third of the time.
                if pipeline > 1 and stage.batch_size < 2 * pipeline * replica * rest:
                    continue
                for expert, fsdp in itertools.product(expert_sizes, _powers(rest)):
                    sharded = expert * fsdp
                    if rest % sharded or any(m.d_model % (sharded * pipeline) for m in models):
                        continue
                    data = rest // sharded
                    # Experts are split before they are copied, and before their narrow matrices
                    # are.
                    if expert > 1 and (data > 1 or tensor > 1):
                        continue
                    if replica < slices and data % slices == 0:
                        continue  # data that takes the slices is a replica by another name
                    yield MeshConfig(
                        replica=replica,
                        data=data,
                        fsdp=fsdp,
                        expert=expert,
                        pipeline=pipeline,
                        context=context,
                        tensor=tensor,
                    )


def _pipelines(models: Sequence[ModelConfig], stage: Stage | Sequences) -> list[int]:
    """The devices that a pipeline of all models may have: 1 alone for jobs after training.

    Where sequences are split as well a pipeline is not looked for.
    """
    if isinstance(stage, Sequences):
        return [1]
    repeats = min(sum(segment.repeats for segment in model.segments) for model in models)
    return [devices for devices in _powers(repeats) if repeats % devices == 0]


def _changed(work: Work, changes: dict[str, Any]) -> Work:
    """The work with some fields of its stage changed; a mesh of the same sizes is among them,
    resolved.

    The run stays as it is: see `_run_of`.
    """
    return work.varied(stage=work.stage.model_copy(update=changes), mesh=changes["mesh"])


def _run_of(work: Work, name: str) -> Run:
    """The run with the stage as the work has it."""
    return work.run.model_copy(update={"stages": {**work.run.stages, name: work.stage}})


def _fastest(
    work: Work, sizes: MeshConfig, target: Target, links: Links
) -> tuple[Work, Estimate] | None:
    """The fastest of accumulation, remat and offload that fits; or where none does, what lacks
    least.
    """
    room = target.facts.device_memory_gib
    assert room  # the catalogue refuses chips without it
    least: tuple[float, tuple[int, ...], Work] | None = None
    work = replace(work, mesh=sizes)
    for offload in OFFLOADS:
        if sizes.pipeline > 1 and offload.activations:
            continue
        offloading = work.varied(run=work.run.model_copy(update={"offload": offload}))
        # Worked out here, for all that is varied below.
        assert offloading.shapes and offloading.storage and offloading.update
        assert offloading.token_shards
        best: tuple[Work, Estimate] | None = None
        for one, computed, least_step, order in _within(offloading, target, links):
            if best and least_step >= _rank(best[1])[1]:
                continue
            needed = one.memory_gib
            if needed <= room.value:
                found = estimate_work(one, target, links, computed)
                if best is None or _rank(found) < _rank(best[1]):
                    best = one, found
            elif least is None or (needed, order) < least[:2]:
                least = needed, order, one
        if best:
            return best
    return (least[2], estimate_work(least[2], target, links)) if least else None


class _Tried(NamedTuple):
    """A way to carry out a step.

    Attributes:
        work: of the step.
        computed: its `computing_seconds`.
        least: seconds that it takes at least.
        order: of two that are equal the lower is taken.
    """

    work: Work
    computed: Mapping[str, float]
    least: float
    order: tuple[int, ...]


def _within(work: Work, target: Target, links: Links) -> Iterator[_Tried]:
    """The work in each number of microbatches with each of `REMATS`, but for what is no faster than
    one that came before and fits.
    """
    sizes, offload = work.mesh, work.run.offload
    room = target.facts.device_memory_gib
    assert room  # the catalogue refuses chips without it
    remats = [
        remat
        for remat in REMATS
        if set(offload.activations) <= set(remat.names if remat.policy == "save_named" else ())
    ]
    number = OFFLOADS.index(offload)
    left: dict[int, Work] = {}
    for mesh, remat in itertools.product(_interleavings(sizes, work.model), remats):
        one = _changed(work, {"mesh": mesh, "remat": remat})
        # Worked out here, for all that is varied below.
        assert one.totals and (sizes.pipeline == 1 or one.dealt)
        left[len(left)] = one
    numbers = _accumulations(work.stage, sizes)
    waits = {}
    for mesh in _interleavings(sizes, work.model):
        possible = [steps for steps in numbers if _deals_out(mesh, steps)]
        if possible:
            ends = [
                _changed(work, {"accumulation_steps": steps, "mesh": mesh, "remat": remats[0]})
                for steps in (possible[0], possible[-1])
            ]
            waits[mesh.stages_per_device] = _least_waiting(ends, target, links)
    every = []
    for steps in numbers:
        found = {
            index: _changed(one, {"accumulation_steps": steps, "mesh": one.mesh})
            for index, one in left.items()
            if _deals_out(one.mesh, steps)
        }
        ways = []
        for index, one in found.items():
            computed = computing_seconds(one, target)
            waiting_least = waits[one.mesh.stages_per_device](steps)
            bound = least_seconds(one, target, computed, waiting_least)
            ways.append(_Tried(one, computed, bound, (number, steps, index)))
        if sizes.pipeline > 1:
            every += ways  # more microbatches leave a pipeline less idle
            continue
        yield from ways
        fitting = {index for index, one in found.items() if one.memory_gib <= room.value}
        if remats[0] is REMATS[0] and 0 in fitting:
            return
        left = {index: one for index, one in left.items() if index not in fitting}
    # Those first that may be the fastest.
    yield from sorted(every, key=lambda tried: tried.least)


def _deals_out(mesh: MeshConfig, steps: int) -> bool:
    """Whether so many microbatches flow through several stages of each device in turns."""
    return mesh.stages_per_device == 1 or steps % mesh.pipeline == 0


# So much less is taken for a bound than is worked out, for the rounding of sums.
_ROUNDING = 1e-9


def _least_waiting(ends: Sequence[Work], target: Target, links: Links) -> Callable[[int], Waiting]:
    """How long a step waits at least for collectives, by its number of microbatches.

    Bytes and numbers of collectives are linear in it. The more is kept for the backward pass, the
    fewer are repeated there.

    Args:
        ends: the work in the fewest and in the most microbatches, with the most that is kept.
        target: the chips.
        links: of the mesh on them.
    """
    first, last = (waiting(work, target, links) for work in ends)
    fewest, most = (work.stage.accumulation_steps for work in ends)

    def least(steps: int) -> Waiting:
        share = (steps - fewest) / max(1, most - fewest)
        flowing = first.flowing + (last.flowing - first.flowing) * share
        return Waiting(flowing * (1 - _ROUNDING), first.once * (1 - _ROUNDING))

    return least


def _interleavings(sizes: MeshConfig, model: ModelConfig) -> list[MeshConfig]:
    """A mesh with as many stages on each device as a pipeline may have, up to four."""
    if sizes.pipeline == 1:
        return [sizes]
    repeats = sum(segment.repeats for segment in model.segments)
    return [
        sizes.model_copy(update={"stages_per_device": each})
        for each in (1, 2, 4)
        if repeats % (sizes.pipeline * each) == 0
    ]


def _accumulations(stage: Stage, sizes: MeshConfig) -> list[int]:
    """Numbers of microbatches that the sequences of a batch can be divided into.

    Those that keep a pipeline busy: of the others none is faster.
    """
    sequences = stage.batch_size // batch_shards(Execution(sizes.of_stage))
    most = min(sequences, MOST_ACCUMULATION * sizes.pipeline)
    found = [steps for steps in _powers(most) if sequences % steps == 0]
    return [steps for steps in found if steps >= min(sizes.pipeline, found[-1])]


def _rank(estimate: Estimate) -> tuple[float, float]:
    """What orders layouts: memory that is lacking, then seconds, links of unknown speed counted at
    a nominal one.
    """
    unknown = sum(total.bytes for total, _, seconds in estimate.collectives if seconds is None)
    lacking = 0.0 if estimate.fits else estimate.total_gib - estimate.usable_gib
    return lacking, estimate.step + unknown / NOMINAL_BYTES_PER_S


def _placements(sizes: MeshConfig, target: Target) -> list[Any]:
    if target.facts.family != "tpu":
        return [None]
    across = target.slices // math.gcd(sizes.replica, target.slices)
    if across > 1:
        return [None]  # an axis in part across slices: left to the links
    within = {**sizes.by_traffic, "replica": sizes.replica // target.slices or 1}
    return placements(tuple(within.items()), extent(target))[:MOST_PLACEMENTS]


def _candidate(run: Run, name: str, changed: Run, estimate: Estimate) -> Candidate:
    before, stage = run.stages[name], changed.stages[name]
    mesh, remat = stage.mesh, stage.remat
    assert mesh and remat
    # What a run of several stages has in common is left to the others.
    mesh_path = f"stages.{name}.mesh" if before.mesh or len(run.stages) > 1 else "mesh"
    remat_path = f"stages.{name}.remat" if before.remat or len(run.stages) > 1 else "remat"
    assignments: dict[str, Any] = {f"{mesh_path}.{axis}": size for axis, size in mesh.sizes.items()}
    if mesh.stages_per_device > 1:
        assignments[f"{mesh_path}.stages_per_device"] = mesh.stages_per_device
    if mesh.expert > 1:
        assignments[f"{mesh_path}.expert_dispatch"] = mesh.expert_dispatch
        assignments[f"{mesh_path}.expert_room"] = mesh.expert_room
    if mesh.torus:
        assignments[f"{mesh_path}.torus"] = {
            axis: list(factors) for axis, factors in mesh.torus.items()
        }
    if stage.accumulation_steps != before.accumulation_steps:
        assignments[f"stages.{name}.accumulation_steps"] = stage.accumulation_steps
    assignments[f"{remat_path}.policy"] = remat.policy
    if remat.policy == "save_named":
        assignments[f"{remat_path}.names"] = list(remat.names)
    if changed.offload != run.offload:
        assignments["offload.optimizer"] = changed.offload.optimizer
        assignments["offload.activations"] = list(changed.offload.activations)
    return Candidate(assignments, changed, mesh, estimate)


def _powers(largest: int) -> list[int]:
    """Powers of two, and the largest itself, up to it."""
    return sorted({2**i for i in range(largest.bit_length()) if 2**i <= largest} | {largest})
