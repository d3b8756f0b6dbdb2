"""Products in 8 bits on meshes against the same on one device."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from braeburn.config import Execution, Matmul, MeshConfig, Precision
from braeburn.layers.linear import linear
from braeburn.layers.spec import ParamSpec
from braeburn.parallel.mesh import build
from braeburn.parallel.rules import partition

RISES = ParamSpec((32, 64), ("embed", "ffn"), "matrix", ("embed",))
FALLS = ParamSpec((64, 32), ("ffn", "embed"), "matrix", ("ffn",))
TOKENS = PartitionSpec(("data", "fsdp"), None, None)


def block(mesh: MeshConfig, matmul: Matmul) -> list[np.ndarray]:
    """What two products give of the same numbers, and the gradients of inputs and weights."""
    execution = Execution(mesh, precision=Precision(compute="float32", matmul=matmul))
    generator = np.random.default_rng(0)
    shapes = ((8, 4, 32), RISES.shape, FALLS.shape, (8, 4, 32))
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    # Each device's tokens and hidden units have largest numbers of their own.
    arrays[0] *= np.exp2(np.arange(8) % 5).reshape(8, 1, 1).astype(np.float32)
    arrays[1] *= np.exp2(np.arange(64) // 8 % 5).astype(np.float32)

    def local(x: Any, rises: Any, falls: Any, above: Any) -> Any:
        def two(x: Any, rises: Any, falls: Any) -> Any:
            return linear(linear(x, rises, RISES, execution), falls, FALLS, execution)

        found, pull = jax.vjp(two, x, rises, falls)
        of_x, *of_weights = pull(above)
        if mesh.tensor > 1:
            found, of_x = (jax.lax.psum(part, "tensor") for part in (found, of_x))
        if mesh.data > 1:
            of_weights = [jax.lax.psum(part, "data") for part in of_weights]
        return found, of_x, *of_weights

    weights = [
        partition(spec.axes, spec.shape, "parameters", execution, spec.role)
        for spec in (RISES, FALLS)
    ]
    function = jax.shard_map(
        local,
        mesh=build(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]),
        in_specs=(TOKENS, *weights, TOKENS),
        out_specs=(TOKENS, TOKENS, *weights),
        check_vma=False,
    )
    return [np.asarray(result) for result in jax.jit(function)(*arrays)]


@cache
def one_device(matmul: Matmul) -> list[np.ndarray]:
    return block(MeshConfig(fsdp=1), matmul)


@pytest.mark.parametrize("matmul", ["fp8", "fp8_rows", "int8"])
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["tokens", "all"]
)
def test_products_are_those_of_one_device(mesh: dict[str, int], matmul: Matmul) -> None:
    for found, wanted in zip(block(MeshConfig(**mesh), matmul), one_device(matmul), strict=True):
        # Without one unit of a row that shards have parts of, int8 comes out 1e-2 apart.
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
