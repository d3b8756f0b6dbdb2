"""`ParamSpec`: the one source of truth about a parameter.

Initial values, abstract arrays, parameter counts, optimizer roles, shardings and exports all derive
from a tree of specs. A tree is a nested dict whose leaves are `ParamSpec`s; its paths name the
parameters.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# muP-simple role: "matrix" for the weights whose updates shrink with width, the others keep theirs.
# A "router" decides which experts a token goes to, and is computed with in float32, as norms are.
# A "bias" is added to the results of a product, or is one more score of attention, as a sink; it is
# held in float32, as norms are, and starts at zero.
# A "balance" is what is added to an expert's score for it to be chosen more often or less; no loss
# trains it, its gradient is how busy the expert was, and it starts at zero.
# A "mask" is a score that pruning learns for each unit, a "scale" a factor that quantisation
# learns; neither is part of the finished model.
Role = Literal["matrix", "embedding", "norm", "bias", "router", "balance", "mask", "scale"]
WORD = 2**32

Tree = dict[str, Any]

LAYERS, EXPERTS = "layers", "experts"


@dataclass(frozen=True)
class ParamSpec:
    """One parameter, or one kind of parameter of every layer stacked along a leading `layers` axis.

    Attributes:
        shape: sizes of the dimensions.
        axes: the logical name of each dimension.
        role: what the optimizer and pruning take it for.
        fan_in: logical axes that the weight is summed over; values are drawn with variance 1 /
            (their product). Empty for a parameter that starts at one or zero.
        share: of its values, that one token is multiplied by: not all where experts share tokens
            out.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    fan_in: tuple[str, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether the first dimension runs over layers."""
        return self.axes[:1] == (LAYERS,)

    @property
    def is_precise(self) -> bool:
        """Whether it is computed with in float32, whatever the type of weights."""
        return self.role in ("norm", "bias", "router", "balance")

    def held_in(self, dtype: Any) -> np.dtype:
        """The type that this parameter has where weights have `dtype`."""
        return np.dtype(np.float32 if self.is_precise else dtype)

    def stack(self, layers: int) -> "ParamSpec":
        """The spec of this parameter of several layers, along a leading axis."""
        return replace(self, shape=(layers, *self.shape), axes=(LAYERS, *self.axes))

    @property
    def block_dims(self) -> tuple[int, ...]:
        """The dimensions of one layer's tensor: all but the stacking one."""
        return tuple(range(1 if self.stacked else 0, len(self.shape)))

    @property
    def matrix_dims(self) -> tuple[int, ...]:
        """The dimensions of one matrix, of which each layer has one, or one for each expert."""
        return tuple(dim for dim in self.block_dims if self.axes[dim] != EXPERTS)

    @property
    def num_experts(self) -> int | None:
        """How many experts have a matrix of each layer; None where layers have one."""
        return self.shape[self.axes.index(EXPERTS)] if EXPERTS in self.axes else None

    def initial(self, key: Array) -> Array:
        """Float32 initial values. Layer i of a stacked parameter depends on `key` and i alone."""
        if self.role in ("bias", "balance"):
            return jnp.zeros(self.shape, jnp.float32)
        if not self.fan_in:
            return jnp.ones(self.shape, jnp.float32)
        scale = math.prod(self.shape[self.axes.index(axis)] for axis in self.fan_in) ** -0.5
        block = tuple(self.shape[dim] for dim in self.block_dims)
        if not self.stacked:
            return scale * jax.random.normal(key, block, jnp.float32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.shape[0]))
        return scale * jax.vmap(lambda layer_key: jax.random.normal(layer_key, block, jnp.float32))(
            keys
        )


def walk(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested dict as (path, leaf), the path joined by `/`, in its own order."""
    for name, child in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(child, dict):
            yield from walk(child, path)
        else:
            yield path, child


def map_specs(function: Callable[[str, ParamSpec], Any], specs: Tree, prefix: str = "") -> Tree:
    """A tree of `function(path, spec)` with the structure of `specs`."""
    result: Tree = {}
    for name, child in specs.items():
        path = f"{prefix}/{name}" if prefix else name
        result[name] = (
            map_specs(function, child, path) if isinstance(child, dict) else function(path, child)
        )
    return result


def random_key(seed: int | Array) -> Array:
    """JAX's random key of a seed of any size.

    JAX would take the last 32 bits alone, so that a seed and the same plus 2^32 were one; the
    others are folded in. Below 2^32 the key is `jax.random.key(seed)`.
    """
    if not isinstance(seed, int):
        return jax.random.key(seed)
    key = jax.random.key(seed % WORD)
    while seed := seed // WORD:
        key = jax.random.fold_in(key, seed % WORD)
    return key


def initialize(specs: Tree, seed: int | Array) -> Tree:
    """Float32 initial values of all parameters.

    Each parameter's random key derives from its path, so that adding or removing one changes no
    other.
    """
    root = random_key(seed)

    def initial(path: str, spec: ParamSpec) -> Array:
        digest = hashlib.sha256(path.encode()).digest()
        return spec.initial(jax.random.fold_in(root, int.from_bytes(digest[:4], "little")))

    return map_specs(initial, specs)


def abstract(specs: Tree, dtype: Any = jnp.float32) -> Tree:
    """Shapes and types of all parameters, without values."""
    return map_specs(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)


# The roles of a finished model's parameters.
WEIGHTS: tuple[Role, ...] = ("matrix", "embedding", "norm", "bias", "router", "balance")


def count(specs: Tree, roles: tuple[Role, ...] = WEIGHTS) -> int:
    """Number of parameters with one of `roles`."""
    return sum(spec.size for _, spec in walk(specs) if spec.role in roles)


def count_active(specs: Tree) -> int:
    """Number of parameters that one token is multiplied by."""
    return sum(round(spec.size * spec.share) for _, spec in walk(specs))


def map_params_like(
    function: Callable[[Tree], Tree], state: Any, params_keys: Iterable[str]
) -> Any:
    """A state with `function` applied to each tree in it that has the parameters' form, and all
    else as it is.

    Args:
        function: from such a tree to another.
        state: any tree, as an optimizer's state, or the parameters themselves.
        params_keys: the names at the top of the parameters; a dict with just these is taken for one
            of their form.
    """
    names = set(params_keys)

    def mirrors(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == names

    return jax.tree.map(
        lambda node: function(node) if mirrors(node) else node, state, is_leaf=mirrors
    )
