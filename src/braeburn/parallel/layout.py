"""A run's arrays on its mesh: where each lies, and programs that run on every device's part of
them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.config import (
    persistent_cache_min_compile_time_secs,
)  # of one thread; jax.config sets that of all
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from braeburn.config import Execution, MeshConfig, Precision
from braeburn.data.packing import Batch
from braeburn.parallel.mesh import build
from braeburn.parallel.rules import BATCH, LENGTH, Kind, batch_shards, partition
from braeburn.parallel.sequence import zigzag

Tree = Any

HOST = "pinned_host"


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the arrays of one model lie.

    Attributes:
        execution: how the model is carried out: resolved sizes of the mesh, rules and more.
        mesh: its devices; abstract for programs that are only traced.
        specs: tree of the parameters' specs, each with `axes`, `shape` and `role`.
    """

    execution: Execution
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    specs: Tree

    @property
    def sizes(self) -> MeshConfig:
        """Sizes of the mesh, resolved."""
        return self.execution.mesh

    @cached_property
    def of_step(self) -> "Layout":
        """Where the batch of a train step lies: the devices of a pipeline all have the same
        sequences, which other programs share out among them.
        """
        if self.sizes.pipeline == 1:
            return self
        return replace(self, execution=self.execution.of_stage)

    def _partitions(self, kind: Kind) -> Tree:
        return jax.tree.map(
            lambda spec: partition(spec.axes, spec.shape, kind, self.execution, spec.role),
            self.specs,
        )

    @cached_property
    def partitions(self) -> Tree:
        """How each parameter is split."""
        return self._partitions("parameters")

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return int(self.mesh.size)

    @property
    def platform(self) -> str:
        """What the devices are, as JAX names it: "cpu", "gpu" or "tpu"; "" of an abstract mesh."""
        if isinstance(self.mesh, jax.sharding.AbstractMesh):
            return ""
        return str(self.mesh.devices.flat[0].platform)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Keeps what is compiled within it out of JAX's persistent cache where it could not be used
        from there.

        Programs for several simulated CPU devices of one process abort or hang in their collectives
        when they come from the cache (jaxlib 0.10.2, rendezvous.h: "Check failed: id <
        num_threads").
        """
        own = self.mesh.local_devices
        simulated = len(own) > 1 and own[0].platform == "cpu"
        with persistent_cache_min_compile_time_secs(math.inf) if simulated else nullcontext():
            yield

    def _place(self, spec: PartitionSpec, memory: str | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, spec, memory_kind=memory)

    def everywhere(self) -> NamedSharding:
        """A copy on each device."""
        return self._place(PartitionSpec())

    def parameters(self) -> Tree:
        """The shardings of the parameters, and of their gradients."""
        return jax.tree.map(self._place, self.partitions)

    def optimizer_state(self, state: Tree, *, on_device: bool = False) -> Tree:
        """The shardings of an optimizer's state: what has a parameter's path and shape lies as its
        rule says.

        Args:
            state: the state, or its shapes.
            on_device: of the state in use, also where it otherwise waits on the host.
        """
        rules = {
            _names(path): rule
            for path, rule in jax.tree.leaves_with_path(self._partitions("optimizer"))
        }
        shapes = {_names(path): spec.shape for path, spec in jax.tree.leaves_with_path(self.specs)}
        memory = HOST if self.execution.offload.optimizer and not on_device else None

        def place(path: Any, leaf: Any) -> NamedSharding:
            names = parameter_of(path, leaf, shapes)
            return self.everywhere() if names is None else self._place(rules[names], memory)

        return jax.tree.map_with_path(place, state)

    def batch_partition(self) -> PartitionSpec:
        """How arrays [B, T] of a batch are split."""
        rows, columns = (
            partition((axis,), (0,), "activations", self.execution) for axis in (BATCH, LENGTH)
        )
        return PartitionSpec(*rows, *columns)

    def batch(self) -> NamedSharding:
        """The sharding of arrays [B, T] of a batch."""
        return self._place(self.batch_partition())

    def rows(self, batch_size: int) -> list[int]:
        """The sequences of a batch that this process's devices work on, in order."""
        shape = (batch_size, self.sizes.context)
        places = self.batch().addressable_devices_indices_map(shape).values()
        return sorted(
            {row for place in places if place for row in range(*place[0].indices(batch_size))}
        )

    def place(self, batch: Batch, rows: Sequence[int], batch_size: int) -> Batch:
        """A batch on the devices, from the `rows` that this process has read of it, [len(rows), T,
        ...] each.

        The tokens of a sequence are reordered so that each context shard gets an early piece and a
        late one.
        """
        sharding, own = self.batch(), np.asarray(rows)
        length, shards = next(iter(batch.values())).shape[1], self.sizes.context
        order = zigzag(length, shards) if shards > 1 else slice(None)  # whose result is no copy

        def put(values: np.ndarray) -> Array:
            values = np.asarray(values)[:, order]

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # only this process's own parts are asked for
                first, last, _ = index[0].indices(batch_size)
                return values[np.searchsorted(own, np.arange(first, last)), index[1]]

            return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

        return {name: put(values) for name, values in batch.items()}

    def gradient(
        self, function: Callable[..., tuple[Tree, Tree]], *others: "Layout"
    ) -> Callable[..., Any]:
        """A program over whole arrays from one over each device's part.

        Args:
            function: (parameters, batch) -> (gradients of the sum over all devices with respect to
                this device's parts, this device's shares of some sums). It may run collectives.
            others: of further parameters that the function takes and does not change, on the same
                mesh.

        Returns:
            (parameters, batch, ...) -> (gradients, sums). Copies of a parameter have their
            gradients summed here, once.
        """

        def local(params: Tree, batch: Batch, *further: Tree) -> tuple[Tree, Tree]:
            gradients, sums = function(params, batch, *further)
            return jax.tree.map(self._sum_over_copies, gradients, self.partitions), self._sum(sums)

        in_specs = (
            self.partitions,
            self.of_step.batch_partition(),
            *(other.partitions for other in others),
        )
        return self._shard_mapped(local, in_specs, (self.partitions, PartitionSpec()))

    def total(self, function: Callable[[Tree, Batch], Tree]) -> Callable[[Tree, Batch], Tree]:
        """A program (parameters, batch) -> sums over whole arrays from one that gives each device's
        shares of them.
        """
        program = self._shard_mapped(
            lambda params, batch: self._sum(function(params, batch)),
            (self.partitions, self.batch_partition()),
            PartitionSpec(),
        )
        return lambda params, batch: program(params, self._filled(batch))

    def tokenwise(self, function: Callable[[Tree, Batch], Tree]) -> Callable[[Tree, Batch], Tree]:
        """A program (parameters, batch) -> arrays [B, T, ...] from one that gives them for each
        device's part.
        """
        in_specs = (self.partitions, self.batch_partition())
        program = self._shard_mapped(function, in_specs, self.batch_partition())

        def of_all_rows(params: Tree, batch: Batch) -> Tree:
            rows = len(jax.tree.leaves(batch)[0])
            return jax.tree.map(lambda x: x[:rows], program(params, self._filled(batch)))

        return of_all_rows

    def _filled(self, batch: Batch) -> Batch:
        """A batch with empty sequences added, for the mesh to divide it: that of a train step may
        have fewer than there are devices in a pipeline.
        """
        missing = -len(jax.tree.leaves(batch)[0]) % batch_shards(self.execution)
        if not missing:
            return batch
        return jax.tree.map(lambda x: jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))), batch)

    def _shard_mapped(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        # What lies where is told by the specs: the kernels for attention do not carry the types
        # that check it.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _sum_over_copies(self, gradient: Array, spec: PartitionSpec) -> Array:
        split = {axis for dim in spec for axis in (dim if isinstance(dim, tuple) else (dim,))}
        axes = tuple(
            axis for axis, size in self.sizes.sizes.items() if size > 1 and axis not in split
        )
        return lax.psum(gradient, axes) if axes else gradient

    def _sum(self, shares: Tree) -> Tree:
        axes = tuple(axis for axis, size in self.sizes.sizes.items() if size > 1)
        return jax.tree.map(lambda share: lax.psum(share, axes), shares) if axes else shares


def can_offload(device: Any) -> bool:
    """Whether arrays of a device may wait in the host's memory."""
    return HOST in {memory.kind for memory in device.addressable_memories()}


def one_device(specs: Tree, precision: Precision) -> Layout:
    """Everything on the first of this process's devices."""
    execution = Execution(precision=precision)
    return Layout(execution, build(execution.mesh, jax.local_devices()[:1]), specs)


def parameter_of(
    path: Any, leaf: Any, shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> tuple[str, ...] | None:
    """The names of the parameter that an array of an optimizer's state lies like; None where it is
    like none.

    Args:
        path: of the array in the state.
        leaf: the array, or its type.
        shapes: of the parameters, by the names on their paths.
    """
    names = _names(path)
    for start in range(len(names)):
        if shapes.get(names[start:]) == leaf.shape:
            return names[start:]
    return None


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(key.key) for key in path if hasattr(key, "key"))
