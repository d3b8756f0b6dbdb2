"""The decoder, top to bottom: embedding, layers of attention and feed-forward, final norm.

Shapes are named by letters: B sequences, T positions, D d_model, N query heads, K key-value heads,
H head_dim, F ffn_dim, V vocabulary. They name logical dimensions: on a mesh of several devices this
is the program of each, over its part of everything (`braeburn.parallel`): its sequences, its piece
of each, its heads, FFN units and vocabulary. Between sublayers a shard of `tensor` holds
t = T / tensor of the positions; names of variables do not tell the two apart, so that `x_BTD` is
[B, t, D] there.

In the forward pass a layer communicates as follows. `linear` all-gathers each matrix along `fsdp`
just before it is used. Tokens are all-gathered along `tensor` before each sublayer, and its partial
outputs are reduce-scattered after it (sequence parallelism, arXiv 2205.05198). Attention exchanges
keys and values along `context`. The backward pass runs the transposed collectives.

`Context`, `Signals`, `Memory` and the kinds of sublayers are explained in
`layers/sublayers/definition.py`, `LayerConfig` and `Segment` in `config/model.py`.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import Execution, LayerConfig, ModelConfig, Segment
from braeburn.layers.attention import Scope, attention
from braeburn.layers.embedding import embed
from braeburn.layers.norm import rms_norm
from braeburn.layers.spec import EXPERTS, ParamSpec, Tree, map_specs, walk
from braeburn.layers.sublayers.definition import (
    ActivationHook,
    Context,
    Memory,
    Report,
    Signals,
    norm,
    sublayer_of,
)
from braeburn.layers.weights import gathered_norms
from braeburn.parallel.collectives import gather_tokens, scatter_tokens
from braeburn.parallel.rules import stored_along

# Vocabulary ids, positions or segments, in NumPy too.
Tokens = Int[Array | np.ndarray, "B T"]


def layer_specs(layer: LayerConfig, model: ModelConfig) -> Tree:
    """The specs of the parameters of one layer, not stacked."""
    specs: Tree = {}
    for name, config in (("attention", layer.attention), ("ffn", layer.feed_forward)):
        if layer.norms != "after":
            specs[f"{name}_norm"] = norm(model, "embed")
        specs |= sublayer_of(config).specs(config, model)
        if layer.norms != "before":
            specs[f"{name}_output_norm"] = norm(model, "embed")
    return specs


def _stacked(specs: Tree, repeats: int) -> Tree:
    return map_specs(lambda _, spec: spec.stack(repeats), specs)


def param_specs(model: ModelConfig) -> Tree:
    """The specs of every parameter of a model.

    Paths are `SEGMENT/PARAMETER` where the pattern of a segment is one layer, and otherwise
    `SEGMENT/INDEX IN THE PATTERN/PARAMETER`. The first dimension of each counts repeats.
    """
    # Values of variance 1 / d_model give logits of unit variance, also where the embedding is the
    # head as well.
    embedding = ParamSpec(
        (model.vocab_size, model.d_model), ("vocab", "embed"), "embedding", ("embed",)
    )
    specs: Tree = {"embedding": embedding}
    for segment in model.segments:
        layers = [layer_specs(layer, model) for layer in segment.pattern]
        specs[segment.name] = _by_layer(segment, [_stacked(one, segment.repeats) for one in layers])
    specs["final_norm"] = norm(model, "embed")
    if not model.tied_embeddings:
        specs["head"] = embedding
    return specs


@functools.cache
def has_experts(model: ModelConfig) -> bool:
    """Whether a mesh can split experts of a model."""
    return any(EXPERTS in spec.axes for _, spec in walk(param_specs(model)))


def _by_layer(segment: Segment, trees: list[Any]) -> Any:
    """One tree for each layer of a segment's pattern, as they stand under the segment's name."""
    return trees[0] if len(trees) == 1 else {str(i): tree for i, tree in enumerate(trees)}


def in_pattern(segment: Segment, tree: Any) -> list[Any]:
    """The inverse of `_by_layer`."""
    count = len(segment.pattern)
    return [tree] if count == 1 else [tree[str(i)] for i in range(count)]


@dataclass(frozen=True)
class Stack:
    """Layers whose parameters are stacked.

    Attributes:
        path: of their parameters in the tree of all.
        layer: what each of them is.
        numbers: which layers of the model they are, counted from 0.
    """

    path: tuple[str, ...]
    layer: LayerConfig
    numbers: tuple[int, ...]


def stacks(model: ModelConfig) -> list[Stack]:
    """All stacks of a model, in the order of their first layers."""
    found, first = [], 0
    for segment in model.segments:
        count = len(segment.pattern)
        for i, layer in enumerate(segment.pattern):
            path = (segment.name,) if count == 1 else (segment.name, str(i))
            numbers = range(first + i, first + segment.num_layers, count)
            found.append(Stack(path, layer, tuple(numbers)))
        first += segment.num_layers
    return found


def layer_states(model: ModelConfig, make: Callable[[LayerConfig, int], Any]) -> dict[str, Any]:
    """A state for each layer, as `decoder` takes them.

    Args:
        model: whose layers.
        make: gives, for a layer of a pattern and its number of repeats, arrays with a leading
            dimension of that many.
    """
    return {
        segment.name: _by_layer(
            segment, [make(layer, segment.repeats) for layer in segment.pattern]
        )
        for segment in model.segments
    }


def head_matrix(params: Tree) -> Float[Array, "V D"]:
    """The matrix that turns final hidden states into logits: the embedding itself where they are
    tied.
    """
    return params["head"] if "head" in params else params["embedding"]


def no_activation_hook(axis: str, activations: Array, state: Any) -> Any:
    """The hook that is called by default: it returns a layer's state unchanged."""
    return state


def layer(
    x_BTD: Float[Array, "B t D"], signals: Signals, config: LayerConfig, contexts: list[Context]
) -> tuple[Float[Array, "B t D"], Signals]:
    """One layer: attention, then the feed-forward sublayer, each added to the residual stream.

    The residual stream and the norms work token by token, so each tensor shard keeps only its own
    tokens. A sublayer needs all tokens, and returns this shard's partial sum over hidden units.

    Args:
        x_BTD: the residual stream, of this tensor shard's tokens.
        signals: what passes through layers beside it.
        config: of the layer.
        contexts: of the two sublayers.

    Returns:
        The stream and the signals behind the layer. `activation_hook` was shown what each sublayer
        reads ("embed", [B, T, D], twice), each head's result ("heads", [B, T, N, H]) and the hidden
        units ("ffn", [B, T, F]).
    """
    sublayers = (("attention", config.attention), ("ffn", config.feed_forward))
    for (name, sublayer), context in zip(sublayers, contexts, strict=True):
        mesh, split = context.execution.mesh, context.execution.split_tokens
        epsilon = context.model.norm_epsilon
        with jax.named_scope(name):
            y_BTD = x_BTD
            if config.norms != "after":
                y_BTD = rms_norm(y_BTD, context.weights[f"{name}_norm"], epsilon)
            y_BTD = gather_tokens(y_BTD, mesh, split)
            state = context.activation_hook("embed", y_BTD, signals.state)
            signals = signals._replace(state=state)
            y_BTD, signals = sublayer_of(sublayer).apply(y_BTD, signals, context)
            y_BTD = checkpoint_name(scatter_tokens(y_BTD, mesh, split), f"{name}_output")
            if config.norms != "before":
                y_BTD = rms_norm(y_BTD, context.weights[f"{name}_output_norm"], epsilon)
            x_BTD = x_BTD + y_BTD
    return x_BTD, signals


class Surroundings(NamedTuple):
    """The inputs that all layers share beside their weights and hidden states.

    Attributes:
        memory: how attention reaches keys and values.
        states: of each layer, such as its cache, as `layer_states` makes them; or None.
        activation_hook: is shown the activations of each layer.
        token_weights: of this device's tokens in the loss, float32 [B, T], the same on all shards
            of `tensor`; None where there is no loss.
    """

    memory: Memory
    states: Any = None
    activation_hook: ActivationHook = no_activation_hook
    token_weights: Array | np.ndarray | None = None


class Decoded(NamedTuple):
    """What comes out of all layers.

    Attributes:
        hidden: after the final norm, [B, t, D] of this tensor shard's tokens, t = T / tensor, in
            the type to compute in.
        states: the new states, in the form of `layer_states`.
        report: what layers add to the loss and the metrics; None where none does, or nothing was
            asked for.
    """

    hidden: Float[Array, "B t D"]
    states: Any
    report: Report | None


def decoder(
    params: Tree,
    tokens: tuple[Tokens, Tokens],
    surroundings: Surroundings,
    model: ModelConfig,
    execution: Execution,
) -> Decoded:
    """Runs all layers.

    Args:
        params: this device's part of each parameter, float32; to generate from, of any float type,
            and the layers may be `apart` (`models/cached.py`), as the states are then.
        tokens: vocabulary ids and positions of this device's tokens.
        surroundings: what all layers share beside these.
        model: what is computed.
        execution: how it is carried out.
    """
    ids, positions = map(jnp.asarray, tokens)
    states, token_weights = surroundings.states, surroundings.token_weights
    # A layer's matrices are gathered as each is multiplied, and again in its backward pass.
    params = gathered_norms(params, param_specs(model), execution)
    # A loop of one round is none to XLA. Where a round has several layers, barriers also keep them
    # from being recomputed all at once.
    in_loop = model.scan_layers and all(
        segment.repeats > 1 and len(segment.pattern) == 1 for segment in model.segments
    )
    repeats = repeat_functions(positions, surroundings, model, execution, in_loop=in_loop)
    x_BTD = embedded(params["embedding"], ids, model, execution)
    new_states = {}
    carry = Carry(x_BTD, None, None if token_weights is None else empty_report(model))
    for segment in model.segments:
        repeat = repeats[segment.name]
        if isinstance(params[segment.name], tuple):
            each = zip(params[segment.name], states[segment.name], strict=True)
            carry, found = _one_by_one(
                repeat, carry, [tuple(in_pattern(segment, tree) for tree in one) for one in each]
            )
            new_states[segment.name] = tuple(_by_layer(segment, state) for state in found)
            continue
        weights = in_pattern(segment, params[segment.name])
        state = (
            [None] * len(weights) if states is None else in_pattern(segment, states[segment.name])
        )
        stacked = (weights, state)
        if reuses(model) and carry.shared is None and model.scan_layers:
            first = jax.tree.map(lambda leaf: leaf[0], stacked)
            carry = carry._replace(shared=nothing_shared(repeat, carry, first))
        carry, state = _repeated(repeat, carry, stacked, segment.repeats, model.scan_layers)
        new_states[segment.name] = _by_layer(segment, state)
    hidden_BTD = final_normed(carry.x_BTD, params["final_norm"], model)
    report = None if carry.report is None else averaged(carry.report, model)
    return Decoded(hidden_BTD, new_states, report)


def embedded(
    embedding: Float[Array, "v d"], ids: Int[Array, "B T"], model: ModelConfig, execution: Execution
) -> Float[Array, "B t D"]:
    """What the first layer reads.

    Args:
        embedding: this device's part of the table, float32.
        ids: vocabulary ids of this device's tokens.
        model: what is computed.
        execution: how it is carried out.

    Returns:
        The rows, of this tensor shard's tokens, in the type to compute in: see `embed`.
    """
    with jax.named_scope("embedding"):
        x_BTD = embed(embedding, ids, execution)
        if model.scaled_embedding:
            # Rounded to the type first, as the models that do this were trained.
            x_BTD = x_BTD * jnp.asarray(model.d_model**0.5, x_BTD.dtype)
    return x_BTD


def final_normed(
    x_BTD: Float[Array, "B t D"], scales: Float[Array, " D"], model: ModelConfig
) -> Float[Array, "B t D"]:
    """What the head reads, from what the last layer leaves and the whole scales of the norm."""
    with jax.named_scope("final_norm"):
        return rms_norm(x_BTD, scales, model.norm_epsilon)


def reuses(model: ModelConfig) -> bool:
    """Whether layers reuse the keys and values of earlier ones."""
    return any(layer.attention.reuses_keys for layer in model.layer_configs)


class Carry(NamedTuple):
    """What one repeat of a pattern hands on to the next.

    Attributes:
        x_BTD: the residual stream.
        shared: keys and values that later layers may reuse.
        report: of the layers so far.
    """

    x_BTD: Array
    shared: Any
    report: Report | None


# (carry, (weights, states) of the layers of one repeat) -> (carry, new states).
Repeat = Callable[[Carry, tuple[Any, Any]], tuple[Carry, list[Any]]]


def nothing_shared(repeat: Repeat, carry: Carry, first: Any) -> Any:
    """Zeros of the shape of the keys and values that layers hand on.

    A loop needs a carry of one shape throughout, so that its first layer is given such, too.

    Args:
        repeat: of a segment whose layers make keys and values.
        carry: to its first layer, without any.
        first: weights and states of one repeat.
    """
    found = jax.eval_shape(repeat, carry, first)[0].shared
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)


def repeat_functions(
    positions: Int[Array, "B T"],
    surroundings: Surroundings,
    model: ModelConfig,
    execution: Execution,
    rematerialize: bool = True,
    in_loop: bool = False,
) -> dict[str, Repeat]:
    """What runs one repeat of the pattern of each segment, by its name.

    Args:
        positions: of this device's tokens.
        surroundings: what all layers share beside these.
        model: what is computed.
        execution: how it is carried out.
        rematerialize: whether each layer keeps only what the policy says; otherwise the caller
            sees to that.
        in_loop: as of `rematerialized`.
    """
    memory, _, activation_hook, token_weights = surroundings
    token_weights = None if token_weights is None else jnp.asarray(token_weights)
    prepared = {
        config: sublayer_of(config).prepare(config, model, positions)
        for layer in dict.fromkeys(model.layer_configs)
        for config in (layer.attention, layer.feed_forward)
    }
    keeps_shared, specs = reuses(model), param_specs(model)

    def run_layer(config: LayerConfig, specs: Tree) -> Callable:
        def body(x_BTD: Array, signals: Signals, weights: Tree) -> tuple[Array, Signals]:
            contexts = [
                Context(
                    sublayer,
                    model,
                    execution,
                    specs,
                    weights,
                    prepared[sublayer],
                    memory,
                    activation_hook,
                    token_weights,
                )
                for sublayer in (config.attention, config.feed_forward)
            ]
            x_BTD, signals = layer(x_BTD, signals, config, contexts)
            # Keys and values that no later layer reuses are not returned: what is returned would be
            # stored for the backward pass.
            return x_BTD, signals if keeps_shared else signals._replace(keys_and_values=None)

        return rematerialized(body, execution, in_loop=in_loop) if rematerialize else body

    found: dict[str, Repeat] = {}
    for segment in model.segments:
        segment_specs = in_pattern(segment, specs[segment.name])
        # Equal layers are one function, so that they are traced once.
        body_of = {
            config: run_layer(config, own)
            for config, own in zip(segment.pattern, segment_specs, strict=True)
        }
        bodies = [body_of[config] for config in segment.pattern]

        def repeat(
            carry: Carry, repeated: tuple[Any, Any], bodies: list[Callable] = bodies
        ) -> tuple[Carry, list[Any]]:
            x_BTD, shared, report = carry
            states = []
            for body, weights, state in zip(bodies, *repeated, strict=True):
                x_BTD, signals = body(x_BTD, Signals(state, shared, report), weights)
                _, shared, report = signals
                states.append(signals.state)
            return Carry(x_BTD, shared, report), states

        found[segment.name] = repeat
    return found


def _metrics_of(layer: LayerConfig) -> list[str]:
    """The names of what a layer adds to the metrics."""
    return [
        name
        for config in (layer.attention, layer.feed_forward)
        for name in sublayer_of(config).metrics(config)
    ]


def empty_report(model: ModelConfig) -> Report | None:
    """The report of no layer; None for a model whose layers add nothing."""
    names = [name for layer in dict.fromkeys(model.layer_configs) for name in _metrics_of(layer)]
    zero = jnp.zeros((), jnp.float32)
    return Report(zero, dict.fromkeys(names, zero)) if names else None


def averaged(report: Report, model: ModelConfig) -> Report:
    """The report with means of metrics over the layers that have them, in place of sums."""
    counts = Counter(name for layer in model.layer_configs for name in _metrics_of(layer))
    metrics = {name: value / counts[name] for name, value in report.metrics.items()}
    return Report(report.loss, metrics)


def _repeated(
    repeat: Repeat, carry: Carry, stacked: Any, repeats: int, scan: bool
) -> tuple[Carry, Any]:
    """`repeat` over the leading axis of `stacked`, as one loop or written out."""
    if scan:
        return jax.lax.scan(repeat, carry, stacked)
    carry, states = _one_by_one(repeat, carry, unstack(stacked, repeats))
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _one_by_one(repeat: Repeat, carry: Carry, each: list[Any]) -> tuple[Carry, list[Any]]:
    """`repeat` over trees of single layers."""
    states = []
    for one in each:
        carry, state = repeat(carry, one)
        states.append(state)
    return carry, states


def unstack(stacked: Any, num_layers: int) -> list[Any]:
    """The trees of single layers.

    Split, not indexed: the gradient is then one concatenation and not L paddings.
    """
    leaves, structure = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, [1] * num_layers, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [jnp.squeeze(parts[i], 0) for parts in split])
        for i in range(num_layers)
    ]


def rematerialized(
    body: Callable, execution: Execution, *, always: bool = False, in_loop: bool = False
) -> Callable:
    """A layer that keeps for the backward pass only what the policy says, and never its gathered
    weights.

    Args:
        body: the layer.
        execution: how it is carried out.
        always: whether inputs are kept as what they are also where the policy keeps everything.
        in_loop: whether forward and backward pass are loops of their own, so that XLA cannot take
            what is recomputed from the forward pass. Elsewhere barriers keep it from that, and from
            fusing what was kept with what reads it.
    """
    remat, offload, policies = execution.remat, execution.offload, jax.checkpoint_policies
    if offload.activations:
        kept = [name for name in remat.names if name not in offload.activations]
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=list(offload.activations),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif remat.policy == "save_named":
        policy = policies.save_only_these_names(*remat.names)
    elif remat.policy == "full":
        policy = policies.nothing_saveable
    elif gathered := stored_along(execution.rules, execution.mesh):

        def policy(primitive: Any, *_: Any, **settings: Any) -> bool:
            along = settings.get("axis_name", ())
            return not (primitive.name == "all_gather" and any(axis in along for axis in gathered))

    elif always:
        policy = policies.everything_saveable
    else:
        return body

    return jax.checkpoint(body, policy=policy, prevent_cse=not in_loop)


class Packed:
    """Keys and values of the same packed sequences: a token sees the earlier ones of its own
    segment. Which are earlier follows from the index in the packed sequence; positions within a
    document are used for the rotation alone.
    """

    holds_past = False

    def __init__(self, segment_ids: Tokens, execution: Execution):
        """Takes the segment of each of this device's tokens."""
        self._segment_ids = jnp.asarray(segment_ids)
        self._mesh = execution.mesh

    def keep(self, arrays: tuple[Array, ...], state: Any) -> tuple[tuple[Array, ...], Any]:
        """The arrays as they are."""
        return arrays, state

    def attend(self, query: Array, keys_and_values: Any, scope: Scope) -> Array:
        """Attention within segments."""
        key, value = keys_and_values
        return attention(query, key, value, self._segment_ids, self._mesh, scope)


def forward(
    params: Tree, inputs: tuple[Tokens, Tokens, Tokens], model: ModelConfig, execution: Execution
) -> Float[Array, "B T D"]:
    """Final hidden states of packed sequences; a token attends to the earlier ones of its own
    segment.

    Args:
        params: this device's part of each parameter, float32.
        inputs: vocabulary ids, positions and segments of this device's tokens.
        model: what is computed.
        execution: how it is carried out.

    Returns:
        Those of all tensor shards' tokens, in the type to compute in.
    """
    return reported_forward(params, inputs, None, model, execution)[0]


def reported_forward(
    params: Tree,
    inputs: tuple[Tokens, Tokens, Tokens],
    token_weights: Float[Array | np.ndarray, "B T"] | None,
    model: ModelConfig,
    execution: Execution,
) -> tuple[Float[Array, "B T D"], Report | None]:
    """The result of `forward`, and what layers add to the loss and the metrics of training.

    Args:
        params: as of `forward`.
        inputs: as of `forward`.
        token_weights: of the tokens in the loss, whose sum over all microbatches and devices is 1.
        model: as of `forward`.
        execution: as of `forward`.
    """
    ids, positions, segment_ids = inputs
    surroundings = Surroundings(Packed(segment_ids, execution), token_weights=token_weights)
    decoded = decoder(params, (ids, positions), surroundings, model, execution)
    return gather_tokens(decoded.hidden, execution.mesh), decoded.report
