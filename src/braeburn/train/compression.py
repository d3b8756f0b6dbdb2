"""What a stage does to a model besides training it: masks that learn what to cut, weights rounded
as they will ship.

Between stages the state is always that of an ordinary model. Within one it may also hold the scores
of masks or the factors of scales, and the weights are then used otherwise than they are stored.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from braeburn.config import ModelConfig, Pruning, Run
from braeburn.data.packing import Batch
from braeburn.layers.spec import Tree, map_params_like, map_specs
from braeburn.models.decoder import param_specs
from braeburn.parallel.layout import Layout
from braeburn.train.state import TrainState
from braeburn.train.step import Use
from braeburn.transforms import importance
from braeburn.transforms.pruning import kept, masked, masks, score_specs, sliced
from braeburn.transforms.quantization import factor_specs, quantized

# Beside the parameters of the model, in one tree with them.
MASKS, FACTORS = "masks", "factors"


def of_model(layout: Layout, model: ModelConfig) -> Layout:
    """Where the parameters of a model lie on the mesh of a layout."""
    return dataclasses.replace(layout, specs=param_specs(model))


def trained_specs(run: Run, name: str) -> Tree:
    """The specs of all that a stage trains: the model's parameters, scores of masks, factors of
    scales.
    """
    stage, model = run.stages[name], run.models()[name].trained
    specs = param_specs(model)
    if stage.pruning and stage.pruning.learned:
        return specs | {MASKS: score_specs(model, stage.pruning.keep)}
    factors = factor_specs(specs, stage.quantization) if stage.quantization else {}
    return specs | ({FACTORS: factors} if factors else {})


def temperature(pruning: Pruning, total_steps: int, step: Any) -> Float[Array, ""]:
    """That of the masks at a 0-based step of the stage: falls by equal ratios, and is 0 for the
    last `exact` steps.
    """
    soft_steps = max(1, round((1 - pruning.exact) * total_steps))
    progress = jnp.asarray(step, jnp.float32) / soft_steps
    falling = pruning.temperature * (pruning.final_temperature / pruning.temperature) ** progress
    return jnp.where(progress < 1, falling, 0.0)


def use_of(run: Run, name: str) -> Use | None:
    """How a stage uses what it trains: (parameters, steps of the stage) -> weights; None where as
    they are.
    """
    stage, model = run.stages[name], run.models()[name].trained
    pruning, quantization = stage.pruning, stage.quantization

    def use_masked(params: Tree, step: Any) -> Tree:
        assert pruning
        now = masks(params[MASKS], pruning.keep, model, temperature(pruning, stage.steps, step))
        return masked(_weights(params), now, model)

    def use_quantized(params: Tree, step: Any) -> Tree:
        assert quantization
        return quantized(
            _weights(params), params.get(FACTORS, {}), param_specs(model), quantization
        )

    if pruning and pruning.learned:
        return use_masked
    return use_quantized if quantization else None


def enter(
    run: Run, name: str, state: TrainState, layout: Layout, batches: Iterable[Batch]
) -> TrainState:
    """The state that a stage trains, from the one that it finds.

    Args:
        run: the run.
        name: of the stage.
        state: of an ordinary model, on the stage's mesh.
        layout: where what the stage trains lies.
        batches: the stage's first, placed; those of `calibration_tokens` are read where activations
            are measured.
    """
    pruning, found = run.stages[name].pruning, run.models()[name].found
    if not pruning:
        factors = {key: specs for key, specs in layout.specs.items() if key == FACTORS}
        ones = map_specs(lambda _, spec: np.ones(spec.shape, np.float32), factors)
        return _with(state, ones, layout) if factors else state
    scores = scores_of(pruning, found, state.params, of_model(layout, found), run.seed, batches)
    if pruning.learned:
        return _with(state, {MASKS: importance.standardised(scores)}, layout)
    return cut(state, scores, pruning, found, layout)


def scores_of(
    pruning: Pruning,
    model: ModelConfig,
    params: Tree,
    layout: Layout,
    seed: int,
    batches: Iterable[Batch],
) -> Tree:
    """The importance of the units of a model, by axis, as the pruning's method measures it without
    training.

    Args:
        pruning: its method, and the axes to look at.
        model: sizes and RoPE base.
        params: its parameters.
        layout: where they lie, and the type to compute activations in.
        seed: of the random method.
        batches: placed, read where activations are measured.
    """
    if pruning.method == "magnitude":
        return jax.jit(lambda params: importance.magnitude(params, model, pruning.keep))(params)
    if pruning.method == "random":
        # As NumPy has it, an array that is alike in all processes belongs to no device.
        return jax.tree.map(np.asarray, importance.random(model, pruning.keep, seed))
    measure = importance.activation_importance(layout, model, pruning.keep)
    sums = functools.reduce(
        lambda a, b: jax.tree.map(jnp.add, a, b), (measure(params, batch) for batch in batches)
    )
    return importance.activation(sums)


def leaving(
    run: Run, name: str, state: TrainState, layout: Layout
) -> Callable[[TrainState], TrainState]:
    """The program that turns a stage's last state into that of the ordinary model that the stage
    leaves.

    That is the model of the units kept, or of rounded weights. It is compiled here: a stop that is
    asked for once the last step is made would otherwise wait for the compiler.

    Args:
        run: the run.
        name: of the stage.
        state: of the stage at any step, or an abstract one; only its shapes and places are read.
        layout: where what the stage trains lies.
    """
    stage, models = run.stages[name], run.models()[name]
    left = of_model(layout, models.left)
    if stage.pruning and stage.pruning.learned:
        change = _cutting(stage.pruning, models.found)
        return _compiled(lambda state: change(state, state.params[MASKS]), left, state)
    use = use_of(run, name)
    if not use:
        return lambda state: state
    return _compiled(
        lambda s: _without_extras(s)._replace(params=use(s.params, stage.steps)), left, state
    )


def _weights(params: Tree) -> Tree:
    return {key: value for key, value in params.items() if key not in (MASKS, FACTORS)}


def _without_extras(state: TrainState) -> TrainState:
    optimizer = map_params_like(_weights, state.optimizer, state.params)
    return state._replace(params=_weights(state.params), optimizer=optimizer)


def _with(state: TrainState, extras: Tree, layout: Layout) -> TrainState:
    """The state with further parameters, of which the optimizer remembers nothing."""

    def join(state: TrainState, extras: Tree) -> TrainState:
        zeros = jax.tree.map(jnp.zeros_like, extras)
        optimizer = map_params_like(lambda tree: tree | zeros, state.optimizer, state.params)
        return state._replace(params=state.params | extras, optimizer=optimizer)

    return _changed(join, layout, state, extras)


def cut(
    state: TrainState, scores: Tree, pruning: Pruning, model: ModelConfig, after: Layout
) -> TrainState:
    """The state with only the units of the highest scores, its optimizer's moments cut alike.

    Args:
        state: of a model, and perhaps of masks.
        scores: of its units.
        pruning: how many stay.
        model: the model before.
        after: where what is left of it lies.
    """
    return _changed(_cutting(pruning, model), after, state, scores)


def _cutting(pruning: Pruning, model: ModelConfig) -> Callable[[TrainState, Tree], TrainState]:
    specs = param_specs(model)

    def change(state: TrainState, scores: Tree) -> TrainState:
        state, indices = _without_extras(state), kept(scores, pruning.keep, model)
        optimizer = map_params_like(
            lambda tree: sliced(tree, indices, specs), state.optimizer, specs
        )
        return state._replace(params=sliced(state.params, indices, specs), optimizer=optimizer)

    return change


def _changed(
    change: Callable[..., TrainState], after: Layout, state: TrainState, *further: Tree
) -> TrainState:
    """`change(state, ...)`, laid out anew."""
    state = _on_device(state, after)
    with after.compiling():
        return _program(change, after, state, *further)(state, *further)


def _compiled(
    change: Callable[[TrainState], TrainState], after: Layout, state: TrainState
) -> Callable[[TrainState], TrainState]:
    """The same for later states like this one, compiled now."""

    def abstract(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    like = jax.tree.map(abstract, state, _places_on_device(state, after))
    with after.compiling():
        program = _program(change, after, like).lower(like).compile()
    return lambda state: program(_on_device(state, after))


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
