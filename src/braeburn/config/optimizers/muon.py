"""Muon."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from braeburn.config.base import Fraction, Positive, Size
from braeburn.config.optimizers.base import OptimizerConfig


class Muon(OptimizerConfig):
    """Muon for the matrices of the layers, AdamW for embeddings, norms, the head, scores of masks
    and factors of scales.

    A matrix's update is its Nesterov momentum made orthogonal by `newton_schulz_steps` steps, and
    scaled to the root-mean-square `update_rms` that updates of AdamW have (arXiv 2502.16982): one
    learning rate serves both. That of AdamW is the stage's times `adamw_learning_rate_ratio`, but
    for scores of masks, whose rate is the pruning's own. Weight decay is AdamW's, at the stage's
    learning rate.
    """

    fine_tuning_rate: ClassVar[float] = 1e-4
    steady: ClassVar[Mapping[str, float]] = {"epsilon": 1e-4}

    kind: Literal["muon"] = "muon"
    momentum: Fraction = 0.95
    newton_schulz_steps: Size = 5
    update_rms: Positive = 0.2
    adamw_learning_rate_ratio: Positive = 1.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    skip_norm: Positive = 1e6
