"""A mixture of experts from a trained dense model (sparse upcycling, arXiv 2212.05055)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braeburn.config import LayerConfig, ModelConfig, validate
from braeburn.config.upcycling import Upcycling
from braeburn.disk import check_new
from braeburn.errors import UserError
from braeburn.layers.spec import ParamSpec, Tree, abstract, initialize, map_specs, walk
from braeburn.models.decoder import param_specs, stacks
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.state import TrainState
from braeburn.train.stored import Pieces, StoredArray
from braeburn.train.trained import found_run, ordinary_step, read_tokenizer, received_run

# Kinds of feed-forward sublayers that an expert can be a copy of -> the activation of the expert.
ACTIVATIONS: dict[str, Literal["silu", "gelu"]] = {"swiglu": "silu", "geglu": "gelu"}
# Names of an expert's matrices begin with it, and are else those of a dense layer's.
_PREFIX = "expert_"


def upcycle(directory: Path, out: Path, upcycling: Upcycling) -> ModelConfig:
    """Makes a run directory whose checkpoint 0 is a run's newest with experts in place of the
    feed-forward sublayers of some layers.

    Each expert is a copy of the sublayer with noise of its own, and routers are drawn as those of a
    new model are, from the seed of the run. The weights of a token's experts sum to one, so that
    without noise the result computes what the dense model does. There is no optimizer's state.
    Weights are copied one layer after the other; of several processes, each writes its share.

    Args:
        directory: the run.
        out: the folder to make; several processes must all see it.
        upcycling: which layers get how many experts.

    Returns:
        The sparse model.

    Raises:
        UserError: there is no checkpoint, a layer cannot get experts, or `out` is in use.
    """
    check_new(out)
    run = received_run(directory)
    step, tokenizer = ordinary_step(run, directory), read_tokenizer(directory)
    model, length = run.model_at(step)
    model = model.model_copy(update={"max_position_embeddings": length})
    sparse = sparse_model(model, upcycling)
    stored = Checkpoints(directory).stored_params(step, abstract(param_specs(model)))
    params = _params(_Dense(model, dict(walk(stored))), sparse, upcycling.noise, run.seed)
    changes = {
        "name": f"{run.name[:90]}-upcycled",
        "model": sparse,
        "stages": {},
        "initial_weights": None,
    }
    made = validate(run.model_copy(update=changes).model_dump())
    found_run(out, made, TrainState(np.int32(0), params, None), tokenizer, "upcycle", directory)
    return sparse


def sparse_model(model: ModelConfig, upcycling: Upcycling) -> ModelConfig:
    """The model with experts in place of the feed-forward sublayers of some layers.

    Raises:
        UserError: no layer would get experts, or one of those that would has no sublayer that an
            expert can be a copy of.
    """
    every, begin = upcycling.every, model.num_layers - model.tail_layers
    if every > model.num_layers:
        raise UserError(
            f"--every {every} gives none of the {model.num_layers} layers experts; use --every "
            f"{model.num_layers} or less"
        )
    layers = [
        layer if (number + 1) % every else _sparse_layer(model, upcycling, number, layer)
        for number, layer in enumerate(model.layer_configs)
    ]
    period = min(begin, math.lcm(len(model.pattern), every))
    changes: dict[str, Any] = {"pattern": tuple(layers[:period])}
    if model.tail_pattern:
        period = math.lcm(len(model.tail_pattern), every)
        # Its repeats are whole, unlike the last one of the other layers.
        period = model.tail_layers if model.tail_layers % period else period
        changes["tail_pattern"] = tuple(layers[begin : begin + period])
    return ModelConfig.model_validate(model.model_copy(update=changes).model_dump())


def _sparse_layer(
    model: ModelConfig, upcycling: Upcycling, number: int, layer: LayerConfig
) -> LayerConfig:
    """A layer of a model with experts in place of its feed-forward sublayer."""
    kind = layer.feed_forward.kind
    if kind not in ACTIVATIONS:
        raise UserError(
            f"layer {number} has feed_forward.kind={kind!r}, and experts are copies of "
            f"{' or '.join(map(repr, ACTIVATIONS))}; upcycle a dense run"
        )
    experts = upcycling.sublayer(model.ffn_dim, ACTIVATIONS[kind])
    return layer.model_copy(update={"feed_forward": experts})


@dataclass(frozen=True)
class _Dense:
    """The weights that experts are copies of.

    Attributes:
        model: what they are of.
        arrays: by path, as the checkpoint has them.
    """

    model: ModelConfig
    arrays: Mapping[str, StoredArray]

    @cached_property
    def _places(self) -> dict[int, tuple[str, int]]:
        """Where the arrays of each layer are: the path that they have in common, and the index."""
        return {
            number: ("/".join(stack.path), index)
            for stack in stacks(self.model)
            for index, number in enumerate(stack.numbers)
        }

    def of_layers(self, numbers: Sequence[int], name: str) -> list[tuple[StoredArray, int]]:
        """For each of some layers, the array that holds its weight of a name, and its index there;
        nothing where these layers have no such weight.
        """
        places = [self._places[number] for number in numbers]
        paths = [(f"{path}/{name}", index) for path, index in places]
        return [(self.arrays[path], index) for path, index in paths if path in self.arrays]


def _params(dense: _Dense, sparse: ModelConfig, noise: float, seed: int) -> Tree:
    """All parameters of a sparse model, each made as it is written."""
    numbers = {"/".join(stack.path): stack.numbers for stack in stacks(sparse)}

    def pieces(path: str, spec: ParamSpec) -> Pieces:
        if not spec.stacked:
            return Pieces.of(dense.arrays[path])
        home, _, name = path.rpartition("/")
        same = dense.of_layers(numbers[home], name)
        if not same and spec.role == "router":
            return Pieces.whole(spec.shape, np.float32, lambda: _drawn(path, spec, seed))
        found = same or dense.of_layers(numbers[home], name.removeprefix(_PREFIX))

        def of_layer(index: int) -> np.ndarray:
            array, place = found[index]
            if same:
                return array[place]
            generator = np.random.default_rng([seed, numbers[home][index], *name.encode()])
            return _copies(array[place], spec.shape[1], noise, generator)

        return Pieces.of_layers(spec.shape, found[0][0].dtype, of_layer)

    return map_specs(pieces, param_specs(sparse))


def _drawn(path: str, spec: ParamSpec, seed: int) -> np.ndarray:
    """The initial values that a parameter has in a new model."""
    return np.asarray(initialize({path: spec}, seed)[path])


def _copies(
    matrix: np.ndarray, count: int, noise: float, generator: np.random.Generator
) -> np.ndarray:
    """As many copies of a matrix, each with noise of its own."""
    precise = matrix.astype(np.float32)
    deviation = np.float32(noise * np.sqrt(np.mean(np.square(precise))))
    copies = np.empty((count, *matrix.shape), matrix.dtype)
    for copy in copies:
        drawn = generator.standard_normal(matrix.shape, np.float32) if noise else 0.0
        copy[...] = precise + deviation * drawn
    return copies
