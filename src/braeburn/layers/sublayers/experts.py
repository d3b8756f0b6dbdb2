"""A feed-forward sublayer of experts, of which each token uses a few.

Tokens are sorted by expert, each expert's stand together and are multiplied by its matrices, and
the results go back to their tokens (`layers/dispatch.py`, also where a mesh splits the experts). No
expert has a limit, so that no token is lost.

Shapes are named by letters: S tokens of this device, E experts, k experts of a token, M rows of
tokens sorted by expert, D d_model, F hidden units of an expert (its tensor shard's).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.layers.dispatch import Assigned, Compute, sum_over_experts
from braeburn.layers.grouped import grouped_product, grouped_vectors
from braeburn.layers.linear import flat, ready
from braeburn.layers.spec import EXPERTS, ParamSpec, Tree
from braeburn.layers.sublayers.definition import Context, Report, Signals, Sublayer
from braeburn.parallel.rules import token_axes

# Where the gate and the up of "clamped" end, and how steep its sigmoid is.
LIMIT, STEEPNESS = 7.0, 1.702


def _clamped(gate: Array, up: Array) -> Array:
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return gate * jax.nn.sigmoid(STEEPNESS * gate) * (up + 1)


# (gate, up) -> hidden units.
ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate) * up,
    "clamped": _clamped,
}
MATRICES = ("expert_gate", "expert_up", "expert_down")
METRICS = ("router_balance_loss", "router_z_loss", "router_largest_load")


def specs(config: Experts, model: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of the router, of the three matrices of all experts, and of what else the
    configuration asks for.
    """
    count, inputs, hidden = config.num_experts, model.d_model, config.expert_dim
    share = config.experts_per_token / count
    rises = ParamSpec(
        (count, inputs, hidden), (EXPERTS, "embed", "expert_ffn"), "matrix", ("embed",), share
    )
    falls = ParamSpec(
        (count, hidden, inputs), (EXPERTS, "expert_ffn", "embed"), "matrix", ("expert_ffn",), share
    )
    router = ParamSpec((inputs, count), ("embed", "expert_scores"), "router", ("embed",))
    found = {"router": router, "expert_gate": rises, "expert_up": rises, "expert_down": falls}
    if config.bias:
        found["router_bias"] = ParamSpec((count,), ("expert_scores",), "balance")
    if units := config.shared_dim:
        up = ParamSpec((inputs, units), ("embed", "expert_ffn"), "matrix", ("embed",))
        down = ParamSpec((units, inputs), ("expert_ffn", "embed"), "matrix", ("expert_ffn",))
        found |= {"shared_gate": up, "shared_up": up, "shared_down": down}
    return found | (_biases(found) if config.linear_bias else {})


def _biases(products: dict[str, ParamSpec]) -> dict[str, ParamSpec]:
    """The specs of the biases of products, each along the axes that its product is not summed
    over.
    """
    found = {}
    for name, spec in products.items():
        sizes = zip(spec.axes, spec.shape, strict=True)
        left = {axis: size for axis, size in sizes if axis not in spec.fan_in}
        if spec.role == "matrix":
            found[f"{name}_bias"] = ParamSpec(
                tuple(left.values()), tuple(left), "bias", share=spec.share
            )
    # The name of the router's own, after the same rule, is that of what balances experts.
    router = products["router"]
    return found | {"router_logit_bias": ParamSpec(router.shape[1:], router.axes[1:], "bias")}


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        logits: of the router, float32 [S, E].
        scores: of all experts, float32 [S, E].
        experts: of each token, int32 [S, k], the highest score first.
        weights: of these, float32 [S, k].
    """

    logits: Float[Array, "S E"]
    scores: Float[Array, "S E"]
    experts: Int[Array, "S k"]
    weights: Float[Array, "S k"]


def route(
    logits: Float[Array, "S E"], config: Experts, bias: Float[Array, " E"] | None = None
) -> Routing:
    """The experts of each token and their weights.

    Args:
        logits: of the router, float32.
        config: of the sublayer.
        bias: that is added to the scores for the choice alone; None for none.
    """
    softmax = config.scores == "softmax"
    scores = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
    rated = lax.stop_gradient(scores if bias is None else scores + bias)
    if config.groups > 1:
        rated = _of_best_groups(rated, config)
    _, experts = lax.top_k(rated, config.experts_per_token)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits, scores, experts, weights * config.scale)


def _of_best_groups(rated: Float[Array, "S E"], config: Experts) -> Float[Array, "S E"]:
    """The ratings of the experts of each token's groups, and minus infinity for others."""
    by_group = rated.reshape(rated.shape[0], config.groups, -1)
    best = lax.top_k(by_group, min(2, by_group.shape[-1]))[0].sum(-1)
    _, chosen = lax.top_k(best, config.groups_per_token)
    among = jnp.any(jax.nn.one_hot(chosen, config.groups, dtype=bool), axis=1)
    return jnp.where(among[:, :, None], by_group, -jnp.inf).reshape(rated.shape)


def _expert(context: Context) -> Compute:
    """What the experts of a device do with rows that are sorted by expert."""
    activate = ACTIVATIONS[context.config.activation]

    def compute(matrices: Tree, x_MD: Array, sizes: Array) -> Array:
        def product(x: Array, name: str) -> Array:
            with jax.named_scope(name):
                found = grouped_product(x, ready(matrices[name], x), sizes)
                if (bias := matrices.get(f"{name}_bias")) is not None:
                    found = found + grouped_vectors(bias.astype(x.dtype), sizes, x.shape[0])
                return found

        gate_MF = checkpoint_name(product(x_MD, "expert_gate"), "ffn_gate")
        up_MF = checkpoint_name(product(x_MD, "expert_up"), "ffn_up")
        return product(activate(gate_MF, up_MF), "expert_down")

    return compute


def apply(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
) -> tuple[Float[Array, "B T D"], Signals]:
    """This tensor shard's part of the sum over the experts of each token."""
    config = context.config
    x_SD = flat(x_BTD)
    # In float32 at least: which experts a token goes to must not hang on how it was rounded.
    precise = x_SD.astype(jnp.promote_types(x_SD.dtype, jnp.float32))
    bias = context.weights["router_bias"] if config.bias else None
    logits = context.linear(precise, "router")
    if config.linear_bias:
        logits = logits + context.vector("router_logit_bias")
    routing = route(logits, config, bias)
    matrices = {name: context.joined(x_SD, name) for name in MATRICES}
    if config.linear_bias:
        matrices |= {f"{name}_bias": context.bias_of(name) for name in MATRICES}
    assigned = Assigned(x_SD, routing.weights, routing.experts)
    mesh = context.execution.mesh
    y_SD = sum_over_experts(assigned, matrices, _expert(context), config.num_experts, mesh)
    if config.shared_dim:
        gate_SF, up_SF = (context.product(x_SD, name) for name in ("shared_gate", "shared_up"))
        hidden_SF = ACTIVATIONS[config.activation](gate_SF, up_SF)
        y_SD = y_SD + context.product(hidden_SF, "shared_down")
    if signals.report is not None:
        signals = signals._replace(report=_reported(signals, routing, context))
    return y_SD.reshape(x_BTD.shape), signals


def _reported(signals: Signals, routing: Routing, context: Context) -> Report:
    """The report with this device's shares of the router's losses and metrics.

    Every token counts by its weight in the loss, and tensor shards, which have routed the same
    tokens, have equal shares. How busy experts are is counted over all devices, in whole numbers,
    whose sums are exact: those of shares hang on their order, and so on the mesh.
    """
    config, execution = context.config, context.execution
    assert signals.report is not None and context.token_weights is not None
    weights_S = context.token_weights.reshape(-1)
    is_counted = jnp.repeat((weights_S > 0).astype(jnp.int32), config.experts_per_token)
    counts = jax.ops.segment_sum(is_counted, routing.experts.reshape(-1), config.num_experts)
    own = counts / execution.mesh.tensor
    if axes := token_axes(execution):
        counts = lax.psum(counts, axes)
    load = counts / jnp.maximum(jnp.sum(counts), 1)
    probabilities = routing.scores
    if config.scores == "sigmoid":
        probabilities = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
    shares = weights_S / execution.mesh.tensor
    balance = config.num_experts * jnp.sum(shares[:, None] * probabilities * load)
    z = jnp.sum(shares * jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)))
    largest = config.num_experts * jnp.max(load) * jnp.sum(shares)
    metrics = dict(zip(METRICS, (balance, z, largest), strict=True))
    loss = config.balance_loss * balance + config.router_z_loss * z
    if config.bias:
        bias = context.weights["router_bias"]
        loss += jnp.sum((bias - lax.stop_gradient(bias)) * own)
    return signals.report.add(loss, jax.tree.map(lax.stop_gradient, metrics))


DEFINITION = Sublayer(specs=specs, apply=apply, metrics=lambda _: METRICS)
