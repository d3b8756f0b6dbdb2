"""What a model's layers and loss take on one device, by its traced program; and what an online
teacher adds to a step.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, ClassVar, Self

from braeburn.config import (
    Distillation,
    Execution,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    Precision,
    Run,
    ShardingRules,
    Stage,
)
from braeburn.hardware.catalogue import Chip
from braeburn.hardware.products import speedup
from braeburn.models.decoder import has_experts
from braeburn.parallel.collectives import EXPERT
from braeburn.parallel.rules import stored_along, token_axes
from braeburn.plan.attention import WITH_KERNEL, Accelerator
from braeburn.plan.blocks import (
    SPLIT_TRACED,
    ExpertSplit,
    Shapes,
    Split,
    crosses_context,
    shapes_of,
    sized,
)
from braeburn.plan.graph import Amount, Collective, Moved, axes_of_name
from braeburn.plan.identity import by_identity
from braeburn.plan.layers import Around, around_of, teacher_layers_of
from braeburn.plan.pipeline import WHOLE, Part, part_of
from braeburn.plan.storage import FLOAT, Storage, storage_of
from braeburn.plan.totals import Sequence, Totals, totals_of


@dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind along one axis in a step, or all copies between device and host.

    Attributes:
        axis: of the mesh, or several joined, as "fsdp x expert"; "host" of copies.
        kind: as HLO names it; "copy" of copies.
        bytes: on one device, as `plan.collectives.Collective.bytes` counts them.
        times: how many there are.
        what: "weights", with the gradients that take the way back, which go on beside the computing
            of a layer; or "tokens", "gradients" that are summed once a step, or "update", which
            computing waits for.
    """

    axis: str
    kind: str
    bytes: float
    times: float
    what: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Each axis of the mesh that they run along."""
        return axes_of_name(self.axis)


@cache
def accelerator_of(chip: Chip) -> Accelerator:
    """What the choice of attention's back end depends on, of a chip of the catalogue."""
    platform = {"tpu": "tpu", "nvidia": "cuda", "amd": "rocm"}.get(chip.family, "other")
    fp8, int8 = speedup(chip, "fp8"), speedup(chip, "int8")
    return Accelerator(platform, chip.compute_capability, fp8, int8)


@by_identity
def _shapes(
    model: ModelConfig,
    precision: Precision,
    rules: ShardingRules,
    mesh: MeshConfig,
    learns: ObjectiveConfig | Distillation,
    teacher: ModelConfig | None,
) -> Shapes:
    model = sized(model)
    crosses = mesh.context > 1 and crosses_context(model, precision, rules)
    split = Split(mesh.tensor, stored_along(rules, mesh), mesh.context if crosses else 1)
    if mesh.expert > 1 and any(has_experts(each) for each in (model, teacher) if each):
        experts = ExpertSplit(mesh.expert, mesh.expert_dispatch, mesh.expert_room)
        stored = tuple(axis for axis in split.stored if axis != EXPERT)
        split = split._replace(stored=stored, experts=experts)
    return shapes_of(model, precision, rules, split, learns, sized(teacher) if teacher else None)


@cache
def _planned(shapes: Shapes, accelerator: Accelerator) -> Shapes:
    """The shapes with what products in 8 bits and of experts are planned for, if there are any."""
    split, matmul = shapes.split, shapes.precision.matmul
    if matmul != "compute":
        faster = accelerator.int8 if matmul == "int8" else accelerator.fp8
        split = split._replace(eight_bits=faster)
    experts = any(has_experts(each) for each in (shapes.model, shapes.teacher) if each)
    if experts or matmul != "compute":
        split = split._replace(experts=split.experts._replace(target=accelerator.grouped))
    if split == shapes.split:
        return shapes
    return shapes_of(
        shapes.model, shapes.precision, shapes.rules, split, shapes.learns, shapes.teacher
    )


@dataclass(frozen=True)
class Pass:
    """A model that works on a stage's batch, over a mesh of resolved sizes.

    Attributes:
        run: the run.
        stage: of it.
        mesh: resolved sizes.
        model: that works.
        accelerator: of the devices.
    """

    run: Run
    stage: Stage
    mesh: MeshConfig
    model: ModelConfig
    accelerator: Accelerator = field(default=WITH_KERNEL, kw_only=True)
    # What does not depend on all that `varied` may change.
    of_mesh: ClassVar[tuple[str, ...]] = ("shapes", "storage", "sequence", "token_shards")

    def varied(self, **changes: Any) -> Self:
        """The same with another stage or run, which may differ in what is kept for the backward
        pass, in microbatches and in what waits on the host; or on a mesh of the same sizes.
        """
        found = replace(self, **changes)
        known = self.__dict__
        names = (name for name in self.kept_in(found) if name in known)
        found.__dict__.update((name, known[name]) for name in names)
        return found

    def kept_in(self, other: Self) -> tuple[str, ...]:
        """The names of what is the same of another, which differs as `varied` allows."""
        return self.of_mesh

    @property
    def working(self) -> MeshConfig:
        """The mesh of the devices that work on the same layers; a pipeline is one more `fsdp`
        except to a train step.
        """
        return self.mesh

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.run.precision.compute == "bfloat16" else FLOAT

    @cached_property
    def token_shards(self) -> int:
        """Devices, or with `tensor` above 1 groups of them, that share out the tokens."""
        sizes = self.working.sizes
        axes = token_axes(Execution(self.working, self.run.rules))
        return math.prod(sizes[axis] for axis in axes)

    @cached_property
    def tokens(self) -> int:
        """Tokens that a device, with the tensor shards that share them, works on at once."""
        return self.stage.batch_tokens // (self.token_shards * self.stage.accumulation_steps)

    @cached_property
    def storage(self) -> Storage:
        """What a device stores of the model and of what the optimizer remembers."""
        return storage_of(self.model, self.run.optimizer, self.run.rules, self.mesh)

    @property
    def shard(self) -> float:
        """Parameters that a device stores."""
        return self.storage.parameters

    @property
    def optimizer_bytes(self) -> float:
        """Bytes of what the optimizer remembers on a device."""
        return self.storage.optimizer_bytes

    def shapes_for(self, model: ModelConfig, teacher: ModelConfig | None = None) -> Shapes:
        """What the programs of a model are traced with, or of a model beside its teacher."""
        learns = self.stage.distillation if teacher else self.stage.objective
        run = self.run
        found = _shapes(model, run.precision, run.rules, self.working, learns, teacher)
        return _planned(found, self.accelerator)

    @cached_property
    def shapes(self) -> Shapes:
        """What its programs are traced with."""
        return self.shapes_for(self.model)

    @cached_property
    def scale(self) -> float:
        """Its tokens, in units of those that are traced."""
        return self.tokens / self.shapes.tokens

    @cached_property
    def sequence(self) -> Sequence:
        """How its sequences are worked on."""
        mesh = self.mesh
        return Sequence(
            self.stage.sequence_length,
            mesh.context,
            mesh.context > 1 and mesh.context_attention == "ring",
            self.accelerator,
        )

    def at(self, amount: Amount) -> float:
        """A quantity for this device's tokens."""
        return amount.fixed + amount.scaled * self.scale

    def read_and_written(self, amount: Amount) -> float:
        """Bytes of element-wise work; what does not grow with the tokens is done on the weights as
        they are stored.
        """
        sizes = self.working.sizes
        stored = math.prod(SPLIT_TRACED / sizes[axis] for axis in self.shapes.split.stored)
        return amount.fixed * stored + amount.scaled * self.scale

    def kernel_flops(self, totals: Totals, tile: int, backward: int) -> float:
        """Of the products in fused kernels of attention, over the tiles that causality and windows
        leave.

        Args:
            totals: of the layers.
            tile: queries and keys that the kernel takes at once.
            backward: products that it forms in its backward pass; forward there are two.
        """
        length, steps = self.stage.sequence_length, self.stage.accumulation_steps
        return steps * sum(
            self.at(each.once) * (each.forward + backward * each.backward) * each.keys(length, tile)
            for each in totals.kernels
        )

    @property
    def part(self) -> Part:
        """The part of the model that the device works on."""
        return WHOLE

    def collectives(self, totals: Totals, around: Around) -> Iterator[CollectiveTotal]:
        """Those of layers and of what is around them, over all microbatches."""
        steps = self.stage.accumulation_steps
        for key, (size, times) in _together(totals, around, self.part):
            yield CollectiveTotal(
                key.axis, key.kind, self.at(size) * steps, times * steps, key.what
            )


@cache
def _together(totals: Totals, around: Around, part: Part) -> tuple[tuple[Collective, Moved], ...]:
    """The collectives of a device's part of the layers and of what is around them, those of one
    kind added up.
    """
    found = {
        key: Moved(moved.bytes * part.layers, moved.times * part.layers)
        for key, moved in totals.collectives
    }
    for key, moved in around.collectives.items():
        own = Moved(moved.bytes * part.around, moved.times * part.around)
        found[key] = found[key] + own if key in found else own
    return tuple((key, moved) for key, moved in found.items() if moved.times)


@dataclass(frozen=True)
class Teaching(Pass):
    """An online teacher: it runs forward on each microbatch, before the student does.

    Attributes:
        student: the model that learns.
    """

    student: ModelConfig = field(kw_only=True)

    @cached_property
    def working(self) -> MeshConfig:
        """The mesh of the devices that work on the same layers."""
        return self.mesh.of_stage

    @cached_property
    def part(self) -> Part:
        """The part of the teacher that the busiest device works on."""
        return part_of(self.model, self.mesh, self.stage.accumulation_steps)

    @cached_property
    def shapes(self) -> Shapes:
        """What the programs of both models are traced with."""
        return self.shapes_for(self.student, self.model)

    @cached_property
    def totals(self) -> Totals:
        """What its own layers do."""
        return totals_of(teacher_layers_of(self.shapes), self.shapes.tokens, self.sequence)

    @cached_property
    def _added(self) -> Around:
        """What there is around the layers of both models, less what there is around the student's
        alone.
        """
        alone = self.shapes_for(self.student)
        both, one = around_of(self.shapes), around_of(alone)
        factor = self.shapes.tokens / alone.tokens

        def less(one: Amount, other: Amount) -> Amount:
            return Amount(
                max(0.0, one.fixed - other.fixed), max(0.0, one.scaled - other.scaled * factor)
            )

        nothing = Moved(Amount(), 0)
        return Around(
            less(both.flops, one.flops),
            less(both.element_wise, one.element_wise),
            {
                key: Moved(
                    less(moved.bytes, one.collectives.get(key, nothing).bytes),
                    max(0.0, moved.times - one.collectives.get(key, nothing).times),
                )
                for key, moved in both.collectives.items()
            },
        )

    @cached_property
    def matrix_flops(self) -> float:
        """Of all matrix products but attention's."""
        each = self.at(self.totals.flops) * self.part.layers
        each += self.at(self._added.flops) * self.part.around
        return each * self.stage.accumulation_steps

    def attention_flops(self, tile: int) -> float:
        """Of attention's two products in a fused kernel, over the tiles that causality and windows
        leave.
        """
        return self.kernel_flops(self.totals, tile, 0) * self.part.layers

    @cached_property
    def attention_products(self) -> float:
        """Of attention's products in no fused kernel."""
        steps = self.stage.accumulation_steps
        return self.at(self.totals.plain) * steps * self.part.layers

    @cached_property
    def memory_bytes(self) -> float:
        """Read and written by element-wise work."""
        each = self.read_and_written(self.totals.element_wise)
        each += self.at(self.totals.attention_bytes)
        each *= self.part.layers
        each += self.read_and_written(self._added.element_wise) * self.part.around
        return each * self.stage.accumulation_steps

    @cached_property
    def stored_bytes(self) -> float:
        """On a device all the while: its weights, and its targets for a microbatch: hidden states
        where the target is the whole distribution, else top-k labels.
        """
        distillation = self.stage.distillation
        whole = distillation.target == "distribution"
        per_token = self.width * self.model.d_model if whole else 2 * FLOAT * distillation.kept
        return FLOAT * self.shard + self.tokens * per_token

    @cached_property
    def working_bytes(self) -> float:
        """On a device while it runs: a layer's weights gathered, and its activations."""
        return self.totals.weights[0] + max(map(self.at, self.totals.live))

    def collective_totals(self) -> Iterator[CollectiveTotal]:
        """Every collective that it adds to a step."""
        for total in self.collectives(self.totals, self._added):
            if total.bytes > 0:
                yield total


def joined(totals: Iterable[CollectiveTotal]) -> list[CollectiveTotal]:
    """Collectives with those of one kind along one axis added up."""
    found: dict[tuple[str, str, str], CollectiveTotal] = {}
    for each in totals:
        key = each.axis, each.kind, each.what
        if before := found.get(key):
            each = replace(each, bytes=before.bytes + each.bytes, times=before.times + each.times)
        found[key] = each
    return list(found.values())
