"""Muon against a float64 NumPy reference and optax's own, and how matrices are dealt out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon

from braeburn.config import (
    ONE_DEVICE,
    Execution,
    LayerConfig,
    MeshConfig,
    ModelConfig,
    Pruning,
    Schedule,
    Stage,
)
from braeburn.config.optimizers.muon import Muon
from braeburn.config.sublayers.experts import Experts
from braeburn.layers.spec import LAYERS, ParamSpec, abstract, count, initialize, map_specs, walk
from braeburn.models.decoder import param_specs
from braeburn.optim.build import build_optimizer
from braeburn.optim.definition import Parameters, state_bytes
from braeburn.optim.muon import (
    is_matrix,
    matrix_form,
    orthogonalized,
    scale_by_muon,
    stacks,
    update_cost,
)
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build
from braeburn.plan.collectives import collectives, traffic

FLOAT = 4
# Sizes whose products differ: L layers, D d_model, N heads, K key heads, H head_dim, F FFN.
L, D, N, K, H, F = 3, 24, 4, 2, 8, 40
MODEL = ModelConfig(
    vocab_size=16, d_model=D, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=H, ffn_dim=F
)
SPECS = param_specs(MODEL)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five steps in float64 on one matrix, from the paper."""
    a, b, c = COEFFICIENTS
    x = x.astype(np.float64)
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def as_matrix(path: str, layer: np.ndarray) -> np.ndarray:
    """One layer's weight as rows that it is summed over and columns, by its name."""
    rows = N * H if path.endswith("attention_output") else F if path.endswith("down") else D
    return layer.reshape(rows, -1)


class Reference:
    """The whole optimizer in float64, by the names of the decoder's parameters."""

    def __init__(self, params, rate, decay):
        self.theta = {path: np.asarray(p, np.float64) for path, p in walk(params)}
        self.m = {path: np.zeros_like(p) for path, p in self.theta.items()}
        self.v = {path: np.zeros_like(p) for path, p in self.theta.items()}
        self.rate, self.decay, self.t = rate, decay, 0

    def step(self, gradients):
        gradients = {path: np.asarray(g, np.float64) for path, g in walk(gradients)}
        self.t += 1
        t = self.t
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        for path, g in gradients.items():
            g = g * min(1.0, 1.0 / (norm + 1e-8))
            name = path.rpartition("/")[2]
            if name in ("query", "key", "value", "attention_output", "gate", "up", "down"):
                self.m[path] = 0.95 * self.m[path] + 0.05 * g
                ahead = 0.95 * self.m[path] / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
                update = np.empty_like(g)
                for layer in range(L):
                    matrix = as_matrix(path, ahead[layer])
                    scale = 0.2 * math.sqrt(max(matrix.shape))
                    update[layer] = (scale * newton_schulz(matrix)).reshape(g.shape[1:])
            else:
                self.m[path] = 0.9 * self.m[path] + 0.1 * g
                self.v[path] = 0.95 * self.v[path] + 0.05 * g**2
                mean, square = self.m[path] / (1 - 0.9**t), self.v[path] / (1 - 0.95**t)
                update = 0.5 * mean / (np.sqrt(square) + 1e-8)
            decay = 0.0 if "norm" in name else self.decay
            self.theta[path] = self.theta[path] - self.rate * (update + decay * self.theta[path])


def stage_of(**changes):
    fields = {
        "tokens": 160,
        "sequence_length": 4,
        "batch_tokens": 4,
        "mixture": {"a": 1.0},
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "schedule": Schedule(decay="constant"),
    }
    return Stage(**(fields | changes))


def random_like(specs, rng, scale=1.0):
    return map_specs(
        lambda _, spec: jnp.asarray(rng.normal(0, scale, spec.shape), jnp.float32), specs
    )


def test_it_equals_the_float64_reference():
    rng = np.random.default_rng(0)
    params = initialize(SPECS, 0)
    reference = Reference(params, 0.01, 0.1)
    optimizer = build_optimizer(Muon(adamw_learning_rate_ratio=0.5), stage_of(), SPECS, MODEL)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(10):
        gradients = random_like(SPECS, rng, 10.0 ** rng.uniform(-4, 0.5))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        reference.step(gradients)
        for path, found in walk(params):
            np.testing.assert_allclose(
                found, reference.theta[path], rtol=0, atol=3e-6, err_msg=path
            )


SPARSE = MODEL.model_copy(
    update={
        "pattern": (LayerConfig(feed_forward=Experts(num_experts=3, expert_dim=24)),),
        "num_layers": 2,
    }
)


@pytest.mark.parametrize("model", [MODEL, SPARSE], ids=["dense", "experts"])
def test_matrices_move_as_in_optax(model):
    """Each of a layer and of an expert by itself. Its AdamW, for the rest, looks ahead, and ours
    does not.
    """
    specs = param_specs(model)
    rng = np.random.default_rng(1)
    params = initialize(specs, 1)
    # (rows, columns) of each, by hand.
    dims = {
        "query": ((1,), (2, 3)),
        "key": ((1,), (2, 3)),
        "value": ((1,), (2, 3)),
        "attention_output": ((1, 2), (3,)),
        "gate": ((1,), (2,)),
        "up": ((1,), (2,)),
        "down": ((1,), (2,)),
        **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), ((2,), (3,))),
    }
    numbers = map_specs(
        lambda path, _: (
            MuonDimensionNumbers(*dims[name]) if (name := path.split("/")[-1]) in dims else None
        ),
        specs,
    )
    theirs = muon(1.0, adam_b2=0.95, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)
    ours = scale_by_muon(Muon(), Parameters(specs, model))
    our_state, their_state = ours.init(params), theirs.init(params)
    for _ in range(5):
        gradients = random_like(specs, rng, 0.1)
        our_updates, our_state = ours.update(gradients, our_state, params)
        their_updates, their_state = theirs.update(gradients, their_state, params)
        theirs_of = dict(walk(their_updates))
        for path, ours_of in walk(our_updates):
            if path.rpartition("/")[2] in dims:
                np.testing.assert_allclose(ours_of, -theirs_of[path], rtol=0, atol=1e-4)


def test_singular_values_come_near_one_and_zero_stays_zero():
    x = jax.random.normal(jax.random.key(0), (16, 48))
    values = np.linalg.svd(np.asarray(orthogonalized(x, 5)), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert not np.asarray(orthogonalized(jnp.zeros((4, 8)), 5)).any()


def test_updates_of_matrices_have_the_root_mean_square_of_adamw():
    gradients = random_like(SPECS, np.random.default_rng(2))
    optimizer = scale_by_muon(Muon(), Parameters(SPECS, MODEL))
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    specs = dict(walk(SPECS))
    for path, update in walk(updates):
        rms = float(jnp.sqrt(jnp.mean(jnp.square(update))))
        # The first step of AdamW is 1; matrices get what it has on average, 0.2.
        assert rms == pytest.approx(0.2 if is_matrix(specs[path]) else 1.0, rel=0.25), path


def test_the_state_remembers_one_moment_of_matrices_and_two_of_the_rest():
    matrices, rest = count(SPECS, ("matrix",)), count(SPECS, ("embedding", "norm"))
    parameters = Parameters(SPECS, MODEL)
    assert state_bytes(Muon(), parameters) == FLOAT * (matrices + 2 * rest)
    state = scale_by_muon(Muon(), parameters).init(initialize(SPECS, 0))
    kept = dict(walk(state.second_moment))
    assert kept.keys() == {path for path, spec in walk(SPECS) if spec.role != "matrix"}
    assert state.second_moment.keys() == state.momentum.keys() == SPECS.keys()


def test_scores_and_factors_are_updated_by_adamw():
    """By adamw alone: also where a factor has the shape of a stack of matrices."""
    extra = {
        "masks": {"ffn": ParamSpec((L, F), (LAYERS, "ffn"), "mask")},
        "factors": {"up": ParamSpec((L, 2, F), (LAYERS, "embed", "ffn"), "scale", ("embed",))},
    }
    specs = SPECS | extra
    rng = np.random.default_rng(3)
    params, gradients = random_like(specs, rng), random_like(specs, rng, 0.01)
    ratio = 0.25
    ours = scale_by_muon(Muon(adamw_learning_rate_ratio=ratio), Parameters(specs, MODEL))
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    updates, _ = ours.update(gradients, ours.init(params), params)
    expected, _ = adam.update(gradients, adam.init(params), params)
    for name, factor in (("masks", 1.0), ("factors", ratio), ("embedding", ratio)):
        jax.tree.map(
            lambda a, b, factor=factor: np.testing.assert_allclose(a, factor * b, rtol=1e-5),
            updates[name],
            expected[name],
        )
    # Scores keep their own rate in a pruning stage.
    stage = stage_of(pruning=Pruning(keep={"ffn": 8}, learning_rate=0.3))
    whole = build_optimizer(Muon(adamw_learning_rate_ratio=ratio), stage, specs, MODEL)
    updates, _ = whole.update(gradients, whole.init(params), params)
    # In the first step the sign times the share of the layer's root-mean-square is the share.
    score = np.asarray(gradients["masks"]["ffn"])
    share = score / np.sqrt(np.mean(np.square(score), axis=1, keepdims=True))
    np.testing.assert_allclose(updates["masks"]["ffn"], -0.3 * share, rtol=1e-3)


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"tensor": 2}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_updates_are_the_same_on_every_mesh(mesh):
    sizes = MeshConfig.model_validate({"fsdp": 1} | mesh)
    devices = jax.devices()[: math.prod(sizes.sizes.values())]
    layout = Layout(Execution(sizes), build(sizes, devices), SPECS)
    params = initialize(SPECS, 4)
    gradients = random_like(SPECS, np.random.default_rng(4), 0.01)

    def made(mesh: MeshConfig, shardings):
        optimizer = scale_by_muon(Muon(), Parameters(SPECS, MODEL, Execution(mesh)))
        with layout.compiling():
            return jax.jit(optimizer.update, out_shardings=(shardings, None))(
                jax.device_put(gradients, shardings), optimizer.init(params)
            )[0]

    expected = made(ONE_DEVICE, None)
    found = made(sizes, layout.parameters())
    difference = max(
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )
    print(f"{mesh}: largest difference of an update {difference:.1e}")
    assert difference < 1e-4


def test_matrices_are_dealt_out_evenly():
    """By hand: 2 L of queries and outputs, 2 L of keys and values, 3 L of the FFN."""
    alone, split = (
        {stack.sizes: stack for stack in stacks(Parameters(SPECS, MODEL, Execution(mesh)))}
        for mesh in (ONE_DEVICE, MeshConfig(fsdp=4, tensor=2))
    )
    assert alone.keys() == split.keys() == {(D, N * H), (K * H, D), (D, F)}
    counts = {sizes: (stack.slots, stack.dealt) for sizes, stack in alone.items()}
    assert counts == {(D, N * H): (6, 6), (K * H, D): (6, 6), (D, F): (9, 9)}
    counts = {sizes: (stack.slots, stack.dealt) for sizes, stack in split.items()}
    assert counts == {(D, N * H): (8, 1), (K * H, D): (8, 1), (D, F): (16, 2)}
    assert set(split[D, F].all_to_alls) == {(1, "fsdp"), (2, "tensor")}
    assert set(split[K * H, D].all_to_alls) == {(1, "tensor"), (2, "fsdp")}


def test_the_cost_is_that_of_the_formula():
    """Each axis carries every device's part of all slots there and back."""
    mesh = MeshConfig(fsdp=4, tensor=2)
    cost = update_cost(Muon(), Parameters(SPECS, MODEL, Execution(mesh)))
    parts = (8 * D * N * H + 8 * D * K * H + 16 * D * F) // 8
    assert {(c.axis, c.kind, c.bytes, c.times) for c in cost.collectives} == {
        (axis, "all-to-all", 2 * FLOAT * parts, 6) for axis in ("fsdp", "tensor")
    }

    def products(rows, columns):
        return 5 * (4 * rows**2 * columns + 2 * rows**3)

    assert cost.matrix_flops == products(D, N * H) + products(K * H, D) + 2 * products(D, F)
    alone = update_cost(Muon(), Parameters(SPECS, MODEL))
    assert alone.matrix_flops == 6 * products(D, N * H) + 6 * products(K * H, D) + 9 * products(
        D, F
    )
    assert alone.collectives == ()
    # Keys that tensor shards share are whole on each, and cross fsdp alone.
    shared = Parameters(SPECS, MODEL, Execution(MeshConfig(fsdp=2, tensor=4)))
    keys = next(stack for stack in stacks(shared) if stack.sizes == (K * H, D))
    assert (keys.all_to_alls, keys.slots, keys.dealt) == (((2, "fsdp"),), 6, 3)


def test_a_parameter_and_its_matrices_are_turned_into_each_other():
    parameters = Parameters(SPECS, MODEL)
    for path, spec in walk(SPECS):
        if not is_matrix(spec):
            continue
        form = matrix_form(spec, parameters)
        x = jnp.arange(spec.size, dtype=jnp.float32).reshape(spec.shape)
        flat = form.flat(x)
        assert flat.shape == (L, *form.sizes) and form.sizes[0] <= form.sizes[1]
        wanted = as_matrix(path, np.asarray(x[1]))
        turned = wanted if wanted.shape == form.sizes else wanted.T
        np.testing.assert_array_equal(flat[1], turned)
        np.testing.assert_array_equal(form.unflat(flat, x), x)


def test_a_single_matrix_is_a_stack_of_one():
    specs = {"single": ParamSpec((8, 4), ("embed", "ffn"), "matrix", ("embed",))}
    parameters = Parameters(specs, MODEL, Execution(MeshConfig(fsdp=2, tensor=2)))
    (stack,) = stacks(parameters)
    assert (stack.sizes, stack.slots, stack.dealt) == ((4, 8), 4, 1)
    gradients = {"single": jax.random.normal(jax.random.key(1), (8, 4))}
    optimizer = scale_by_muon(Muon(), Parameters(specs, MODEL))
    updates, state = optimizer.update(gradients, optimizer.init(gradients))
    expected = 0.2 * math.sqrt(8) * newton_schulz(np.asarray(gradients["single"]))
    np.testing.assert_allclose(updates["single"], expected, atol=1e-5)
    assert state.second_moment == {} and abstract(specs).keys() == state.momentum.keys()


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_the_compiled_update_has_the_collectives_of_the_formula(mesh):
    """Of queries and outputs, keys and values, and the FFN: a device's part of all slots, twice."""
    sizes = MeshConfig.model_validate(mesh)
    layout = Layout(Execution(sizes), build(sizes, jax.devices()[:8]), SPECS)
    optimizer = scale_by_muon(Muon(), Parameters(SPECS, MODEL, Execution(sizes)))

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            shardings,
        )

    gradients = placed(abstract(SPECS), layout.parameters())
    state = jax.eval_shape(optimizer.init, gradients)
    shardings = layout.optimizer_state(state)
    with layout.compiling():
        step = jax.jit(optimizer.update, out_shardings=(layout.parameters(), shardings))
        text = step.lower(gradients, placed(state, shardings)).compile().as_text()
    found = traffic(collectives(text, sizes.sizes))
    if "tensor" in mesh:
        parts = (8 * D * N * H + 8 * D * K * H + 16 * D * F) // 8
        axes = ("fsdp", "tensor")
    else:
        parts = (8 * D * N * H + 8 * D * K * H + 12 * D * F) // 4
        axes = ("fsdp",)
    assert found == {("all-to-all", (axis,)): 2 * FLOAT * parts for axis in axes}
