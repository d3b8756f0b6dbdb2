"""The product of rows and the matrix of their group, beside float64 in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.layers.grouped import BACKENDS, grouped_product, triton
from braeburn.layers.grouped.request import Request
from braeburn.layers.grouped.select import choose


def expected(rows: np.ndarray, matrices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    result = np.zeros((rows.shape[0], matrices.shape[2]))
    ends = np.cumsum(sizes)
    for matrix, first, last in zip(matrices, ends - sizes, ends, strict=True):
        result[first:last] = rows[first:last].astype(np.float64) @ matrix.astype(np.float64)
    return result


def inputs(
    count: int, groups: int, sizes: tuple[int, int] = (12, 20)
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((count, sizes[0]), np.float32)
    return rows, generator.standard_normal((groups, *sizes), np.float32)


# Several tiles of columns; sums over tiles of 16.
TILED = (48, 144)


@pytest.fixture(autouse=True, scope="module")
def _without_gpus():
    """Kernels for GPUs are interpreted."""
    patch = pytest.MonkeyPatch()
    patch.setattr(triton, "INTERPRET", True)
    yield
    patch.undo()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 5, 16, 17, 63, 64, 100, 256, 300]), min_size=1, max_size=5
    ),
    behind=st.sampled_from([0, 1, 40]),
)
def test_products_and_gradients(backend, sizes, behind) -> None:
    """Whatever the groups: empty ones, one with all rows, and rows that belong to none."""
    sizes = np.asarray(sizes, np.int32)
    tiles = {"sizes": TILED} if backend.name == "triton" else {}
    rows, matrices = inputs(max(1, int(sizes.sum()) + behind), len(sizes), **tiles)
    counts = jnp.asarray(sizes)
    inside = (np.arange(len(rows)) < sizes.sum())[:, None]

    def product(rows, matrices):
        found = backend.product(rows, matrices, counts)
        return found if backend.fills else jnp.where(inside, found, 0)

    wanted = expected(rows, matrices, sizes)
    found, back = jax.vjp(product, jnp.asarray(rows), jnp.asarray(matrices))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    cotangent = np.random.default_rng(1).standard_normal(found.shape, np.float32)
    of_rows, of_matrices = back(jnp.asarray(cotangent))
    turned = expected(cotangent * inside, matrices.swapaxes(1, 2), sizes)
    np.testing.assert_allclose(of_rows, turned, rtol=1e-4, atol=1e-4)
    ends = np.cumsum(sizes)
    for found_, first, last in zip(of_matrices, ends - sizes, ends, strict=True):
        sums = rows[first:last].astype(np.float64).T @ cotangent[first:last].astype(np.float64)
        np.testing.assert_allclose(found_, sums, rtol=1e-3, atol=1e-3)


def test_rows_of_no_group_are_zero() -> None:
    rows, matrices = (jnp.asarray(each) for each in inputs(50, 3))
    found = np.asarray(grouped_product(rows, matrices, jnp.array([10, 0, 5], jnp.int32)))
    assert np.any(found[14])
    assert not np.any(found[15:])


def test_products_are_about_as_many_as_rows() -> None:
    """Not as many as rows times groups, as XLA for CPUs makes of `ragged_dot`. Blocks are counted
    by what the loops run over.
    """
    from braeburn.layers.grouped import blocks

    for sizes in ([100] * 8, [0] * 7 + [800], [1] * 8):
        worked = 0
        for size in sizes:
            left = size
            for block in blocks.BLOCKS[:-1]:
                worked += left // block * block
                left %= block
            worked += -(-left // blocks.BLOCKS[-1]) * blocks.BLOCKS[-1]
        assert worked <= sum(sizes) + len(sizes) * (blocks.BLOCKS[-1] - 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_is_kept(dtype: str) -> None:
    rows, matrices = (jnp.asarray(each, dtype) for each in inputs(40, 2))
    sizes = jnp.array([30, 10], jnp.int32)
    found, back = jax.vjp(lambda r, m: grouped_product(r, m, sizes), rows, matrices)
    assert {leaf.dtype for leaf in (found, *back(found))} == {jnp.dtype(dtype)}


def asked(**changes) -> Request:
    usual = {"platform": "cuda", "dtype": jnp.bfloat16, "rows": 4096, "groups": 128}
    sizes = {"inputs": 2048, "outputs": 768, "compute_capability": (9, 0)}
    return Request(**(usual | sizes | changes))


@pytest.mark.parametrize(
    ("changes", "name", "because"),
    [
        ({}, "triton", None),
        ({"platform": "tpu"}, "ragged_dot", None),
        ({"platform": "rocm"}, "ragged_dot", None),
        ({"platform": "cpu"}, "blocks", "it is for NVIDIA's GPUs, not cpu"),
        ({"dtype": jnp.float32}, "counted", "it would round products of float32"),
        ({"compute_capability": (7, 5)}, "counted", "it needs compute capability 8.0"),
        ({"compute_capability": None}, "counted", "it needs compute capability 8.0"),
        ({"outputs": 760}, "counted", "matrices of 2048 x 760 are no multiples of 16"),
    ],
)
def test_what_the_kernels_do_not_take_falls_to_a_loop(changes, name, because) -> None:
    backend, passed_over = choose(asked(**changes))
    assert backend.name == name
    assert because is None or any(because in reason for reason in passed_over)


def test_a_jax_without_triton_falls_to_a_loop(monkeypatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    backend, passed_over = choose(asked())
    assert backend.name == "counted"
    assert "not triton: this version of JAX has no Triton" in passed_over


def test_kernels_are_lowered_for_gpus_with_their_gradients(monkeypatch) -> None:
    """Without a GPU, as far as the code of Triton that XLA compiles."""
    monkeypatch.setattr(triton, "INTERPRET", False)

    def both(rows, matrices, sizes):
        found, back = jax.vjp(lambda r, m: triton.product(r, m, sizes), rows, matrices)
        return found, *back(found)

    rows = jax.ShapeDtypeStruct((1000, 2048), jnp.bfloat16)
    matrices = jax.ShapeDtypeStruct((8, 2048, 768), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    # JAX 0.12 asks for the GPU that kernels are for.
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("fsdp",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(both).trace(rows, matrices, sizes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3
    assert text.count('name = "grouped_products"') == 2
