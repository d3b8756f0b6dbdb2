"""Stages that make a model narrower."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from braeburn.config.base import Positive, Size, some
from braeburn.config.model import ModelConfig
from braeburn.config.transforms.base import TransformConfig

# Logical axes whose units can be cut, and the field of the model that counts them.
PRUNABLE = {"ffn": "ffn_dim", "heads": "num_heads", "embed": "d_model"}
PrunedAxis = Literal["ffn", "heads", "embed"]


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
    others = [layer.feed_forward for layer in model.layer_configs]
    if "ffn" in pruning.keep and not all(config.has_ffn_units for config in others):
        kind = next(config.kind for config in others if not config.has_ffn_units)
        raise ValueError(
            f"{prefix}ffn={pruning.keep['ffn']} counts hidden units of ffn_dim, which layers of "
            f"the kind {kind!r} do not have; prune heads instead, or another model"
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
