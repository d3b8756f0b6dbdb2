"""AdamW."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from braeburn.config.base import Fraction, Positive
from braeburn.config.optimizers.base import OptimizerConfig


class AdamW(OptimizerConfig):
    """AdamW with decoupled weight decay, multiplied by the learning rate, on every parameter but
    the norms.
    """

    fine_tuning_rate: ClassVar[float] = 1e-4
    steady: ClassVar[Mapping[str, float]] = {"epsilon": 1e-4}

    kind: Literal["adamw"] = "adamw"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    skip_norm: Positive = 1e6
