"""The one table of what lies where: from the logical axes of arrays to the axes of the mesh."""

from typing import Annotated

from pydantic import model_validator

from braeburn.config.base import Frozen, OneOrMore
from braeburn.config.mesh import MeshAxis

# No parameter has these.
NO_PARAMETERS = ("batch", "length")
Axes = Annotated[tuple[MeshAxis, ...], OneOrMore]


class Placement(Frozen):
    """Mesh axes that one logical axis is split along, the outermost first, for each kind of array.

    Attributes:
        parameters: as parameters and their gradients are stored.
        optimizer: as the optimizer's state of a parameter is stored.
        activations: as the axis is split while computing. A parameter that is stored split along
            further axes is gathered over these for its product, layer by layer.
        whole_if_uneven: whether a dimension that the mesh does not divide is kept whole; others are
            refused.
    """

    parameters: Axes = ()
    optimizer: Axes = ()
    activations: Axes = ()
    whole_if_uneven: bool = False


class ShardingRules(Frozen):
    """A placement for each logical axis.

    A logical axis names a dimension by what it is in the model, as `embed` or `ffn`; a physical
    axis is one of the mesh, as `fsdp` or `tensor`. Code of the model speaks of logical axes alone,
    and the rules map each of them to the axes of the mesh that split it: for parameters as they are
    stored, for the optimizer's state, and for activations and what is computed with.

    A field named by a role and an axis, as `norm_embed`, holds for the `embed` of parameters of
    that role, in place of `embed`. The program of each device is written for certain axes: what
    lies along `activations`, and how the embedding and the head are stored, is fixed.
    """

    batch: Placement = Placement(activations=("replica", "data", "fsdp"))
    length: Placement = Placement(activations=("context",))
    vocab: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",)
    )
    embed: Placement = Placement(parameters=("fsdp",), optimizer=("fsdp",))
    heads: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",)
    )
    kv_heads: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",), whole_if_uneven=True
    )
    head_dim: Placement = Placement()
    latent: Placement = Placement(parameters=("fsdp",), optimizer=("fsdp",), whole_if_uneven=True)
    ffn: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",)
    )
    experts: Placement = Placement(
        parameters=("expert",), optimizer=("expert",), activations=("expert",)
    )
    expert_ffn: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",)
    )
    layers: Placement = Placement()
    embedding_embed: Placement = Placement(parameters=("fsdp",), optimizer=("fsdp",))
    norm_embed: Placement = Placement(
        parameters=("fsdp", "tensor"), optimizer=("fsdp", "tensor"), whole_if_uneven=True
    )
    bias_embed: Placement = Placement()
    norm_heads: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",)
    )
    norm_kv_heads: Placement = Placement(
        parameters=("tensor",), optimizer=("tensor",), activations=("tensor",), whole_if_uneven=True
    )
    norm_head_dim: Placement = Placement(
        parameters=("fsdp", "tensor"), optimizer=("fsdp", "tensor"), whole_if_uneven=True
    )

    def of(self, axis: str, role: str = "") -> Placement:
        """The placement of a logical axis, in a parameter of a role or elsewhere.

        An axis without a field, as a transform's parameters may have, is not split.
        """
        placement = getattr(self, f"{role}_{axis}", None) or getattr(self, axis, Placement())
        assert isinstance(placement, Placement)
        return placement

    @model_validator(mode="after")
    def _check(self) -> "ShardingRules":
        for name, field in type(self).model_fields.items():
            found, usual = getattr(self, name), field.default
            if found.activations != usual.activations:
                raise ValueError(
                    f"{name}.activations={list(found.activations)} is not how the program of a "
                    f"device is written; leave it at {list(usual.activations)}"
                )
            if name in ("vocab", "embedding_embed") and found.parameters != usual.parameters:
                raise ValueError(
                    f"{name}.parameters={list(found.parameters)} is not how the embedding and the "
                    f"head are looked up in parts; leave it at {list(usual.parameters)}"
                )
            used = found.activations
            if name not in NO_PARAMETERS and found.parameters[: len(used)] != used:
                raise ValueError(
                    f"{name}.parameters={list(found.parameters)} does not begin with the axes "
                    f"{list(used)} of its activations, so that no gather could join it; put these "
                    f"first"
                )
        return self
