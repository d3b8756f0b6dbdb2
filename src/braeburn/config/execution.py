"""How a model is carried out, beside what it is."""

from dataclasses import dataclass, replace

from braeburn.config.memory import NO_OFFLOAD, Offload, Precision, Remat
from braeburn.config.mesh import ONE_DEVICE, MeshConfig
from braeburn.config.rules import ShardingRules

KEEP_ALL = Remat(policy="none")
USUAL_RULES = ShardingRules()
USUAL_PRECISION = Precision()


@dataclass(frozen=True)
class Execution:
    """How a model is carried out. What it computes is its configuration's to say.

    Attributes:
        mesh: sizes of the mesh, none of them -1.
        rules: what lies where on it.
        precision: the types to compute in.
        remat: what the forward pass keeps for the backward pass.
        offload: what waits in the host's memory.
        split_tokens: whether the shards of `tensor` share out the tokens between sublayers; without
            it each has them all, as where there is one new token.
    """

    mesh: MeshConfig = ONE_DEVICE
    rules: ShardingRules = USUAL_RULES
    precision: Precision = USUAL_PRECISION
    remat: Remat = KEEP_ALL
    offload: Offload = NO_OFFLOAD
    split_tokens: bool = True

    @property
    def forward_only(self) -> "Execution":
        """The same without a backward pass, for which nothing is kept. Products in 8 bits are for
        training: what they round away, the finished model has.
        """
        precision = self.precision.in_compute
        return replace(self, remat=KEEP_ALL, offload=NO_OFFLOAD, precision=precision)

    @property
    def of_stage(self) -> "Execution":
        """The same for the devices that share one place along `pipeline`."""
        return replace(self, mesh=self.mesh.of_stage)
