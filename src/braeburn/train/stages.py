"""What a stage of a run is made of: its model, optimizer and compiled programs."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from braeburn.config import Mesh, Model, Run, Stage
from braeburn.errors import UserError
from braeburn.model import transformer
from braeburn.model.spec import Tree, abstract, initialize, walk
from braeburn.optim.build import build_optimizer
from braeburn.parallel.layout import Layout, can_offload
from braeburn.parallel.mesh import build, resolve
from braeburn.parallel.rules import check
from braeburn.train.compilation import compiler_flags
from braeburn.train.state import TrainState, new_state
from braeburn.train.step import Batch, train_step


def model_of_stage(model: Model, stage: Stage) -> Model:
    """The model with the stage's RoPE base, where it has one of its own."""
    return model.model_copy(update={"rope_base": stage.rope_base}) if stage.rope_base else model


def model_at(run: Run, step: int) -> tuple[Model, int]:
    """The model as trained after `step` steps, and the longest sequence that it was trained on by then."""
    model, length, first = run.model, 0, 0
    for stage in run.stages.values():
        if first < step:
            model, length = model_of_stage(run.model, stage), max(length, stage.sequence_length)
        first += stage.steps
    return model, length


@dataclass(frozen=True)
class Program:
    """A stage ready to run."""

    name: str
    stage: Stage
    optimizer: optax.GradientTransformation
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    compile_seconds: float


def stage_optimizer(run: Run, stage: Stage) -> optax.GradientTransformation:
    """The optimizer of a stage of a run."""
    return build_optimizer(run.optimizer, stage, transformer.param_specs(run.model), run.model)


def layout_of(run: Run, name: str, devices: Sequence[Any] | None = None) -> Layout:
    """Where the arrays of a stage lie on `devices`, all that there are by default.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the stage.
    """
    if -1 not in (run.stages[name].mesh or run.mesh).sizes.values():
        sizes_of(run, name)  # before the devices are looked for
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(run, name, len(devices))
    if (run.offload.optimizer or run.offload.activations) and not can_offload(devices[0]):
        raise UserError(
            f"offload needs host memory that the device can reach, and {devices[0].device_kind} has none; "
            f"set offload.optimizer to false and offload.activations to []"
        )
    return Layout(sizes, build(sizes, devices), transformer.param_specs(run.model), run.offload)


def sizes_of(run: Run, name: str, num_devices: int | None = None) -> Mesh:
    """The sizes of a stage's mesh, resolved for a number of devices unless none is inferred.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the stage.
    """
    mesh = run.stages[name].mesh or run.mesh
    if num_devices is not None:
        mesh = resolve(mesh, num_devices)
    specs = walk(transformer.param_specs(run.model))
    check(run, name, mesh, {path: (spec.axes, spec.shape, spec.role) for path, spec in specs})
    return mesh


def stage_step(
    run: Run, stage: Stage, layout: Layout
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The train step of a stage as a traceable function of state and batch."""
    model = model_of_stage(run.model, stage)

    def loss(params: Tree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        remat = stage.remat or run.remat
        return transformer.loss(params, batch, model, run.precision, remat, run.offload, layout.sizes)

    step = functools.partial(
        train_step,
        loss=loss,
        optimizer=stage_optimizer(run, stage),
        accumulation_steps=stage.accumulation_steps,
        spread=layout.gradient,
    )
    if not run.offload.optimizer:
        return step

    def fetch_and_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        on_device = layout.optimizer_state(state.optimizer, on_device=True)
        return step(state._replace(optimizer=jax.device_put(state.optimizer, on_device)), batch)

    return fetch_and_step


def abstract_batch(stage: Stage, layout: Layout) -> Batch:
    """Shapes, types and places of a stage's batches."""
    shape, place = (stage.batch_size, stage.sequence_length), layout.batch()
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32) | {"weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in types.items()}


def abstract_state(run: Run, stage: Stage, layout: Layout) -> TrainState:
    """Shapes, types and places of the train state, the same in every stage."""
    params = abstract(transformer.param_specs(run.model))
    optimizer = jax.eval_shape(stage_optimizer(run, stage).init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, optimizer)
    places = TrainState(layout.everywhere(), layout.parameters(), layout.optimizer_state(optimizer))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)


def lower_stage(run: Run, name: str, layout: Layout) -> jax.stages.Lowered:
    """A stage's train step for the devices of a layout, which need not be there, before it is compiled."""
    stage = run.stages[name]
    state = abstract_state(run, stage, layout)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(stage_step(run, stage, layout), donate_argnums=0, out_shardings=(places, layout.everywhere()))
    return step.lower(state, abstract_batch(stage, layout))


def compile_stage(run: Run, name: str, layout: Layout) -> Program:
    """Compiles a stage's train step. The state passed to it is given up, the one it returns takes its memory."""
    began = time.monotonic()
    flags = compiler_flags(layout.mesh.devices.flat[0].device_kind)
    with layout.compiling():
        compiled = lower_stage(run, name, layout).compile(flags or None)
    stage = run.stages[name]
    return Program(name, stage, stage_optimizer(run, stage), compiled, time.monotonic() - began)


def initial_state(run: Run, layout: Layout) -> TrainState:
    """The state before the run's first step, laid out for its first stage."""
    specs, optimizer = transformer.param_specs(run.model), stage_optimizer(run, next(iter(run.stages.values())))
    # It runs once: on CPUs, whose compiler takes seconds to make random numbers fast, fast is not worth it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    shape = abstract_state(run, next(iter(run.stages.values())), layout)
    make = jax.jit(
        lambda: new_state(initialize(specs, run.seed), optimizer),
        compiler_options=options,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shape),
    )
    with layout.compiling():
        return make()
