"""Stages that make a model smaller: pruning, distillation, quantisation."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from braeburn.config.base import Frozen, Positive, Size, some
from braeburn.config.model import ModelConfig

# Logical axes whose units can be cut, and the field of the model that counts them.
PRUNABLE = {"ffn": "ffn_dim", "heads": "num_heads", "embed": "d_model"}
PrunedAxis = Literal["ffn", "heads", "embed"]


class TransformConfig(Frozen):
    """What a stage does to its model besides training it: the base of each kind's configuration.

    A kind of transform is a subclass, the field of `Stage` that holds it, and the module of that
    field's name in `braeburn.transforms`.

    `rounds` tells whether the effective weights jump where stored weights change by a rounding
    error, so that runs part which are equal but for such errors.
    """

    rounds: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        """What the stage does to the model, in a few words after the stage's name."""
        return f"applies {type(self).__name__}"

    @property
    def measured_tokens(self) -> int:
        """How many of the stage's first tokens are read to measure activations."""
        return 0

    def trained(self, model: ModelConfig) -> ModelConfig:
        """The model that the stage trains, from the one that it finds."""
        return model

    def left(self, model: ModelConfig) -> ModelConfig:
        """The model that the stage leaves, from the one that it finds."""
        return model

    def check(self, path: str, model: ModelConfig) -> None:
        """Refuses a model that the transform does not fit.

        Args:
            path: of this configuration in the run, for the message.
            model: the one that the stage finds.

        Raises:
            ValueError: naming the field at fault and a value that would work.
        """


class Pruning(TransformConfig):
    """A stage that makes the model narrower: `keep` tells how many units of an axis stay, in each
    layer alike.

    `soft_top_k` learns which, jointly with the weights: masks that sum to `keep`, whose temperature
    falls until, for the last `exact` of the steps, they are zeros and ones; the rest is cut off as
    the stage ends. The other methods cut as the stage begins, by the importance of units, and train
    what is left. `learning_rate` is that of the masks' scores. Activations are measured on the
    stage's first `calibration_tokens`.
    """

    keep: dict[PrunedAxis, Size] = Field(min_length=1)
    method: Literal["soft_top_k", "activation", "magnitude", "random"] = "soft_top_k"
    temperature: Positive = 0.3
    final_temperature: Positive = 0.02
    exact: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: Positive = 0.3
    calibration_tokens: Size = 131_072

    @model_validator(mode="after")
    def _check(self) -> "Pruning":
        if self.final_temperature > self.temperature:
            raise ValueError(
                f"final_temperature={self.final_temperature} is above "
                f"temperature={self.temperature}; "
                f"set final_temperature to at most {self.temperature}"
            )
        return self

    @property
    def summary(self) -> str:
        """The units that stay of each axis, and the method."""
        kept = " ".join(f"{axis}={size}" for axis, size in self.keep.items())
        return f"prunes to {kept} by {self.method}"

    @property
    def measured_tokens(self) -> int:
        """`calibration_tokens`, which only two of the methods read."""
        return self.calibration_tokens

    @property
    def learned(self) -> bool:
        """Whether masks are trained, and the model cut at the end of the stage."""
        return self.method == "soft_top_k"

    def trained(self, model: ModelConfig) -> ModelConfig:
        """The model that the stage trains: learned masks train the units that they will cut at the
        end; the other methods cut first.
        """
        return model if self.learned else self.left(model)

    def left(self, model: ModelConfig) -> ModelConfig:
        """The model of the units that stay."""
        return model.model_copy(update={PRUNABLE[axis]: size for axis, size in self.keep.items()})

    def check(self, path: str, model: ModelConfig) -> None:
        """Refuses sizes that do not fit a model: see `check_pruning`."""
        check_pruning(f"{path}.keep.", self, model)


class Distillation(Frozen):
    """What a stage's teacher teaches, with a share of `weight` in the targets; the rest is the text
    itself.

    `label` is the teacher's likeliest token (arXiv 2407.21075), `top_k` its likeliest `top_k` with
    their probabilities, renormalised, `distribution` all of them. Probabilities are at
    `temperature`. With `cached`, labels and top-k come from one pass over the text, stored beside
    it for all students of this teacher.
    """

    target: Literal["label", "top_k", "distribution"] = "label"
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    temperature: Positive = 1.0
    top_k: Size = 8
    cached: bool = False

    @property
    def kept(self) -> int:
        """Tokens that a cache holds for each position."""
        return self.top_k if self.target == "top_k" else 1

    @model_validator(mode="after")
    def _check(self) -> "Distillation":
        if self.cached and self.target == "distribution":
            raise ValueError(
                "cached=true cannot hold whole distributions; set target to 'top_k', or cached to "
                "false"
            )
        return self


class Quantization(TransformConfig):
    """Training with weights rounded as they will be shipped: gradients pass the rounding by (arXiv
    1308.3432).

    Along what a matrix is multiplied over, each `group_size` weights share a scale: `int8` and
    `int4` as llama.cpp's Q8_0 and Q4_0, which have groups of 32; `int2` has four levels and learns
    a factor of the scale for each matrix.
    """

    rounds: ClassVar[bool] = True

    kind: Literal["int8", "int4", "int2"] = "int4"
    group_size: Size = 32

    @property
    def summary(self) -> str:
        """The kind of values, and the size of the groups."""
        return f"rounds to {self.kind} in groups of {self.group_size}"


def check_pruning(prefix: str, pruning: Pruning, model: ModelConfig) -> None:
    """Refuses to keep as many units as there are, or query heads that key heads cannot share
    evenly.

    Raises:
        ValueError: naming the axis after `prefix`.
    """
    for axis, size in pruning.keep.items():
        present = getattr(model, PRUNABLE[axis])
        if size >= present:
            raise ValueError(
                f"{prefix}{axis}={size} is not less than the model's {PRUNABLE[axis]}={present}; "
                f"set {prefix}{axis} below {present}"
            )
    if "embed" in pruning.keep and model.scaled_embedding:
        raise ValueError(
            f"{prefix}embed={pruning.keep['embed']} would change the sqrt(d_model) that "
            f"scaled_embedding=true multiplies embeddings by; prune ffn or heads"
        )
    heads = pruning.keep.get("heads", model.num_heads)
    if heads % model.num_kv_heads:
        fits = some(range(model.num_kv_heads, model.num_heads, model.num_kv_heads))
        raise ValueError(
            f"{prefix}heads={heads} is not a multiple of num_kv_heads={model.num_kv_heads}; "
            f"set {prefix}heads to one of {fits}"
        )
