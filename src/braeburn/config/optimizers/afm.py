"""The optimizer of the Apple Foundation Models."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from braeburn.config.base import Fraction, Positive, Size
from braeburn.config.optimizers.base import OptimizerConfig


class AfmOptimizer(OptimizerConfig):
    """AXLearn's `adastar_optimizer` with muP-simple update scales."""

    # Its first updates, which are sign-like, amplify rounding.
    tolerance: ClassVar[float] = 1e-4
    fine_tuning_rate: ClassVar[float] = 1e-3
    is_width_free: ClassVar[bool] = True
    steady: ClassVar[Mapping[str, float]] = {"epsilon": 1e-8}  # of squares

    kind: Literal["afm"] = "afm"
    momentum: Fraction = 0.95
    second_moment_decay: Fraction = 0.95
    epsilon: Positive = 1e-30
    update_rms: Positive = 1.0
    mup_base_width: Size = 768
