"""The layers of a model dealt out to the stages of a pipeline.

Stored, the weights are split over the devices of a pipeline as over those of `fsdp`: each has a
part of every layer. For a step each device is sent its own layers, whole along `pipeline`, and
afterwards sends their gradients back the same way. This costs one exchange of the weights a step.
In return nothing else needs to know of stages: not checkpoints, optimizers or exports. Any number
of layers can be dealt out in any way, and the embedding and the head, as well as the optimizer's
state, weigh on no device more than on another.

The embedding is used by the first stage and the head by the last: a device holds one table, that
of its own stage.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from braeburn.config import Execution, ModelConfig, Segment
from braeburn.data.packing import Batch
from braeburn.layers.spec import ParamSpec, Tree, count_active, walk
from braeburn.layers.weights import gathered
from braeburn.models import decoder
from braeburn.models.decoder import Carry, Packed, Surroundings, in_pattern, layer_specs
from braeburn.parallel.collectives import PIPELINE, all_gather, all_to_all, axis_index
from braeburn.parallel.rules import mesh_axes

# Stages of equal depth are kept where others would make the longest less than this part shorter.
WORTH = 0.05


@dataclass(frozen=True)
class Division:
    """Which repeats of each segment's pattern every stage has.

    Attributes:
        rows: by the name of the segment, of each stage, the first repeat and how many.
    """

    rows: dict[str, tuple[tuple[int, int], ...]]

    def longest(self, segment: str) -> int:
        """The most repeats of a segment that a stage has."""
        return max(count for _, count in self.rows[segment])

    def is_even(self, segment: str) -> bool:
        """Whether every stage has as many repeats of a segment."""
        return len({count for _, count in self.rows[segment]}) == 1


@functools.cache
def divided(model: ModelConfig, num_stages: int) -> Division:
    """The division of a model whose longest stage is the shortest, the head counted in.

    The length of a layer is the number of its weights that a token is multiplied by. Where stages
    of equal depth are nearly as good, they are taken: they need no padding.

    Args:
        model: whose repeats are divided, at least as many as stages.
        num_stages: of the pipeline.
    """
    units = [segment for segment in model.segments for _ in range(segment.repeats)]
    costs = [_cost(segment, model) for segment in units]
    head = model.vocab_size * model.d_model
    counts = _balanced(costs, head, num_stages)
    if len(units) % num_stages == 0:
        even = [len(units) // num_stages] * num_stages
        if _longest(costs, head, even) <= (1 + WORTH) * _longest(costs, head, counts):
            counts = even
    rows: dict[str, list[tuple[int, int]]] = {segment.name: [] for segment in model.segments}
    begins = {}
    first = 0
    for segment in model.segments:
        begins[segment.name] = first
        first += segment.repeats
    end = 0
    for count in counts:
        begin, end = end, end + count
        for segment in model.segments:
            offset = begins[segment.name]
            low = min(max(begin - offset, 0), segment.repeats)
            high = min(max(end - offset, 0), segment.repeats)
            rows[segment.name].append((low, high - low))
    return Division({name: tuple(each) for name, each in rows.items()})


def layer_costs(model: ModelConfig, num_stages: int) -> tuple[list[int], int]:
    """The weights that a token is multiplied by: those of each stage, and of the head."""
    division = divided(model, num_stages)
    lengths = [0] * num_stages
    for segment in model.segments:
        cost = _cost(segment, model)
        for stage, (_, count) in enumerate(division.rows[segment.name]):
            lengths[stage] += count * cost
    return lengths, model.vocab_size * model.d_model


def _cost(segment: Segment, model: ModelConfig) -> int:
    """The weights of one repeat that a token is multiplied by."""
    return sum(count_active(layer_specs(layer, model)) for layer in segment.pattern)


def _longest(costs: list[int], head: int, counts: list[int]) -> int:
    ends = np.cumsum(counts)
    lengths = [sum(costs[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    lengths[-1] += head
    return max(lengths)


def _balanced(costs: list[int], head: int, num_stages: int) -> list[int]:
    """How many of consecutive costs each stage has, for the longest stage to be the shortest; of
    several such divisions the most even.
    """
    sums = [0, *np.cumsum(costs).tolist()]

    @functools.cache
    def best(first: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """(longest, sum of squares, counts) of the stages of all costs from one on."""
        if stages == 1:
            length = sums[-1] - sums[first] + head
            return length, length**2, (len(costs) - first,)
        found = []
        for count in range(1, len(costs) - first - stages + 2):
            length = sums[first + count] - sums[first]
            longest, squares, counts = best(first + count, stages - 1)
            found.append((max(length, longest), squares + length**2, (count, *counts)))
        return min(found)

    return list(best(0, num_stages)[2])


class StageWeights(NamedTuple):
    """What a device of a pipeline holds during a step, or the gradients of that.

    Attributes:
        layers: by the name of the segment, arrays [stages of the device, repeats, ...].
        table: the embedding on the first device, and the head on the last.
        final_norm: float32 [D], whole.
    """

    layers: Tree
    table: Float[Array, "v d"]
    final_norm: Float[Array, " D"]


def travels_in(spec: ParamSpec, within: Execution) -> np.dtype:
    """The type in which a weight is dealt out: that in which it is multiplied, unless it is still
    to be gathered, from float32, within its stage.

    Args:
        spec: of the whole parameter.
        within: how the layers of a stage are carried out.
    """
    if spec.role != "matrix":
        return jnp.dtype(jnp.float32)
    stored, used = (
        mesh_axes(spec.axes, spec.shape, kind, within, spec.role)
        for kind in ("parameters", "activations")
    )
    whole = all(set(one) <= set(other) for one, other in zip(stored, used, strict=True))
    return jnp.dtype(within.precision.compute if whole else jnp.float32)


@dataclass(frozen=True)
class StagedModel:
    """A model on a pipeline, as each device carries it out inside `shard_map`.

    Attributes:
        model: what is computed.
        execution: how it is carried out, with the mesh of the whole pipeline.
    """

    model: ModelConfig
    execution: Execution

    @functools.cached_property
    def within(self) -> Execution:
        """How the layers of a stage are carried out, by the devices that have the same stage."""
        return self.execution.of_stage

    @functools.cached_property
    def division(self) -> Division:
        """Which layers each stage has."""
        mesh = self.execution.mesh
        return divided(self.model, mesh.pipeline * mesh.stages_per_device)

    def dealt(self, params: Tree) -> tuple[StageWeights, Callable[[StageWeights], Tree]]:
        """The weights of this device's stages, and the way back for their gradients.

        Args:
            params: this device's part of each parameter, float32.

        Returns:
            The weights in the types that they travel in, and a function from float32 gradients with
            respect to them to gradients with respect to `params`, which are summed over the devices
            of the pipeline where these share a part.
        """
        specs = dict(walk(decoder.param_specs(self.model)))

        def cast(path: Any, leaf: Array) -> Array:
            return leaf.astype(travels_in(specs["/".join(key.key for key in path)], self.within))

        _, back = jax.vjp(self._deal, params)
        weights = self._deal(jax.tree.map_with_path(cast, params))
        return weights, lambda gradients: back(gradients)[0]

    def _deal(self, params: Tree) -> StageWeights:
        specs = decoder.param_specs(self.model)
        layers = {
            segment.name: jax.tree.map(
                functools.partial(self._rows, segment.name),
                specs[segment.name],
                params[segment.name],
            )
            for segment in self.model.segments
            if self.division.longest(segment.name)
        }
        table = self._whole(params["embedding"], specs["embedding"])
        if "head" in params:
            head = self._whole(params["head"], specs["head"])
            mesh = self.execution.mesh
            table = jnp.where(axis_index(PIPELINE, mesh) == mesh.pipeline - 1, head, table)
        norm = gathered(params["final_norm"], specs["final_norm"], self.execution)
        return StageWeights(layers, table, norm)

    def _split(self, spec: ParamSpec) -> int | None:
        """The dimension that a stored parameter is split along `pipeline` in."""
        stored = mesh_axes(spec.axes, spec.shape, "parameters", self.execution, spec.role)
        return next((dim for dim, along in enumerate(stored) if PIPELINE in along), None)

    def _whole(self, weight: Array, spec: ParamSpec) -> Array:
        """A weight joined along `pipeline`."""
        dim = self._split(spec)
        return weight if dim is None else all_gather(weight, PIPELINE, dim, self.execution.mesh)

    def _rows(self, segment: str, spec: ParamSpec, weight: Array) -> Array:
        """The repeats of a segment that this device has, [stages of the device, repeats, ...]; the
        last are padding where other stages have more.
        """
        mesh = self.execution.mesh
        own = self._places(segment)
        if spec.role == "norm":
            weight = gathered(weight, spec, self.execution)
        dim = None if spec.role == "norm" else self._split(spec)
        if dim is None:
            rows = jnp.take(weight, jnp.asarray(own)[axis_index(PIPELINE, mesh)], axis=0)
        else:
            # What goes to each device, in the order of the devices.
            leaving = jnp.take(weight, jnp.asarray(own.reshape(-1)), axis=0)
            rows = all_to_all(leaving, PIPELINE, 0, dim, mesh)
        return rows.reshape(mesh.stages_per_device, -1, *rows.shape[1:])

    def _places(self, segment: str) -> np.ndarray:
        """The repeats of each device, [devices, stages of a device x repeats]; padding repeats the
        first.
        """
        mesh, longest = self.execution.mesh, self.division.longest(segment)
        rows = self.division.rows[segment]
        places = np.zeros((mesh.pipeline, mesh.stages_per_device, longest), np.int32)
        for stage, (first, count) in enumerate(rows):
            turn, device = divmod(stage, mesh.pipeline)
            places[device, turn, :count] = np.arange(first, first + count)
        return places.reshape(mesh.pipeline, -1)

    def counts(self) -> dict[str, np.ndarray]:
        """How many repeats of each segment the stages of each device have, [devices, stages of a
        device], of those segments of which stages have different numbers.
        """
        mesh = self.execution.mesh
        return {
            segment.name: np.array(
                [count for _, count in self.division.rows[segment.name]], np.int32
            )
            .reshape(mesh.stages_per_device, mesh.pipeline)
            .T
            for segment in self.model.segments
            if not self.division.is_even(segment.name)
        }

    def first_carry(self, table: Array, microbatch: Batch, layers: Tree) -> Carry:
        """What the first stage reads.

        Args:
            table: the embedding, this device's part.
            microbatch: its tokens.
            layers: of a stage.
        """
        x_BTD = decoder.embedded(table, microbatch["inputs"], self.model, self.within)
        carry = Carry(x_BTD, None, None)
        if not decoder.reuses(self.model):
            return carry
        segment = self.model.segments[0]
        rows = in_pattern(segment, layers[segment.name])
        first = jax.tree.map(lambda leaf: leaf[0], (rows, [None] * len(rows)))
        repeat = self._repeats(microbatch, True)[segment.name]
        return carry._replace(shared=decoder.nothing_shared(repeat, carry, first))

    def _repeats(self, microbatch: Batch, rematerialize: bool) -> dict[str, decoder.Repeat]:
        surroundings = Surroundings(
            Packed(microbatch["segment_ids"], self.within), token_weights=microbatch.get("weights")
        )
        positions = jnp.asarray(microbatch["positions"])
        return decoder.repeat_functions(
            positions, surroundings, self.model, self.within, rematerialize
        )

    def run(
        self, layers: Tree, carry: Carry, microbatch: Batch, counts: dict[str, Array]
    ) -> tuple[Carry, Any]:
        """The layers of one stage.

        Args:
            layers: by the name of the segment, arrays [repeats, ...].
            carry: from the stage before, without a report.
            microbatch: its `positions` and `segment_ids`, int32 [B, T]; its `weights`, where
                layers are to add to the loss and the metrics.
            counts: the repeats of the stage, of segments of which stages have different numbers.

        Returns:
            What the next stage reads, and the sums that these layers add to the loss and the
            metrics.
        """
        if "weights" in microbatch:
            carry = carry._replace(report=decoder.empty_report(self.model))
        # Where stages have different numbers, `_through` sees to what is kept.
        repeats_of = functools.cache(functools.partial(self._repeats, microbatch))
        for segment in self.model.segments:
            if segment.name in layers:
                rows = in_pattern(segment, layers[segment.name])
                count = counts.get(segment.name)
                repeat = repeats_of(count is None)[segment.name]
                carry = self._through(repeat, carry, rows, count)
        return carry._replace(report=None), carry.report

    def _through(
        self, repeat: decoder.Repeat, carry: Carry, rows: list[Any], count: Array | None
    ) -> Carry:
        """The repeats of one segment, of which those from `count` on are padding."""
        num_rows = jax.tree.leaves(rows)[0].shape[0]
        states = [None] * len(rows)

        def one(carry: Carry, item: tuple[Any, Any]) -> tuple[Carry, None]:
            return repeat(carry, (item[1], states))[0], None

        def one_or_none(carry: Carry, item: tuple[Any, Any]) -> tuple[Carry, None]:
            return lax.cond(item[0] < count, one, lambda carry, _: (carry, None), carry, item)

        # Outside of the branch: what a branch keeps for the way back is kept apart from its inputs,
        # so that the weights would be kept once more.
        if count is None:
            body = one
        else:
            body = decoder.rematerialized(one_or_none, self.within, always=True)
        stacked = (jnp.arange(num_rows), rows)
        if self.model.scan_layers:
            return lax.scan(body, carry, stacked)[0]
        for item in decoder.unstack(stacked, num_rows):
            carry, _ = body(carry, item)
        return carry
