"""What the configuration of every optimizer has."""

from collections.abc import Mapping
from typing import Any, ClassVar

from braeburn.config.base import Frozen, NonNegative, Positive, Share


class OptimizerConfig(Frozen):
    """The guard around an optimizer, and what other parts of Braeburn need to know of it.

    A gradient is clipped to a norm of `clip_norm`. A step whose gradient is not finite, or of a
    norm not below `skip_norm`, is skipped; a stage of which more than `max_skipped` of the steps
    were does not count as finished.

    Biases by which routers choose experts move by `balance_rate` in each step, whatever the
    optimizer.

    A subclass has a field `kind` of its own, and `braeburn.optim` a module of that name.

    Attributes:
        tolerance: what losses in float32 may differ by between layouts, relatively.
        fine_tuning_rate: the learning rate for a trained model where none is given.
        is_width_free: whether the best learning rate is the same for all widths of a model.
        steady: fields, each with the least value under which an update does not hang on how a
            gradient near zero was rounded.
    """

    tolerance: ClassVar[float] = 1e-5
    fine_tuning_rate: ClassVar[float]
    is_width_free: ClassVar[bool] = False
    steady: ClassVar[Mapping[str, float]] = {}

    kind: Any
    clip_norm: Positive = 1.0
    skip_norm: Positive = 100.0
    max_skipped: Share = 0.1
    balance_rate: NonNegative = 1e-3
