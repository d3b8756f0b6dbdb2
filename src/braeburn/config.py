"""The typed run: every choice that determines a training run, as one frozen value.

A recipe is a function that returns a `Run`; `override` makes another `Run` from it by dotted paths,
and `provenance` tells where each value came from. Nothing here imports JAX, so a bad value is
refused before an accelerator is touched.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from braeburn.disk import explained
from braeburn.errors import UserError, did_you_mean
from braeburn.jsonfile import Unreadable, read_json

# What a number of steps, tokens or bytes can be at all; with more, sums leave what tables and files
# can hold.
MOST = 10**18
Size = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
# The state counts steps in 32 bits.
MOST_STEPS = 2**31 - 1
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def check_name(name: str) -> str:
    """A name that can be a part of a file's name, and of a line.

    Raises:
        ValueError: it is empty or too long, or has characters that mean something in paths or
            scripts.
    """
    if not re.fullmatch(r"\w[\w .,'+=@()\[\]-]{0,99}", name) or name.endswith(" "):
        shown = ascii(name) if len(name) <= 100 else f"{name[:60]!a}..."
        raise ValueError(
            f"{shown} cannot be a name; use up to 100 letters, digits, spaces and any of . , ' + = "
            f"@ ( ) [ ] _ -, beginning with a letter or digit"
        )
    return name


# Of a run, a stage or a source: each becomes a part of names of files, of a script's lines, of a
# job's name.
Name = Annotated[str, AfterValidator(check_name)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# The random keys of weights take 32 bits at a time, those of the data any number.
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def _one_or_more(value: Any) -> Any:
    """A single value as a tuple of one; it is what people type where several are allowed."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        example = value.replace("'", '"')
        raise ValueError(f"{value!r} is no list in JSON; write it with double quotes, as {example}")
    return (value,) if isinstance(value, str | int) else value


OneOrMore = BeforeValidator(_one_or_more)


# Far beyond any model that is published; without a limit, one wrong digit would take all memory
# before it is noticed.
LARGEST_SIZES = {
    "vocab_size": 2**24,
    "d_model": 2**20,
    "num_layers": 10_000,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "ffn_dim": 2**24,
}


class _Frozen(BaseModel):
    # What a value is made of is checked again with it, since `model_copy` checks nothing.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, revalidate_instances="always"
    )

    def replace(self, **changes: Any) -> Self:
        """The same with some fields replaced, validated as a whole; what was left at its default
        stays so.

        Raises:
            UserError: there is no such field, or a value is refused.
        """
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        try:
            return type(self).model_validate({**fields, **changes})
        except ValidationError as error:
            raise UserError(explain_validation_error(error)) from None


class RopeScaling(_Frozen):
    """How rotary frequencies are stretched to reach beyond the trained length; names as in
    transformers.
    """

    kind: Literal["linear", "llama3"] = "llama3"
    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Size = 8192


class Model(_Frozen):
    """A decoder-only transformer: grouped-query attention, rotary positions, RMSNorm before each
    block, SwiGLU.

    `max_position_embeddings` is the longest sequence that weights from elsewhere were made for; 0
    where none were.
    """

    vocab_size: Annotated[int, Field(gt=0, le=LARGEST_SIZES["vocab_size"])]
    d_model: Annotated[int, Field(gt=0, le=LARGEST_SIZES["d_model"])]
    num_layers: Annotated[int, Field(gt=0, le=LARGEST_SIZES["num_layers"])]
    num_heads: Annotated[int, Field(gt=0, le=LARGEST_SIZES["num_heads"])]
    num_kv_heads: Annotated[int, Field(gt=0, le=LARGEST_SIZES["num_kv_heads"])]
    head_dim: Annotated[int, Field(gt=0, le=LARGEST_SIZES["head_dim"])]
    ffn_dim: Annotated[int, Field(gt=0, le=LARGEST_SIZES["ffn_dim"])]
    qk_norm: bool = True
    tied_embeddings: bool = True
    norm_epsilon: Positive = 1e-5
    rope_base: Positive = 500_000.0
    rope_scaling: RopeScaling | None = None
    z_loss: NonNegative = 1e-6
    scan_layers: bool = True
    max_position_embeddings: Count = 0

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Model":
        """The model of a run directory's newest checkpoint or of one of its checkpoints, as
        `braeburn import` makes it.

        A recipe that trains on from it names the directory as `initial_weights`, too.

        Raises:
            UserError: it is no run directory, or holds no checkpoint.
        """
        path = Path(directory).expanduser()
        step = None
        if path.parent.name == "checkpoints" and path.name.isdigit():
            step = int(path.name)
            path = path.parent.parent
        try:
            run = read_run(path)
        except UserError as error:
            raise UserError(
                f"Model.from_directory({str(directory)!r}): {error}; a Hugging Face directory is "
                f"made one by `braeburn import`"
            ) from None
        found = sorted(
            int(each.name) for each in (path / "checkpoints").glob("*") if each.name.isdigit()
        )
        if not found or (step is not None and step not in found):
            raise UserError(
                f"Model.from_directory({str(directory)!r}): there is no such checkpoint; train for "
                f"at least one, or name one of {found}"
            )
        model, length = run.model_at(found[-1] if step is None else step)
        return model.model_copy(update={"max_position_embeddings": length})

    @model_validator(mode="after")
    def _check(self) -> "Model":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"set num_kv_heads to one of {some(divisors(self.num_heads))}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but rotary positions need pairs; use "
                f"{self.head_dim + 1}"
            )
        return self


MeshAxis = Literal["replica", "data", "fsdp", "context", "tensor"]
# -1 stands for as many as the devices allow.
AxisSize = Annotated[int, Field(ge=-1, le=2**24)]


class Mesh(_Frozen):
    """Devices along each axis of the mesh, the slowest link first; one size may be -1, to take what
    devices are left.

    `replica` crosses slices or nodes and carries one sum of gradients a step; `data` does the same
    inside one. `fsdp` splits the batch, and with it parameters, gradients and optimizer state;
    `context` splits sequences; `tensor` splits heads, FFN and vocabulary, and the tokens between
    them.

    `context_attention` tells how queries reach the keys of other context shards: passed around a
    ring, or gathered. `torus` lays axes over the physical dimensions of a slice: for each axis its
    size along each of them, as in {"fsdp": [8, 8, 4], "tensor": [1, 1, 4]} on 8 x 8 x 16 chips;
    without it the innermost axes get the best links.
    """

    replica: AxisSize = 1
    data: AxisSize = 1
    fsdp: AxisSize = -1
    context: AxisSize = 1
    tensor: AxisSize = 1
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    torus: dict[MeshAxis, Annotated[tuple[Size, ...], OneOrMore]] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis by its name, in the order of the mesh."""
        return {axis: getattr(self, axis) for axis in get_args(MeshAxis)}

    @model_validator(mode="after")
    def _check(self) -> "Mesh":
        for axis, size in self.sizes.items():
            if size == 0:
                raise ValueError(
                    f"{axis}=0 leaves no device; set {axis} to 1, or to -1 for all devices left"
                )
        inferred = [axis for axis, size in self.sizes.items() if size == -1]
        if len(inferred) > 1:
            raise ValueError(
                f"{' and '.join(inferred)} are both -1, but only one can be inferred; set "
                f"{inferred[0]} to a size, as 1"
            )
        if self.torus and len({len(factors) for factors in self.torus.values()}) > 1:
            raise ValueError(
                "torus names different numbers of dimensions; give each axis one size for each of "
                "them"
            )
        return self


# A mesh of one device: nothing is split.
ONE_DEVICE = Mesh(fsdp=1)


NamedActivation = Literal[
    "query", "key", "value", "attention", "attention_output", "ffn_gate", "ffn_up", "ffn_output"
]


class Remat(_Frozen):
    """What the forward pass keeps for the backward pass: all, only each layer's input, or that and
    `names`.
    """

    policy: Literal["none", "full", "save_named"] = "none"
    names: Annotated[tuple[NamedActivation, ...], OneOrMore] = (
        "query",
        "key",
        "value",
        "attention",
        "ffn_gate",
        "ffn_up",
    )


class Schedule(_Frozen):
    """The multiplier of the learning rate over a stage: linear warm-up from 0, then a decay to
    `floor`.

    A constant one decays not at all, and so has no floor.
    """

    warmup_steps: Count = 0
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.decay == "constant" and self.floor:
            raise ValueError(
                f"floor={self.floor} is never reached with decay='constant'; set floor to 0, or "
                f"decay to 'cosine' or 'linear'"
            )
        return self


# Logical axes whose units can be cut, and the field of the model that counts them.
PRUNABLE = {"ffn": "ffn_dim", "heads": "num_heads", "embed": "d_model"}
PrunedAxis = Literal["ffn", "heads", "embed"]


class Pruning(_Frozen):
    """A stage that makes the model narrower: `keep` tells how many units of an axis stay, in each
    layer alike.

    `soft_top_k` learns which, jointly with the weights: masks that sum to `keep`, whose temperature
    falls until, for the last `exact` of the steps, they are zeros and ones; the rest is cut off as
    the stage ends. The other methods cut as the stage begins, by the importance of units, and train
    what is left. `learning_rate` is that of the masks' scores. Activations are measured on the
    stage's first `calibration_tokens`.
    """

    keep: dict[PrunedAxis, Size] = Field(min_length=1)
    method: Literal["soft_top_k", "activation", "magnitude", "random"] = "soft_top_k"
    temperature: Positive = 0.3
    final_temperature: Positive = 0.02
    exact: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: Positive = 0.3
    calibration_tokens: Size = 131_072

    @model_validator(mode="after")
    def _check(self) -> "Pruning":
        if self.final_temperature > self.temperature:
            raise ValueError(
                f"final_temperature={self.final_temperature} is above "
                f"temperature={self.temperature}; "
                f"set final_temperature to at most {self.temperature}"
            )
        return self

    @property
    def learned(self) -> bool:
        """Whether masks are trained, and the model cut at the end of the stage."""
        return self.method == "soft_top_k"

    def pruned(self, model: Model) -> Model:
        """The model that is left."""
        return model.model_copy(update={PRUNABLE[axis]: size for axis, size in self.keep.items()})


class Distillation(_Frozen):
    """What a stage's teacher teaches, with a share of `weight` in the targets; the rest is the text
    itself.

    `label` is the teacher's likeliest token (arXiv 2407.21075), `top_k` its likeliest `top_k` with
    their probabilities, renormalised, `distribution` all of them. Probabilities are at
    `temperature`. With `cached`, labels and top-k come from one pass over the text, stored beside
    it for all students of this teacher.
    """

    target: Literal["label", "top_k", "distribution"] = "label"
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    temperature: Positive = 1.0
    top_k: Size = 8
    cached: bool = False

    @property
    def kept(self) -> int:
        """Tokens that a cache holds for each position."""
        return self.top_k if self.target == "top_k" else 1

    @model_validator(mode="after")
    def _check(self) -> "Distillation":
        if self.cached and self.target == "distribution":
            raise ValueError(
                "cached=true cannot hold whole distributions; set target to 'top_k', or cached to "
                "false"
            )
        return self


class Quantization(_Frozen):
    """Training with weights rounded as they will be shipped: gradients pass the rounding by (arXiv
    1308.3432).

    Along what a matrix is multiplied over, each `group_size` weights share a scale: `int8` and
    `int4` as llama.cpp's Q8_0 and Q4_0, which have groups of 32; `int2` has four levels and learns
    a factor of the scale for each matrix.
    """

    kind: Literal["int8", "int4", "int2"] = "int4"
    group_size: Size = 32


class Stage(_Frozen):
    """One stage of training. Sizes are in tokens; `mixture` maps the names of sources to weights of
    any scale.

    `mesh` and `remat` take the place of the run's, as where longer sequences are fewer in a batch
    and want splitting themselves. `teacher` is a run directory, one of its checkpoints, a Hugging
    Face directory, or the name of an earlier stage, whose last weights then teach.
    """

    tokens: Size
    sequence_length: Annotated[int, Field(gt=0, le=2**30)]
    batch_tokens: Annotated[int, Field(gt=0, le=2**40)]
    mixture: dict[Name, NonNegative] = Field(min_length=1)
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    schedule: Schedule = Schedule()
    rope_base: Positive | None = None
    accumulation_steps: Size = 1
    mesh: Mesh | None = None
    remat: Remat | None = None
    teacher: str | None = None
    distillation: Distillation = Distillation()
    pruning: Pruning | None = None
    quantization: Quantization | None = None

    @property
    def batch_size(self) -> int:
        """Sequences in one batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps in the stage; the last may pass `tokens` by less than one batch."""
        return math.ceil(self.tokens / self.batch_tokens)

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        if self.batch_tokens % self.sequence_length:
            nearest = max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of "
                f"sequence_length={self.sequence_length}; set batch_tokens to {nearest}"
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps={self.accumulation_steps} does not divide the "
                f"{self.batch_size} sequences of a "
                f"batch; set accumulation_steps to one of {some(divisors(self.batch_size))}"
            )
        if not sum(self.mixture.values()) > 0:
            raise ValueError(
                "mixture has no weight above zero; give at least one source a positive weight"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} leaves none of the stage's "
                f"{self.steps} steps to "
                f"decay; set schedule.warmup_steps below {self.steps} or raise tokens"
            )
        if self.pruning and self.quantization:
            raise ValueError(
                "pruning and quantization cannot be in one stage; make another stage of "
                "quantization"
            )
        return self


class AfmOptimizer(_Frozen):
    """The optimizer of the Apple Foundation Models (AXLearn's `adastar_optimizer`) with muP-simple
    update scales.

    A step whose gradient is not finite, or of a norm not below `skip_norm`, is skipped; a stage of
    which more than `max_skipped` of the steps were does not count as finished.
    """

    kind: Literal["afm"] = "afm"
    momentum: Fraction = 0.95
    second_moment_decay: Fraction = 0.95
    epsilon: Positive = 1e-30
    update_rms: Positive = 1.0
    mup_base_width: Size = 768
    clip_norm: Positive = 1.0
    skip_norm: Positive = 100.0
    max_skipped: Share = 0.1


class AdamW(_Frozen):
    """AdamW with decoupled weight decay, multiplied by the learning rate, on every parameter but
    the norms.

    `skip_norm` and `max_skipped` are those of the other optimizer.
    """

    kind: Literal["adamw"] = "adamw"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    clip_norm: Positive = 1.0
    skip_norm: Positive = 1e6
    max_skipped: Share = 0.1


Optimizer = Annotated[AfmOptimizer | AdamW, Field(discriminator="kind")]


class Source(_Frozen):
    """Documents from files: globs, local or of any fsspec file system, compressed or not.

    `text` takes a file as one document, or splits it at `separator`; `jsonl` and `parquet` take
    `field` of each row; `auto` decides by the file's name, and refuses what its first bytes do not
    agree with. `python-code`, `python-prose` (docstrings) and `python-long` read Python files,
    those of the running Python's standard library unless `paths` names others.
    """

    paths: Annotated[tuple[str, ...], OneOrMore] = ()
    format: Literal[
        "auto", "text", "jsonl", "parquet", "python-code", "python-prose", "python-long"
    ] = "auto"
    field: str = "text"
    separator: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Source":
        if not self.paths and not self.format.startswith("python-"):
            raise ValueError(
                f"paths is empty with format={self.format!r}; name at least one file or glob in "
                f"paths"
            )
        return self


class Data(_Frozen):
    """Where text comes from and how it is turned into batches.

    `tokenizer` is the path of a `tokenizer.json`; with none, a byte-level BPE of `model.vocab_size`
    entries is trained on the sources. `held_out` is the fraction of documents, chosen by hash, that
    training never sees; with 0 none is held out, and nothing is evaluated. `cache` holds the
    tokenised shards; with none, they are kept below the user's cache folder. `accept` is the
    fingerprint of text that has changed since the run's last checkpoint, to go on with it all the
    same.
    """

    sources: dict[Name, Source] = Field(default_factory=dict)
    tokenizer: str | None = None
    held_out: Fraction = 0.02
    cache: str | None = None
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    prefetch: Annotated[int, Field(gt=0, le=2**16)] = 4
    accept: str | None = None


class Checkpoint(_Frozen):
    """When checkpoints are written and which are kept: the newest `keep_last` and every
    `keep_every_steps`-th.
    """

    every_steps: Size = 1000
    keep_last: Size = 2
    keep_every_steps: Size | None = None


class Precision(_Frozen):
    """The type of activations and of the weights as they are multiplied; parameters and optimizer
    are float32.

    `reduce` is the type in which fully sharded gradients are summed over devices.
    """

    compute: Literal["float32", "bfloat16"] = "bfloat16"
    reduce: Literal["float32", "bfloat16"] = "float32"


class Offload(_Frozen):
    """What waits in the host's memory while it is not needed: the optimizer's state, and
    activations by name.
    """

    optimizer: bool = False
    activations: Annotated[tuple[NamedActivation, ...], OneOrMore] = ()


# Everything waits on the device.
NO_OFFLOAD = Offload()


class Evaluation(_Frozen):
    """Held-out evaluation at the end of each stage and every `every_steps`, over at most `tokens`
    of each source.
    """

    every_steps: Size | None = None
    tokens: Size = 262_144


class StageModels(NamedTuple):
    """The model as a stage finds it, as it trains it, and as it leaves it."""

    found: Model
    trained: Model
    left: Model


class Run(_Frozen):
    """One complete training run.

    `initial_weights` is a directory whose weights and tokenizer training starts from, in the place
    of random weights: a run directory, one of its checkpoints, or a Hugging Face directory.
    `Model.from_directory` gives its model.
    """

    name: Name
    model: Model
    stages: dict[Name, Stage]
    data: Data = Data()
    optimizer: Optimizer = AfmOptimizer()
    initial_weights: str | None = None
    seed: Seed = 0
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    precision: Precision = Precision()
    remat: Remat = Remat()
    offload: Offload = NO_OFFLOAD
    evaluation: Evaluation = Evaluation()

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all stages."""
        return sum(stage.steps for stage in self.stages.values())

    def stage_at(self, step: int) -> tuple[str, Stage, int]:
        """The stage that runs the 0-based global `step`: its name, the stage and the step's index
        within it.
        """
        first = 0
        for name, stage in self.stages.items():
            if step < first + stage.steps:
                return name, stage, step - first
            first += stage.steps
        raise IndexError(f"step {step} lies beyond the run's {first} steps")

    def model_at(self, step: int) -> tuple[Model, int]:
        """The model as left after `step` steps, and the longest sequence that it was trained on by
        then, in tokens.
        """
        model = self.model
        length = model.max_position_embeddings
        first = 0
        for stage, models in zip(self.stages.values(), self.models().values(), strict=True):
            if first < step:
                model = models.left if step >= first + stage.steps else models.trained
                length = max(length, stage.sequence_length)
            first += stage.steps
        return model, length

    def models(self) -> dict[str, StageModels]:
        """The model of each stage: pruning makes it narrower for all that follow, a RoPE base holds
        for its stage.
        """
        found, model = {}, self.model
        for name, stage in self.stages.items():
            wide, model = model, stage.pruning.pruned(model) if stage.pruning else model
            # Soft-Top-K trains the units that it will cut at the end; the other methods cut first.
            trained = wide if stage.pruning and stage.pruning.learned else model
            base = {"rope_base": stage.rope_base} if stage.rope_base else {}
            found[name] = StageModels(
                *(each.model_copy(update=base) for each in (wide, trained, model))
            )
        return found

    @model_validator(mode="after")
    def _check(self) -> "Run":
        model, names = self.model, list(self.stages)
        for index, (name, stage) in enumerate(self.stages.items()):
            if stage.teacher in names[index:]:
                remedy = f"one of {names[:index]}" if index else "a directory"
                raise ValueError(
                    f"stages.{name}.teacher={stage.teacher!r} is not an earlier stage; set it to "
                    f"{remedy}"
                )
            if stage.pruning:
                check_pruning(f"stages.{name}.pruning.keep.", stage.pruning, model)
                model = stage.pruning.pruned(model)
        if self.total_steps > MOST_STEPS:
            raise ValueError(
                f"stages have {self.total_steps:,} steps in all, and a run has at most "
                f"{MOST_STEPS:,}; lower tokens or raise batch_tokens"
            )
        for name, stage in self.stages.items():
            for source in stage.mixture:
                if source not in self.data.sources:
                    raise ValueError(
                        f"stages.{name}.mixture.{source} is not a source of the data; "
                        + did_you_mean(source, self.data.sources)
                    )
        remats = {
            f"stages.{name}.remat": stage.remat
            for name, stage in self.stages.items()
            if stage.remat
        }
        if len(remats) < len(self.stages):
            remats["remat"] = self.remat
        for path, remat in remats.items():
            for name in self.offload.activations:
                if remat.policy != "save_named" or name not in remat.names:
                    raise ValueError(
                        f"offload.activations has {name!r}, which is not kept for the backward "
                        f"pass; set {path}.policy to 'save_named' with {name!r} among {path}.names"
                    )
        return self


def check_pruning(prefix: str, pruning: Pruning, model: Model) -> None:
    """Refuses to keep as many units as there are, or query heads that key heads cannot share
    evenly.

    Raises:
        ValueError: naming the axis after `prefix`.
    """
    for axis, size in pruning.keep.items():
        present = getattr(model, PRUNABLE[axis])
        if size >= present:
            raise ValueError(
                f"{prefix}{axis}={size} is not less than the model's {PRUNABLE[axis]}={present}; "
                f"set {prefix}{axis} below {present}"
            )
    heads = pruning.keep.get("heads", model.num_heads)
    if heads % model.num_kv_heads:
        fits = some(range(model.num_kv_heads, model.num_heads, model.num_kv_heads))
        raise ValueError(
            f"{prefix}heads={heads} is not a multiple of num_kv_heads={model.num_kv_heads}; "
            f"set {prefix}heads to one of {fits}"
        )


def divisors(number: int) -> list[int]:
    """All numbers that divide one, in order; in time of its square root."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    large = [number // n for n in reversed(small) if n * n != number]
    return small + large


def some(values: Sequence[int]) -> str:
    """A list of numbers for a sentence, of many only the first."""
    shown = ", ".join(map(str, values[:12]))
    return f"[{shown}{', ...' if len(values) > 12 else ''}]"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts as (dotted path, value)."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from flatten(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def parse_assignment(text: str) -> tuple[str, Any]:
    """`path=value` as (path, value), the value read as JSON where it is JSON and as a string
    otherwise.

    A field that holds text takes a number or a truth value as it was typed.

    Raises:
        UserError: there is no `=`, or the value is beyond what can be read.
    """
    path, equals, raw = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise UserError(
            f"--set {text!r} is not an assignment; write --set path=value, as in --set seed=1"
        )
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = {"None": None, "True": True, "False": False}.get(raw, raw)
    except (ValueError, RecursionError):
        raise UserError(
            f"--set {path} has a number of thousands of digits, or lists within lists beyond "
            f"reason; give it a value that the field can have"
        ) from None
    if isinstance(value, int | float) and _holds_text(path):
        value = raw.strip()
    return path, value


def _holds_text(path: str) -> bool:
    """Whether the field at a path is declared as text, by its last name; those of a mixture are
    sources.
    """
    *parents, last = path.split(".")
    declared = {
        name
        for kind in _Frozen.__subclasses__()
        for name, field in kind.model_fields.items()
        if field.annotation in (str, str | None)
    }
    return last in declared and parents[-1:] not in (["mixture"], ["sources"], ["stages"])


def override(run: Run, assignments: Mapping[str, Any]) -> Run:
    """A run with the fields at dotted paths replaced, validated again.

    Raises:
        UserError: a path names no field (the nearest ones are listed) or a value is refused.
    """
    fields = run.model_dump(exclude_unset=True)
    kind = assignments.get("optimizer.kind", run.optimizer.kind)
    if kind != run.optimizer.kind:
        # The other kind has other fields, which may be assigned before or after it.
        fields["optimizer"] = {}
        run = run.model_copy(update={"optimizer": AdamW() if kind == "adamw" else AfmOptimizer()})
    # A recipe leaves the kind to the type, and so out of the fields that it sets.
    fields["optimizer"] = {"kind": kind, **fields.get("optimizer", {})}
    for path, value in assignments.items():
        _assign(run, fields, path, value)
    try:
        changed = validate(fields)
    except UserError as error:
        raise UserError(f"{error}{_new_stage(run, fields, str(error))}") from None
    for name in _added(run, fields.get("data"), "sources"):
        if all(not stage.mixture.get(name) for stage in changed.stages.values()):
            first = next(iter(changed.stages), "STAGE")
            near = difflib.get_close_matches(name, run.data.sources, n=1)
            meant = f"did you mean {near[0]!r}? Otherwise " if near else ""
            raise UserError(
                f"data.sources.{name} is a new source that no stage draws from; {meant}add its "
                f"weight, as --set stages.{first}.mixture.{name}=1"
            )
    return changed


def _new_stage(run: Run, fields: Mapping[str, Any], error: str) -> str:
    """What to add to the error that a stage lacks a field, where the stage is new: its name may be
    a slip.
    """
    missing = re.match(r"stages\.([^.]+)\.\S+ is missing", error)
    if not missing or missing[1] not in _added(run, fields, "stages"):
        return ""
    near = difflib.get_close_matches(missing[1], run.stages, n=1)
    return f", since {missing[1]!r} is a new stage" + (
        f"; did you mean the stage {near[0]!r}?" if near else ""
    )


def _added(run: Run, fields: Any, kind: Literal["stages", "sources"]) -> list[str]:
    """The stages or sources that `fields`, the run's or its data's, hold and the run does not."""
    present = run.stages if kind == "stages" else run.data.sources
    there = fields.get(kind) if isinstance(fields, Mapping) else None
    return [name for name in there if name not in present] if isinstance(there, Mapping) else []


# What a stage or a source has that is begun by assigning to one of its fields.
_NEW_STAGE = Stage(
    tokens=1, sequence_length=1, batch_tokens=1, mixture={"any": 1.0}, learning_rate=1.0
)
_NEW = {"stages": _NEW_STAGE.model_dump(), "sources": Source.model_construct().model_dump()}


def _assign(run: Run, fields: dict[str, Any], path: str, value: Any) -> None:
    """Sets the leaf at `path` of `fields`, which hold what is set already, if the run has such a
    field.
    """
    *parents, last = path.split(".")
    known: Any = run.model_dump()
    for depth, name in enumerate(parents):
        begins = parents[depth - 1] if depth and parents[depth - 1] in _NEW and name else None
        if not isinstance(known, dict) or (name not in known and not begins):
            raise UserError(_unknown_field(run, path, ".".join(parents[: depth + 1])))
        optional = {
            "rope_scaling": RopeScaling(),
            "mesh": Mesh(),
            "remat": Remat(),
            "pruning": Pruning.model_construct(keep={}),
            "quantization": Quantization(),
        }  # may be None, and assigned into all the same
        if begins and name not in known:
            known = _NEW[begins]
        else:
            known = optional[name].model_dump() if name in optional else known[name]
        # A field left at its default is absent, or None where the recipe switched it off.
        fields[name] = fields = fields.get(name) or {}
    if parents[-1:] not in (["stages"], ["sources"], ["mixture"], ["keep"]) and (
        not isinstance(known, dict) or last not in known
    ):
        raise UserError(_unknown_field(run, path, path))
    if last == "separator" and isinstance(value, str):
        value = _unescaped(value)
    fields[last] = value


def _unescaped(separator: str) -> str:
    r"""A separator as it is meant where a shell passed \n, \r, \t or \\ on as they were typed."""
    meant = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nrt\\]", lambda match: meant[match.group()], separator)


def _unknown_field(run: Run, path: str, unknown: str) -> str:
    known = [leaf for leaf, _ in flatten(run.model_dump())]
    # A bare `learning_rate` or a misspelt last part should still find `stages.core.learning_rate`.
    last = path.rpartition(".")[2]
    same_end = [leaf for leaf in known if leaf.rpartition(".")[2] == last]
    candidates = same_end or known
    return f"{unknown!r} is not a field of the run {run.name!r}; {did_you_mean(path, candidates)}"


def validate(fields: Mapping[str, Any]) -> Run:
    """A run from nested dicts, as `config.json` and overrides hold it.

    Raises:
        UserError: a field is missing, unknown or refused, in one sentence.
    """
    try:
        return Run.model_validate(fields)
    except ValidationError as error:
        raise UserError(explain_validation_error(error)) from None


def explain_validation_error(error: ValidationError) -> str:
    """The first problem of a validation as one sentence that names field, value and fix."""
    problem = error.errors()[0]
    # The discriminator of a union appears in the location, but is no field.
    path = ".".join(str(part) for part in problem["loc"] if part not in ("afm", "adamw"))
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        if problem["loc"][-1:] == ("[key]",):
            return f"{'.'.join(map(str, problem['loc'][:-2]))}: {message}"
        return f"{path}: {message}" if path else message
    if problem["type"] == "extra_forbidden":
        known = {field for kind in _Frozen.__subclasses__() for field in kind.model_fields}
        return f"{path!r} is not a field; {did_you_mean(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{path} is missing; give it a value"
    if problem["type"].startswith("union_tag"):
        kind = (
            problem["input"].get("kind") if isinstance(problem["input"], dict) else problem["input"]
        )
        return f"{path}.kind={_short(kind)} is not valid: it must be 'afm' or 'adamw'"
    reason = problem["msg"].removeprefix("Input ")
    return f"{path or 'the run'}={_short(problem['input'])} is not valid: it {reason}"


def _short(value: Any) -> str:
    """A value as Python writes it, but for the middle of one that would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"


def provenance(recipe: Run, assignments: Mapping[str, Any]) -> dict[str, str]:
    """Where each leaf of the resolved run came from: "default", "recipe" or "command line"."""
    named = {path for path, _ in flatten(recipe.model_dump(exclude_unset=True))}
    named |= {"optimizer.kind"} & {f"{field}.kind" for field in recipe.model_fields_set}
    resolved = override(recipe, assignments)
    origins = {}
    for path, _ in flatten(resolved.model_dump()):
        if any(path == a or path.startswith(a + ".") for a in assignments):
            origins[path] = "command line"
        else:
            origins[path] = "recipe" if path in named else "default"
    return origins


def read_run(directory: Path) -> Run:
    """The run that a run directory's `config.json` holds.

    Raises:
        UserError: there is no such file, or it holds no run of this version.
    """
    path = directory / "config.json"
    fields = _read_config(directory).get("run")
    if not isinstance(fields, dict):
        raise UserError(
            f"{str(path)!r} does not hold a run; restore it or start in another folder with --out"
        )
    try:
        return validate(fields)
    except UserError as error:
        raise UserError(
            f"{str(path)!r} does not hold a run of this version of Braeburn: {error}"
        ) from None


def read_identity(directory: Path) -> str | None:
    """What tells the run of a run directory from all others; None where its `config.json` does not
    say.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    identity = _read_config(directory).get("identity")
    return identity if isinstance(identity, str) else None


def _read_config(directory: Path) -> dict[str, Any]:
    """The fields of a run directory's `config.json`."""
    path = directory / "config.json"
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{str(directory)!r} is not a run directory: it holds no config.json; "
            f"name the folder given to --out of train or import"
        ) from None
    except Unreadable as error:
        raise UserError(
            f"{str(path)!r} does not hold a run: it {error}; restore it or start in another "
            f"folder with --out"
        ) from None
    except OSError as error:
        reason = explained(error) or f"{str(path)!r} cannot be read ({error.strerror}); see to it"
        raise UserError(reason) from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{str(path)!r} does not hold a run; restore it or start in another folder with --out"
        )
    return fields
