"""A feed-forward sublayer of experts, of which each token uses a few.

Tokens are sorted by expert, each expert's stand together and are multiplied by its matrices, and
the results go back to their tokens. No expert has a limit, so that no token is lost.

Shapes are named by letters: S tokens of this device, E experts, k experts of a token, A = S k
assignments of a token to an expert, D d_model, F hidden units of an expert (its tensor shard's).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from braeburn.config import ModelConfig
from braeburn.config.sublayers.experts import Experts
from braeburn.layers.linear import flat
from braeburn.layers.spec import EXPERTS, ParamSpec
from braeburn.layers.sublayers.definition import Context, Report, Signals, Sublayer
from braeburn.parallel.rules import token_axes

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}
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
    return found


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


class Order(NamedTuple):
    """Assignments sorted by expert, those of one expert in the order of the tokens.

    Attributes:
        of_sorted: the number of the assignment at each place, int32 [A]; assignment s k + i is the
            i-th of token s.
        place: the place of each assignment, int32 [A].
        sizes: assignments of each expert, int32 [E].
    """

    of_sorted: Int[Array, " A"]
    place: Int[Array, " A"]
    sizes: Int[Array, " E"]


def ordered(experts: Int[Array, "S k"], num_experts: int) -> Order:
    """The order of all assignments."""
    numbers = experts.reshape(-1)
    of_sorted = jnp.argsort(numbers, stable=True)
    places = jnp.arange(numbers.size, dtype=of_sorted.dtype)
    place = jnp.zeros_like(of_sorted).at[of_sorted].set(places, unique_indices=True)
    return Order(of_sorted, place, jnp.bincount(numbers, length=num_experts).astype(jnp.int32))


@jax.custom_vjp
def permuted(rows: Float[Array, "A D"], source: Array, place: Array) -> Float[Array, "A D"]:
    """Rows in another order: those of `source`, whose inverse is `place`.

    The transpose of a gather adds into its source row by row. That of a permutation is the inverse
    one, which is a gather as well.
    """
    return rows[source]


def _permuted_forward(rows: Array, source: Array, place: Array) -> tuple[Array, Array]:
    return rows[source], place


def _permuted_backward(place: Array, cotangent: Array) -> tuple[Array, None, None]:
    return cotangent[place], None, None


permuted.defvjp(_permuted_forward, _permuted_backward)


def apply(
    x_BTD: Float[Array, "B T D"], signals: Signals, context: Context
) -> tuple[Float[Array, "B T D"], Signals]:
    """This tensor shard's part of the sum over the experts of each token."""
    config = context.config
    x_SD = flat(x_BTD)
    # In float32 at least: which experts a token goes to must not hang on how it was rounded.
    precise = x_SD.astype(jnp.promote_types(x_SD.dtype, jnp.float32))
    bias = context.weights["router_bias"] if config.bias else None
    routing = route(context.linear(precise, "router"), config, bias)
    order = ordered(routing.experts, config.num_experts)
    repeated = jnp.repeat(x_SD, config.experts_per_token, axis=0)
    x_AD = permuted(repeated, order.of_sorted, order.place)
    gate_AF = checkpoint_name(context.grouped_linear(x_AD, order.sizes, "expert_gate"), "ffn_gate")
    up_AF = checkpoint_name(context.grouped_linear(x_AD, order.sizes, "expert_up"), "ffn_up")
    hidden_AF = ACTIVATIONS[config.activation](gate_AF) * up_AF
    y_AD = context.grouped_linear(hidden_AF, order.sizes, "expert_down")
    y_AD = permuted(y_AD, order.place, order.of_sorted)
    y_SKD = y_AD.reshape(x_SD.shape[0], config.experts_per_token, -1)
    y_SD = jnp.einsum("SKD,SK->SD", y_SKD, routing.weights.astype(y_SKD.dtype))
    if config.shared_dim:
        gate_SF, up_SF = (context.linear(x_SD, name) for name in ("shared_gate", "shared_up"))
        y_SD = y_SD + context.linear(ACTIVATIONS[config.activation](gate_SF) * up_SF, "shared_down")
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
