"""The mesh: how many devices lie along each axis."""

from collections.abc import Collection
from operator import attrgetter
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from braeburn.config.base import Frozen, OneOrMore, Size

MeshAxis = Literal["replica", "data", "fsdp", "expert", "pipeline", "context", "tensor"]
AXES: tuple[str, ...] = get_args(MeshAxis)
# The axes that rules call `fsdp`: together they split the storage of weights and, outside the
# layers and steps that `expert` and `pipeline` are for, the batch.
SHARDED: tuple[MeshAxis, ...] = ("fsdp", "expert", "pipeline")
# The axes by what they send between devices; those come first that can live with slow links.
BY_TRAFFIC: tuple[MeshAxis, ...] = (
    "replica",
    "pipeline",
    "data",
    "fsdp",
    "expert",
    "context",
    "tensor",
)
PipelineSchedule = Literal["1f1b", "gpipe"]
# -1 stands for as many as the devices allow.
AxisSize = Annotated[int, Field(ge=-1, le=2**24)]

# The size of each axis, which the plan asks for many times.
_SIZES = attrgetter(*AXES)


class MeshConfig(Frozen):
    """Devices along each axis of the mesh, the slowest link first; one size may be -1, to take what
    devices are left.

    `replica` crosses slices or nodes and carries one sum of gradients a step; `data` does the same
    inside one. `fsdp` splits the batch, and with it parameters, gradients and optimizer state;
    `context` splits sequences; `tensor` splits heads, FFN and vocabulary, and the tokens between
    them.

    `expert` splits the experts of models that have them; for all else it is more of `fsdp`, and for
    models without experts it is nothing else. `expert_dispatch` tells how tokens reach the experts
    of other devices: "gather" gathers the tokens of all expert shards and scatters the sums of the
    results, "all_to_all" sends each token's assignments to the shards of its experts and the
    results back. Buffers for assignments have room for `expert_room` times an even share. No
    assignment is lost where a shard has more: it works through them in further rounds.

    `pipeline` splits the layers of a train step, through which microbatches flow: as many as the
    stage's `accumulation_steps`, by `pipeline_schedule`. With `stages_per_device` above 1 each
    device has several groups of layers in turn (interleaved), for less idle time. Outside train
    steps `pipeline` is one more `fsdp`.

    `context_attention` tells how queries reach the keys of other context shards: passed around a
    ring, or gathered. `torus` lays axes over the physical dimensions of a slice: for each axis its
    size along each of them, as in {"fsdp": [8, 8, 4], "tensor": [1, 1, 4]} on 8 x 8 x 16 chips;
    without it the innermost axes get the best links.
    """

    replica: AxisSize = 1
    data: AxisSize = 1
    fsdp: AxisSize = -1
    expert: AxisSize = 1
    pipeline: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    pipeline_schedule: PipelineSchedule = "1f1b"
    stages_per_device: Size = 1
    expert_dispatch: Literal["gather", "all_to_all"] = "gather"
    expert_room: Annotated[float, Field(ge=1, le=2**14)] = 1.25
    torus: dict[MeshAxis, Annotated[tuple[Size, ...], OneOrMore]] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis by its name, in the order of the mesh."""
        return dict(zip(AXES, _SIZES(self), strict=True))

    @property
    def by_traffic(self) -> dict[str, int]:
        """The size of each axis by its name, the axis first that can live with the slowest link."""
        return {axis: getattr(self, axis) for axis in BY_TRAFFIC}

    @property
    def sharded(self) -> tuple[str, ...]:
        """The axes of more than one device that weights are fully sharded along."""
        return tuple(axis for axis in SHARDED if self.sizes[axis] > 1)

    @property
    def of_stage(self) -> "MeshConfig":
        """The mesh of the devices that share one place along `pipeline`."""
        return self if self.pipeline == 1 else self.model_copy(update={"pipeline": 1})

    def split_along(self, axes: tuple[str, ...], taken: Collection[str] = ()) -> tuple[str, ...]:
        """The axes of more than one device that some axes of a rule stand for.

        Args:
            axes: as a rule names them: `fsdp` stands for all of `SHARDED`.
            taken: those among `expert` and `pipeline` that split another dimension.
        """
        found: list[str] = []
        for axis in axes:
            meant = [name for name in SHARDED if name not in taken] if axis == "fsdp" else [axis]
            found += [name for name in meant if self.sizes[name] > 1]
        return tuple(found)

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        for axis, size in self.sizes.items():
            if size == 0:
                raise ValueError(
                    f"{axis}=0 leaves no device; set {axis} to 1, or to -1 for all devices left"
                )
        inferred = [axis for axis, size in self.sizes.items() if size == -1]
        if len(inferred) > 1:
            raise ValueError(
                f"{' and '.join(inferred)} are both -1, but only one can be inferred; set "
                f"{inferred[0]} to a size, as 1"
            )
        if self.stages_per_device > 1 and self.pipeline == 1:
            raise ValueError(
                f"stages_per_device={self.stages_per_device} deals the layers of a pipeline out in "
                f"turns, and pipeline=1 is none; set pipeline to a size, as 4, or "
                f"stages_per_device to 1"
            )
        if self.pipeline != 1 and self.context_attention == "ring":
            raise ValueError(
                f"context_attention='ring' cannot go round within the stages of pipeline="
                f"{self.pipeline}, whose devices are at different tasks; set context_attention to "
                f"'all_gather', or pipeline to 1"
            )
        if self.torus and len({len(factors) for factors in self.torus.values()}) > 1:
            raise ValueError(
                "torus names different numbers of dimensions; give each axis one size for each of "
                "them"
            )
        return self


# A mesh of one device: nothing is split.
ONE_DEVICE = MeshConfig(fsdp=1)
