"""What is kept where and in which precision: activations, optimizer state, weights."""

from typing import Annotated, Literal

from braeburn.config.base import Frozen, OneOrMore

NamedActivation = Literal[
    "query", "key", "value", "attention", "attention_output", "ffn_gate", "ffn_up", "ffn_output"
]


class Remat(Frozen):
    """What the forward pass keeps for the backward pass: all, only each layer's input, or that and
    `names`. Of queries and keys that are normalised it is their projections, which the norm reads.
    """

    policy: Literal["none", "full", "save_named"] = "none"
    names: Annotated[tuple[NamedActivation, ...], OneOrMore] = (
        "query",
        "key",
        "value",
        "attention",
        "ffn_gate",
        "ffn_up",
    )


# What the products of the matrices of layers are computed in; see `Precision`.
Matmul = Literal["compute", "fp8", "fp8_rows", "int8"]


class Precision(Frozen):
    """The type of activations and of the weights as they are multiplied; parameters and optimizer
    are float32.

    `reduce` is the type in which fully sharded gradients are summed over devices.

    `matmul` is what the products of layers' matrices are computed in while a model is trained:
    `compute` for the type of `compute`; `fp8`, with one scale for each array, or `fp8_rows`, with
    one for each row and column; or `int8`, but for the gradients of weights. Embedding, head,
    routers and the matrices of experts, and all that runs forward alone, keep to `compute`.
    """

    compute: Literal["float32", "bfloat16"] = "bfloat16"
    reduce: Literal["float32", "bfloat16"] = "float32"
    matmul: Matmul = "compute"

    @property
    def in_compute(self) -> "Precision":
        """The same with all products in the type of `compute`."""
        return self if self.matmul == "compute" else self.model_copy(update={"matmul": "compute"})


class Offload(Frozen):
    """What waits in the host's memory while it is not needed: the optimizer's state, and
    activations by name.
    """

    optimizer: bool = False
    activations: Annotated[tuple[NamedActivation, ...], OneOrMore] = ()


# Everything waits on the device.
NO_OFFLOAD = Offload()
