"""Weights rounded as they will be shipped, with gradients that pass the rounding by:
quantisation-aware training.

Matrices and embeddings are rounded, norms are not. Each `group_size` weights that follow one
another along what they are multiplied over share a scale; where the groups do not come out even, a
parameter stays as it is, as in the files that are shipped.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from braeburn.config import Quantization, StageModels
from braeburn.layers.spec import LAYERS, ParamSpec, Tree, map_specs, walk
from braeburn.models.decoder import param_specs
from braeburn.transforms.definition import ADDED, Definition, Found, Transform, merged, without

# The name of the learned factors of scales, at the top of the tree of what a stage trains.
FACTORS = "factors"
# Largest magnitude of the balanced four levels -1.5, -0.5, 0.5 and 1.5, in steps.
_OUTERMOST = 1.5
_EDGE = 5e-7  # relative: a few roundings


def is_quantized(spec: ParamSpec, group_size: int) -> bool:
    """Whether a parameter is one of weights, and what it is multiplied over a multiple of the
    group.
    """
    return spec.role in ("matrix", "embedding") and _row_length(spec) % group_size == 0


def factor_specs(specs: Tree, quantization: Quantization) -> Tree:
    """The specs of the learned factors: one for each matrix of each layer, in the structure of the
    parameters.

    Only `int2` has any; for the others the tree is empty.
    """
    if quantization.kind != "int2":
        return {}
    factors: Tree = {}
    for path, spec in _quantized_specs(specs, quantization):
        *parents, name = path.split("/")
        node = factors
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = (
            ParamSpec(spec.shape[:1], (LAYERS,), "scale")
            if spec.stacked
            else ParamSpec((), (), "scale")
        )
    return factors


def quantized(params: Tree, factors: Tree, specs: Tree, quantization: Quantization) -> Tree:
    """The parameters as their quantised values, float32; what is not quantised is returned as it
    is.

    `int8` and `int4` give exactly what llama.cpp's Q8_0 and Q4_0 hold, and weights that lie on
    their grid already are unchanged. The gradient of a weight is that of its rounded value (the
    straight-through estimator of arXiv 1308.3432). `int2` has the four balanced levels and the
    learned scale of the Apple Foundation Models (arXiv 2507.13575); its weights beyond the
    outermost levels have no gradient, its factors have that of LSQ (arXiv 1902.08153).

    Args:
        params: float32 arrays as `specs` describe them.
        factors: float32 arrays as `factor_specs` describes them.
        specs: the specs of the parameters.
        quantization: kind and size of the groups.
    """
    values, learned = dict(walk(params)), dict(walk(factors))
    for path, spec in _quantized_specs(specs, quantization):
        weights = jnp.asarray(values[path])
        values[path] = _quantize(weights, learned.get(path), spec, quantization)
    return _like(params, values)


def _quantized_specs(specs: Tree, quantization: Quantization) -> Iterator[tuple[str, ParamSpec]]:
    return (
        (path, spec) for path, spec in walk(specs) if is_quantized(spec, quantization.group_size)
    )


def _like(tree: Tree, values: dict[str, Array], prefix: str = "") -> Tree:
    """The tree with its leaves replaced by those at their paths."""
    return {
        name: _like(child, values, f"{prefix}{name}/")
        if isinstance(child, dict)
        else values[prefix + name]
        for name, child in tree.items()
    }


def _row_length(spec: ParamSpec) -> int:
    return math.prod(spec.shape[spec.axes.index(axis)] for axis in spec.fan_in)


def _quantize(
    weights: Array, factor: Array | None, spec: ParamSpec, quantization: Quantization
) -> Array:
    """One parameter.

    Its groups are cut where they lie, which moves nothing and keeps the shards of a mesh.
    """
    first = spec.axes.index(spec.fan_in[0])
    after = first + len(spec.fan_in)
    if spec.axes[first:after] != spec.fan_in:
        raise ValueError(f"the axes {spec.fan_in} do not follow one another in {spec.axes}")
    groups = weights.reshape(
        *weights.shape[:first], -1, quantization.group_size, *weights.shape[after:]
    )
    along = first + 1
    if factor is not None:
        result = _int2(
            groups, factor.reshape(-1, *[1] * (groups.ndim - 1)) if spec.stacked else factor, along
        )
    else:
        round_to = {"int8": _int8, "int4": _int4}[quantization.kind]
        result = _straight_through(groups, round_to(lax.stop_gradient(groups), along))
    return result.reshape(weights.shape)


def _straight_through(values: Array, rounded: Array) -> Array:
    """Exactly `rounded`, with the gradient of `values`: the difference of two equal numbers is no
    rounding error.
    """
    return lax.stop_gradient(rounded) + (values - lax.stop_gradient(values))


def _int8(groups: Array, along: int) -> Array:
    """Q8_0: 255 levels up to the group's largest magnitude, halves rounded away from zero."""
    largest = jnp.max(jnp.abs(groups), axis=along, keepdims=True)
    # Barriers, for XLA rewrites both x / 127 and 1 / (x / 127), and the results differ in their
    # last bits.
    scale = lax.optimization_barrier(
        largest / lax.optimization_barrier(jnp.full_like(largest, 127))
    )
    # The bounds change no result. They keep the product from being fused, unrounded, with what is
    # added to it.
    steps = jnp.minimum(jnp.abs(groups * _reciprocal(scale)), 127)
    whole = jnp.floor(steps)
    return jnp.sign(groups) * (whole + jnp.floor(2 * (steps - whole))) * _as_float16(scale)


def _int4(groups: Array, along: int) -> Array:
    """Q4_0: 16 levels from the group's weight of largest magnitude, the first of equals, to 7/8 of
    its opposite.
    """
    first = jnp.argmax(jnp.abs(groups), axis=along, keepdims=True)
    chosen = lax.broadcasted_iota(first.dtype, groups.shape, along) == first
    scale = jnp.sum(jnp.where(chosen, groups, 0), axis=along, keepdims=True) / -8
    steps = jnp.clip(groups * _reciprocal(scale), -8, 8)  # bounds as in `_int8`
    return (jnp.minimum(jnp.floor(steps + 8.5), 15) - 8) * _as_float16(scale)


def _int2(groups: Array, factor: Array, along: int) -> Array:
    """The levels -1.5, -0.5, 0.5 and 1.5 times a scale: `factor` times what would reach the largest
    magnitude.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(groups), axis=along, keepdims=True))
    scale = factor * jnp.where(largest == 0, 1, largest) / _OUTERMOST
    steps = groups / scale
    # With a factor of one the largest weight of a group lies on the edge: rounding must not decide
    # its gradient.
    within = jnp.abs(steps) <= _OUTERMOST * (1 + _EDGE)
    levels = jnp.floor(jnp.clip(steps, -_OUTERMOST, _OUTERMOST)) + 0.5
    return jnp.where(
        largest == 0, 0, scale * _straight_through(jnp.where(within, steps, levels), levels)
    )


def _reciprocal(scale: Array) -> Array:
    return jnp.where(scale == 0, 0, 1 / scale)


def _as_float16(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounded to float16's values, and float32 still.

    By arithmetic, since compilers drop a conversion there and back, and `lax.reduce_precision`
    flushes the subnormal values, which small weights have.
    """
    exponent = jnp.maximum(lax.bitcast_convert_type(scale, jnp.int32) >> 23 & 0xFF, 127 - 14)
    last_place = lax.bitcast_convert_type((exponent - 10) << 23, jnp.float32)
    return jnp.round(scale / last_place) * last_place


def _transform(quantization: Quantization, models: StageModels, steps: int) -> Transform:
    specs = param_specs(models.trained)
    factors = factor_specs(specs, quantization)
    extras = {FACTORS: factors} if factors else {}

    def effective(params: Tree, step: Any) -> Tree:
        return quantized(without(params, extras), params.get(FACTORS, {}), specs, quantization)

    def ones(found: Found) -> Tree:
        return map_specs(lambda _, spec: np.ones(spec.shape, np.float32), extras)

    return Transform(
        extra_specs=extras,
        effective=effective,
        measure=ones,
        enter=ADDED if extras else None,
        leave=merged(effective, steps, extras),
    )


DEFINITION: Definition = _transform
