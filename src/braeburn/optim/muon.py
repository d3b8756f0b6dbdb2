"""Muon (arXiv 2502.16982): orthogonalised momentum for matrices, AdamW for all other parameters.

Each matrix must be whole to be made orthogonal, and parameters are split over the mesh. Matrices of
one shape are dealt out: each device gets as many whole ones of all layers as every other, makes
them orthogonal, and gives each device its part back.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as optax_muon

from braeburn.config.optimizers.muon import Muon
from braeburn.layers.spec import ParamSpec, Tree, map_specs, walk
from braeburn.optim.definition import Definition, Parameters, UpdateCollective, UpdateCost, by_path
from braeburn.parallel.collectives import all_to_all

FLOAT = 4


class MuonState(NamedTuple):
    """Moments, float32, and the number of updates made.

    Attributes:
        updates: made so far.
        momentum: of all parameters.
        second_moment: of all parameters but matrices.
    """

    updates: Int[Array, ""]
    momentum: Tree
    second_moment: Tree


def is_matrix(spec: ParamSpec) -> bool:
    """Whether a parameter's updates are made orthogonal: it has rows and columns."""
    sides = {spec.axes[dim] in spec.fan_in for dim in spec.matrix_dims}
    return spec.role == "matrix" and len(sides) == 2


def without_matrices(specs: Tree) -> Tree:
    """The specs of all other parameters."""
    return {
        name: without_matrices(child) if isinstance(child, dict) else child
        for name, child in specs.items()
        if isinstance(child, dict) or not is_matrix(child)
    }


def orthogonalized(matrix: Float[Array, "R C"], steps: int) -> Float[Array, "R C"]:
    """A matrix with its singular values brought near one by optax's Newton-Schulz iteration."""
    transformation = optax_muon(
        ns_steps=steps,
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=MuonDimensionNumbers(0, 1),
    )
    return transformation.update(matrix, transformation.init(matrix))[0]


@dataclass(frozen=True)
class MatrixForm:
    """A parameter taken as matrices, one of each layer or expert: what it is summed over against
    the rest.

    Attributes:
        dims: of the parameter: those that count matrices, those of their rows, and those of their
            columns. The smaller side is the rows.
        sizes: how many rows and columns there are.
        axes: of the mesh, along which rows and columns are split, the outermost first.
        matrices: how many matrices a device holds parts of.
    """

    dims: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    sizes: tuple[int, int]
    axes: tuple[tuple[str, ...], tuple[str, ...]]
    matrices: int

    def flat(self, x: Array) -> Float[Array, "M R C"]:
        """A device's part of a parameter as parts of matrices."""
        order = [dim for dims in self.dims for dim in dims]
        return x.transpose(order).reshape(
            [math.prod(x.shape[dim] for dim in dims) for dims in self.dims]
        )

    def unflat(self, matrices: Float[Array, "M R C"], like: Array) -> Array:
        """The same parts in the shape of the parameter's part `like`."""
        order = [dim for dims in self.dims for dim in dims]
        shape = [like.shape[dim] for dim in order]
        return matrices.reshape(shape).transpose([order.index(dim) for dim in range(like.ndim)])


def matrix_form(spec: ParamSpec, parameters: Parameters) -> MatrixForm:
    """How a parameter is taken as matrices."""
    split = [
        (along,) if isinstance(along, str) else tuple(along or ())
        for along in parameters.partition(spec)
    ]
    counted = tuple(dim for dim in range(len(spec.shape)) if dim not in spec.matrix_dims)
    summed = tuple(dim for dim in spec.matrix_dims if spec.axes[dim] in spec.fan_in)
    rest = tuple(dim for dim in spec.matrix_dims if dim not in summed)

    def side(dims: tuple[int, ...]) -> tuple[int, tuple[str, ...], tuple[int, ...]]:
        size = math.prod(spec.shape[dim] for dim in dims)
        return size, tuple(axis for dim in dims for axis in split[dim]), dims

    rows, columns = sorted([side(summed), side(rest)])
    shards = math.prod(parameters.mesh.sizes[axis] for dim in counted for axis in split[dim])
    return MatrixForm(
        dims=(counted, rows[2], columns[2]),
        sizes=(rows[0], columns[0]),
        axes=(rows[1], columns[1]),
        matrices=math.prod(spec.shape[dim] for dim in counted) // shards,
    )


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape that are split the same way, of all layers and several parameters.

    Attributes:
        forms: of the parameters, by path.
        sizes: rows and columns of each matrix.
        all_to_alls: the side, 1 or 2, and mesh axis of each all-to-all that makes matrices whole,
            in order.
        shards: devices that the matrices are dealt out over.
        slots: matrices that are dealt out, some of them zeros where the real ones do not come out
            even.
    """

    forms: dict[str, MatrixForm]
    sizes: tuple[int, int]
    all_to_alls: tuple[tuple[int, str], ...]
    shards: int
    slots: int

    @property
    def dealt(self) -> int:
        """Matrices that each device makes orthogonal."""
        return self.slots // self.shards

    def orthogonalize(self, parts: Tree, config: Muon, parameters: Parameters) -> Tree:
        """A device's parts of the orthogonalised matrices, by path, from its parts of the matrices.

        The zeros that fill the slots stay zeros.
        """
        mesh = parameters.mesh
        flat = [form.flat(parts[path]) for path, form in self.forms.items()]
        ends = list(accumulate(len(each) for each in flat))
        stack = jnp.concatenate(flat)
        stack = jnp.pad(stack, ((0, self.slots - len(stack)), (0, 0), (0, 0)))
        if self.all_to_alls:
            # Where the compiler sees that a slice is transposed or zero, it gives the operands of
            # an all-to-all different memory layouts, and refuses them (jaxlib 0.10.2, CPU).
            stack = lax.optimization_barrier(stack)
        for side, axis in self.all_to_alls:
            stack = all_to_all(stack, axis, 0, side, mesh)
        # One at a time, so that only one matrix's products are held; the result does then not
        # depend on how many a device has either.
        scale = config.update_rms * math.sqrt(max(self.sizes))
        stack = lax.map(lambda x: scale * orthogonalized(x, config.newton_schulz_steps), stack)
        for side, axis in reversed(self.all_to_alls):
            stack = all_to_all(stack, axis, side, 0, mesh)
        split = jnp.split(stack[: ends[-1]], ends[:-1])
        return {
            path: form.unflat(each, parts[path])
            for (path, form), each in zip(self.forms.items(), split, strict=True)
        }


def stacks(parameters: Parameters) -> Sequence[Stack]:
    """All matrices of a model, in stacks of one shape."""
    groups: dict[tuple, dict[str, MatrixForm]] = {}
    for path, spec in walk(parameters.specs):
        if is_matrix(spec):
            form = matrix_form(spec, parameters)
            groups.setdefault((form.sizes, form.axes), {})[path] = form
    found = []
    for (sizes, axes), forms in groups.items():
        # What an inner axis has split is joined first.
        all_to_alls = tuple((side, axis) for side in (1, 2) for axis in reversed(axes[side - 1]))
        shards = math.prod(parameters.mesh.sizes[axis] for _, axis in all_to_alls)
        matrices = sum(form.matrices for form in forms.values())
        slots = -(-matrices // shards) * shards
        found.append(Stack(forms, sizes, all_to_alls, shards, slots))
    return found


def update_cost(config: Muon, parameters: Parameters) -> UpdateCost:
    """The products of Newton-Schulz, and the all-to-alls that make matrices whole and split them
    again.
    """
    flops = workspace = largest = 0
    moved: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for stack in stacks(parameters):
        rows, columns = stack.sizes
        # X X^T, its square, and the sum of both times X.
        step = 4 * rows**2 * columns + 2 * rows**3
        flops += stack.dealt * config.newton_schulz_steps * step
        whole = FLOAT * stack.dealt * rows * columns
        # Momentum with its look-ahead, and the update; of one stack also what is dealt out.
        workspace += 2 * whole
        largest = max(largest, 3 * whole)
        for _, axis in stack.all_to_alls:
            moved[axis] += 2 * whole
            times[axis] += 2
    return UpdateCost(
        matrix_flops=flops,
        workspace_bytes=workspace + largest,
        collectives=tuple(
            UpdateCollective(axis, "all-to-all", moved[axis], times[axis]) for axis in moved
        ),
    )


def scale_by_muon(config: Muon, parameters: Parameters) -> optax.GradientTransformation:
    """Clipped gradients to updates before the learning rate.

    Momentum, its bias correction and Nesterov's look-ahead are those of `optax.contrib.muon`;
    updates of other parameters are those of `optax.scale_by_adam`.
    """
    specs = parameters.specs
    spec_of = dict(walk(specs))
    matrices = {path: spec for path, spec in spec_of.items() if is_matrix(spec)}
    dealt = stacks(parameters)

    def orthogonalize(parts: Tree) -> Tree:
        found: Tree = {}
        for stack in dealt:
            found |= stack.orthogonalize(parts, config, parameters)
        return found

    def init(params: Tree) -> MuonState:
        value = by_path(params)
        second_moment = map_specs(
            lambda path, _: jnp.zeros_like(value[path]), without_matrices(specs)
        )
        return MuonState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), second_moment
        )

    def update(
        gradients: Tree, state: MuonState, params: Tree | None = None
    ) -> tuple[Tree, MuonState]:
        count = (state.updates + 1).astype(jnp.float32)
        gradient, before = by_path(gradients), by_path(state.momentum)
        squares = by_path(state.second_moment)

        def moved(path: str, spec: ParamSpec) -> Array:
            decay = config.momentum if is_matrix(spec) else config.beta1
            return decay * before[path] + (1 - decay) * gradient[path]

        def squared(path: str, spec: ParamSpec) -> Array:
            return config.beta2 * squares[path] + (1 - config.beta2) * jnp.square(gradient[path])

        momentum = map_specs(moved, specs)
        second_moment = map_specs(squared, without_matrices(specs))
        m, v = by_path(momentum), by_path(second_moment)

        def ahead(path: str) -> Array:
            decay = config.momentum
            return decay * m[path] / _weight(decay, count + 1) + (1 - decay) * gradient[
                path
            ] / _weight(decay, count)

        orthogonal = parameters.per_device(orthogonalize, matrices)(
            {path: ahead(path) for path in matrices}
        )

        def step(path: str, spec: ParamSpec) -> Array:
            if is_matrix(spec):
                return orthogonal[path]
            mean = m[path] / _weight(config.beta1, count)
            deviation = jnp.sqrt(v[path] / _weight(config.beta2, count))
            ratio = 1.0 if spec.role == "mask" else config.adamw_learning_rate_ratio
            return ratio * mean / (deviation + config.epsilon)

        return map_specs(step, specs), MuonState(state.updates + 1, momentum, second_moment)

    return optax.GradientTransformation(init, update)


def _weight(decay: float, count: Float[Array, ""]) -> Float[Array, ""] | float:
    """The weights of a running mean after `count` values: 1 - decay^count, without the cancellation
    of a power near one.
    """
    return -jnp.expm1(count * math.log(decay)) if decay else 1.0


DEFINITION = Definition(
    transformation=scale_by_muon,
    second_moment=lambda state: state.second_moment,
    weight_decay=lambda stage: stage.learning_rate * stage.weight_decay,
    no_decay=frozenset({"norm", "bias"}),
    update_cost=update_cost,
)
