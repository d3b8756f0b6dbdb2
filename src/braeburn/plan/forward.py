"""What a model's layers and loss take on one device, by its traced program; and what a live teacher
adds to a step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import jax.numpy as jnp

from braeburn.config import MeshConfig, ModelConfig, Precision, Run, Stage
from braeburn.hardware.catalogue import Chip
from braeburn.layers.attention.backend import Backend, Request
from braeburn.layers.spec import Role, Tree, count
from braeburn.models.decoder import param_specs
from braeburn.plan.attention import Accelerator, Attention, Cost, attention_of
from braeburn.plan.blocks import FSDP_TRACED, Shapes
from braeburn.plan.graph import Amount, Collective, Moved
from braeburn.plan.layers import Around, Call, Layers, around_of, teacher_layers_of

FLOAT = 4


@dataclass(frozen=True)
class Exchange:
    """One kind of collective along one axis, over a whole step.

    Attributes:
        axis: of the mesh, or "host".
        kind: as HLO names it, or "copy".
        bytes: on one device, as `plan.collectives.Collective.bytes` counts them.
        times: how many there are.
        what: "weights", with gradients and what waits on the host, which can be had early; or
            "tokens".
    """

    axis: str
    kind: str
    bytes: float
    times: float
    what: str


@cache
def specs_of(model: ModelConfig) -> Tree:
    """The specs of a model's parameters."""
    return param_specs(model)


@cache
def _count(model: ModelConfig, roles: tuple[Role, ...] = ("matrix", "embedding", "norm")) -> int:
    return count(specs_of(model), roles)


@cache
def accelerator_of(chip: Chip) -> Accelerator:
    """What the choice of attention's back end depends on, of a chip of the catalogue."""
    platform = {"tpu": "tpu", "nvidia": "cuda", "amd": "rocm"}.get(chip.family, "other")
    return Accelerator(platform, chip.compute_capability)


@cache
def shapes_of(
    model: ModelConfig, precision: Precision, tensor: int, fsdp: bool, teacher: object = None
) -> Shapes:
    """The shapes that a model's programs are traced with; what changes none of them is left out.

    Args:
        model: that is trained.
        precision: of its activations and sums.
        tensor: devices along `tensor`.
        fsdp: whether weights are split along `fsdp`.
        teacher: a teacher's model with what it teaches, or None.
    """
    plain = model.model_copy(update={"rope_base": 1.0, "rope_scaling": None, "scan_layers": True})
    return Shapes(plain, precision, tensor, fsdp, teacher=teacher)  # type: ignore[arg-type]


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
    accelerator: Accelerator = field(default=Accelerator(), kw_only=True)

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.run.precision.compute == "bfloat16" else FLOAT

    @cached_property
    def tokens(self) -> int:
        """Tokens that a device, with the tensor shards that share them, works on at once."""
        mesh = self.mesh
        shards = mesh.replica * mesh.data * mesh.fsdp * mesh.context
        return self.stage.batch_tokens // (shards * self.stage.accumulation_steps)

    @cached_property
    def shard(self) -> float:
        """Parameters that a device stores."""
        return _count(self.model) / (self.mesh.fsdp * self.mesh.tensor)

    @cached_property
    def shapes(self) -> Shapes:
        """What its programs are traced with."""
        mesh = self.mesh
        return shapes_of(self.model, self.run.precision, mesh.tensor, mesh.fsdp > 1)

    @cached_property
    def scale(self) -> float:
        """Its tokens, in units of those that are traced."""
        return self.tokens / self.shapes.tokens

    def at(self, amount: Amount) -> float:
        """A quantity for this device's tokens."""
        return amount.fixed + amount.scaled * self.scale

    def read_and_written(self, amount: Amount) -> float:
        """Bytes of element-wise work; what does not grow with the tokens is done on the weights as
        they are stored.
        """
        stored = FSDP_TRACED / self.mesh.fsdp if self.mesh.fsdp > 1 else 1.0
        return amount.fixed * stored + amount.scaled * self.scale

    def attention(self, call: Call) -> tuple[Attention, Backend]:
        """The costs of attention for one sequence and one key head, and its back end."""
        mesh = self.mesh
        request = Request(
            platform=self.accelerator.platform,
            dtype=jnp.dtype(self.run.precision.compute),
            sequence_length=self.stage.sequence_length,
            num_heads=call.num_heads // call.num_kv_heads,
            num_kv_heads=1,
            head_dim=call.head_dim,
            context_shards=mesh.context,
            ring=mesh.context > 1 and mesh.context_attention == "ring",
            compute_capability=self.accelerator.compute_capability,
        )
        return attention_of(self.accelerator, request)

    @cached_property
    def sequences(self) -> float:
        """Sequences, or pieces of them, that a device works on at once."""
        return self.tokens * self.mesh.context / self.stage.sequence_length

    def passes_of_attention(self, layers: Layers) -> Iterator[tuple[Cost, Call, float]]:
        """Each pass of each kind of attention over a part of the batch: its cost for a sequence and
        a key head, and the number of these.
        """
        for call, times in layers.calls.items():
            found, _ = self.attention(call)
            each = times * self.sequences * call.num_kv_heads
            yield found.forward, call, each
            if call.state == "forward":
                continue
            if call.state != "whole":
                again = found.again if call.state == "kept" else found.again_whole
                yield again, call, each
            yield found.backward, call, each

    def kernel_flops(self, layers: Layers, tile: int, backward: int) -> float:
        """Of the products in fused kernels of attention, over the tiles that causality leaves.

        Args:
            layers: that attention is in.
            tile: queries and keys that the kernel takes at once.
            backward: products that it forms in its backward pass; forward there are two.
        """
        total = 0.0
        for call, times in layers.calls.items():
            found, _ = self.attention(call)
            products = 2 * found.forward.calls
            if call.state != "forward":
                products += backward * found.backward.calls
                products += 2 * found.again_whole.calls * (call.state == "again")
            once = call.num_heads * call.head_dim * (self.stage.sequence_length + tile)
            total += times * products * once * self.tokens
        return total * self.stage.accumulation_steps

    def plain_flops(self, layers: Layers) -> float:
        """Of attention's products that are in no fused kernel."""
        passes = self.passes_of_attention(layers)
        return self.stage.accumulation_steps * sum(cost.flops * each for cost, _, each in passes)

    def attention_bytes(self, layers: Layers) -> float:
        """Read and written by attention outside fused kernels."""
        passes = self.passes_of_attention(layers)
        moved = sum(cost.element_wise * each for cost, _, each in passes)
        return self.stage.accumulation_steps * moved

    def live_bytes(self, layers: Layers) -> float:
        """The most bytes that a layer's activations take while it is worked on."""
        most = 0.0
        for size, call in layers.live:
            needed = self.at(size)
            if call:
                found, backend = self.attention(call)
                request = Request(
                    self.accelerator.platform,
                    jnp.dtype(self.run.precision.compute),
                    self.stage.sequence_length,
                    call.num_heads,
                    call.num_kv_heads,
                    call.head_dim,
                    self.mesh.context,
                )
                if backend.kernel:
                    needed += backend.kernel(request, max(1, round(self.sequences)))
                elif call.state != "forward":
                    needed += found.live * self.sequences * call.num_kv_heads
            most = max(most, needed)
        return most

    def collectives(self, layers: Layers, around: Around) -> Iterator[Exchange]:
        """Those of layers and of what is around them, over all parts of a batch."""
        steps = self.stage.accumulation_steps
        found: dict[Collective, Moved] = dict(around.collectives)
        for key, moved in layers.collectives.items():
            found[key] = found[key] + moved if key in found else moved
        for key, (size, times) in found.items():
            yield Exchange(key.axis, key.kind, self.at(size) * steps, times * steps, key.what)
        over_context: dict[str, tuple[float, float]] = {}
        for cost, call, each in self.passes_of_attention(layers):
            for kind, (size, times) in cost.collectives.items():
                before = over_context.get(kind, (0.0, 0.0))
                over_context[kind] = (
                    before[0] + size * each * steps,
                    before[1] + times * layers.calls[call] * steps,
                )
        for kind, (moved_bytes, times) in over_context.items():
            yield Exchange("context", kind, moved_bytes, times, "tokens")


@dataclass(frozen=True)
class Teaching(Pass):
    """A teacher whose weights are at hand: it runs forward on each part of a batch, before the
    student does.

    Attributes:
        student: the model that learns.
    """

    student: ModelConfig = field(kw_only=True)

    @cached_property
    def _taught(self) -> Shapes:
        mesh, teaches = self.mesh, (self.shapes.model, self.stage.distillation)
        return shapes_of(self.student, self.run.precision, mesh.tensor, mesh.fsdp > 1, teaches)

    @cached_property
    def scale(self) -> float:
        """Its tokens, in units of those that are traced."""
        return self.tokens / self._taught.tokens

    @cached_property
    def layers(self) -> Layers:
        """Its own."""
        return teacher_layers_of(self._taught)

    @cached_property
    def _added(self) -> Around:
        """What there is around the layers of both models, less what there is around the student's
        alone.
        """
        mesh = self.mesh
        alone = shapes_of(self.student, self.run.precision, mesh.tensor, mesh.fsdp > 1)
        both, one = around_of(self._taught), around_of(alone)
        factor = self._taught.tokens / alone.tokens

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
        each = self.at(self.layers.flops) + self.at(self._added.flops)
        return each * self.stage.accumulation_steps

    def attention_flops(self, tile: int) -> float:
        """Of attention's two products in a fused kernel, over the tiles that causality leaves."""
        return self.kernel_flops(self.layers, tile, 0)

    @cached_property
    def attention_products(self) -> float:
        """Of attention's products in no fused kernel."""
        return self.plain_flops(self.layers)

    @cached_property
    def memory_bytes(self) -> float:
        """Read and written by element-wise work."""
        each = sum(
            self.read_and_written(part.element_wise) for part in (self.layers, self._added)
        )
        return each * self.stage.accumulation_steps + self.attention_bytes(self.layers)

    @cached_property
    def stored_bytes(self) -> float:
        """On a device all the while: its weights, and what it says of a part of the batch."""
        distillation = self.stage.distillation
        whole = distillation.target == "distribution"
        said = self.width * self.model.d_model if whole else 2 * FLOAT * distillation.kept
        return FLOAT * self.shard + self.tokens * said

    @cached_property
    def working_bytes(self) -> float:
        """On a device while it runs: a layer's weights gathered, and its activations."""
        return self.layers.weights[0] + self.live_bytes(self.layers)

    def exchanges(self) -> Iterator[Exchange]:
        """Every collective that it adds to a step."""
        for exchange in self.collectives(self.layers, self._added):
            if exchange.bytes > 0:
                yield exchange


def joined(exchanges: Iterator[Exchange]) -> list[Exchange]:
    """Exchanges with those of one kind along one axis added up."""
    found: dict[tuple[str, str, str], Exchange] = {}
    for each in exchanges:
        key = each.axis, each.kind, each.what
        if before := found.get(key):
            each = Exchange(*key[:2], before.bytes + each.bytes, before.times + each.times, key[2])
        found[key] = each
    return list(found.values())


def offloaded(kept: Mapping[str, Amount], names: tuple[str, ...]) -> Amount:
    """Bytes of what is kept under some names."""
    total = Amount()
    for name in names:
        total = total + kept.get(name, Amount())
    return total
