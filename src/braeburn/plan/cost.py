"""What a step of a stage takes on a target, in memory and time, by arithmetic: nothing is compiled
or measured.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import jax

from braeburn.config import Execution, MeshConfig, ModelConfig, Remat, Run
from braeburn.errors import UserError
from braeburn.hardware.catalogue import Confidence, weakest
from braeburn.hardware.links import Links
from braeburn.hardware.targets import Target
from braeburn.hardware.torus import Factors
from braeburn.layers.spec import abstract, walk
from braeburn.models.huggingface_config import is_huggingface, read_config
from braeburn.optim.definition import Parameters, UpdateCost, update_cost
from braeburn.parallel.rules import check
from braeburn.plan.forward import FLOAT, Exchange, Pass, Teaching, specs_of
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
        weights_hidden: fraction of the exchange of weights and gradients that goes on beside
            computing.
        tokens_hidden: that of the exchange of hidden states, which computing waits for.
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
REMADE = 5 * FLOAT


@dataclass(frozen=True)
class Estimate:
    """What is predicted of a stage's step on a target.

    Attributes:
        memory: GiB on each chip by part.
        usable_gib: what a program may take.
        seconds: of computing, by part.
        exchanges: each with its link and seconds, None where the link's speed is unknown.
        step: seconds of a step; a lower bound where a link's speed is unknown.
    """

    memory: dict[str, float]
    usable_gib: float
    seconds: dict[str, float]
    exchanges: list[tuple[Exchange, str, float | None]]
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
    def exchanging(self) -> float:
        """Seconds of exchange over links of known speed."""
        return sum(seconds or 0.0 for _, _, seconds in self.exchanges)

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which all exchange goes on beside computing."""
        return max(self.compute, self.exchanging)

    @property
    def serial(self) -> float | None:
        """Seconds of a step in which none does; None where a link's speed is unknown."""
        unknown = any(seconds is None for _, _, seconds in self.exchanges)
        return None if unknown else self.compute + self.exchanging


@cache
def _flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    return flops_per_token(model, specs_of(model), sequence_length)


@dataclass(frozen=True)
class Work(Pass):
    """What one device does in a step of a stage, in FLOPs and bytes.

    Attributes:
        teacher: a model that runs forward on each batch; None where there is none, or what it says
            is stored.
        remade: values that a step holds for the parameters whose effective weights are not the
            stored ones: `Transform.copies` of each.
    """

    teacher: ModelConfig | None = None
    remade: int = 0

    @property
    def remat(self) -> Remat:
        """What the stage keeps for the backward pass."""
        return self.stage.remat or self.run.remat

    @cached_property
    def teaching(self) -> Teaching | None:
        """What a device does for the teacher."""
        return Teaching(self.run, self.stage, self.mesh, self.teacher) if self.teacher else None

    @cached_property
    def remade_shard(self) -> float:
        """Of the parameters that a device stores, those that are remade."""
        return self.remade / (self.mesh.fsdp * self.mesh.tensor)

    @cached_property
    def update(self) -> UpdateCost:
        """What the optimizer's update takes beyond element-wise work."""
        execution = Execution(self.mesh, self.run.rules)
        parameters = Parameters(specs_of(self.model), self.model, execution)
        return update_cost(self.run.optimizer, parameters)

    @cached_property
    def saved(self) -> set[str]:
        """Activations kept for the backward pass, by their names."""
        remat = self.remat
        names = (
            "query",
            "key",
            "value",
            "attention",
            "attention_output",
            "ffn_gate",
            "ffn_up",
            "ffn_output",
        )
        return set({"none": names, "full": (), "save_named": remat.names}[remat.policy])

    @cached_property
    def matrix_flops(self) -> float:
        """Of all matrix products but attention's: forward, twice that backward, what is worked out
        again, and the optimizer's.
        """
        model, products, again = self.model, self.products, 0
        if self.remat.policy != "none":
            # The norm of queries and keys needs what it normalised, which is not kept. Nothing
            # needs the last product.
            normalised = {"query", "key"} if model.qk_norm else set()
            needed = products.keys() - {"ffn_output"} - (self.saved - normalised)
            again = sum(products[name] for name in needed)
        layers = self.tokens * self.parts * (3 * sum(products.values()) + again)
        # Where the head is gathered in blocks, logits are formed once for log Z and again for the
        # gradient.
        passes = 4 if self.mesh.fsdp > 1 else 3
        head = (
            self.tokens
            * self.stage.accumulation_steps
            * passes
            * 2
            * model.d_model
            * model.vocab_size
        )
        return (layers + head) / self.mesh.tensor + self.update.matrix_flops

    def attention_flops(self, tile: int, backward: int) -> float:
        """Of attention's products, two forward and so many backward, over the tiles that causality
        leaves.
        """
        passes = backward + (2 if "attention" in self.saved else 4)
        once = self.model.num_heads * self.model.head_dim * (self.stage.sequence_length + tile)
        return self.tokens * self.parts * passes * once / self.mesh.tensor

    @cached_property
    def memory_bytes(self) -> float:
        """Read and written by element-wise work: norms, rotations, activation, residuals, logits
        and the update.
        """
        again = 0 if self.remat.policy == "none" else 1
        layers = self.width * self.tokens * self.parts * self.element_wise * (3 + again)
        logits = 4 * FLOAT * self.tokens * self.stage.accumulation_steps * self.model.vocab_size
        summed = 3 * FLOAT * self.shard * self.stage.accumulation_steps
        # What is kept is copied into the arrays of all layers, and out of them.
        copied = (
            4 * (self._kept_bytes(self.saved) + self._passed_on) * self.stage.accumulation_steps
        )
        updated = UPDATED * self.shard + 2 * self.optimizer_bytes + self.remade_shard * REMADE
        return (layers + logits) / self.mesh.tensor + updated + summed + copied + self._repacked

    @cached_property
    def _repacked(self) -> float:
        """Moved to put gathered weights in order whose shards are padded, having no multiple of 8
        columns.

        TPUs pad them to 128: for shards of 3 columns the compiler gives 22 times the cycles of a
        copy of the weights, in the forward pass.
        """
        width = self.model.d_model // self.mesh.fsdp
        if self.mesh.fsdp == 1 or width % 8 == 0:
            return 0.0
        return self.parts * self.width * self.layer_parameters / self.mesh.tensor * 64 / width

    def _kept_bytes(self, names: set[str]) -> float:
        kept = sum(self.widths[name] for name in names)
        return self.width * self.tokens * self.model.num_layers * kept / self.mesh.tensor

    @cached_property
    def _passed_on(self) -> float:
        """Kept besides what has a name: a layer's input.

        Where nothing is worked out again, also what norms, rotations and SwiGLU leave, most of it
        in float32: as much as two compiled steps keep.
        """
        model, values = self.model, self.model.d_model
        if self.remat.policy == "none":
            normalised = 8 * (self.widths["query"] + self.widths["key"]) if model.qk_norm else 0
            values += 16 * model.d_model + 3 * model.ffn_dim + normalised
        return self.width * self.tokens * model.num_layers * values / self.mesh.tensor

    @cached_property
    def host_bytes(self) -> float:
        """Moved between device and host in a step, both ways."""
        offload = self.run.offload
        activations = 2 * self._kept_bytes(set(offload.activations)) * self.stage.accumulation_steps
        return activations + (2 * self.optimizer_bytes if offload.optimizer else 0)

    def memory(self) -> dict[str, float]:
        """GiB on a device at the step's fullest moment, by part."""
        model, mesh = self.model, self.mesh
        kept = self._kept_bytes(self.saved - set(self.run.offload.activations))
        kept += self._passed_on
        # In a layer's backward pass: its weights gathered twice, their gradient, and its
        # activations with theirs.
        weights = self.layer_parameters / mesh.tensor * (2 * self.width + FLOAT) * (mesh.fsdp > 1)
        live = 2 * sum(self.widths.values()) + model.ffn_dim
        layer = weights + self.width * self.tokens * (live / mesh.tensor + 2 * model.d_model)
        # In the loss: the hidden states of all tensor shards' tokens with their gradient, and
        # logits of a block.
        logits = FLOAT * 2**26
        loss = self.tokens * model.d_model * (2 * self.width + 2 * FLOAT) + 3 * logits
        # While the teacher works, nothing of the student's is kept yet.
        teacher = self.teaching.working_bytes - kept if self.teaching else 0.0
        # While the optimizer works, nothing is kept any more.
        update = self.update.workspace_bytes - kept
        parts = {
            "parameters": FLOAT * self.shard,
            "optimizer": 0.0 if self.run.offload.optimizer else self.optimizer_bytes,
            "gradients": FLOAT * self.shard * (1 + (self.stage.accumulation_steps > 1)),
            "activations": kept,
            "workspace": max(layer, loss, teacher, update),
        }
        if self.remade:
            parts["weights_in_use"] = FLOAT * self.remade_shard
        if self.teaching:
            parts["teacher"] = self.teaching.stored_bytes
        return {name: value / GIB for name, value in parts.items()}

    def exchanges(self) -> Iterator[Exchange]:
        """Every collective of a step, but scalars and indices."""
        taught = {(e.axis, e.kind): e for e in self.teaching.exchanges()} if self.teaching else {}
        for own in self._student_exchanges():
            also = taught.get((own.axis, own.kind))
            yield (
                replace(own, bytes=own.bytes + also.bytes, times=own.times + also.times)
                if also
                else own
            )
        for asked in self.update.collectives:
            yield Exchange(asked.axis, asked.kind, asked.bytes, asked.times, "update")

    def _student_exchanges(self) -> Iterator[Exchange]:
        """Those of the model that is trained, as `tests/parallel/test_traffic.py` checks them."""
        model, mesh, parts = self.model, self.mesh, self.parts
        steps = self.stage.accumulation_steps
        reduce = 2 if self.run.precision.reduce == "bfloat16" else FLOAT
        layers = self.layer_parameters / mesh.tensor
        head = model.vocab_size * model.d_model / mesh.tensor
        hidden = self.width * self.tokens * model.d_model
        if mesh.fsdp > 1:
            gathered = 2 * self.width * (layers * parts + head * steps)
            # Seven matrices a layer, and eight blocks of the head.
            yield Exchange("fsdp", "all-gather", gathered, 2 * (7 * parts + 8 * steps), "weights")
            scattered = reduce * (layers * parts + head * steps)
            yield Exchange("fsdp", "reduce-scatter", scattered, 7 * parts + 8 * steps, "weights")
            yield Exchange(
                "fsdp", "all-to-all", 2 * hidden / mesh.tensor * steps, 2 * steps, "tokens"
            )
        if mesh.tensor > 1:
            # Before attention and FFN, and after; the other way round in the backward pass, which
            # enters them again.
            again = 0 if self.remat.policy == "none" else 2
            leaves = 5 if again and "attention_output" not in self.saved else 4
            yield Exchange(
                "tensor", "all-gather", hidden * ((4 + again) * parts + steps), 6 * parts, "tokens"
            )
            yield Exchange(
                "tensor",
                "reduce-scatter",
                hidden * (leaves * parts + 2 * steps),
                4 * parts,
                "tokens",
            )
        if mesh.context > 1:
            keys = self.width * self.tokens * 2 * self.widths["key"] / mesh.tensor
            if mesh.context_attention == "ring":
                hops = (3 + ("attention" not in self.saved)) * (mesh.context - 1) + 2
                yield Exchange(
                    "context", "collective-permute", keys * hops * parts, hops * parts, "tokens"
                )
            else:
                whole = keys * mesh.context * parts
                yield Exchange("context", "all-gather", 2 * whole, 2 * parts, "tokens")
                yield Exchange("context", "reduce-scatter", whole, parts, "tokens")
        summed = FLOAT * self.shard
        for axis in ("context", "data", "replica"):
            if mesh.sizes[axis] > 1:
                yield Exchange(
                    axis, "all-reduce", summed, 10, "weights"
                )  # arrays of all layers each
                summed /= mesh.sizes[
                    axis
                ]  # the sum over several axes is scattered along the first for the next


def live_teacher(run: Run, name: str) -> ModelConfig | None:
    """The model of the teacher whose weights a stage needs at hand; None where it has none, or what
    it says is kept.

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


def work_of(run: Run, name: str, mesh: MeshConfig) -> Work:
    """The work of a stage over a mesh of resolved sizes.

    Raises:
        UserError: the stage's teacher is not there.
    """
    return Work(
        run,
        run.stages[name],
        mesh,
        run.models()[name].trained,
        live_teacher(run, name),
        _remade(run, name),
    )


def _remade(run: Run, name: str) -> int:
    """`Work.remade`, by what the transform of a stage changes."""
    transform = transform_of(run.stages[name], run.models()[name])
    if not transform.use:
        return 0
    program = jax.make_jaxpr(transform.use)(abstract(trained_specs(run, name)), 0).jaxpr
    touched = sum(weights.aval.size for weights in program.outvars if weights not in program.invars)
    return transform.copies * touched


def divided_work(run: Run, name: str, target: Target) -> Work:
    """The work of a stage over its own mesh.

    Raises:
        UserError: the mesh does not fit the target, or divide the stage or its teacher; or that is
            not there.
    """
    work = work_of(run, name, sizes_of(run, name, target.devices))
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


def estimate_work(work: Work, target: Target, links: Links) -> Estimate:
    """As `estimate`, of a mesh that is known to divide the stage, laid over links."""
    chip, stage, model = target.facts, work.stage, work.model
    peak, room = chip.peak_flops, chip.device_memory_gib
    assert peak and room  # the catalogue refuses chips without them
    efficiency = EFFICIENCY[chip.family]
    bandwidth = (
        (chip.memory_gb_per_s.value if chip.memory_gb_per_s else math.inf)
        * 1e9
        / chip.devices_per_chip
    )
    seconds = {
        "matrix": work.matrix_flops / (peak * efficiency.matrix),
        "attention": work.attention_flops(efficiency.tile, efficiency.backward)
        / (peak * efficiency.attention),
        "memory_bound": work.memory_bytes / (bandwidth * efficiency.memory),
    }
    if taught := work.teaching:
        products = (
            taught.matrix_flops / efficiency.matrix
            + taught.attention_flops(efficiency.tile) / efficiency.attention
        )
        seconds["teacher"] = products / peak + taught.memory_bytes / (bandwidth * efficiency.memory)
    exchanges: list[tuple[Exchange, str, float | None]] = []
    hidden = 0.0
    if offloaded := work.host_bytes:
        spent: float | None = offloaded / (HOST_GB_PER_S * 1e9)
        exchanges.append((Exchange("host", "copy", offloaded, 1, "weights"), "PCIe", spent))
        hidden += (spent or 0.0) * efficiency.weights_hidden
    for asked in work.exchanges():
        exchange = _as_compiled(asked, work.mesh, target)
        axes = (exchange.axis,)
        once = links.seconds(exchange.kind, exchange.bytes / exchange.times, axes)
        spent = None if once is None else once * exchange.times
        exchanges.append((exchange, links.name(axes), spent))
        # A layer's weights from another slice are sent and received in that layer, which waits for
        # them.
        early = exchange.what == "weights" and (
            links.name(axes) != "DCN" or exchange.kind == "all-reduce"
        )
        hidden += (spent or 0.0) * (
            efficiency.weights_hidden if early else efficiency.tokens_hidden
        )
    compute, exchanging = sum(seconds.values()), sum(spent or 0.0 for _, _, spent in exchanges)
    step = max(compute, exchanging, compute + exchanging - hidden)
    flops = _flops_per_token(model, stage.sequence_length) * stage.batch_tokens
    figures = [figure for figure in (chip.bf16_tflops, chip.memory_gb_per_s) if figure]
    return Estimate(
        memory=work.memory(),
        usable_gib=room.value,
        seconds=seconds,
        exchanges=exchanges,
        step=step,
        mfu=flops / (step * target.devices * peak),
        tokens_per_second=stage.batch_tokens / step,
        confidence=weakest(
            efficiency.confidence,
            *figures,
            *(links.confidence((e.axis,)) for e, link, _ in exchanges if link != "PCIe"),
        ),
        memory_confidence=room.confidence,
        torus=links.torus,
    )


def labelling_seconds(run: Run, name: str, mesh: MeshConfig, target: Target) -> float:
    """Seconds in which the teacher of a stage fills its cache; 0 where it has none, or no cache.

    It is taken to label as many tokens as the stage reads, each once, in the time that it would add
    to the steps if it were at hand.

    Raises:
        UserError: the stage's teacher is not there.
    """
    if not (run.stages[name].distillation.cached and (teacher := _teacher(run, name))):
        return 0.0
    work, links = work_of(run, name, mesh), Links(target, mesh)
    alone, taught = (
        estimate_work(each, target, links) for each in (work, replace(work, teacher=teacher))
    )
    return (taught.step - alone.step) * work.stage.steps


def _as_compiled(exchange: Exchange, sizes: MeshConfig, target: Target) -> Exchange:
    """What libtpu makes of an exchange of weights over many chips: sums of whole arrays, which move
    them twice.

    So it writes most gradients' reduce-scatters over 256 chips or more, and all-gathers over the
    whole of a three-dimensional slice as sums with zeros; over 128 chips it writes neither.
    """
    if target.facts.family != "tpu" or exchange.axis != "fsdp" or sizes.fsdp < 256:
        return exchange
    whole = sizes.fsdp == target.chips_per_slice and target.facts.dimensions == 3
    summed = exchange.kind == "reduce-scatter" or (exchange.kind == "all-gather" and whole)
    return replace(exchange, kind="all-reduce") if summed else exchange
