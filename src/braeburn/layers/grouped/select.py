"""Which back end multiplies rows by the matrix of their group."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from braeburn.layers.grouped import blocks, counted, ragged, triton
from braeburn.layers.grouped.request import Request
from braeburn.layers.platform import traced_for

logger = logging.getLogger(__name__)

Product = Callable[
    [Float[Array, "M D"], Float[Array, "E D F"], Int[Array, " E"]], Float[Array, "M F"]
]


@dataclass(frozen=True)
class Work:
    """What a back end does beside one product of each row, as far as the plan counts it.

    Attributes:
        rows: of each group that are multiplied in vain, on average.
        block: rows that are multiplied by one copy of their matrix, while all rows and results lie
            in memory once more; 0 where nothing is copied.
    """

    rows: float = 0.0
    block: int = 0


@dataclass(frozen=True)
class Backend:
    """One way to multiply rows by the matrix of their group.

    Attributes:
        name: in logs.
        why_not: the reason that a request is not supported, or None.
        product: (rows, matrices, rows of each group) -> the products.
        fills: whether it gives zeros for the rows behind the last group, and not anything.
        work: what it does beside its products.
    """

    name: str
    why_not: Callable[[Request], str | None]
    product: Product
    fills: bool = False
    work: Work = Work()


def _for(*platforms: str) -> Callable[[Request], str | None]:
    """Supports what is asked for on some platforms, as JAX names them; none for all."""

    def why_not(request: Request) -> str | None:
        if not platforms or request.platform in platforms:
            return None
        return f"it is for {' and '.join(platforms)}, not {request.platform}"

    return why_not


# The best first; the last supports everything. XLA has kernels of `ragged_dot` for TPUs and, in
# hipBLASLt, for AMD's GPUs. For NVIDIA's (jax-cuda13-pjrt 0.12.0, H100) it multiplies all rows by
# all matrices, for which qwen3-30b-a3b would need 922 GiB on each of 64.
BACKENDS = (
    Backend("ragged_dot", _for("tpu", "rocm"), ragged.product),
    # Of a group's last block half is empty.
    Backend("triton", triton.why_not, triton.product, fills=True, work=Work(triton.BLOCK / 2)),
    Backend(
        "counted", _for("cuda"), counted.product, work=Work(1.0 * counted.BLOCK, counted.BLOCK)
    ),
    Backend("blocks", _for(), blocks.product),
)


@dataclass(frozen=True)
class Target:
    """What products are planned for.

    Attributes:
        platform: as `Request` has it.
        compute_capability: of an NVIDIA GPU.
    """

    platform: str
    compute_capability: tuple[int, int] | None = None


_PLANNED: ContextVar[Target | None] = ContextVar("planned", default=None)


@contextmanager
def planned_for(target: Target) -> Iterator[None]:
    """Within it, `grouped_product` is one `ragged_dot` whatever the devices.

    The plan traces programs so, and adds the work of the back end that the target would choose.
    """
    before = _PLANNED.set(target)
    try:
        yield
    finally:
        _PLANNED.reset(before)


def planned_platform() -> str | None:
    """The platform that the traced program is planned for; None where it is to run."""
    planned = _PLANNED.get()
    return planned.platform if planned else None


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
    planned = _PLANNED.get()
    platform, compute_capability = traced_for()
    if planned:
        platform, compute_capability = planned.platform, planned.compute_capability
    backend = select(
        Request(
            platform=platform,
            dtype=rows.dtype,
            rows=rows.shape[0],
            groups=matrices.shape[0],
            inputs=matrices.shape[1],
            outputs=matrices.shape[2],
            compute_capability=compute_capability,
        )
    )
    found = (ragged.product if planned else backend.product)(rows, matrices, sizes)
    if backend.fills:
        return found
    # What is written behind the last group is up to the back end.
    inside = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(inside[:, None], found, 0)


def select(request: Request) -> Backend:
    """The first back end that supports the request; on GPUs each choice is logged once."""
    backend, passed_over = choose(request)
    if passed_over and request.platform == "cuda":
        _log(backend.name, request.inputs, request.outputs, "; ".join(passed_over))
    return backend


@functools.cache
def _log(name: str, inputs: int, outputs: int, because: str) -> None:
    logger.info("experts of %s x %s: %s (%s)", inputs, outputs, name, because)


def choose(request: Request) -> tuple[Backend, list[str]]:
    """The first back end that supports the request, and why those before it do not."""
    passed_over: list[str] = []
    for backend in BACKENDS:
        reason = backend.why_not(request)
        if reason is None:
            return backend, passed_over
        passed_over.append(f"not {backend.name}: {reason}")
    raise NotImplementedError("; ".join(passed_over))
