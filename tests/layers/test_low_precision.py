"""Products in 8 bits against ones that are rounded by NumPy and multiplied in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Execution, Precision
from braeburn.layers import low_precision
from braeburn.layers.linear import linear
from braeburn.layers.low_precision import E4M3, E5M2
from braeburn.layers.spec import ParamSpec

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
KINDS = ("fp8", "fp8_rows", "int8")
NARROW = ParamSpec((24, 16), ("embed", "ffn"), "matrix", ("embed",))
HEADS = ParamSpec((3, 8, 16), ("heads", "head_dim", "embed"), "matrix", ("heads", "head_dim"))


def rounded(x, dims, form, matmul):
    """The rounded numbers and their unit, in float64."""
    largest = np.max(np.abs(x), axis=None if matmul == "fp8" else dims, keepdims=True)
    if matmul == "int8":
        largest = np.maximum(largest, np.float32(1e-30))
        steps = np.rint(x * (np.float32(127) / largest))
        return steps.astype(np.float64), (largest * np.float32(1 / 127)).astype(np.float64)
    fraction, power = np.frexp(largest.astype(np.float64) / LARGEST[form])
    power = np.where(fraction == 0.5, power - 1, np.where(largest == 0, -126, power))
    unit = np.exp2(np.clip(power, -126, 126).astype(np.float64))
    scaled = (x / unit).astype(np.float32)
    return scaled.astype(form.dtype).astype(np.float64), unit


def multiplied(one, other, formats, matmul):
    """The product of two matrices that are rounded first."""
    (a, unit_a), (b, unit_b) = (
        rounded(one, 1, formats[0], matmul),
        rounded(other, 0, formats[1], matmul),
    )
    return (a @ b) * unit_a * unit_b


def products(spec, execution, x, weight, above):
    """The product and both gradients."""

    def all_three(x, weight, above):
        found, pull = jax.vjp(lambda x, weight: linear(x, weight, spec, execution), x, weight)
        return found, *pull(above)

    return jax.jit(all_three)(x, weight, above)


def arrays(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("matmul", KINDS)
@pytest.mark.parametrize("spec", [NARROW, HEADS], ids=["one dimension", "two"])
def test_products_and_gradients_are_those_of_rounded_numbers(matmul, spec):
    summed = len(spec.fan_in)
    inputs, outputs = spec.shape[:summed], spec.shape[summed:]
    x, weight, above = arrays(0, (2, 5, *inputs), spec.shape, (2, 5, *outputs))
    # Rows and columns of very different sizes.
    x *= np.exp2(np.arange(10)).reshape(2, 5, *[1] * summed).astype(np.float32)
    above *= 1e-6
    execution = Execution(precision=Precision(compute="float32", matmul=matmul))
    found, of_x, of_weight = products(spec, execution, x, weight, above)
    flat, matrix = x.reshape(10, -1), weight.reshape(np.prod(inputs), -1)
    above = above.reshape(10, -1)
    wanted = multiplied(flat, matrix, (E4M3, E4M3), matmul)
    np.testing.assert_allclose(found.reshape(10, -1), wanted, rtol=1e-5, atol=1e-5)
    wanted = multiplied(above, matrix.T, (E5M2, E4M3), matmul)
    np.testing.assert_allclose(of_x.reshape(10, -1), wanted, rtol=1e-5, atol=1e-11)
    if matmul == "int8":
        wanted = flat.T.astype(np.float64) @ above
    else:
        wanted = multiplied(flat.T, above, (E4M3, E5M2), matmul)
    np.testing.assert_allclose(of_weight.reshape(matrix.shape), wanted, rtol=1e-4, atol=1e-8)
    # They are not the exact ones.
    assert np.max(np.abs(found.reshape(10, -1) - flat @ matrix)) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4
    ),
    matmul=st.sampled_from(KINDS),
    form=st.sampled_from([E4M3, E5M2]),
)
def test_numbers_are_rounded_as_numpy_rounds_them(values, matmul, form):
    # What XLA flushes to zero is left out.
    x = np.array(values, np.float32).reshape(2, 2)
    x[np.abs(x) < 1e-30] = 0
    found = low_precision._rounded(jnp.asarray(x), (1,), form, matmul, ())
    wanted, unit = rounded(x, 1, form, matmul)
    np.testing.assert_array_equal(np.asarray(found.values, np.float64), wanted)
    np.testing.assert_array_equal(np.asarray(found.unit, np.float64), unit)


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_the_largest_number_is_what_the_format_ends_with(form):
    for largest in (1.0, 1.75, np.nextafter(np.float32(1.75), np.float32(2)), 448.0, 3e-5):
        found = low_precision._rounded(jnp.asarray([largest, 0]), (0,), form, "fp8", ())
        top = float(found.values[0])
        assert LARGEST[form] / 2 <= top <= LARGEST[form]
        assert top * float(found.unit[0]) == pytest.approx(float(largest), rel=0.13)


@pytest.mark.parametrize("matmul", KINDS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_seen(matmul, bad):
    x, weight, above = arrays(1, (4, 24), NARROW.shape, (4, 16))
    execution = Execution(precision=Precision(matmul=matmul))
    x[1, 3] = bad
    # The gradients do not hang on the value of the product.
    found, _, of_weight = products(
        NARROW, execution, jnp.asarray(x, jnp.bfloat16), weight, jnp.asarray(above, jnp.bfloat16)
    )
    assert not np.isfinite(found[1]).any() and not np.isfinite(of_weight).all()
    x[1, 3], above[2, 5] = 0, bad
    _, of_x, of_weight = products(NARROW, execution, x, weight, above)
    assert not np.isfinite(of_x[2]).any() and not np.isfinite(of_weight).all()


@pytest.mark.parametrize("matmul", KINDS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_other_compilers_are_given_comes_to_the_same(platform, matmul, monkeypatch):
    given = arrays(2, (6, 24), NARROW.shape, (6, 16))
    execution = Execution(precision=Precision(compute="float32", matmul=matmul))
    wanted = products(NARROW, execution, *given)
    asked = []
    monkeypatch.setattr(
        low_precision, "traced_for", lambda: (asked.append(platform), (platform, None))[1]
    )
    for found, same in zip(products(NARROW, execution, *given), wanted, strict=True):
        np.testing.assert_allclose(found, same, rtol=1e-6, atol=1e-6)
    assert asked


@pytest.mark.parametrize("matmul", KINDS)
def test_zeros_give_zeros(matmul):
    execution = Execution(precision=Precision(compute="float32", matmul=matmul))
    zeros = [np.zeros(shape, np.float32) for shape in ((4, 24), NARROW.shape, (4, 16))]
    for array in products(NARROW, execution, *zeros):
        np.testing.assert_array_equal(array, 0)


def test_what_stays_in_the_type_to_compute_in():
    precision = Precision(matmul="fp8")
    training = Execution(precision=precision)
    router = replace(NARROW, role="router")
    assert low_precision.lowering(NARROW, training) is not None
    for spec, execution in (
        (router, training),
        (NARROW, training.forward_only),
        (NARROW, Execution()),
    ):
        assert low_precision.lowering(spec, execution) is None
