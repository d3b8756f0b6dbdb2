"""Our parameters as the tensors of other software, which keeps layers apart and writes outputs
before inputs.

Names come from a table of the format; shapes and transpositions follow from the `ParamSpec`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from braeburn.config import ModelConfig
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.layers.spec import Tree, walk
from braeburn.models.decoder import param_specs, stacks
from braeburn.models.families import family_of
from braeburn.models.families.definition import USUAL, Names, Placing


@dataclass(frozen=True)
class Tensor:
    """A tensor of the other software, or what a parameter has of one: one of our parameters, one
    layer of a stacked one, or one expert of a layer. Where a tensor holds the matrices of all
    experts, these come first.

    The weight of a `torch.nn.Linear` is [outputs, inputs]; our matrices hold the inputs (`fan_in`)
    first.
    """

    name: str
    path: str
    layer: int | None
    block: tuple[int, ...]  # the shape on our side, without the layers
    shape: tuple[int, ...]  # the shape on the other side, of what is the parameter's
    transposed: bool
    offset: float = 0.0  # what a value is larger by on our side
    expert: int | None = None
    precise: bool = False  # whether it is computed with in float32
    parts: int = 1  # parameters that take turns along the last dimension of the tensor
    part: int = 0  # whose turn this one's is

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor on the other side, that of all parts."""
        return self.shape if self.parts == 1 else (*self.shape[:-1], self.parts * self.shape[-1])

    @property
    def own(self) -> tuple[Any, ...]:
        """The index of the parameter's own part of the tensor."""
        return (..., slice(self.part, None, self.parts))

    def of(self, parameter: Any) -> Any:
        """The part of our parameter that this tensor holds."""
        if self.layer is None:
            return parameter
        return parameter[self.layer if self.expert is None else (self.layer, self.expert)]

    def exported(self, parameters: Mapping[str, Any]) -> np.ndarray:
        """Our values in the other layout, contiguous float32."""
        block = np.asarray(self.of(parameters[self.path]))
        if self.transposed:
            *experts, outputs, inputs = self.shape
            block = block.reshape(*experts, inputs, outputs).swapaxes(-1, -2)
        if self.offset:
            block = np.asarray(block, np.float32) - np.float32(self.offset)
        return np.ascontiguousarray(block.reshape(self.shape), np.float32)

    def imported(self, tensor: np.ndarray) -> np.ndarray:
        """Values of the other layout in ours.

        Args:
            tensor: the whole tensor, which other parameters may have a part of.
        """
        if self.parts > 1:
            tensor = tensor[self.own]
        if self.offset:
            tensor = tensor.astype(np.float32) + np.float32(self.offset)
        return (tensor.swapaxes(-1, -2) if self.transposed else tensor).reshape(self.block)


@dataclass(frozen=True)
class Joint:
    """A tensor of the other software as it stands in a file.

    Attributes:
        name: in the file.
        shape: in the file.
        parts: what parameters have of it; one, but for those that share it.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    def exported(self, parameters: Mapping[str, Any]) -> np.ndarray:
        """Our values in the other layout, contiguous float32."""
        if len(self.parts) == 1:
            return self.parts[0].exported(parameters)
        values = np.empty(self.shape, np.float32)
        for part in self.parts:
            values[part.own] = part.exported(parameters)
        return values


def joint(tensors: Iterable[Tensor]) -> list[Joint]:
    """The tensors of a file, from what parameters have of them."""
    by_name: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_name.setdefault(tensor.name, []).append(tensor)
    return [Joint(name, own[0].whole_shape, tuple(own)) for name, own in by_name.items()]


def tensors_of(
    model: ModelConfig,
    names: Names,
    norm_offset: float = 0.0,
    placings: Mapping[str, Placing] | None = None,
) -> list[Tensor]:
    """Every tensor of a model, layer by layer, the unstacked ones first.

    Args:
        model: what the tensors are of.
        names: of its tensors, whichever stack a layer is in.
        norm_offset: what our norms are larger by than theirs.
        placings: of the parameters that lie in their tensors in another way than usual, by the keys
            of `names`.
    """
    numbers = {"/".join(stack.path): stack.numbers for stack in stacks(model)}
    found = []
    for path, spec in walk(param_specs(model)):
        stack, _, own = path.rpartition("/")
        layers = numbers.get(stack)
        key = f"layers/{own}" if layers else path
        name, placing = names[key], (placings or {}).get(key, USUAL)
        block = shape = tuple(spec.shape[dim] for dim in spec.matrix_dims)
        is_matrix = spec.role in ("matrix", "router")
        if is_matrix:
            inputs = math.prod(spec.shape[spec.axes.index(axis)] for axis in spec.fan_in)
            outputs = math.prod(block) // inputs
            shape = (inputs, outputs) if placing.inputs_first else (outputs, inputs)
        if spec.role in ("norm", "bias"):
            shape = (math.prod(block),)
        offset = norm_offset if spec.role == "norm" else 0.0
        # Experts are together in a tensor whose name has no place for their numbers.
        together = spec.num_experts is not None and name.count("{}") == 1
        if together:
            block, shape = (spec.num_experts, *block), (spec.num_experts, *shape)
        one = Tensor(
            name,
            path,
            None,
            block,
            shape,
            transposed=is_matrix and not placing.inputs_first,
            offset=offset,
            precise=spec.is_precise,
            parts=placing.parts,
            part=placing.part,
        )
        if layers is None:
            found.append((-1, one))
        each = spec.num_experts is not None and not together
        experts = range(spec.num_experts or 0) if each else (None,)
        for index, number in enumerate(layers or ()):
            found += (
                (number, replace(one, name=name.format(number, expert), layer=index, expert=expert))
                for expert in experts
            )
    return [tensor for _, tensor in sorted(found, key=lambda each: each[0])]


def family_tensors(model: ModelConfig) -> list[Tensor]:
    """What each parameter of a model has of the tensors in Hugging Face files."""
    family = family_of(model)
    return tensors_of(model, family.names, family.norm_offset, family.placings)


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
