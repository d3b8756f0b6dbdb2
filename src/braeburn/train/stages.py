"""What a stage of a run is made of: its model, optimizer and compiled programs."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from braeburn.config import Model, Run, Stage
from braeburn.model import transformer
from braeburn.model.spec import Tree, abstract, initialize
from braeburn.optim.build import build_optimizer
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


def stage_step(run: Run, stage: Stage) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The train step of a stage as a traceable function of state and batch."""
    model = model_of_stage(run.model, stage)

    def loss(params: Tree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return transformer.loss(params, batch, model, run.precision, run.remat)

    return functools.partial(
        train_step, loss=loss, optimizer=stage_optimizer(run, stage), accumulation_steps=stage.accumulation_steps
    )


def abstract_batch(stage: Stage) -> Batch:
    """Shapes and types of a stage's batches."""
    shape = (stage.batch_size, stage.sequence_length)
    integers = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "targets", "positions", "segment_ids")
    }
    return integers | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32)}


def abstract_state(run: Run, stage: Stage) -> TrainState:
    """Shapes and types of the train state, the same in every stage."""
    params = abstract(transformer.param_specs(run.model))
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(stage_optimizer(run, stage).init, params)
    )


def compile_stage(run: Run, name: str) -> Program:
    """Compiles a stage's train step. The state passed to it is given up, the one it returns takes its memory."""
    began = time.monotonic()
    stage = run.stages[name]
    step = jax.jit(stage_step(run, stage), donate_argnums=0)
    compiled = step.lower(abstract_state(run, stage), abstract_batch(stage)).compile()
    return Program(name, stage, stage_optimizer(run, stage), compiled, time.monotonic() - began)


def initial_state(run: Run) -> TrainState:
    """The state before the run's first step."""
    specs, optimizer = transformer.param_specs(run.model), stage_optimizer(run, next(iter(run.stages.values())))
    # It runs once: on CPUs, whose compiler takes seconds to make random numbers fast, fast is not worth it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return jax.jit(lambda: new_state(initialize(specs, run.seed), optimizer), compiler_options=options)()
