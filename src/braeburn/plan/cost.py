"""What a step of a stage takes on a target, in memory and time, by arithmetic: nothing is compiled
or measured.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax

from braeburn.config import (
    SHARDED,
    Execution,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Remat,
    Run,
    ShardingRules,
)
from braeburn.errors import UserError
from braeburn.hardware.catalogue import Chip, Confidence, Hidden, weakest
from braeburn.hardware.links import Links
from braeburn.hardware.products import check_matmul, peak_of
from braeburn.hardware.targets import Target
from braeburn.hardware.torus import Factors
from braeburn.layers.spec import abstract, walk
from braeburn.models.huggingface_config import is_huggingface, read_config
from braeburn.objectives.vocabulary import MAX_LOGITS
from braeburn.optim.definition import Parameters, UpdateCost, update_cost
from braeburn.parallel.collectives import PIPELINE
from braeburn.parallel.rules import check
from braeburn.plan.attention import WITH_KERNEL, Accelerator
from braeburn.plan.forward import CollectiveTotal, Pass, Teaching, accelerator_of, joined
from braeburn.plan.graph import Amount, Traced, distinct
from braeburn.plan.identity import by_identity
from braeburn.plan.layers import Around, around_of, layers_of
from braeburn.plan.pipeline import Dealt, Part, dealt, part_of
from braeburn.plan.storage import FLOAT, specs_of, storage_of
from braeburn.plan.totals import Totals, totals_of
from braeburn.plan.trace import differentiate, rematerialize
from braeburn.train.metrics import flops_per_token
from braeburn.train.resolved import sizes_of, trained_specs
from braeburn.train.teaching import find_in_run
from braeburn.transforms.definition import transform_of

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """What a family of chips reaches of its specification, one set for all models and sizes.

    Attributes:
        matrix: fraction of the dense peak in matrix products.
        attention: fraction of the peak in a fused attention kernel, of the products that causality
            leaves.
        memory: fraction of the memory's bandwidth in element-wise work, of the fewest bytes that it
            could move.
        weights_hidden: fraction of the collectives on weights and gradients that overlaps with
            computing, for chips whose own is not in the catalogue.
        tokens_hidden: the same of the collectives on hidden states, which computing waits for.
        tile: queries and keys that the attention kernel takes at once.
        backward: products of queries and keys that it forms in its backward pass; forward there are
            two.
        confidence: M where the fractions are guesses, so that no time is trusted more than they
            are; V where compiled steps and published times bear them out, which leaves the
            confidence to the figures of the chip.
    """

    matrix: float
    attention: float
    memory: float
    weights_hidden: float
    tokens_hidden: float
    tile: int
    backward: int
    confidence: Confidence


# TPU: by the cycles of compiled steps matrix products reach 96% of the peak, less 5-10% on
# hardware, Splash attention 55%, and element-wise work takes twice the time of its fewest bytes.
# NVIDIA: dense bf16 products reach 650-750 of the H100's 989 TFLOP/s at its power limit, and
# cuDNN's attention, forward and backward, half of the peak. AMD: a quarter less. Others: as AMD,
# for want of anything published. docs/plan.md sets them against published step times.
EFFICIENCY = {
    "tpu": Efficiency(0.88, 0.55, 0.5, 0.6, 0.2, 512, 7, "V"),
    "nvidia": Efficiency(0.72, 0.5, 0.5, 0.6, 0.2, 128, 5, "V"),
    "amd": Efficiency(0.55, 0.35, 0.4, 0.5, 0.2, 128, 5, "M"),
    "other": Efficiency(0.55, 0.35, 0.4, 0.5, 0.2, 128, 5, "M"),
}
# To the host and back, each way, per chip: PCIe 4.0 x16 at three quarters, shared by two chips.
HOST_GB_PER_S = 12.0

# Bytes read and written to update a parameter, beside its optimizer's state: it is read and
# written, and its gradient is read for its norm, clipped, and read again.
UPDATED = 6 * FLOAT

# Bytes read and written to mask or round a parameter: it is read and written, then its gradient,
# for which it is read once more.
TRANSFORMED = 5 * FLOAT


@dataclass(frozen=True)
class Estimate:
    """What is predicted of a stage's step on a target.

    Attributes:
        memory: GiB on each chip by part.
        usable_gib: what a program may take.
        seconds: of computing, by part.
        collectives: each with its link and seconds, None where the link's speed is unknown; with
            the copies between device and host.
        step: seconds of a step; a lower bound where a link's speed is unknown.
    """

    memory: dict[str, float]
    usable_gib: float
    seconds: dict[str, float]
    collectives: list[tuple[CollectiveTotal, str, float | None]]
    step: float
    mfu: float
    tokens_per_second: float
    confidence: str
    memory_confidence: str
    torus: Factors | None

    @property
    def total_gib(self) -> float:
        """Memory of a chip that the step takes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.total_gib <= self.usable_gib

    @property
    def compute(self) -> float:
        """Seconds of computing."""
        return sum(self.seconds.values())

    @property
    def communication(self) -> float:
        """Seconds of communication over links of known speed."""
        return sum(seconds or 0.0 for _, _, seconds in self.collectives)

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which all communication goes on beside computing."""
        return max(self.compute, self.communication)

    @property
    def serial(self) -> float | None:
        """Seconds of a step in which none does; None where a link's speed is unknown."""
        unknown = any(seconds is None for _, _, seconds in self.collectives)
        return None if unknown else self.compute + self.communication


@cache
def _flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    return flops_per_token(model, specs_of(model), sequence_length)


@by_identity
def _update(
    optimizer: OptimizerConfig, model: ModelConfig, rules: ShardingRules, mesh: MeshConfig
) -> UpdateCost:
    return update_cost(optimizer, Parameters(specs_of(model), model, Execution(mesh, rules)))


@dataclass(frozen=True)
class Work(Pass):
    """What one device does in a step of a stage, in FLOPs and bytes.

    Attributes:
        teacher: an online teacher, which runs forward on each batch; None where there is none, or
            its labels are cached.
        transformed: values of parameters that are masked or rounded before they are used, with
            those that the gradient of masks and factors needs.
    """

    teacher: ModelConfig | None = None
    transformed: int = 0
    of_mesh: ClassVar[tuple[str, ...]] = (*Pass.of_mesh, "update", "around", "working")

    def kept_in(self, other: Self) -> tuple[str, ...]:
        """The names of what is the same of another, which differs as `varied` allows."""
        found = self.of_mesh
        if self.remat is other.remat:
            found = (*found, "totals")
        if self.mesh.stages_per_device == other.mesh.stages_per_device:
            found = (*found, "dealt")
        return found

    @cached_property
    def working(self) -> MeshConfig:
        """The mesh of the devices that work on the same layers."""
        return self.mesh.of_stage

    @property
    def is_pipelined(self) -> bool:
        """Whether microbatches flow through a pipeline."""
        return self.mesh.pipeline > 1

    @cached_property
    def part(self) -> Part:
        """The part of the model that the busiest device works on."""
        return part_of(self.model, self.mesh, self.stage.accumulation_steps)

    @cached_property
    def dealt(self) -> Dealt:
        """The weights that a device of a pipeline holds during a step."""
        return dealt(self.run, self.model, self.mesh)

    @property
    def remat(self) -> Remat:
        """What the stage keeps for the backward pass."""
        return self.stage.remat or self.run.remat

    @cached_property
    def totals(self) -> Totals:
        """What the model's layers do."""
        return totals_of(layers_of(self.shapes, self.remat), self.shapes.tokens, self.sequence)

    @cached_property
    def around(self) -> Around:
        """What embedding, final norm and loss do."""
        return around_of(self.shapes)

    @cached_property
    def teaching(self) -> Teaching | None:
        """What a device does for the teacher."""
        if not self.teacher:
            return None
        return Teaching(
            self.run,
            self.stage,
            self.mesh,
            self.teacher,
            accelerator=self.accelerator,
            student=self.model,
        )

    @cached_property
    def transformed_shard(self) -> float:
        """The values that are masked or rounded on one device."""
        return self.transformed * self.storage.part

    @cached_property
    def update(self) -> UpdateCost:
        """What the optimizer's update takes beyond element-wise work."""
        return _update(self.run.optimizer, self.model, self.run.rules, self.mesh)

    @cached_property
    def matrix_flops(self) -> float:
        """Of all matrix products but attention's: forward, twice that backward, what is recomputed,
        and the optimizer's.
        """
        each = self.at(self.totals.flops) * self.part.layers
        each += self.at(self.around.flops) * self.part.around
        return each * self.stage.accumulation_steps + self.update.matrix_flops

    def attention_flops(self, tile: int, backward: int) -> float:
        """Of attention's products in a fused kernel, two forward and so many backward, over the
        tiles that causality leaves.
        """
        return self.kernel_flops(self.totals, tile, backward) * self.part.layers

    @cached_property
    def attention_products(self) -> float:
        """Of attention's products in no fused kernel."""
        steps = self.stage.accumulation_steps
        return self.at(self.totals.plain) * steps * self.part.layers

    @cached_property
    def memory_bytes(self) -> float:
        """Read and written by element-wise work: norms, rotations, activation, residuals, logits
        and the update.

        The backward pass is taken to move twice the bytes of the forward pass.
        """
        return self._microbatch_bytes * self.stage.accumulation_steps + self.update_bytes

    @property
    def update_bytes(self) -> float:
        """Of `memory_bytes`, those that are moved once a step."""
        updated = UPDATED * self.shard + 2 * self.optimizer_bytes
        if self.is_pipelined:
            # Stored weights are made those of the stage, and their gradients those of the stored.
            updated += 2 * self.dealt.layer_bytes + 2 * FLOAT * self.dealt.layers
        return updated + self.transformed_shard * TRANSFORMED

    @cached_property
    def _microbatch_bytes(self) -> float:
        """Of `memory_bytes`, those that are moved for each microbatch."""
        totals = self.totals
        fixed, scaled = totals.element_wise
        once = self.at(Amount(0.0, scaled)) * (3 + totals.repeats)
        # Stored weights are made those that are multiplied, and once more for the backward pass. A
        # pipeline's stages have them already, and only take each layer's out of the stack of all.
        made = self.read_and_written(Amount(fixed)) * (1 + totals.repeats)
        if self.is_pipelined and self.dealt.is_ready:
            made *= 2 * self.width / (FLOAT + self.width)
        once += made
        once += self.at(totals.attention_bytes)
        # What is kept is copied into the arrays of all layers, and out of them; in a pipeline, also
        # into those of all microbatches under way.
        copies = 8 if self.is_pipelined else 4
        once += copies * self.at(totals.kept) + self._repacked
        around = self.read_and_written(self.around.element_wise)
        if not self.is_pipelined:
            return once + around + 3 * FLOAT * self.shard  # gradients are added up
        # The gradients of all layers begin as zeros, which the traced program has around them.
        own = self.dealt
        everywhere = storage_of(self.model, self.run.optimizer, self.run.rules, self.working)
        zeros = FLOAT * (everywhere.parameters - own.table * own.tables)
        once = (once + zeros) * self.part.layers + (around - zeros) * self.part.around
        return once + 3 * FLOAT * own.layers

    @cached_property
    def _repacked(self) -> float:
        """Moved to put gathered weights in order whose shards are padded, having no multiple of 8
        columns.

        TPUs pad them to 128: for shards of 3 columns the compiler gives 22 times the cycles of a
        copy of the weights, in the forward pass.
        """
        total = 0.0
        for key, moved in self.totals.collectives:
            shards = math.prod(self.working.sizes[axis] for axis in key.axes if axis in SHARDED)
            width = self.model.d_model // shards
            if (key.kind, key.what) == ("all-gather", "weights") and shards > 1 and width % 8:
                total += moved.bytes.fixed / 2 * 64 / width
        return total

    @cached_property
    def _offloaded_bytes(self) -> float:
        """Of what is kept, that which waits on the host."""
        named = self.totals.named
        return sum(self.at(named.get(name, Amount())) for name in self.run.offload.activations)

    @cached_property
    def host_bytes(self) -> float:
        """Moved between device and host in a step, both ways."""
        offload = self.run.offload
        activations = 2 * self._offloaded_bytes * self.stage.accumulation_steps
        return activations + (2 * self.optimizer_bytes if offload.optimizer else 0)

    @property
    def least_gib(self) -> float:
        """GiB on a device of parameters and gradients alone, which nothing moves elsewhere."""
        return 2 * FLOAT * self.shard / GIB

    @property
    def memory_gib(self) -> float:
        """GiB on a device at the step's fullest moment."""
        return sum(self._memory.values())

    def memory(self) -> dict[str, float]:
        """GiB on a device at the step's fullest moment, by part."""
        return dict(self._memory)

    @cached_property
    def _memory(self) -> dict[str, float]:
        model, stored = self.model, FLOAT * self.shard
        kept = self.at(self.totals.kept) * self.part.held - self._offloaded_bytes
        # In a layer's backward pass: its weights gathered twice, their gradient, and its
        # activations with theirs.
        gathered, scattered = self.totals.weights
        layer = 2 * gathered + scattered + max(map(self.at, self.totals.live))
        if self.is_pipelined and self.dealt.is_padded:
            layer = max(layer, gathered + self._branch_bytes)
        layer += self.at(self.totals.kept) * self.part.fresh
        # In the loss: the hidden states of all tensor shards' tokens with their gradient, and
        # logits of a block.
        logits = FLOAT * MAX_LOGITS
        loss = self.tokens * model.d_model * (2 * self.width + 2 * FLOAT) + 3 * logits
        # While the teacher works, nothing of the student's is kept yet.
        teacher = self.teaching.working_bytes - kept if self.teaching else 0.0
        # While the optimizer works, nothing is kept any more.
        update = self.update.workspace_bytes - kept
        parts = {
            "parameters": stored,
            "optimizer": 0.0 if self.run.offload.optimizer else self.optimizer_bytes,
            "gradients": stored * (1 + (self.stage.accumulation_steps > 1)),
            "activations": kept,
            "workspace": max(layer, loss, teacher, update),
        }
        if self.is_pipelined:
            own = self.dealt
            tables = FLOAT * own.table + FLOAT * own.norms
            parts["gradients"] = stored + FLOAT * own.layers + tables
            parts["stage_weights"] = own.layer_bytes + tables
            parts["messages"] = self.part.messages * self._message_bytes
        if self.transformed:
            parts["weights_in_use"] = FLOAT * self.transformed_shard
        if self.teaching:
            parts["teacher"] = self.teaching.stored_bytes
        return {name: value / GIB for name, value in parts.items()}

    @cached_property
    def _branch_bytes(self) -> float:
        """Of the backward pass of a layer that is a branch, as where stages have unequal numbers of
        layers: all that the branch of its forward pass hands to it, which is held until it ends.
        """
        whole = layers_of(self.shapes, Remat(policy="none"))
        totals = totals_of(whole, self.shapes.tokens, self.sequence)
        handed_on = self.at(totals.kept) / self.model.num_layers
        return handed_on + max(map(self.at, totals.live))

    @cached_property
    def _message_bytes(self) -> float:
        """Of the hidden states of a microbatch, as a stage hands them on."""
        return self.width * self.tokens * self.model.d_model / self.mesh.tensor

    def collective_totals(self) -> list[CollectiveTotal]:
        """Every collective of a step, but those of scalars and indices."""
        return [*self.microbatch_collectives, *self.step_collectives]

    @cached_property
    def microbatch_collectives(self) -> list[CollectiveTotal]:
        """Those for each microbatch, in the whole step."""
        found = list(self.collectives(self.totals, self.around))
        if self.teaching:
            found = joined([*found, *self.teaching.collective_totals()])
        if self.is_pipelined:
            sent = self.part.sent
            found.append(
                CollectiveTotal(
                    PIPELINE, "collective-permute", self._message_bytes * sent, sent, "tokens"
                )
            )
        return found

    @cached_property
    def step_collectives(self) -> list[CollectiveTotal]:
        """Those that there are once a step."""
        found = []
        if self.is_pipelined:
            own = self.dealt
            exchanged = own.layer_bytes + FLOAT * own.layers
            table = FLOAT * own.table * own.tables
            found += [
                CollectiveTotal(PIPELINE, "all-to-all", exchanged, 2, "update"),
                CollectiveTotal(PIPELINE, "all-gather", table, own.tables, "update"),
                CollectiveTotal(PIPELINE, "reduce-scatter", table, own.tables, "update"),
            ]
        copies = (
            ("all-reduce", "gradients", self.storage.summed),
            ("all-gather", "update", self.storage.updated),
        )
        found += [
            CollectiveTotal(shared.axis, kind, shared.bytes, shared.times, what)
            for kind, what, by_axis in copies
            for shared in by_axis
        ]
        found += [
            CollectiveTotal(asked.axis, asked.kind, asked.bytes, asked.times, "update")
            for asked in self.update.collectives
        ]
        return found


def online_teacher(run: Run, name: str) -> ModelConfig | None:
    """The model of a stage's online teacher; None where the stage has no teacher, or its labels are
    cached.

    Raises:
        UserError: the teacher is no stage, and no model with a checkpoint either.
    """
    return None if run.stages[name].distillation.cached else _teacher(run, name)


def _teacher(run: Run, name: str) -> ModelConfig | None:
    stage = run.stages[name]
    if stage.teacher is None:
        return None
    if stage.teacher in run.stages:
        return run.models()[stage.teacher].left
    path = Path(stage.teacher)
    try:
        return read_config(path) if is_huggingface(path) else find_in_run(path).model
    except UserError as error:
        raise UserError(f"stages.{name}.teacher={stage.teacher!r} cannot teach: {error}") from None


def work_of(run: Run, name: str, mesh: MeshConfig, accelerator: Accelerator = WITH_KERNEL) -> Work:
    """The work of a stage over a mesh of resolved sizes, on devices of one kind.

    Args:
        run: the run.
        name: of the stage.
        mesh: of resolved sizes.
        accelerator: what the choice of attention's back end depends on.

    Returns:
        The FLOPs, bytes and collectives of one step on one device.

    Raises:
        UserError: the stage's teacher is not there.
    """
    return Work(
        run,
        run.stages[name],
        mesh,
        run.models()[name].trained,
        online_teacher(run, name),
        _transformed(run, name),
        accelerator=accelerator,
    )


def _transformed(run: Run, name: str) -> int:
    """`Work.transformed`, by the traced program from stored weights to effective weights."""
    effective = transform_of(run.stages[name], run.models()[name]).effective
    if not effective:
        return 0
    leaves, structure = jax.tree.flatten(abstract(trained_specs(run, name)))

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(effective(jax.tree.unflatten(structure, leaves), 0))

    program = differentiate(
        flat,
        leaves,
        [True] * len(leaves),
        jax.eval_shape(flat, *leaves),
        lambda function: function,
        Traced(),
    )
    kept = rematerialize(program, None, program.inputs).kept
    # Masks on several axes, and factors, need for their gradients what comes between.
    made = [*program.outputs, *(value for value, _ in kept if value.floating)]
    arrays = distinct(program.forward, made) - distinct(program.forward, program.inputs)
    return round(sum(value.count.scaled for value in arrays))


def divided_work(run: Run, name: str, target: Target) -> Work:
    """The work of a stage over its own mesh.

    Raises:
        UserError: the mesh does not fit the target, or divide the stage or its teacher; or that is
            not there.
    """
    check_matmul(run.precision, target.facts)
    sizes = sizes_of(run, name, target.devices)
    work = work_of(run, name, sizes, accelerator_of(target.facts))
    if work.teacher:
        specs = walk(specs_of(work.teacher))
        check(
            run,
            name,
            work.teacher,
            run.execution(name, work.mesh),
            {path: (spec.axes, spec.shape, spec.role) for path, spec in specs},
        )
    return work


def estimate(run: Run, name: str, target: Target) -> Estimate:
    """Predicts a stage's step for the run's mesh, remat, accumulation and offload on a target.

    Raises:
        UserError: the mesh does not fit the target or the stage, or the stage's teacher is not
            there.
    """
    work = divided_work(run, name, target)
    return estimate_work(work, target, Links(target, work.mesh))


def hidden_fractions(chip: Chip) -> Hidden:
    """What computing hides of collectives on a chip: as the schedules of compiled programs show,
    or as is assumed of its family.
    """
    assumed = EFFICIENCY[chip.family]
    return chip.hidden or Hidden(assumed.weights_hidden, assumed.tokens_hidden, "")


def memory_bandwidth(chip: Chip) -> float:
    """Bytes that the memory of a device moves in a second by its specification; infinite where that
    is unknown.
    """
    figure = chip.memory_gb_per_s
    return (figure.value if figure else math.inf) * 1e9 / chip.devices_per_chip


def timed(
    asked: Iterable[CollectiveTotal], sizes: MeshConfig, target: Target, links: Links
) -> tuple[list[tuple[CollectiveTotal, str, float | None]], float]:
    """Collectives as they are compiled, each with its link and its seconds.

    Args:
        asked: of the traced program.
        sizes: of the mesh.
        target: the chips.
        links: of the mesh on them.

    Returns:
        The collectives, None for seconds where the link's speed is unknown; and of all seconds
        those that pass beside computing.
    """
    beside = hidden_fractions(target.facts)
    found: list[tuple[CollectiveTotal, str, float | None]] = []
    hidden = 0.0
    for each in asked:
        total = _as_compiled(each, sizes, target)
        axes = total.axes
        once = links.seconds(total.kind, total.bytes / total.times, axes)
        spent = None if once is None else once * total.times
        found.append((total, links.name(axes), spent))
        # A layer's weights from another slice are sent and received in that layer, which waits for
        # them.
        early = total.what == "weights" and links.name(axes) != "DCN"
        hidden += (spent or 0.0) * (beside.weights if early else beside.tokens)
    return found, hidden


def computing_seconds(work: Work, target: Target) -> dict[str, float]:
    """Seconds of computing in a step, by part, but for what a pipeline waits."""
    chip = target.facts
    peak = chip.peak_flops
    assert peak  # the catalogue refuses chips without it
    efficiency = EFFICIENCY[chip.family]
    moved = memory_bandwidth(chip) * efficiency.memory
    seconds = {
        "matrix": work.matrix_flops / (peak * efficiency.matrix),
        "attention": work.attention_flops(efficiency.tile, efficiency.backward)
        / (peak * efficiency.attention)
        + work.attention_products / (peak * efficiency.matrix),
        "memory_bound": work.memory_bytes / moved,
    }
    if teaching := work.teaching:
        products = (
            teaching.matrix_flops + teaching.attention_products
        ) / efficiency.matrix + teaching.attention_flops(efficiency.tile) / efficiency.attention
        seconds["teacher"] = products / peak + teaching.memory_bytes / moved
    return seconds


class Waiting(NamedTuple):
    """Seconds of a step in which computing waits for collectives.

    Attributes:
        flowing: for those of microbatches.
        once: for those that there are once a step.
    """

    flowing: float
    once: float


def waiting(work: Work, target: Target, links: Links) -> Waiting:
    """How long a step waits for collectives over links of known speed."""
    return Waiting(
        *(
            _waited(*timed(asked, work.mesh, target, links))
            for asked in (work.microbatch_collectives, work.step_collectives)
        )
    )


def _waited(
    over_links: Iterable[tuple[CollectiveTotal, str, float | None]], beside: float
) -> float:
    """Of the seconds of collectives, as `timed` gives them, those without computing beside."""
    return sum(spent or 0.0 for _, _, spent in over_links) - beside


def least_seconds(
    work: Work, target: Target, computed: Mapping[str, float], waits: Waiting
) -> float:
    """What a step takes at least.

    Args:
        work: of the step.
        target: the chips.
        computed: its `computing_seconds`.
        waits: how long it waits at least.
    """
    total = sum(computed.values())
    least = total + waits.flowing + waits.once
    if work.is_pipelined:
        least += _bubble(work, target, total, waits.flowing)
    return least


def _bubble(work: Work, target: Target, computing: float, flowing: float) -> float:
    """Seconds in which a device of a pipeline waits for the first microbatch to reach it and for
    the last to leave the others.

    Args:
        work: of the step.
        target: the chips.
        computing: seconds of it.
        flowing: seconds that microbatches wait for collectives.
    """
    chip = target.facts
    efficiency = EFFICIENCY[chip.family]
    assert chip.peak_flops
    once = work.update_bytes / (memory_bandwidth(chip) * efficiency.memory)
    once += work.update.matrix_flops / (chip.peak_flops * efficiency.matrix)
    return work.part.idle * (computing - once + flowing)


def estimate_work(
    work: Work, target: Target, links: Links, computed: Mapping[str, float] | None = None
) -> Estimate:
    """As `estimate`, of a mesh that is known to divide the stage, laid over links.

    Args:
        work: of the step.
        target: the chips.
        links: of the mesh on them.
        computed: its `computing_seconds`, where they are known.
    """
    chip, stage, model = target.facts, work.stage, work.model
    peak, room = chip.peak_flops, chip.device_memory_gib
    assert peak and room  # the catalogue refuses chips without them
    efficiency = EFFICIENCY[chip.family]
    seconds = dict(computed or computing_seconds(work, target))
    over_links, beside = timed(work.microbatch_collectives, work.mesh, target, links)
    if work.is_pipelined:
        flowing = _waited(over_links, beside)
        seconds["bubble"] = _bubble(work, target, sum(seconds.values()), flowing)
    collectives: list[tuple[CollectiveTotal, str, float | None]] = []
    hidden = 0.0
    if offloaded := work.host_bytes:
        spent: float | None = offloaded / (HOST_GB_PER_S * 1e9)
        copies = CollectiveTotal("host", "copy", offloaded, 1, "weights")
        collectives.append((copies, "PCIe", spent))
        hidden += (spent or 0.0) * efficiency.weights_hidden
    a_step, beside_it = timed(work.step_collectives, work.mesh, target, links)
    collectives += [*over_links, *a_step]
    hidden += beside + beside_it
    compute, communication = sum(seconds.values()), sum(spent or 0.0 for _, _, spent in collectives)
    step = max(compute, communication, compute + communication - hidden)
    flops = _flops_per_token(model, stage.sequence_length) * stage.batch_tokens
    peaks = (chip.bf16_tflops, peak_of(chip, work.run.precision.matmul))
    figures = [figure for figure in (*peaks, chip.memory_gb_per_s) if figure]
    return Estimate(
        memory=work.memory(),
        usable_gib=room.value,
        seconds=seconds,
        collectives=collectives,
        step=step,
        mfu=flops / (step * target.devices * peak),
        tokens_per_second=stage.batch_tokens / step,
        confidence=weakest(
            efficiency.confidence,
            *figures,
            *(links.confidence(each.axes) for each, link, _ in collectives if link != "PCIe"),
        ),
        memory_confidence=room.confidence,
        torus=links.torus,
    )


def labelling_seconds(run: Run, name: str, mesh: MeshConfig, target: Target) -> float:
    """Seconds in which the teacher of a stage fills its cache; 0 where it has none, or no cache.

    It is taken to label as many tokens as the stage reads, each once, in the time that an online
    teacher would add to the steps.

    Args:
        run: the run.
        name: of the stage.
        mesh: of resolved sizes.
        target: whose chips the teacher runs on.

    Raises:
        UserError: the stage's teacher is not there.
    """
    if not (run.stages[name].distillation.cached and (teacher := _teacher(run, name))):
        return 0.0
    work = work_of(run, name, mesh, accelerator_of(target.facts))
    links = Links(target, mesh)
    alone, distilled = (
        estimate_work(each, target, links) for each in (work, replace(work, teacher=teacher))
    )
    return (distilled.step - alone.step) * work.stage.steps


def _as_compiled(total: CollectiveTotal, sizes: MeshConfig, target: Target) -> CollectiveTotal:
    """What libtpu makes of collectives on weights over many chips: sums of whole arrays, which move
    them twice.

    So it writes reduce-scatters over a whole slice, and most over 256 chips or more; and
    all-gathers over the whole of a three-dimensional slice. The whole may be that of `fsdp` or of
    `fsdp` and `expert` joined. Over a part of a slice, of 128 chips or fewer, it writes neither.
    """
    if target.facts.family != "tpu" or "fsdp" not in total.axes:
        return total
    size_of = sizes.sizes
    chips = math.prod(size_of[axis] for axis in total.axes)
    whole = chips == target.chips_per_slice
    summed = (total.kind == "reduce-scatter" and (whole or chips >= 256)) or (
        total.kind == "all-gather" and whole and target.facts.dimensions == 3
    )
    return replace(total, kind="all-reduce") if summed else total
