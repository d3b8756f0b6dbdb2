"""Attention within documents on an NVIDIA GPU: is it right, and how fast is it?

    python benchmarks/gpu_attention.py [--check-only | --time-only] [--toy] [--json FILE]

Each back end for GPUs is compared with attention and its gradients written out in float64 NumPy, on
documents of many shapes, as relative errors |found - expected| / |expected|; bfloat16 alone
accounts for about 0.004. Then forward and backward passes are timed at 16 sequences of 4096 tokens,
beside cuDNN without documents and beside PyTorch. Exits with 1 where an error is above 0.01 or a
result is not finite.

Without a GPU, cuDNN's attention is lowered for one instead of being run. `--toy` takes small
shapes, for that.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import DisabledSafetyCheck, export

from braeburn.config import ONE_DEVICE, MeshConfig
from braeburn.layers import attention
from braeburn.layers.attention import cudnn
from braeburn.parallel.sequence import zigzag

LIMIT = 0.01
PARTS = ("output", "query", "key", "value")
# The custom calls that cuDNN's attention is lowered to.
CALLS = ("Softmax", "SoftmaxBackward", "ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward")
# Lengths of the documents of each sequence, heads, key heads, width of a head.
SHAPES: dict[str, tuple[list[list[int]], int, int, int]] = {
    "one document": ([[1024], [1024]], 8, 8, 128),
    "grouped queries": ([[300, 500, 224], [1024]], 16, 4, 128),
    "one key head": ([[300, 500, 224], [1, 1023]], 8, 1, 64),
    "40 documents": ([[25] * 40 + [24], [1000, 24]], 8, 4, 128),
    "documents of one token": ([[1] * 256, [256], [3, 250, 3]], 4, 2, 64),
    "odd lengths": ([[7, 300, 13, 100, 80], [499, 1]], 8, 8, 128),
}
TOY_SHAPES: dict[str, tuple[list[list[int]], int, int, int]] = {
    "grouped queries": ([[30, 50, 48], [128]], 4, 2, 32)
}
# Sequences, their tokens, heads, key heads, width of a head.
SPEED = (16, 4096, 16, 8, 128)
TOY_SPEED = (1, 256, 4, 2, 32)


def has_gpu() -> bool:
    """Whether programs of this process run on a GPU."""
    return jax.default_backend() == "gpu"


class Lowered(Exception):
    """A program that cannot run here was lowered for a GPU."""


def call(both: Any, back_end: str, *given: Any) -> Any:
    """The result of a jitted function.

    Raises:
        Lowered: it runs on GPUs alone, of which none is here.
    """
    if back_end.startswith("cudnn") and not has_gpu():
        checks = [DisabledSafetyCheck.custom_call(f"__cudnn$fmha{name}") for name in CALLS]
        text = export(both, platforms=["cuda"], disabled_checks=checks)(*given).mlir_module()
        raise Lowered(f"lowered for a GPU, with {text.count('__cudnn$fmha')} calls of cuDNN")
    return both(*given)


def arrays(
    lengths: list[list[int]], heads: int, kv_heads: int, head_dim: int
) -> tuple[np.ndarray, ...]:
    """Random query, key, value and gradient of the output, float32, and the segments of documents
    of these lengths.
    """
    rng = np.random.default_rng(len(lengths[0]))
    batch, length = len(lengths), sum(lengths[0])
    wide = (batch, length, heads, head_dim)
    query, gradient = rng.normal(size=(2, *wide)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, length, kv_heads, head_dim)).astype(np.float32)
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]).astype(
        np.int32
    )
    return query, key, value, gradient, segments


def expected(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    gradient: np.ndarray,
    segments: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """The output and the gradients for query, key and value, in float64."""
    group, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5
    query, gradient = query.astype(np.float64), gradient.astype(np.float64)
    wide_key, wide_value = (np.repeat(x.astype(np.float64), group, axis=2) for x in (key, value))
    causal = np.tril(np.ones((query.shape[1],) * 2, bool))
    visible = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    scores = np.where(visible, np.einsum("bqnh,bsnh->bnqs", query, wide_key) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    output = np.einsum("bnqs,bsnh->bqnh", weights, wide_value)
    logit_gradient = np.einsum("bqnh,bsnh->bnqs", gradient, wide_value)
    logit_gradient = (
        weights
        * (logit_gradient - np.einsum("bqnh,bqnh->bnq", gradient, output)[..., None])
        * scale
    )

    def grouped(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)

    return (
        output,
        np.einsum("bnqs,bsnh->bqnh", logit_gradient, wide_key),
        grouped(np.einsum("bnqs,bqnh->bsnh", logit_gradient, query)),
        grouped(np.einsum("bnqs,bqnh->bsnh", weights, gradient)),
    )


def found(
    name: str, run: Callable[..., Any], given: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, ...]:
    """The same by a back end, in bfloat16."""
    query, key, value, gradient = (jnp.asarray(x, jnp.bfloat16) for x in given[:4])

    @jax.jit
    def both(query: Any, key: Any, value: Any, gradient: Any, segments: Any) -> tuple[Any, ...]:
        output, back = jax.vjp(lambda *x: run(*x, segments, ONE_DEVICE), query, key, value)
        return output, *back(gradient)

    results = call(both, name, query, key, value, gradient, given[4])
    return tuple(np.asarray(x, np.float64) for x in results)


@contextlib.contextmanager
def being_shard(shard: int) -> Iterator[None]:
    """Within it, attention is traced as that of one context shard."""
    real_index = cudnn.axis_index
    cudnn.axis_index = lambda axis, mesh: shard  # type: ignore[assignment]
    try:
        yield
    finally:
        cudnn.axis_index = real_index


def found_in_shards(given: tuple[np.ndarray, ...], shards: int) -> tuple[np.ndarray, ...]:
    """The same by packed attention over context shards, one after the other on one GPU."""
    order = zigzag(given[0].shape[1], shards)
    query, key, value, gradient = (jnp.asarray(x, jnp.bfloat16) for x in given[:4])
    mesh, length = MeshConfig(fsdp=1, context=shards), given[0].shape[1] // shards
    segments = jnp.asarray(given[4])
    parts, sums = [], [np.zeros(key.shape), np.zeros(key.shape)]
    for shard in range(shards):
        own = order[shard * length : (shard + 1) * length]

        @jax.jit
        def both(gradient: Any, own_segments: Any, segments: Any, *arrays: Any) -> tuple[Any, ...]:
            def attend(q: Any, k: Any, v: Any, all_keys: Any, all_values: Any) -> Any:
                everything = (all_keys, all_values, segments)
                return cudnn._attention(cudnn.Heads(q, k, v), None, own_segments, everything, mesh)

            output, back = jax.vjp(attend, *arrays)
            return output, *back(gradient)

        local = (query[:, own], key[:, own], value[:, own], key, value)
        with being_shard(shard):
            output, *gradients = call(
                both, "cudnn", gradient[:, own], segments[:, own], segments, *local
            )
        gradients = [np.asarray(x, np.float64) for x in gradients]
        parts.append((np.asarray(output, np.float64), gradients[0]))
        for total, mine, every in zip(sums, gradients[1:3], gradients[3:], strict=True):
            total[:, own] += mine
            total += every
    undo = np.argsort(order)
    return *(np.concatenate(part, axis=1)[:, undo] for part in zip(*parts, strict=True)), *sums


def errors(results: tuple[np.ndarray, ...], truth: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Relative errors by name; infinite where a result is not finite."""
    named = zip(PARTS, results, truth, strict=True)
    return {
        name: float(np.linalg.norm(x - y) / np.linalg.norm(y))
        if np.isfinite(x).all()
        else float("inf")
        for name, x, y in named
    }


def check(shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors of each back end on each shape."""
    rows = []
    runs: dict[str, Callable[[tuple[np.ndarray, ...]], tuple[np.ndarray, ...]]] = {
        "cudnn": lambda given: found("cudnn", attention.cudnn_attention, given),
        "cudnn-masked": lambda given: found(
            "cudnn-masked", attention.cudnn_masked_attention, given
        ),
        "blocked": lambda given: found("blocked", attention.blocked_attention, given),
        "cudnn over 2 shards": lambda given: found_in_shards(given, 2),
        "cudnn over 4 shards": lambda given: found_in_shards(given, 4),
    }
    for shape, (lengths, *sizes) in shapes.items():
        given = arrays(lengths, *sizes)
        truth = expected(*given)
        for name, run in runs.items():
            if "shards" in name and given[0].shape[1] % 8:
                continue
            if name == "cudnn-masked" and given[0].shape[1] % 2:
                continue
            try:
                row = {"shape": shape, "back_end": name, **errors(run(given), truth)}
            except Lowered as instead:
                row = {"shape": shape, "back_end": name, "not run": str(instead)}
            except Exception as error:  # a back end that fails is a result too
                row = {
                    "shape": shape,
                    "back_end": name,
                    "output": float("inf"),
                    "error": str(error)[:300],
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def seconds(function: Callable[..., Any], *given: Any, repeats: int = 10) -> float:
    """The median over some calls, after two others."""
    for _ in range(2):
        jax.block_until_ready(function(*given))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*given))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def speed(sizes: tuple[int, int, int, int, int]) -> list[dict[str, Any]]:
    """Seconds of a forward and a backward pass.

    Args:
        sizes: sequences, their tokens, heads, key heads, width of a head.
    """
    batch, length, heads, kv_heads, head_dim = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    query, gradient = (
        jax.random.normal(k, (batch, length, heads, head_dim), jnp.bfloat16) for k in keys[:2]
    )
    key, value = (
        jax.random.normal(k, (batch, length, kv_heads, head_dim), jnp.bfloat16) for k in keys[2:]
    )
    rows = []

    def timed(name: str, run: Callable[..., Any], documents: int, spans: int = 0) -> None:
        segments = jnp.asarray(
            np.tile(np.arange(length) * documents // length, (batch, 1)), jnp.int32
        )
        normal = cudnn.SPANS
        cudnn.SPANS = spans or normal

        @jax.jit
        def both(query: Any, key: Any, value: Any, gradient: Any) -> Any:
            return jax.vjp(lambda *x: run(*x, segments), query, key, value)[1](gradient)

        row: dict[str, Any] = {"back_end": name, "documents": documents, "spans": spans}
        try:
            call(both, name, query, key, value, gradient)
            row["seconds"] = seconds(both, query, key, value, gradient)
        except Lowered as instead:
            row["not run"] = str(instead)
        cudnn.SPANS = normal
        rows.append(row)
        print(json.dumps(row), flush=True)

    def undivided(query: Any, key: Any, value: Any, segments: Any) -> Any:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )

    if has_gpu():  # without cuDNN, JAX's own function is not even traced
        timed("cudnn, no documents", undivided, 1)
    for spans in (8, 4, 16) if has_gpu() else (8,):
        for documents in (1, 4, 16, 48) if has_gpu() else (4,):
            timed("cudnn", attention.cudnn_attention, documents, spans)
    timed("cudnn-masked", attention.cudnn_masked_attention, 4)
    timed("blocked", attention.blocked_attention, 4)
    rows += torch_speed(batch, length, heads, kv_heads, head_dim)
    return rows


def torch_speed(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int
) -> list[dict[str, Any]]:
    """PyTorch's fused causal attention at the same sizes, without documents; nothing where it, or
    a GPU, is not there.
    """
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    rows = []
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        query = torch.randn(
            batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        shape = (2, batch, kv_heads, length, head_dim)
        key, value = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn_like(query)

        def both(
            query: Any = query, key: Any = key, value: Any = value, gradient: Any = gradient
        ) -> None:
            attend = torch.nn.functional.scaled_dot_product_attention
            output = attend(query, key, value, is_causal=True, enable_gqa=True)
            torch.autograd.grad(output, (query, key, value), gradient)
            torch.cuda.synchronize()

        row: dict[str, Any] = {"back_end": f"PyTorch, {name}", "documents": 1}
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                row["seconds"] = seconds(both)
        except RuntimeError as error:
            row["error"] = str(error)[:200]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> int:
    """Checks, then times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--check-only", action="store_true", help="time nothing")
    part.add_argument("--time-only", action="store_true", help="check nothing")
    parser.add_argument("--toy", action="store_true", help="small shapes")
    parser.add_argument("--json", help="a file to write all rows to")
    arguments = parser.parse_args()
    checked = [] if arguments.time_only else check(TOY_SHAPES if arguments.toy else SHAPES)
    timed = [] if arguments.check_only else speed(TOY_SPEED if arguments.toy else SPEED)
    if arguments.json:
        device = jax.devices()[0].device_kind
        facts = {"device": device, "jax": jax.__version__, "checked": checked, "timed": timed}
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump(facts, file)
    run = [row for row in checked if "not run" not in row]
    wrong = [row for row in run if not max(row[n] for n in PARTS if n in row) < LIMIT]
    not_run = f"; {len(checked) - len(run)} were not run" if len(run) < len(checked) else ""
    print(f"{len(run) - len(wrong)} of {len(run)} right{not_run}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
