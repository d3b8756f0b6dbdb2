"""What a stage of a run is made of: its model, optimizer and compiled programs."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from braeburn.config import MeshConfig, ModelConfig, Run, Stage
from braeburn.data.packing import Batch
from braeburn.errors import UserError
from braeburn.layers.spec import Tree, abstract, initialize, walk
from braeburn.models import decoder
from braeburn.objectives import cross_entropy, distillation
from braeburn.optim.build import build_optimizer
from braeburn.parallel.layout import Layout, can_offload
from braeburn.parallel.mesh import build, resolve
from braeburn.parallel.rules import check
from braeburn.train.compiler_flags import compiler_flags
from braeburn.train.frozen import effective_weights, updating
from braeburn.train.state import TrainState, new_state
from braeburn.train.step import train_step
from braeburn.train.transitions import of_model, stage_transform, trained_specs


@dataclass(frozen=True)
class Program:
    """A stage ready to run."""

    name: str
    stage: Stage
    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    compile_seconds: float


def stage_optimizer(run: Run, name: str, specs: Tree | None = None) -> optax.GradientTransformation:
    """The optimizer of a stage, for all that it trains or for parameters of other `specs`."""
    model = run.models()[name].trained
    if specs is not None:
        return build_optimizer(run.optimizer, run.stages[name], specs, model)
    specs = trained_specs(run, name)
    optimizer = build_optimizer(run.optimizer, run.stages[name], specs, model)
    return updating(optimizer, stage_transform(run, name), specs)


def layout_of(run: Run, name: str, devices: Sequence[Any] | None = None) -> Layout:
    """Where the arrays that a stage trains lie on `devices`, all that there are by default.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the stage.
    """
    if -1 not in (run.stages[name].mesh or run.mesh).sizes.values():
        sizes_of(run, name)  # before the devices are looked for
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(run, name, len(devices))
    if (run.offload.optimizer or run.offload.activations) and not can_offload(devices[0]):
        raise UserError(
            f"offload needs host memory that the device can reach, and {devices[0].device_kind} "
            f"has none; set offload.optimizer to false and offload.activations to []"
        )
    return Layout(run.execution(name, sizes), build(sizes, devices), trained_specs(run, name))


def sizes_of(run: Run, name: str, num_devices: int | None = None) -> MeshConfig:
    """The sizes of a stage's mesh, resolved for a number of devices unless none is inferred.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the stage or the model that
            it leaves.
    """
    mesh = run.stages[name].mesh or run.mesh
    if num_devices is not None:
        mesh = resolve(mesh, num_devices)
    execution = run.execution(name, mesh)
    for model in dict.fromkeys(run.models()[name]):
        specs = walk(decoder.param_specs(model))
        check(
            run,
            name,
            model,
            execution,
            {path: (spec.axes, spec.shape, spec.role) for path, spec in specs},
        )
    return mesh


def stage_step(
    run: Run, name: str, layout: Layout, teacher: ModelConfig | None = None
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The train step of a stage as a traceable function of state and batch, and of the weights of a
    live teacher.

    Args:
        run: the run.
        name: of the stage.
        layout: where what it trains lies.
        teacher: the model of a teacher whose weights are at hand; None where there is none, or a
            cache of its.
    """
    stage, model = run.stages[name], run.models()[name].trained
    execution = layout.execution

    def loss(params: Tree, batch: Batch, *teaching: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        if stage.teacher is None:
            return cross_entropy.loss(params, batch, model, execution)
        online = (teacher, teaching[0]) if teacher else None
        return distillation.loss(params, batch, online, model, stage.distillation, execution)

    others = [of_model(layout, teacher)] if teacher else []
    step = functools.partial(
        train_step,
        loss=loss,
        optimizer=stage_optimizer(run, name),
        accumulation_steps=stage.accumulation_steps,
        spread=lambda function: of_model(layout, model).gradient(function, *others),
        use=effective_weights(stage_transform(run, name), layout.specs),
    )
    if not run.offload.optimizer:
        return step

    def fetch_and_step(
        state: TrainState, batch: Batch, *teaching: Tree
    ) -> tuple[TrainState, dict[str, Any]]:
        on_device = layout.optimizer_state(state.optimizer, on_device=True)
        return step(
            state._replace(optimizer=jax.device_put(state.optimizer, on_device)), batch, *teaching
        )

    return fetch_and_step


def abstract_batch(stage: Stage, layout: Layout) -> Batch:
    """Shapes, types and places of a stage's batches."""
    shape, place = (stage.batch_size, stage.sequence_length), layout.batch()
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32) | {
        "weights": jnp.float32
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in types.items()
    }
    if stage.teacher and stage.distillation.cached:
        kept = (*shape, stage.distillation.kept)
        batch["teacher_ids"] = jax.ShapeDtypeStruct(kept, jnp.int32, sharding=place)
        batch["teacher_log_probs"] = jax.ShapeDtypeStruct(kept, jnp.float32, sharding=place)
    return batch


def abstract_params(layout: Layout) -> Tree:
    """Shapes, types and places of parameters."""
    places, params = layout.parameters(), abstract(layout.specs)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )


def abstract_state(run: Run, name: str, layout: Layout) -> TrainState:
    """Shapes, types and places of the train state of the parameters of a layout in a stage."""
    params = abstract_params(layout)
    optimizer = jax.eval_shape(stage_optimizer(run, name, layout.specs).init, params)
    places = layout.optimizer_state(optimizer)
    optimizer = jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), optimizer, places
    )
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.everywhere()), params, optimizer
    )


def started_state(run: Run, layout: Layout, read: Callable[[Tree], Tree]) -> TrainState:
    """The state before the run's first step with weights from elsewhere, and a fresh optimizer.

    Args:
        run: the run.
        layout: of its first stage.
        read: gives the parameters, in the types and places of abstract ones.
    """
    first = next(iter(run.stages))
    layout = of_model(layout, run.model)
    shape = abstract_state(run, first, layout)
    params = read(abstract_params(layout))
    with layout.compiling():
        make = jax.jit(
            stage_optimizer(run, first, layout.specs).init, out_shardings=places_of(shape.optimizer)
        )
        optimizer = make(params)
    step = jax.make_array_from_callback((), shape.step.sharding, lambda _: np.int32(0))
    return TrainState(step, params, optimizer)


def places_of(tree: Any) -> Any:
    """The shardings of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def lower_stage(
    run: Run, name: str, layout: Layout, teacher: ModelConfig | None = None
) -> jax.stages.Lowered:
    """A stage's train step for the devices of a layout, which need not be there, before it is
    compiled.
    """
    state = abstract_state(run, name, layout)
    out = (places_of(state), layout.everywhere())
    step = jax.jit(stage_step(run, name, layout, teacher), donate_argnums=0, out_shardings=out)
    teaching = [abstract_params(of_model(layout, teacher))] if teacher else []
    return step.lower(state, abstract_batch(run.stages[name], layout), *teaching)


def compile_stage(
    run: Run, name: str, layout: Layout, teacher: ModelConfig | None = None
) -> Program:
    """Compiles a stage's train step.

    The state passed to it is given up, the one it returns takes its memory.
    """
    began = time.monotonic()
    flags = compiler_flags(layout.mesh.devices.flat[0].device_kind)
    with layout.compiling():
        compiled = lower_stage(run, name, layout, teacher).compile(flags or None)
    return Program(name, run.stages[name], compiled, time.monotonic() - began)


def initial_state(run: Run, layout: Layout) -> TrainState:
    """The state before the run's first step, on the mesh of a layout of its first stage."""
    first, layout = next(iter(run.stages)), of_model(layout, run.model)
    optimizer = stage_optimizer(run, first, layout.specs)
    # It runs once: on CPUs, whose compiler takes seconds to make random numbers fast, fast is not
    # worth it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    make = jax.jit(
        lambda: new_state(initialize(layout.specs, run.seed), optimizer),
        compiler_options=options,
        out_shardings=places_of(abstract_state(run, first, layout)),
    )
    with layout.compiling():
        return make()
