"""The sublayer of experts beside a loop over tokens and experts in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from braeburn.config import AdamW, Execution, LayerConfig, ModelConfig, Precision
from braeburn.config.mesh import ONE_DEVICE
from braeburn.config.sublayers.experts import Experts
from braeburn.layers.spec import initialize, map_specs
from braeburn.layers.sublayers import experts as module
from braeburn.layers.sublayers.definition import Context, Report, Signals
from braeburn.models.decoder import Packed, param_specs
from braeburn.objectives.cross_entropy import loss
from braeburn.optim.build import build_optimizer
from braeburn.recipes import load

EXECUTION = Execution(ONE_DEVICE, precision=Precision(compute="float32"))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 32,
}


def config_of(**changes: Any) -> Experts:
    return Experts(**{"num_experts": 6, "experts_per_token": 2, "expert_dim": 16, **changes})


def weights_of(config: Experts, model: ModelConfig) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return map_specs(
        lambda _, spec: generator.standard_normal(spec.shape, np.float32) * 0.3,
        module.specs(config, model),
    )


def context_of(config: Experts, weights: Any, token_weights: Any = None) -> Context:
    model = ModelConfig(**SIZES)
    specs = module.specs(config, model)
    return Context(
        config,
        model,
        EXECUTION,
        specs,
        jax.tree.map(jnp.asarray, weights),
        prepared=None,
        memory=Packed(jnp.zeros((1, 1), jnp.int32), EXECUTION),
        activation_hook=lambda axis, values, state: state,
        token_weights=token_weights,
    )


def expected(x: np.ndarray, weights: Any, config: Experts) -> tuple[np.ndarray, np.ndarray]:
    """Each token by each of its experts, in float64, and the experts of each token."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    logits = flat @ w["router"] + w.get("router_logit_bias", 0.0)
    if config.scores == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    # gpt-oss: a softmax over the logits of a token's own experts.
    weighed = np.exp(logits) if config.linear_bias and config.normalize else scores

    def network(row: np.ndarray, name: str, expert: Any = ...) -> np.ndarray:
        def product(x: np.ndarray, which: str) -> np.ndarray:
            bias = w.get(f"{name}_{which}_bias")
            found = x @ w[f"{name}_{which}"][expert]
            return found if bias is None else found + bias[expert]

        gate, up = product(row, "gate"), product(row, "up")
        if config.activation == "clamped":
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        else:
            hidden = gate / (1 + np.exp(-gate)) * up
        return product(hidden, "down")

    result, chosen = np.zeros_like(flat), []
    rated = scores + w.get("router_bias", 0.0)
    for token, row in enumerate(flat):
        groups = rated[token].reshape(config.groups, -1)
        order = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1))[: config.groups_per_token]
        allowed = np.isin(np.arange(config.groups), order)
        possible = np.where(allowed[:, None], groups, -np.inf).ravel()
        best = np.argsort(-possible)[: config.experts_per_token]
        chosen.append(best)
        share = weighed[token][best]
        if config.normalize:
            share = share / share.sum()
        for expert, weight in zip(best, share * config.scale, strict=True):
            result[token] += weight * network(row, "expert", expert)
        if config.shared_dim:
            result[token] += network(row, "shared")
    return result.reshape(x.shape), np.asarray(chosen)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize": False, "experts_per_token": 3},
        {"scores": "sigmoid", "scale": 2.5},
        {"num_experts": 3, "experts_per_token": 3},
        {"experts_per_token": 1, "normalize": False},
        {"scores": "sigmoid", "bias": True, "shared_dim": 20},
        {"linear_bias": True},
        {"linear_bias": True, "activation": "clamped", "experts_per_token": 3},
        {"linear_bias": True, "activation": "clamped", "bias": True, "shared_dim": 20},
        {"num_experts": 8, "groups": 4, "groups_per_token": 2, "experts_per_token": 3},
        {
            "num_experts": 12,
            "groups": 3,
            "groups_per_token": 1,
            "scores": "sigmoid",
            "scale": 2.5,
            "bias": True,
        },
    ],
)
def test_each_token_meets_its_experts(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    weights = weights_of(config, ModelConfig(**SIZES))
    x = np.random.default_rng(1).standard_normal((3, 17, 24), np.float32)
    found, _ = module.apply(jnp.asarray(x), Signals(None, None), context_of(config, weights))
    np.testing.assert_allclose(found, expected(x, weights, config)[0], rtol=1e-4, atol=1e-5)


def test_no_token_is_lost_where_all_go_to_one_expert() -> None:
    config = config_of(experts_per_token=1)
    weights = weights_of(config, ModelConfig(**SIZES))
    x = np.abs(np.random.default_rng(1).standard_normal((2, 300, 24), np.float32))
    weights["router"] = np.zeros_like(weights["router"])
    weights["router"][:, 4] = 1.0
    found, _ = module.apply(jnp.asarray(x), Signals(None, None), context_of(config, weights))
    wanted, chosen = expected(x, weights, config)
    assert set(chosen.ravel()) == {4}
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_clamped_activation_ends_where_it_should() -> None:
    """Gates beyond 7, and ups beyond 7 either way, are as those at 7."""
    config = config_of(linear_bias=True, activation="clamped")
    weights = weights_of(config, ModelConfig(**SIZES))
    x = 30 * np.random.default_rng(1).standard_normal((1, 40, 24), np.float32)
    found, _ = module.apply(jnp.asarray(x), Signals(None, None), context_of(config, weights))
    np.testing.assert_allclose(found, expected(x, weights, config)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"linear_bias": True, "activation": "clamped"}], ids=str)
def test_gradients_are_finite_differences(changes: dict[str, Any]) -> None:
    """In float64, of the router's weights among all others, losses of the router included."""
    config = config_of(balance_loss=0.3, router_z_loss=0.2, **changes)
    model = ModelConfig(**SIZES)
    generator = np.random.default_rng(1)
    x, probe = (generator.standard_normal((2, 9, 24)) for _ in range(2))
    share = generator.uniform(0.1, 1, (2, 9))
    weights = jax.tree.map(lambda leaf: leaf.astype(np.float64), weights_of(config, model))
    with jax.enable_x64(True):
        token_weights = jnp.asarray(share / share.sum())
        zero = jnp.zeros(())
        names = dict.fromkeys(module.METRICS, zero)

        def loss(weights: Any, x: Any) -> Any:
            signals = Signals(None, None, Report(zero, names))
            found, signals = module.apply(
                jnp.asarray(x), signals, context_of(config, weights, token_weights)
            )
            assert signals.report is not None
            return jnp.sum(found * probe) + signals.report.loss

        gradient = jax.grad(loss, argnums=(0, 1))(weights, jnp.asarray(x))
        for _ in range(8):
            direction = jax.tree.map(
                lambda leaf: generator.standard_normal(leaf.shape), (weights, x)
            )
            shifted = [
                loss(*jax.tree.map(lambda a, d, s=s: a + s * 1e-5 * d, (weights, x), direction))
                for s in (1, -1)
            ]
            slope = sum(
                np.sum(a * b)
                for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            )
            np.testing.assert_allclose(slope, (shifted[0] - shifted[1]) / 2e-5, rtol=2e-4)


def test_the_balance_loss_is_one_where_all_is_even() -> None:
    """And as many as there are experts where all tokens go to one with certainty."""
    config = config_of(experts_per_token=2, balance_loss=1.0)
    model = ModelConfig(**SIZES)
    weights = weights_of(config, model)
    x = np.ones((1, 6, 24), np.float32)
    shares = jnp.full((1, 6), 1 / 6)
    zero = Report(jnp.zeros(()), dict.fromkeys(module.METRICS, jnp.zeros(())))

    def reported(router: np.ndarray) -> Report:
        context = context_of(config, {**weights, "router": router}, shares)
        report = module.apply(jnp.asarray(x), Signals(None, None, zero), context)[1].report
        assert report is not None
        return report

    even = reported(np.zeros_like(weights["router"]))
    assert float(even.metrics["router_balance_loss"]) == pytest.approx(1.0)
    assert float(even.metrics["router_z_loss"]) == pytest.approx(np.log(6) ** 2)
    certain = np.zeros_like(weights["router"])
    certain[:, 0], certain[:, 1] = 2.0, 1.9
    found = reported(certain)
    assert float(found.metrics["router_largest_load"]) == pytest.approx(3.0)
    assert float(found.loss) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.optimized
@pytest.mark.parametrize("tokens", [16, 100, 512])
def test_one_expert_is_a_dense_layer(tokens: int) -> None:
    """Its loss is that of one bit for bit."""
    sizes = {**SIZES, "d_model": 64, "ffn_dim": 160, "head_dim": 16}
    dense = ModelConfig(**sizes)
    only = Experts(num_experts=1, experts_per_token=1, expert_dim=160, balance_loss=0.0)
    sparse = dense.model_copy(update={"pattern": (LayerConfig(feed_forward=only),)})
    generator = np.random.default_rng(0)
    params = map_specs(
        lambda _, spec: jnp.asarray(generator.standard_normal(spec.shape, np.float32) * 0.2),
        param_specs(dense),
    )
    layers = dict(params["layers"])
    moved = {f"expert_{name}": layers.pop(name)[:, None] for name in ("gate", "up", "down")}
    routed = {**layers, **moved, "router": jnp.ones((2, 64, 1))}
    ids = jnp.asarray(generator.integers(0, 64, (1, tokens)))
    positions, ones = jnp.arange(tokens)[None], jnp.ones((1, tokens), jnp.int32)
    batch = {
        "inputs": ids,
        "targets": ids,
        "positions": positions,
        "segment_ids": ones,
        "weights": jnp.full((1, tokens), 1 / tokens),
    }

    def loss_of(model: ModelConfig) -> Any:
        return jax.jit(
            jax.value_and_grad(lambda params: loss(params, batch, model, EXECUTION), has_aux=True)
        )

    (expected, _), wanted = loss_of(dense)(params)
    (found, _), gradients = loss_of(sparse)({**params, "layers": routed})
    assert float(found) == float(expected)
    for name in ("gate", "up", "down"):
        np.testing.assert_allclose(
            gradients["layers"][f"expert_{name}"][:, 0],
            wanted["layers"][name],
            rtol=1e-4,
            atol=1e-6,
        )


def bias_gradient(config: Experts, weights: Any, x: Any, token_weights: Any) -> jax.Array:
    """The gradient of the biases, of a loss that is zero."""
    zero = Report(jnp.zeros(()), dict.fromkeys(module.METRICS, jnp.zeros(())))

    def loss_of(bias: Any) -> Any:
        context = context_of(config, {**weights, "router_bias": bias}, token_weights)
        report = module.apply(x, Signals(None, None, zero), context)[1].report
        assert report is not None
        return report.loss

    value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(weights["router_bias"]))
    assert float(value) == 0.0
    return gradient


def sparse_optimizer(config: Experts, rate: float) -> tuple[Any, Any]:
    """An optimizer of a model with these experts, and its initial parameters."""
    layer = LayerConfig(feed_forward=config)
    sparse = ModelConfig(**SIZES).model_copy(update={"pattern": (layer,)})
    specs = param_specs(sparse)
    stage = next(iter(load("afm-tiny").stages.values()))
    optimizer = build_optimizer(AdamW(balance_rate=rate), stage, specs, sparse)
    return optimizer, initialize(specs, 0)


def test_the_gradient_of_a_bias_is_how_busy_its_expert_is() -> None:
    """And the bias moves towards an even share by the rate, whatever the optimizer, but for steps
    that are skipped. A token without weight does not count.
    """
    config = config_of(num_experts=4, experts_per_token=1, bias=True, balance_loss=0.0)
    weights = weights_of(config, ModelConfig(**SIZES))
    weights["router"] = np.zeros_like(weights["router"])
    weights["router"][:, 2] = 1.0
    weights["router_bias"] = np.zeros(4, np.float32)
    shares = jnp.full((1, 8), 1 / 7).at[0, 7].set(0.0)
    gradient = bias_gradient(config, weights, jnp.ones((1, 8, 24)), shares)
    np.testing.assert_array_equal(gradient, [0, 0, 7, 0])

    optimizer, params = sparse_optimizer(config, 0.01)
    assert not np.any(params["layers"]["router_bias"])
    gradients = jax.tree.map(jnp.zeros_like, params)
    gradients["layers"]["router_bias"] = jnp.asarray([[0, 0, 7.0, 0], [2.0, 2.0, 2.0, 2.0]])
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["layers"]["router_bias"], [[0.01, 0.01, -0.01, 0.01], [0, 0, 0, 0]]
    )
    assert float(state.grad_norm) == 0.0
    gradients["embedding"] = jnp.full_like(params["embedding"], jnp.nan)
    updates, _ = optimizer.update(gradients, state, params)
    assert not np.any(updates["layers"]["router_bias"])


def test_loads_add_up_exactly_however_tokens_are_divided() -> None:
    """Among devices or microbatches: no bias moves where experts are equally busy, and each moves
    where one assignment of many is amiss.
    """
    config = config_of(num_experts=4, experts_per_token=1, bias=True, balance_loss=0.0)
    weights = weights_of(config, ModelConfig(**SIZES))
    weights["router"] = np.eye(24, 4, dtype=np.float32)
    weights["router_bias"] = np.zeros(4, np.float32)
    # The first half of the tokens leaves the last expert idle.
    quarter = 12_000 // 4
    half = quarter // 2
    of_tokens = np.repeat([0, 1, 2, 1, 2, 3], [quarter, half, half, half, half, quarter])

    def loads(of_tokens: np.ndarray) -> jax.Array:
        x = jnp.asarray(np.eye(4, 24, dtype=np.float32)[of_tokens][None])
        return bias_gradient(config, weights, x, jnp.full((1, len(of_tokens)), 1 / 12_000))

    whole = loads(of_tokens)
    divided = loads(of_tokens[:6000]) + loads(of_tokens[6000:])
    np.testing.assert_array_equal(whole, [quarter] * 4)
    np.testing.assert_array_equal(divided, whole)

    optimizer, params = sparse_optimizer(config, 0.01)
    gradients = jax.tree.map(jnp.zeros_like, params)
    amiss = divided + jnp.asarray([1, -1, 0, 0])
    gradients["layers"]["router_bias"] = jnp.stack([divided, amiss])
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["layers"]["router_bias"], [[0, 0, 0, 0], [-0.01, 0.01, 0, 0]]
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"experts_per_token": 7}, "experts_per_token=7 is more than num_experts=6; set it to at"),
        ({"groups": 4}, "groups=4 does not divide num_experts=6; set groups to one of"),
        ({"groups": 2, "groups_per_token": 3}, "groups_per_token=3 is more than groups=2; set it"),
        ({"groups": 6}, "experts_per_token=2 is more than the 1 experts of groups_per_token=1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config_of(**changes)
