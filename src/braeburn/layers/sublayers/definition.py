"""What a kind of sublayer is, beside its configuration: `DEFINITION` in the module of its name."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from braeburn.config import AttentionConfig, Execution, FeedForwardConfig, ModelConfig
from braeburn.layers.attention.backend import Scope
from braeburn.layers.linear import joined, linear, used
from braeburn.layers.spec import ParamSpec, Tree
from braeburn.layers.weights import gathered
from braeburn.parallel.collectives import TENSOR
from braeburn.parallel.rules import mesh_axes

# (logical axis, activations whose units it counts, a layer's state) -> the layer's new state.
ActivationHook = Callable[[str, Array, Any], Any]


class Report(NamedTuple):
    """What layers add to the loss and to the metrics of a step.

    On several devices these are shares, which sum to those of the whole batch.

    Attributes:
        loss: float32.
        metrics: float32, by name: those that the layers' definitions name.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]

    def add(self, loss: Array, metrics: Mapping[str, Array]) -> "Report":
        """This report with what a further layer adds."""
        added = {name: value + metrics.get(name, 0.0) for name, value in self.metrics.items()}
        return Report(self.loss + loss, added)


class Signals(NamedTuple):
    """What passes through the layers beside the hidden states.

    Attributes:
        state: of this layer, as its cache or what is measured of it.
        keys_and_values: of the last layer that made its own, where a later one reuses them.
        report: of the layers so far; None where nothing is asked for.
    """

    state: Any
    keys_and_values: Any
    report: Report | None = None


@runtime_checkable
class Memory(Protocol):
    """How queries reach keys and values: those of the same sequence, or of a cache.

    Attributes:
        holds_past: whether `keep` returns a cache, which holds earlier tokens' arrays as well.
    """

    holds_past: bool

    def keep(self, arrays: tuple[Array, ...], state: Any) -> tuple[tuple[Array, ...], Any]:
        """Takes what is kept of new tokens to generate from, each [B, T, heads, numbers].

        Returns:
            The arrays as `attend` takes them: of the new tokens, or of all in a cache, which are
            [B, heads, slots, numbers]. And the layer's new state.
        """

    def attend(
        self, query: Float[Array, "B T N H"], keys_and_values: Any, scope: Scope
    ) -> Float[Array, "B T N W"]:
        """The attended values of queries, whose softmax runs over what `scope` says."""


@dataclass(frozen=True)
class Context:
    """What a sublayer is applied in.

    Attributes:
        config: its own configuration.
        model: that of the whole model.
        execution: how the model is carried out.
        specs: of the layer's parameters, stacked over layers.
        weights: the layer's own, this device's part of each.
        prepared: what the kind's `prepare` returned.
        memory: how queries reach keys and values.
        activation_hook: called with activations as they are computed.
        token_weights: of the tokens in the loss, float32 [B, T]; None where there is no loss.
    """

    config: Any
    model: ModelConfig
    execution: Execution
    specs: Mapping[str, ParamSpec]
    weights: Tree
    prepared: Any
    memory: Memory
    activation_hook: ActivationHook
    token_weights: Array | None = None

    def linear(self, x: Array, name: str) -> Array:
        """The product of activations and one of the layer's weights: see `linear`. A profile shows
        it under the weight's name.
        """
        with jax.named_scope(name):
            return linear(x, self.weights[name], self.specs[name], self.execution)

    def used(self, x: Array, name: str) -> Array:
        """One of the layer's weights as what activations `x` are multiplied by: see `used`."""
        with jax.named_scope(name):
            return used(self.weights[name], x, self.specs[name], self.execution)

    def joined(self, x: Array, name: str) -> Array:
        """One of the layer's weights, for several products that come of `x`: see `joined`."""
        with jax.named_scope(name):
            return joined(self.weights[name], x, self.specs[name], self.execution)

    def product(self, x: Array, name: str) -> Array:
        """`linear`, with the bias of the weight where the layer has one."""
        found = self.linear(x, name)
        if f"{name}_bias" not in self.weights:
            return found
        return found + self.bias_of(name).astype(found.dtype)

    def bias_of(self, name: str) -> Array:
        """What this device adds to its products of a weight, in float32: the bias or, where tensor
        shards have a part of a sum each, a part of the bias.
        """
        bias, spec = self.vector(f"{name}_bias"), self.specs[name]
        split = mesh_axes(spec.axes, spec.shape, "activations", self.execution, spec.role)
        along = dict(zip(spec.axes, split, strict=True))
        is_part = any(TENSOR in along[axis] for axis in spec.fan_in)
        return bias / self.execution.mesh.tensor if is_part else bias

    def vector(self, name: str) -> Array:
        """One of the layer's biases or its sinks, this device's part of it, in float32."""
        with jax.named_scope(name):
            return gathered(self.weights[name], self.specs[name], self.execution)


@dataclass(frozen=True)
class Kept:
    """What a sublayer keeps of each token to generate from.

    Attributes:
        axes: the logical axes of one token's.
        window: of the last so many tokens; None for all.
        sizes: of these axes, where they are none of the model's.
    """

    axes: tuple[str, ...]
    window: int | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sublayer:
    """A kind of sublayer.

    Attributes:
        specs: (its configuration, the model) -> the specs of one layer's parameters by name, not
            stacked. The names are those of no other sublayer.
        apply: (hidden states [B, T, D] of all tensor shards' tokens, signals, context) -> (this
            shard's part of a sum [B, T, D], new signals).
        prepare: (its configuration, the model, positions int32 [B, T]) -> what follows from these
            alone, worked out once for all layers of the same configuration.
        cache: its configuration -> the arrays that it keeps of tokens to generate from.
        metrics: its configuration -> the names of what it adds to a step's metrics, of which the
            mean over all layers that have them is told.
    """

    specs: Callable[[Any, ModelConfig], dict[str, ParamSpec]]
    apply: Callable[[Array, Signals, Context], tuple[Array, Signals]]
    prepare: Callable[[Any, ModelConfig, Int[Array, "B T"]], Any] = lambda *_: None
    cache: Callable[[Any], tuple[Kept, ...]] = lambda _: ()
    metrics: Callable[[Any], tuple[str, ...]] = lambda _: ()


@functools.cache
def sublayer_of(config: AttentionConfig | FeedForwardConfig) -> Sublayer:
    """The definition of a sublayer by its configuration."""
    found = importlib.import_module(f"braeburn.layers.sublayers.{config.kind}").DEFINITION
    assert isinstance(found, Sublayer)
    return found


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """The size of each logical axis of a model's parameters."""
    return {
        "vocab": model.vocab_size,
        "embed": model.d_model,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "ffn": model.ffn_dim,
    }


def matrix(model: ModelConfig, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> ParamSpec:
    """The spec of one layer's matrix, which is multiplied over `inputs`."""
    axes, sizes = (*inputs, *outputs), sizes_of(model)
    return ParamSpec(tuple(sizes[axis] for axis in axes), axes, "matrix", inputs)


def bias(model: ModelConfig, *axes: str) -> ParamSpec:
    """The spec of a vector of one layer that is added to the results of a product."""
    sizes = sizes_of(model)
    return ParamSpec(tuple(sizes[axis] for axis in axes), axes, "bias")


def norm(model: ModelConfig, *axes: str) -> ParamSpec:
    """The spec of the scales of one layer's norm."""
    sizes = sizes_of(model)
    return ParamSpec(tuple(sizes[axis] for axis in axes), axes, "norm")
