"""Rounded weights: bit for bit those of ggml, gradients as they should be, the same on every
layout.
"""

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from braeburn.config import Execution, MeshConfig, ModelConfig, Quantization
from braeburn.layers.spec import ParamSpec, Tree, abstract, initialize, map_specs, walk
from braeburn.models import decoder
from braeburn.parallel import mesh as meshes
from braeburn.parallel.layout import Layout
from braeburn.transforms.quantization import _int4, _int8, factor_specs, quantized

# Rounding errors hide where programs are not optimised.
pytestmark = pytest.mark.optimized

THEIRS = {"int8": GGMLQuantizationType.Q8_0, "int4": GGMLQuantizationType.Q4_0}
# One parameter of each arrangement: inputs first, between the layers and the outputs, two axes of
# them, and last.
SPECS: Tree = {
    "embedding": ParamSpec((50, 64), ("vocab", "embed"), "embedding", ("embed",)),
    "layers": {
        "norm": ParamSpec((3, 64), ("layers", "embed"), "norm"),
        "query": ParamSpec(
            (3, 64, 2, 20), ("layers", "embed", "heads", "head_dim"), "matrix", ("embed",)
        ),
        "output": ParamSpec(
            (3, 4, 24, 10),
            ("layers", "heads", "head_dim", "embed"),
            "matrix",
            ("heads", "head_dim"),
        ),
        "uneven": ParamSpec((3, 40, 64), ("layers", "ffn", "embed"), "matrix", ("ffn",)),
    },
}
KINDS = ["int8", "int4", "int2"]


def draw(scale: float = 0.05, specs: Tree = SPECS) -> Tree:
    generator = np.random.default_rng(7)
    return map_specs(
        lambda _, spec: (scale * generator.standard_normal(spec.shape)).astype(np.float32), specs
    )


def ones(quantization: Quantization) -> Tree:
    return initialize(factor_specs(SPECS, quantization), 0)


def run(
    params: Tree, kind: str, factors: Tree | None = None, group_size: int = 32
) -> dict[str, np.ndarray]:
    quantization = Quantization(kind=kind, group_size=group_size)
    factors = ones(quantization) if factors is None else factors
    found = jax.jit(lambda p, f: quantized(p, f, SPECS, quantization))(params, factors)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    return {path: np.asarray(value) for path, value in walk(found)}


def rows(path: str, values: np.ndarray) -> np.ndarray:
    """[..., inputs], as a file has them: the inputs brought to the end, written out by hand for
    each parameter.
    """
    order = {"layers/query": (0, 2, 3, 1), "layers/output": (0, 3, 1, 2)}.get(path)
    moved = values.transpose(order) if order else values
    return moved.reshape(*moved.shape[:2], -1) if path == "layers/output" else moved


@pytest.mark.parametrize("kind", THEIRS)
def test_values_are_exactly_those_of_ggml(kind: str) -> None:
    """Also where magnitudes tie, halves are rounded, groups are zero, and scales are float16's
    subnormals or zero.
    """
    for scale in (1.0, 0.03, 1e-4, 1e-6, 1e-9):
        params = draw(scale)
        params["embedding"][:8] = (
            scale * np.random.default_rng(3).integers(-16, 17, (8, 64)) / np.float32(16)
        )
        params["embedding"][8] = 0
        params["embedding"][9] = np.array([scale, -scale] * 32)
        found = run(params, kind)
        for path, values in walk(params):
            if path in ("layers/norm", "layers/uneven"):
                np.testing.assert_array_equal(found[path], values)
                continue
            packed = gguf.quants.quantize(np.ascontiguousarray(rows(path, values)), THEIRS[kind])
            expected = gguf.quants.dequantize(packed, THEIRS[kind])
            np.testing.assert_array_equal(
                rows(path, found[path]), expected, err_msg=f"{path} {scale}"
            )
            assert scale < 1e-8 or not np.array_equal(found[path], values)


# Steps between the largest weight of a group and zero, and the levels that a weight may lie
# half-way between.
HALF_WAY = {"int8": (127, 126), "int4": (-8, 7)}


@pytest.mark.parametrize("kind", THEIRS)
def test_weights_half_way_between_levels_go_where_ggml_has_them_go(kind: str) -> None:
    """Their last bits decide, and so does each operation on the way: none is fused or replaced by
    another.

    Without the barriers of `_int8`, or the bounds of `_int4`, thousands of these come out
    otherwise.
    """
    generator = np.random.default_rng(0)
    steps, last = HALF_WAY[kind]
    shape = (20_000, 32)
    largest = generator.uniform(0.5, 2, (shape[0], 1)).astype(np.float32)
    weights = (largest / steps * (generator.integers(-last, last, shape) + 0.5)).astype(np.float32)
    weights = np.nextafter(
        weights, weights + generator.choice([-1, 0, 1], shape).astype(np.float32)
    )
    weights[:, :1] = largest
    specs = {"embedding": ParamSpec(shape, ("vocab", "embed"), "embedding", ("embed",))}
    found = jax.jit(lambda p: quantized(p, {}, specs, Quantization(kind=kind)))(
        {"embedding": weights}
    )
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights, THEIRS[kind]), THEIRS[kind])
    np.testing.assert_array_equal(found["embedding"], expected)


# Operations that a compiler may move to the other side of a product.
TRANSPARENT = ("abs", "neg", "reshape", "broadcast_in_dim", "convert_element_type")


def _operands_of_sums(jaxpr: Any) -> list[str]:
    """What computes the operands of sums and differences."""
    made_by = {str(out): equation for equation in jaxpr.eqns for out in equation.outvars}

    def origin(value: Any) -> str:
        equation = made_by.get(str(value))
        while equation and equation.primitive.name in TRANSPARENT:
            equation = made_by.get(str(equation.invars[0]))
        return equation.primitive.name if equation else "given"

    sums = [equation for equation in jaxpr.eqns if equation.primitive.name in ("add", "sub")]
    return [origin(operand) for equation in sums for operand in equation.invars]


@pytest.mark.parametrize("rounding", [_int8, _int4])
def test_no_product_is_added_to_before_it_is_bounded(rounding: Any) -> None:
    """Compilers may fuse a product with a sum and leave the product unrounded, of which not every
    CPU makes use.
    """
    with jax.disable_jit():  # what jnp's functions do stands inline
        jaxpr = jax.make_jaxpr(lambda groups: rounding(groups, 1))(jnp.zeros((4, 32))).jaxpr
    origins = _operands_of_sums(jaxpr)
    assert origins and "mul" not in origins


def test_scales_are_rounded_by_arithmetic() -> None:
    """A compiler may drop a conversion to float16 and back."""
    text = jax.jit(lambda groups: _int8(groups, 1)).lower(jnp.zeros((4, 32))).as_text()
    assert "f16" not in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [16, 32])
def test_weights_on_the_grid_stay_where_they_are(kind: str, group_size: int) -> None:
    once = run(draw(), kind, group_size=group_size)
    twice = run(_tree(once), kind, group_size=group_size)
    for path, values in once.items():
        if (
            kind == "int2"
        ):  # scales are float32 here, which the levels are multiples of but for the last place
            np.testing.assert_allclose(twice[path], values, rtol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(twice[path], values, err_msg=path)


def _tree(values: dict[str, np.ndarray]) -> Tree:
    return map_specs(lambda path, _: values[path], SPECS)


def test_two_bits_are_the_nearest_of_four_levels_between_the_factors_ends() -> None:
    params, quantization = draw(), Quantization(kind="int2")
    factors = jax.tree.map(lambda one: 0.6 * one, ones(quantization))
    found = run(params, "int2", factors)
    for path in ("embedding", "layers/query", "layers/output"):
        values = rows(path, dict(walk(params))[path]).astype(np.float64)
        groups = values.reshape(-1, 32)
        largest = np.abs(groups).max(1, keepdims=True)
        levels = 0.6 * largest * np.array([-1.0, -1 / 3, 1 / 3, 1.0])
        nearest = np.abs(groups[..., None] - levels[:, None]).argmin(-1)
        expected = np.take_along_axis(levels, nearest, 1).reshape(values.shape)
        np.testing.assert_allclose(rows(path, found[path]), expected, rtol=1e-6)
    assert (run(jax.tree.map(np.zeros_like, params), "int2", factors)["embedding"] == 0).all()


def test_one_factor_for_each_matrix_of_each_layer() -> None:
    found = dict(walk(factor_specs(SPECS, Quantization(kind="int2"))))
    assert {path: (spec.shape, spec.axes, spec.role) for path, spec in found.items()} == {
        "embedding": ((), (), "scale"),
        "layers/query": ((3,), ("layers",), "scale"),
        "layers/output": ((3,), ("layers",), "scale"),
    }
    assert all(
        (np.asarray(one) == 1).all() for one in jax.tree.leaves(ones(Quantization(kind="int2")))
    )
    assert (
        factor_specs(SPECS, Quantization(kind="int4"))
        == factor_specs(SPECS, Quantization(kind="int8"))
        == {}
    )

    params, factors = (
        draw(),
        {"layers": {"query": jnp.array([1.0, 0.5, 1.0]), "output": jnp.ones(3)}},
    )
    before = run(params, "int2")
    after = run(params, "int2", factors | {"embedding": jnp.ones(())})
    changed = [
        not np.array_equal(before["layers/query"][i], after["layers/query"][i]) for i in range(3)
    ]
    assert changed == [False, True, False]


def _gradients(kind: str, factors: Tree, params: Tree) -> tuple[Tree, Tree, Tree]:
    """Of a weighted sum of the rounded weights: its weights, and the gradients of the weights and
    the factors.
    """
    quantization = Quantization(kind=kind)
    cotangents = map_specs(
        lambda _, spec: np.random.default_rng(1).standard_normal(spec.shape, dtype=np.float32),
        SPECS,
    )

    def total(p: Tree, f: Tree) -> Any:
        values = quantized(p, f, SPECS, quantization)
        return sum(jax.tree.leaves(jax.tree.map(lambda v, s: jnp.sum(v * s), values, cotangents)))

    return cotangents, *jax.jit(jax.grad(total, (0, 1)))(params, factors)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_pass_the_rounding_by(kind: str) -> None:
    cotangents, found, _ = _gradients(kind, {}, draw())
    jax.tree.map(np.testing.assert_array_equal, found, cotangents)


def test_two_bit_gradients_end_at_the_outermost_levels() -> None:
    """Weights within have that of their level; the factor has, with the levels held, that of the
    sum itself.
    """
    params = draw()
    factors = jax.tree.map(lambda one: 0.6 * one, ones(Quantization(kind="int2")))
    cotangents, found, found_factors = _gradients("int2", factors, params)
    for path in ("embedding", "layers/query", "layers/output"):
        values, cotangent, gradient = (
            rows(path, np.asarray(dict(walk(t))[path])) for t in (params, cotangents, found)
        )
        groups, cotangent, gradient = (
            x.reshape(-1, 32).astype(np.float64) for x in (values, cotangent, gradient)
        )
        largest = np.abs(groups).max(1, keepdims=True)
        inside = np.abs(groups) < 0.6 * largest
        assert 0.1 < inside.mean() < 0.95
        np.testing.assert_allclose(gradient, np.where(inside, cotangent, 0), rtol=1e-5, atol=1e-6)
        # LSQ (arXiv 1902.08153, equation 3): the level itself outside, the distance to it inside.
        step = largest / 1.5
        levels = np.clip(np.floor(groups / (0.6 * step)), -2, 1) + 0.5
        per_weight = cotangent * step * np.where(inside, levels - groups / (0.6 * step), levels)
        factor = np.asarray(dict(walk(found_factors))[path])
        np.testing.assert_allclose(
            factor, per_weight.reshape(*factor.shape, -1).sum(-1), rtol=1e-4, atol=1e-4
        )


def test_axes_apart_from_one_another_are_refused() -> None:
    specs = {
        "odd": ParamSpec(
            (32, 4, 32), ("heads", "embed", "head_dim"), "matrix", ("heads", "head_dim")
        )
    }
    with pytest.raises(ValueError, match="do not follow one another"):
        quantized(draw(specs=specs), {}, specs, Quantization())


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_what_one_device_gives(kind: str) -> None:
    """On global arrays sharded over fsdp and tensor, groups across two shards among them."""
    model = ModelConfig(
        vocab_size=96,
        d_model=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        ffn_dim=64,
        qk_norm=False,
    )
    specs, quantization = decoder.param_specs(model), Quantization(kind=kind)
    params, factors = draw(specs=specs), initialize(factor_specs(specs, quantization), 0)
    program = jax.jit(lambda p, f: quantized(p, f, specs, quantization))
    expected = program(params, factors)
    sizes = MeshConfig(fsdp=4, tensor=2)
    layout = Layout(Execution(sizes), meshes.build(sizes), specs)
    with layout.compiling():
        sharded = jax.device_put(params, layout.parameters())
        found = jax.jit(
            lambda p, f: quantized(p, f, specs, quantization), out_shardings=layout.parameters()
        )(sharded, factors)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, abstract(specs))
