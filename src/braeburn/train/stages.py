"""The programs of a stage, and the shapes of what they work on."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree, abstract, initialize
from braeburn.objectives import distillation
from braeburn.objectives.definition import objective_of, projected_text_loss, text_loss
from braeburn.objectives.vocabulary import Projection
from braeburn.parallel.layout import Layout
from braeburn.train.compiler_flags import compiler_flags
from braeburn.train.frozen import effective_weights
from braeburn.train.pipelined import pipelined
from braeburn.train.resolved import ResolvedStage
from braeburn.train.state import TrainState, new_state
from braeburn.train.step import accumulated, train_step


@dataclass(frozen=True)
class Program:
    """A stage ready to run."""

    stage: ResolvedStage
    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    compile_seconds: float


def stage_step(resolved: ResolvedStage) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The train step of a stage as a traceable function of state and batch, and of the weights of
    an online teacher.
    """
    run, stage, layout = resolved.run, resolved.stage, resolved.layout
    model, teacher = resolved.models.trained, resolved.teacher
    execution = resolved.execution

    objective = objective_of(stage.objective, model)

    def loss(params: Tree, batch: Batch, *teaching: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        if stage.teacher is None:
            return text_loss(params, batch, objective, model, execution)
        online = (teacher, teaching[0]) if teacher else None
        return distillation.loss(params, batch, online, model, stage.distillation, execution)

    def loss_of_hidden(
        projection: Projection, batch: Batch, taught: Projection | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        within = execution.of_stage
        if stage.teacher is None:
            return projected_text_loss(projection, batch, objective, within)
        settings = (model.z_loss, within)
        return distillation.projected_loss(projection, batch, taught, stage.distillation, settings)

    others = [resolved.layout_of(teacher)] if teacher else []
    # Devices sum their gradients once, after all microbatches.
    if execution.mesh.pipeline > 1:
        models = (model, teacher)
        local = pipelined(models, execution, loss_of_hidden, stage.accumulation_steps)
    else:
        local = accumulated(loss, stage.accumulation_steps)
    step = functools.partial(
        train_step,
        gradients=resolved.layout_of(model).gradient(local, *others),
        optimizer=resolved.optimizer,
        effective=effective_weights(resolved.transform, resolved.specs),
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


def abstract_batch(resolved: ResolvedStage) -> Batch:
    """Shapes, types and shardings of a stage's batches."""
    stage = resolved.stage
    shape, sharding = (stage.batch_size, stage.sequence_length), resolved.layout.of_step.batch()
    types = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32) | {
        "weights": jnp.float32
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in types.items()
    }
    if stage.teacher and stage.distillation.cached:
        top_k = (*shape, stage.distillation.kept)
        batch["teacher_ids"] = jax.ShapeDtypeStruct(top_k, jnp.int32, sharding=sharding)
        batch["teacher_log_probs"] = jax.ShapeDtypeStruct(top_k, jnp.float32, sharding=sharding)
    return batch


def abstract_params(layout: Layout) -> Tree:
    """Shapes, types and shardings of parameters."""
    shardings, params = layout.parameters(), abstract(layout.specs)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        shardings,
    )


def abstract_state(resolved: ResolvedStage, layout: Layout | None = None) -> TrainState:
    """Shapes, types and shardings of the train state of a stage.

    Args:
        resolved: the stage.
        layout: of the parameters in the state; by default of all that the stage trains.
    """
    layout = layout or resolved.layout
    params = abstract_params(layout)
    optimizer = jax.eval_shape(resolved.optimizer_of(layout.specs).init, params)
    optimizer = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        optimizer,
        layout.optimizer_state(optimizer),
    )
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.everywhere()), params, optimizer
    )


def started_state(first: ResolvedStage, read: Callable[[Tree], Tree]) -> TrainState:
    """The state before the run's first step with weights from elsewhere, and a fresh optimizer.

    Args:
        first: the run's first stage.
        read: gives the parameters, in the types and shardings of abstract ones.
    """
    layout = first.layout_of(first.models.found)
    shape = abstract_state(first, layout)
    params = read(abstract_params(layout))
    with layout.compiling():
        make = jax.jit(
            first.optimizer_of(layout.specs).init, out_shardings=shardings_of(shape.optimizer)
        )
        optimizer = make(params)
    step = jax.make_array_from_callback((), shape.step.sharding, lambda _: np.int32(0))
    return TrainState(step, params, optimizer)


def initial_state(first: ResolvedStage) -> TrainState:
    """The state before the run's first step, with random weights, on the mesh of its first
    stage.
    """
    layout = first.layout_of(first.models.found)
    optimizer = first.optimizer_of(layout.specs)
    # It runs once: on CPUs, whose compiler takes seconds to make random numbers fast, fast is not
    # worth it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    make = jax.jit(
        lambda: new_state(initialize(layout.specs, first.run.seed), optimizer),
        compiler_options=options,
        out_shardings=shardings_of(abstract_state(first, layout)),
    )
    with layout.compiling():
        return make()


def shardings_of(tree: Any) -> Any:
    """The shardings of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def lower_stage(resolved: ResolvedStage) -> jax.stages.Lowered:
    """A stage's train step for the devices of its layout, which need not be there, before it is
    compiled.
    """
    state = abstract_state(resolved)
    out = (shardings_of(state), resolved.layout.everywhere())
    step = jax.jit(stage_step(resolved), donate_argnums=0, out_shardings=out)
    teacher = resolved.teacher
    teaching = [abstract_params(resolved.layout_of(teacher))] if teacher else []
    return step.lower(state, abstract_batch(resolved), *teaching)


def compile_stage(resolved: ResolvedStage) -> Program:
    """Compiles a stage's train step.

    The state passed to it is given up, the one it returns takes its memory.
    """
    began = time.monotonic()
    layout = resolved.layout
    kind = layout.mesh.devices.flat[0].device_kind
    flags = compiler_flags(kind, layout.execution.precision)
    with layout.compiling():
        compiled = lower_stage(resolved).compile(flags or None)
    return Program(resolved, compiled, time.monotonic() - began)
