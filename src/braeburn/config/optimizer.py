"""The optimizers that a run can name."""

from typing import Annotated, Literal

from pydantic import Field

from braeburn.config.base import Fraction, Frozen, Positive, Share, Size


class AfmOptimizer(Frozen):
    """The optimizer of the Apple Foundation Models (AXLearn's `adastar_optimizer`) with muP-simple
    update scales.

    A step whose gradient is not finite, or of a norm not below `skip_norm`, is skipped; a stage of
    which more than `max_skipped` of the steps were does not count as finished.
    """

    kind: Literal["afm"] = "afm"
    momentum: Fraction = 0.95
    second_moment_decay: Fraction = 0.95
    epsilon: Positive = 1e-30
    update_rms: Positive = 1.0
    mup_base_width: Size = 768
    clip_norm: Positive = 1.0
    skip_norm: Positive = 100.0
    max_skipped: Share = 0.1


class AdamW(Frozen):
    """AdamW with decoupled weight decay, multiplied by the learning rate, on every parameter but
    the norms.

    `skip_norm` and `max_skipped` are those of the other optimizer.
    """

    kind: Literal["adamw"] = "adamw"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    clip_norm: Positive = 1.0
    skip_norm: Positive = 1e6
    max_skipped: Share = 0.1


Optimizer = Annotated[AfmOptimizer | AdamW, Field(discriminator="kind")]
