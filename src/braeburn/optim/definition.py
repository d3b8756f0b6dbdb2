"""What an optimizer is, beside its configuration: `DEFINITION` in the module of its kind."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec

from braeburn.config import Execution, MeshConfig, ModelConfig, OptimizerConfig, Stage
from braeburn.layers.spec import ParamSpec, Tree, abstract, walk
from braeburn.parallel.mesh import abstract_mesh
from braeburn.parallel.rules import partition

ALONE = Execution()


@dataclass(frozen=True)
class Parameters:
    """What an optimizer updates, and how it lies: plain values, for which no device need be there.

    Attributes:
        specs: the specs of the parameters.
        model: that they are of.
        execution: the resolved sizes of the mesh, and the rules of what lies where on it.
    """

    specs: Tree
    model: ModelConfig
    execution: Execution = ALONE

    @property
    def mesh(self) -> MeshConfig:
        """The sizes of the mesh."""
        return self.execution.mesh

    def partition(self, spec: ParamSpec) -> PartitionSpec:
        """How a parameter, its gradient and its update are split over the mesh."""
        return partition(spec.axes, spec.shape, "parameters", self.execution, spec.role)

    def per_device(self, function: Callable[[Tree], Tree], specs: Tree) -> Callable[[Tree], Tree]:
        """A program over whole arrays from one over each device's part of them.

        Args:
            function: from a tree of one device's parts to one of the same shapes. It may run
                collectives, by the functions of `braeburn.parallel.collectives`.
            specs: of the parameters whose updates the tree holds, in its structure.

        Returns:
            The function of the whole arrays, to be called under jit.
        """
        sizes = self.mesh.sizes
        if all(size == 1 for size in sizes.values()):
            return function
        partitions = jax.tree.map(self.partition, specs)
        return jax.shard_map(
            function,
            mesh=abstract_mesh(self.mesh),
            in_specs=(partitions,),
            out_specs=partitions,
            check_vma=False,
        )


@dataclass(frozen=True)
class UpdateCollective:
    """One kind of collective along one axis of the mesh, in one update.

    Attributes:
        axis: of the mesh.
        kind: as HLO names it, "all-to-all".
        bytes: of the arrays on one device, as `plan.collectives.Collective.bytes` counts them.
        times: how many there are.
    """

    axis: str
    kind: str
    bytes: int
    times: int


@dataclass(frozen=True)
class UpdateCost:
    """What an update takes on one device beyond element-wise work on what the device stores.

    Attributes:
        matrix_flops: of matrix products.
        workspace_bytes: of arrays that are there at once, beside parameters, gradients and state.
        collectives: all but those of scalars and of one number a layer.
    """

    matrix_flops: int = 0
    workspace_bytes: int = 0
    collectives: tuple[UpdateCollective, ...] = ()


def element_wise(config: Any, parameters: Parameters) -> UpdateCost:
    """The cost of an update that is element-wise."""
    return UpdateCost()


@dataclass(frozen=True)
class Definition:
    """An optimizer.

    Attributes:
        transformation: (configuration, parameters) -> the transformation of clipped gradients into
            updates, before the learning rate and without weight decay. It runs under jit on whole
            arrays, which lie as `Parameters.partition` says. Each tree in its state that has the
            parameters' names at its top holds arrays of the shapes of the parameters, of all or of
            some: pruning cuts all of them in the same way.
        second_moment: (state of the transformation) -> the running mean of squared gradients, as a
            tree like the parameters that holds at least those of the role "mask"; None where it
            keeps none.
        weight_decay: (stage) -> what a parameter is multiplied by and loses in a step, before the
            schedule.
        no_decay: the roles of parameters that lose nothing.
        update_cost: (configuration, parameters) -> what an update takes, for the plan.
    """

    transformation: Callable[[Any, Parameters], optax.GradientTransformation]
    second_moment: Callable[[Any], Tree | None]
    weight_decay: Callable[[Stage], float]
    no_decay: frozenset[str]
    update_cost: Callable[[Any, Parameters], UpdateCost] = element_wise


def definition_of(config: OptimizerConfig) -> Definition:
    """The definition of an optimizer by its configuration."""
    found = importlib.import_module(f"braeburn.optim.{config.kind}").DEFINITION
    assert isinstance(found, Definition)
    return found


def initial_state(config: OptimizerConfig, parameters: Parameters) -> Any:
    """The types of what an optimizer remembers of parameters, over all devices."""
    transformation = definition_of(config).transformation(config, parameters)
    return jax.eval_shape(transformation.init, abstract(parameters.specs))


def state_bytes(config: OptimizerConfig, parameters: Parameters) -> int:
    """Bytes that an optimizer remembers of parameters, over all devices, but for scalars."""
    state = initial_state(config, parameters)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)


def update_cost(config: OptimizerConfig, parameters: Parameters) -> UpdateCost:
    """What an update takes on one device."""
    return definition_of(config).update_cost(config, parameters)


def by_path(tree: Tree | None) -> dict[str, Any]:
    """The leaves of a tree like the parameters, or of a part of it, by their paths."""
    return dict(walk(tree or {}))
