"""How the state changes as a stage begins and as it ends, as its transform says."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from braeburn.config import ModelConfig, Run
from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree, map_params_like
from braeburn.models.decoder import param_specs
from braeburn.parallel.layout import Layout
from braeburn.train.state import TrainState
from braeburn.transforms.definition import Change, Found, Transform, transform_of


def of_model(layout: Layout, model: ModelConfig) -> Layout:
    """Where the parameters of a model lie on the mesh of a layout."""
    return dataclasses.replace(layout, specs=param_specs(model))


def stage_transform(run: Run, name: str) -> Transform:
    """What a stage of a run does to its model besides training it."""
    return transform_of(run.stages[name], run.models()[name])


def trained_specs(run: Run, name: str) -> Tree:
    """The specs of all that a stage trains: the model's parameters, and those of its transform."""
    return param_specs(run.models()[name].trained) | stage_transform(run, name).extra_specs


def enter(
    run: Run, name: str, state: TrainState, layout: Layout, batches: Iterable[Batch]
) -> TrainState:
    """The state that a stage trains, from the one that it finds.

    Args:
        run: the run.
        name: of the stage.
        state: of an ordinary model, on the stage's mesh.
        layout: where what the stage trains lies.
        batches: the stage's first, placed; read where the transform measures activations.
    """
    transform, model = stage_transform(run, name), run.models()[name].found
    if transform.enter is None:
        return state
    found = Found(model, state.params, of_model(layout, model), batches, run.seed)
    return changed(state, transform.enter, transform.measure(found), layout)


def leaving(
    run: Run, name: str, state: TrainState, layout: Layout
) -> Callable[[TrainState], TrainState]:
    """The program that turns a stage's last state into that of the ordinary model that the stage
    leaves.

    It is compiled here: a stop that is asked for once the last step is made would otherwise wait
    for the compiler.

    Args:
        run: the run.
        name: of the stage.
        state: of the stage at any step, or an abstract one; only its shapes and places are read.
        layout: where what the stage trains lies.
    """
    change = stage_transform(run, name).leave
    if change is None:
        return lambda state: state
    after = of_model(layout, run.models()[name].left)

    def left(state: TrainState) -> TrainState:
        return _applied(change, state, state.params)

    def abstract(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    like = jax.tree.map(abstract, state, _places_on_device(state, after))
    with after.compiling():
        program = _program(left, after, like).lower(like).compile()
    return lambda state: program(_on_device(state, after))


def changed(state: TrainState, change: Change, decides: Tree, after: Layout) -> TrainState:
    """The state after a change, laid out anew.

    Args:
        state: on the mesh of `after`.
        change: of its parameters and of the optimizer's state alike.
        decides: what the change is given beside the state's trees.
        after: where the new parameters lie.
    """

    def apply(state: TrainState, decides: Tree) -> TrainState:
        return _applied(change, state, decides)

    state = _on_device(state, after)
    with after.compiling():
        return _program(apply, after, state, decides)(state, decides)


def _applied(change: Change, state: TrainState, decides: Tree) -> TrainState:
    optimizer = map_params_like(
        lambda moments: change.moments(moments, decides), state.optimizer, state.params
    )
    return state._replace(params=change.params(state.params, decides), optimizer=optimizer)


def _program(
    change: Callable[..., TrainState], after: Layout, state: TrainState, *further: Tree
) -> Any:
    shape = jax.eval_shape(change, state, *further)
    places = TrainState(
        after.everywhere(), after.parameters(), after.optimizer_state(shape.optimizer)
    )
    return jax.jit(change, out_shardings=places)


def _on_device(state: TrainState, layout: Layout) -> TrainState:
    """The state, with an optimizer's state that is kept on the host brought to the device."""
    return (
        jax.device_put(state, _places_on_device(state, layout))
        if layout.execution.offload.optimizer
        else state
    )


def _places_on_device(state: TrainState, layout: Layout) -> TrainState:
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    if layout.execution.offload.optimizer:
        on_device = jax.tree.map(lambda place: place.with_memory_kind("device"), places.optimizer)
        places = places._replace(optimizer=on_device)
    return places
