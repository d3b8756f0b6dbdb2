"""Which back end multiplies rows by the matrix of their group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.layers.grouped import blocks, counted, ragged
from braeburn.layers.platform import traced_for

Product = Callable[
    [Float[Array, "M D"], Float[Array, "E D F"], Int[Array, " E"]], Float[Array, "M F"]
]


@dataclass(frozen=True)
class Backend:
    """One way to multiply rows by the matrix of their group.

    Attributes:
        name: in logs.
        platforms: that it is for, as JAX names them; empty for all.
        product: (rows, matrices, rows of each group) -> the products.
    """

    name: str
    platforms: tuple[str, ...]
    product: Product

    def is_supported(self, platform: str) -> bool:
        """Whether it is for a platform."""
        return not self.platforms or platform in self.platforms


# The best first; the last supports everything. XLA has kernels of `ragged_dot` for TPUs and, in
# hipBLASLt, for AMD's GPUs. For NVIDIA's (jax-cuda13-pjrt 0.12.0, H100) it multiplies all rows by
# all matrices, for which qwen3-30b-a3b would need 922 GiB on each of 64.
BACKENDS = (
    Backend("ragged_dot", ("tpu", "rocm"), ragged.product),
    Backend("counted", ("cuda",), counted.product),
    Backend("blocks", (), blocks.product),
)


_FOR_ACCELERATORS: ContextVar[bool] = ContextVar("for_accelerators", default=False)


@contextmanager
def for_accelerators() -> Iterator[None]:
    """Within it, `grouped_product` takes the back end of accelerators.

    The plan traces programs so, without a device: it counts the work of one product of all rows.
    """
    before = _FOR_ACCELERATORS.set(True)
    try:
        yield
    finally:
        _FOR_ACCELERATORS.reset(before)


def grouped_product(
    rows: Float[Array, "M D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """The product of each row and the matrix of its group.

    Args:
        rows: those of group 0 first, then those of group 1, and so on; rows behind those of the
            last group belong to none.
        matrices: of the groups, of the type of `rows`.
        sizes: rows of each group, int32; their sum is at most M.

    Returns:
        The products, in the type of `rows`; zeros for rows that belong to no group. Differentiable
        in rows and matrices.
    """
    platform = "tpu" if _FOR_ACCELERATORS.get() else traced_for()[0]
    backend = next(each for each in BACKENDS if each.is_supported(platform))
    found = backend.product(rows, matrices, sizes)
    # What is written behind the last group is up to the back end.
    inside = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(inside[:, None], found, 0)
