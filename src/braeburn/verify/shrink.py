"""A run made small enough for a laptop, with the structure of the large one."""

import math
from typing import Any

from braeburn.config import (
    PRUNABLE,
    Checkpoint,
    Distillation,
    Evaluation,
    LayerConfig,
    MeshConfig,
    ModelConfig,
    Precision,
    Pruning,
    Quantization,
    Run,
    Source,
    Stage,
    validate,
)
from braeburn.config.optimizers.base import OptimizerConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.data.corpus import files
from braeburn.errors import UserError

DEVICES = 8
# For JAX as it starts. Programs that run for a second are worth no optimisation, which would take
# most of the time. From the compilation cache, programs for several CPU devices come back with
# their ring steps out of order: they abort or hang (jaxlib 0.10.2).
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
FIRST_STEPS, LATER_STEPS = 20, 8
FILES, FILE_BYTES = 12, range(8 * 1024, 48 * 1024)
SHORTEST = 64  # tokens of a sequence
SEQUENCES = 2 * DEVICES  # in a batch
# The stage that is put first where a teacher is on disk: that one has another vocabulary than the
# small run.
STAND_IN = "stand-in"


def shrink(run: Run, num_devices: int) -> Run:
    """The same run with small sizes, on text that every machine has.

    What a mesh of up to eight devices divides in the one it divides in the other; only batches are
    made to be divided by any. Optimizer, stages, mixtures, accumulation, rematerialisation and
    offloading stay as they are, but that updates are made steady where a model has experts; meshes
    are scaled down to `num_devices`; activations are float32, in which equal computations can be
    told from others.

    Stages prune, distil and round as they do in the large run. `with_stand_in` replaces a teacher
    that is no stage.

    Raises:
        UserError: the run has no stage.
    """
    if not run.stages:
        raise UserError(f"stages of the run {run.name!r} is empty; add a stage to train")
    run = with_stand_in(run)
    model = _model(run.model)
    # The narrower a model, the larger the steps that it takes; muP allows for that by itself.
    narrower = 1.0 if run.optimizer.is_width_free else run.model.d_model / model.d_model
    faster = math.sqrt(narrower)
    shortest = min(stage.sequence_length for stage in run.stages.values())
    stages: dict[str, Stage] = {}
    small = model
    for name, stage in run.stages.items():
        shrunk = _stage(
            stage, LATER_STEPS if stages else FIRST_STEPS, shortest, faster, num_devices
        )
        shrunk = _compression(shrunk, run.models()[name].found, small)
        stages[name] = shrunk
        for transform in shrunk.transforms.values():
            small = transform.left(small)
    changes: dict[str, Any] = {
        "model": model,
        "optimizer": _steady(run.optimizer) if _has_experts(model) else run.optimizer,
        "initial_weights": None,
        "stages": stages,
        "mesh": scale_down(run.mesh, num_devices),
        "data": run.data.model_copy(
            update={
                "sources": _sources(list(run.data.sources)),
                "tokenizer": None,
                "held_out": 0.1,
                "workers": 0,
            }
        ),
        "checkpoint": Checkpoint(every_steps=4),
        # Rounded to 8 bits, two sums in another order may differ by much more than these do.
        "precision": Precision(compute="float32", reduce="float32"),
        "evaluation": Evaluation(tokens=2048),
    }
    return validate(run.model_copy(update=changes).model_dump())


def with_stand_in(run: Run) -> Run:
    """The run with a stage of its own in the place of teachers on disk: its first, with neither
    teacher nor pruning.
    """
    if not any(stage.teacher and stage.teacher not in run.stages for stage in run.stages.values()):
        return run
    first = next(iter(run.stages.values()))
    plain = {"teacher": None, "distillation": Distillation(), **dict.fromkeys(first.transforms)}
    stages = {STAND_IN: first.model_copy(update=plain)}
    for name, stage in run.stages.items():
        on_disk = stage.teacher and stage.teacher not in run.stages
        stages[name] = stage.model_copy(update={"teacher": STAND_IN}) if on_disk else stage
    return run.model_copy(update={"stages": stages})


def scale_down(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh on a power of two of devices: its axes doubled in turn until there are as many, none
    above its size.
    """
    sizes = dict.fromkeys(mesh.sizes, 1)
    for _ in range(num_devices.bit_length() - 1):
        room = [axis for axis, size in mesh.sizes.items() if size == -1 or 2 * sizes[axis] <= size]
        if room:
            sizes[min(room, key=sizes.__getitem__)] *= 2
    return mesh.model_copy(update={**sizes, "torus": None})


def _has_experts(model: ModelConfig) -> bool:
    # By the configuration alone: this module sets the environment that JAX is to start in.
    return any(isinstance(layer.feed_forward, Experts) for layer in model.layer_configs)


def _steady(optimizer: OptimizerConfig) -> OptimizerConfig:
    """The optimizer with updates that do not hang on rounding.

    A router's choice between two experts does where it rates them equally. Weights that differ by
    more than their own rounding make such ties common.
    """
    least = {name: max(getattr(optimizer, name), value) for name, value in optimizer.steady.items()}
    return optimizer.model_copy(update=least)


def _model(model: ModelConfig) -> ModelConfig:
    width = _small(model.d_model, 64)
    heads, kv_heads = (
        math.gcd(number, DEVICES) for number in (model.num_heads, model.num_kv_heads)
    )
    if model.num_kv_heads < model.num_heads and kv_heads == heads:
        heads *= (
            2 if heads == DEVICES else 3
        )  # there still are fewer key heads, and no more meshes divide the others
    sizes = {
        "vocab_size": _small(model.vocab_size, 512),
        "d_model": width,
        **_layers(model, width),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": min(model.head_dim, max(8, 64 // heads // 2 * 2)),  # even, for rotary positions
        "ffn_dim": _small(model.ffn_dim, width * model.ffn_dim // model.d_model),
    }
    return model.model_copy(update=sizes)


def _layers(model: ModelConfig, width: int) -> dict[str, Any]:
    """As few layers as have every kind of them, and enough for the stages of a pipeline: four, or
    two repeats of each pattern, or one and what is left of the last.

    Args:
        model: the model.
        width: `d_model` of the narrower one.
    """

    def smaller(size: int) -> int:
        return _small(size, max(8, width * size // model.d_model))

    repeats, rest = divmod(model.num_layers - model.tail_layers, len(model.pattern))
    without_rest = 4 if len(model.pattern) == 1 else 2
    fewest = 1 if model.tail_layers or rest else without_rest
    tail = len(model.tail_pattern)

    def shrunk(layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
        return tuple(
            layer.model_copy(
                update={
                    "attention": layer.attention.shrunk(SHORTEST, smaller),
                    "feed_forward": layer.feed_forward.shrunk(smaller),
                }
            )
            for layer in layers
        )

    return {
        "num_layers": len(model.pattern) * min(repeats, fewest) + rest + tail,
        "tail_layers": tail,
        "pattern": shrunk(model.pattern),
        "tail_pattern": shrunk(model.tail_pattern),
    }


def _stage(stage: Stage, steps: int, shortest: int, faster: float, num_devices: int) -> Stage:
    # Twice as many pieces as devices, where each holds an early and a late one.
    length = _small(
        stage.sequence_length, min(256, SHORTEST * stage.sequence_length // shortest), 2 * DEVICES
    )
    parts = min(stage.accumulation_steps, 4)
    stable = int((1 - (stage.schedule.decay_fraction or 0.0)) * steps)
    batch_tokens = SEQUENCES // 2 * max(parts, 2) * length
    changes = {
        "tokens": steps * batch_tokens,
        "sequence_length": length,
        "batch_tokens": batch_tokens,
        "learning_rate": stage.learning_rate * faster,
        "schedule": stage.schedule.model_copy(
            update={"warmup_steps": min(stage.schedule.warmup_steps, steps // 4, stable)}
        ),
        "accumulation_steps": parts,
        "mesh": stage.mesh and scale_down(stage.mesh, num_devices),
    }
    return stage.model_copy(update=changes)


def _compression(stage: Stage, large: ModelConfig, small: ModelConfig) -> Stage:
    """The stage with what it cuts, learns from a teacher and rounds fit for the small model."""
    top_k = min(stage.distillation.top_k, small.vocab_size)
    changes = {
        "distillation": stage.distillation.model_copy(update={"top_k": top_k}),
        "pruning": stage.pruning and _pruning(stage.pruning, large, small, stage.batch_tokens),
        "quantization": stage.quantization and _quantization(stage.quantization, small),
    }
    return stage.model_copy(update=changes)


def _pruning(
    pruning: Pruning, large: ModelConfig, small: ModelConfig, batch_tokens: int
) -> Pruning:
    """The share of each axis that stays, as far as the same powers of two up to eight divide what
    that is.
    """

    def kept(axis: str, size: int) -> int:
        before, now = (getattr(model, PRUNABLE[axis]) for model in (large, small))
        step = small.num_kv_heads if axis == "heads" else 1
        divisor = math.gcd(size, DEVICES)
        fits = range(step, now, step)
        return min(
            fits,
            key=lambda n: (math.gcd(n, DEVICES) != divisor, abs(n / now - size / before)),
            default=now,
        )

    return pruning.model_copy(
        update={
            "keep": {axis: kept(axis, size) for axis, size in pruning.keep.items()},
            "calibration_tokens": min(pruning.calibration_tokens, 2 * batch_tokens),
        }
    )


def _quantization(quantization: Quantization, small: ModelConfig) -> Quantization:
    """Groups of the same size, or of the largest that comes out even in rows of the small model's
    width.
    """
    return quantization.model_copy(
        update={"group_size": math.gcd(quantization.group_size, small.d_model)}
    )


def _sources(names: list[str]) -> dict[str, Source]:
    """Some files of Python's standard library under each name, others under every one."""
    paths = [
        file.path
        for file in files("python", Source(format="python-code"))
        if file.size in FILE_BYTES
    ]
    shares = [paths[number :: len(names)][:FILES] for number in range(len(names))]
    return {
        name: Source(paths=tuple(share), format="python-code")
        for name, share in zip(names, shares, strict=True)
    }


def _small(size: int, most: int, devices: int = DEVICES) -> int:
    """The largest size up to `most` divisible by the same powers of two, up to `devices`."""
    divisor = math.gcd(size, devices)
    return next((n for n in range(min(size, most), 0, -1) if math.gcd(n, devices) == divisor), size)
