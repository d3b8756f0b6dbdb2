"""How the state changes as a stage begins and as it ends, as its transform says."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree, map_params_like
from braeburn.parallel.layout import Layout
from braeburn.train.resolved import ResolvedStage
from braeburn.train.stages import abstract_state
from braeburn.train.state import TrainState
from braeburn.transforms.definition import Change, Found


def enter(resolved: ResolvedStage, state: TrainState, batches: Iterable[Batch]) -> TrainState:
    """The state that a stage trains, from the one that it finds.

    Args:
        resolved: the stage.
        state: of an ordinary model, on the stage's mesh.
        batches: the stage's first, placed; read where the transform measures activations.
    """
    transform, model = resolved.transform, resolved.models.found
    if transform.enter is None:
        return state
    layout, seed = resolved.layout_of(model), resolved.run.seed
    decides = transform.measure(Found(model, state.params, layout, batches, seed))
    return changed(state, transform.enter, decides, resolved.layout)


def leaving(resolved: ResolvedStage) -> Callable[[TrainState], TrainState]:
    """The program that turns a stage's last state into that of the ordinary model that the stage
    leaves.

    It is compiled here: a stop that is asked for once the last step is made would otherwise wait
    for the compiler.
    """
    change = resolved.transform.leave
    if change is None:
        return lambda state: state
    after, state = resolved.layout_of(resolved.models.left), abstract_state(resolved)

    def left(state: TrainState) -> TrainState:
        return _applied(change, state, state.params)

    def abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    like = jax.tree.map(abstract, state, _shardings_on_device(state, after))
    with after.compiling():
        program = _program(left, after, like).lower(like).compile()
    return lambda state: program(_on_device(state, after))


def changed(state: TrainState, change: Change, decides: Tree, after: Layout) -> TrainState:
    """The state after a change, laid out anew.

    Args:
        state: on the mesh of `after`.
        change: of its parameters, and of the optimizer's state in the same way.
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
    shardings = TrainState(
        after.everywhere(), after.parameters(), after.optimizer_state(shape.optimizer)
    )
    return jax.jit(change, out_shardings=shardings)


def _on_device(state: TrainState, layout: Layout) -> TrainState:
    """The state, with an optimizer's state that is kept on the host brought to the device."""
    return (
        jax.device_put(state, _shardings_on_device(state, layout))
        if layout.execution.offload.optimizer
        else state
    )


def _shardings_on_device(state: TrainState, layout: Layout) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    if layout.execution.offload.optimizer:
        on_device = jax.tree.map(
            lambda sharding: sharding.with_memory_kind("device"), shardings.optimizer
        )
        shardings = shardings._replace(optimizer=on_device)
    return shardings
