"""The AFM optimizer against a float64 NumPy reference written from its specification, and AdamW
against optax's own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from braeburn.config import AdamW, AfmOptimizer, ModelConfig, Pruning, Schedule, Stage
from braeburn.config.optimizers import KINDS
from braeburn.layers.spec import ParamSpec
from braeburn.optim.build import build_optimizer
from braeburn.optim.guard import begin_stage

D_MODEL = 1536
SPECS = {
    "embedding": ParamSpec((11, 8), ("vocab", "embed"), "embedding", ("embed",)),
    "layers": {
        "query": ParamSpec(
            (3, 8, 2, 4), ("layers", "embed", "heads", "head_dim"), "matrix", ("embed",)
        ),
        "norm": ParamSpec((3, 8), ("layers", "embed"), "norm"),
    },
    "single": ParamSpec((8, 6), ("embed", "ffn"), "matrix", ("embed",)),
    "final_norm": ParamSpec((8,), ("embed",), "norm"),
}
MODEL = ModelConfig(
    vocab_size=11, d_model=D_MODEL, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4, ffn_dim=6
)
STEPS = 40


def make_stage(**changes):
    fields = {
        "tokens": STEPS * 4,
        "sequence_length": 4,
        "batch_tokens": 4,
        "mixture": {"a": 1.0},
        "learning_rate": 0.01,
        "weight_decay": 3.16e-4,
        "schedule": Schedule(warmup_steps=7, floor=0.005),
    }
    return Stage(**(fields | changes))


class Reference:
    """The specification's seven steps, in float64, on one unstacked block at a time."""

    def __init__(self, blocks):
        self.theta = {name: value.astype(np.float64) for name, value in blocks.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.theta.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.theta.items()}
        self.t = 0

    def step(self, gradients, peak, decay, warmup, total, floor):
        gradients = {name: g.astype(np.float64) for name, g in gradients.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        if not (all(np.isfinite(g).all() for g in gradients.values()) and norm < 100):
            return
        self.t += 1
        t = self.t
        if t <= warmup:
            multiplier = t / warmup
        else:
            multiplier = floor + (1 - floor) * 0.5 * (
                1 + math.cos(math.pi * (t - warmup) / (total - warmup))
            )
        for name, g in gradients.items():
            g = g * min(1.0, 1.0 / (norm + 1e-8))
            self.v[name] = 0.95 * self.v[name] + 0.05 * (g**2 + 1e-30)
            r = g / np.sqrt(self.v[name] / (1 - 0.95**t))
            r = r / max(1.0, math.sqrt((r**2).mean()))
            self.m[name] = 0.95 * self.m[name] + 0.05 * r
            scale = min(768 / D_MODEL, 1.0) if name.startswith(("query", "single")) else 1.0
            self.theta[name] = self.theta[name] - multiplier * (
                peak * scale * self.m[name] + decay * self.theta[name]
            )


def blocks_of(tree):
    """The tree's blocks by name: every layer's slice of a stacked tensor is one."""
    blocks = {
        "embedding": tree["embedding"],
        "single": tree["single"],
        "final_norm": tree["final_norm"],
    }
    for name, stacked in tree["layers"].items():
        blocks |= {f"{name}/{i}": stacked[i] for i in range(3)}
    return {name: np.asarray(value) for name, value in blocks.items()}


def random_tree(rng, scale):
    return {
        "embedding": rng.normal(0, scale, (11, 8)).astype(np.float32),
        "layers": {
            "query": rng.normal(0, scale, (3, 8, 2, 4)).astype(np.float32),
            "norm": rng.normal(0, scale, (3, 8)).astype(np.float32),
        },
        "single": rng.normal(0, scale, (8, 6)).astype(np.float32),
        "final_norm": rng.normal(0, scale, (8,)).astype(np.float32),
    }


def gradients_of_step(rng, step):
    """Gradients of very different sizes, with a NaN at step 11 and a norm beyond 100 at step 23."""
    gradients = random_tree(rng, 10.0 ** rng.uniform(-4, 0.5))
    if step == 11:
        gradients["single"][2, 3] = np.nan
    if step == 23:
        gradients["layers"]["query"] *= np.float32(
            200 / np.linalg.norm(gradients["layers"]["query"])
        )
    return gradients


def test_afm_equals_the_float64_reference_over_40_steps():
    rng = np.random.default_rng(0)
    params = random_tree(rng, 0.5)
    reference = Reference(blocks_of(params))
    optimizer = build_optimizer(AfmOptimizer(), make_stage(), SPECS, MODEL)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        gradients = gradients_of_step(rng, step)
        before = (params, state.direction)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reference.step(blocks_of(gradients), 0.01, 3.16e-4, 7, STEPS, 0.005)
        if step in (11, 23):
            jax.tree.map(np.testing.assert_array_equal, before, (params, state.direction))
        for name, block in blocks_of(params).items():
            np.testing.assert_allclose(
                block, reference.theta[name], rtol=0, atol=1e-6, err_msg=f"step {step} {name}"
            )
    assert int(state.skipped) == 2
    assert int(state.stage_steps) == STEPS - 2 == reference.t
    moments = blocks_of(state.direction.momentum)
    for name, block in moments.items():
        np.testing.assert_allclose(block, reference.m[name], rtol=0, atol=1e-6)
    for name, block in blocks_of(state.direction.second_moment).items():
        np.testing.assert_allclose(block, reference.v[name], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_a_bad_gradient_changes_nothing_but_the_counter(bad):
    rng = np.random.default_rng(1)
    params = jax.tree.map(jnp.asarray, random_tree(rng, 1.0))
    for kind in KINDS.values():
        optimizer = build_optimizer(kind(), make_stage(), SPECS, MODEL)
        gradients = random_tree(rng, 0.1)
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        gradients["embedding"][0, 0] = bad
        updates, after = optimizer.update(gradients, state, params)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, state.direction, after.direction)
        assert (int(after.skipped), int(after.stage_steps)) == (1, 1)


def test_the_schedule_restarts_with_a_stage_and_the_moments_carry_over():
    rng = np.random.default_rng(2)
    params = jax.tree.map(jnp.asarray, random_tree(rng, 1.0))
    core = build_optimizer(AfmOptimizer(), make_stage(), SPECS, MODEL)
    later = build_optimizer(AfmOptimizer(), make_stage(learning_rate=0.5), SPECS, MODEL)
    state = core.init(params)
    for _ in range(5):
        _, state = core.update(random_tree(rng, 0.1), state, params)
    begun = begin_stage(state)
    assert int(begun.stage_steps) == 0
    assert int(begun.direction.updates) == 5
    _, after = later.update(random_tree(rng, 0.1), begun, params)
    assert float(after.learning_rate) == pytest.approx(0.5 / 7)


def test_adamw_equals_optax_chain():
    rng = np.random.default_rng(3)
    params = jax.tree.map(jnp.asarray, random_tree(rng, 1.0))
    stage = make_stage(learning_rate=1e-2, weight_decay=0.1, schedule=Schedule(decay="constant"))
    ours = build_optimizer(AdamW(clip_norm=1.0), stage, SPECS, MODEL)
    decayed = jax.tree.map(lambda spec: spec.role != "norm", SPECS)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decayed),
    )
    ours_params = theirs_params = params
    ours_state, theirs_state = ours.init(params), theirs.init(params)
    for _ in range(20):
        gradients = random_tree(rng, 0.3)
        updates, ours_state = ours.update(gradients, ours_state, ours_params)
        ours_params = optax.apply_updates(ours_params, updates)
        updates, theirs_state = theirs.update(gradients, theirs_state, theirs_params)
        theirs_params = optax.apply_updates(theirs_params, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours_params, theirs_params
    )


@pytest.mark.parametrize("kind", KINDS)
def test_scores_move_in_proportion_to_their_gradients(kind):
    """Within a layer; the layers' own sizes, as those of weights' blocks, do not count."""
    pruning = Pruning(keep={"ffn": 3}, learning_rate=0.3)
    stage = make_stage(pruning=pruning, weight_decay=0.1, schedule=Schedule(decay="constant"))
    specs = SPECS | {"masks": {"ffn": ParamSpec((3, 6), ("layers", "ffn"), "mask")}}
    rng = np.random.default_rng(4)
    gradient = np.float32(
        rng.normal(size=(3, 6)) * [[0.1], [1.0], [0.01]] * np.geomspace(0.1, 1.0, 6)
    )
    gradient[2, 0] = 0.0
    params = random_tree(rng, 1.0) | {"masks": {"ffn": np.float32(rng.normal(size=(3, 6)))}}
    params = jax.tree.map(jnp.asarray, params)
    gradients = random_tree(rng, 0.1) | {"masks": {"ffn": gradient}}
    config = KINDS[kind]()
    optimizer = build_optimizer(config, stage, specs, MODEL)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, params)
    moved = 1 - config.momentum**3 if isinstance(config, AfmOptimizer) else 1.0
    share = gradient / np.sqrt(np.mean(np.square(gradient), axis=1, keepdims=True))
    np.testing.assert_allclose(updates["masks"]["ffn"], -0.3 * moved * share, rtol=1e-3)
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    assert not np.asarray(updates["masks"]["ffn"]).any()
