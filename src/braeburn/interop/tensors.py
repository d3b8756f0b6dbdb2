"""Our parameters as the tensors of other software, which keeps layers apart and writes outputs
before inputs.

Names come from a table of the format; shapes and transpositions follow from the `ParamSpec`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from braeburn.config import ModelConfig
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.layers.spec import Tree, walk
from braeburn.models.decoder import param_specs, stacks


@dataclass(frozen=True)
class Tensor:
    """A tensor of the other software: one of our parameters, or one layer of a stacked one.

    The weight of a `torch.nn.Linear` is [outputs, inputs]; our matrices hold the inputs (`fan_in`)
    first.
    """

    name: str
    path: str
    layer: int | None
    block: tuple[int, ...]  # the shape on our side, without the layers
    shape: tuple[int, ...]  # the shape on the other side
    transposed: bool

    def of(self, parameter: Any) -> Any:
        """The part of our parameter that this tensor holds."""
        return parameter if self.layer is None else parameter[self.layer]

    def exported(self, parameters: Mapping[str, Any]) -> np.ndarray:
        """Our values in the other layout, contiguous float32."""
        block = np.asarray(self.of(parameters[self.path]))
        return np.ascontiguousarray(
            block.reshape(self.shape[::-1]).T if self.transposed else block, np.float32
        )

    def imported(self, tensor: np.ndarray) -> np.ndarray:
        """Values of the other layout in ours."""
        return tensor.T.reshape(self.block) if self.transposed else tensor


def tensors_of(model: ModelConfig, names: Mapping[str, str]) -> list[Tensor]:
    """Every tensor of a model, layer by layer, the unstacked ones first.

    Args:
        model: what the tensors are of.
        names: our parameter -> name of the tensor. Of a layer's parameters the key is "layers/" and
            the parameter's own name, whichever stack it is in, and the name has `{}` for the number
            of the layer.
    """
    numbers = {"/".join(stack.path): stack.numbers for stack in stacks(model)}
    found = []
    for path, spec in walk(param_specs(model)):
        stack, _, own = path.rpartition("/")
        layers = numbers.get(stack)
        name = names[f"layers/{own}" if layers else path]
        block = shape = tuple(spec.shape[dim] for dim in spec.block_dims)
        if spec.role == "matrix":
            inputs = math.prod(spec.shape[spec.axes.index(axis)] for axis in spec.fan_in)
            shape = math.prod(block) // inputs, inputs
        is_matrix = spec.role == "matrix"
        if layers is None:
            found.append((-1, Tensor(name, path, None, block, shape, is_matrix)))
        for index, number in enumerate(layers or ()):
            tensor = Tensor(name.format(number), path, index, block, shape, is_matrix)
            found.append((number, tensor))
    return [tensor for _, tensor in sorted(found, key=lambda each: each[0])]


def checked(params: Tree, model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The parameters by path, if they and the tokenizer are those of the model.

    Raises:
        UserError: the tokenizer has tokens that the model has no row for.
        ValueError: a parameter is missing or has another shape.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer holds the token {tokenizer.vocab_size - 1}, which "
            f"vocab_size={model.vocab_size} has no row "
            f"for; name the tokenizer that the model was trained with"
        )
    parameters = dict(walk(params))
    for path, spec in walk(param_specs(model)):
        found = getattr(parameters.get(path), "shape", None)
        if found != spec.shape:
            raise ValueError(f"params[{path!r}] has the shape {found}, the model's is {spec.shape}")
    return parameters
