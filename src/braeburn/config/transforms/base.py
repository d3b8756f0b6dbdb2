"""What every configuration of a transform says."""

from typing import ClassVar

from braeburn.config.base import Frozen
from braeburn.config.model import ModelConfig


class TransformConfig(Frozen):
    """What a stage does to its model besides training it: the base of each kind's configuration.

    A kind of transform is a subclass in a module of this package, and the module of the same name
    in `braeburn.transforms`. `Stage` has a field of that name.

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
