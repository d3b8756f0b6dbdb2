"""A stage of training and its learning rate schedule."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, create_model, model_validator

from braeburn.config.base import Count, Frozen, Name, NonNegative, Positive, Size, divisors, some
from braeburn.config.distillation import Distillation
from braeburn.config.memory import Remat
from braeburn.config.mesh import MeshConfig
from braeburn.config.objectives import NextToken, Objective
from braeburn.config.transforms import TRANSFORMS, Pruning, Quantization, TransformConfig


class Schedule(Frozen):
    """The multiplier of the learning rate over a stage: linear warm-up from 0, then a decay to
    `floor`.

    A constant one decays not at all, and so has no floor. "wsd" (warm-up, stable, decay) stays at 1
    after the warm-up and decays linearly in the last `decay_fraction` of the stage's steps.
    """

    warmup_steps: Count = 0
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    def decay_steps(self, total_steps: int) -> int:
        """Steps at the end of a stage of `total_steps` in which "wsd" decays."""
        return max(1, round((self.decay_fraction or 0.0) * total_steps))

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.decay == "constant" and self.floor:
            raise ValueError(
                f"floor={self.floor} is never reached with decay='constant'; set floor to 0, or "
                f"decay to 'cosine' or 'linear'"
            )
        if self.decay == "wsd" and self.decay_fraction is None:
            raise ValueError(
                "decay='wsd' needs decay_fraction, the part of the stage's steps in which the "
                "rate decays; set decay_fraction to 0.2"
            )
        if self.decay != "wsd" and self.decay_fraction is not None:
            raise ValueError(
                f"decay_fraction={self.decay_fraction} is of decay='wsd', and decay is "
                f"{self.decay!r}; set decay to 'wsd', or decay_fraction to null"
            )
        return self


class Stage(Frozen):
    """One stage of training. Sizes are in tokens; `mixture` maps the names of sources to weights of
    any scale.

    `mesh` and `remat` take the place of the run's, as where longer sequences are fewer in a batch
    and want splitting themselves. `teacher` is a run directory, one of its checkpoints, a Hugging
    Face directory, or the name of an earlier stage, whose last weights then teach.
    """

    tokens: Size
    sequence_length: Annotated[int, Field(gt=0, le=2**30)]
    batch_tokens: Annotated[int, Field(gt=0, le=2**40)]
    mixture: dict[Name, NonNegative] = Field(min_length=1)
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    schedule: Schedule = Schedule()
    rope_base: Positive | None = None
    accumulation_steps: Size = 1
    mesh: MeshConfig | None = None
    remat: Remat | None = None
    objective: Objective = NextToken()
    teacher: str | None = None
    distillation: Distillation = Distillation()
    pruning: Pruning | None = None
    quantization: Quantization | None = None

    @property
    def batch_size(self) -> int:
        """Sequences in one batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps in the stage; the last may pass `tokens` by less than one batch."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def transforms(self) -> dict[str, TransformConfig]:
        """The configuration of the stage's transform by the name of its field; empty where it has
        none.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in fields.items() if isinstance(value, TransformConfig)}

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        if self.batch_tokens % self.sequence_length:
            nearest = max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of "
                f"sequence_length={self.sequence_length}; set batch_tokens to {nearest}"
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps={self.accumulation_steps} does not divide the "
                f"{self.batch_size} sequences of a "
                f"batch; set accumulation_steps to one of {some(divisors(self.batch_size))}"
            )
        if not sum(self.mixture.values()) > 0:
            raise ValueError(
                "mixture has no weight above zero; give at least one source a positive weight"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} leaves none of the stage's "
                f"{self.steps} steps to "
                f"decay; set schedule.warmup_steps below {self.steps} or raise tokens"
            )
        schedule = self.schedule
        if schedule.decay == "wsd":
            stable = self.steps - schedule.decay_steps(self.steps)
            if schedule.warmup_steps > stable:
                raise ValueError(
                    f"schedule.decay_fraction={schedule.decay_fraction} begins to decay after "
                    f"{stable} of the stage's {self.steps} steps, within the "
                    f"schedule.warmup_steps={schedule.warmup_steps}; set schedule.warmup_steps to "
                    f"{stable} or lower schedule.decay_fraction"
                )
        if self.teacher is not None and not isinstance(self.objective, NextToken):
            raise ValueError(
                f"objective.kind={self.objective.kind!r} is for text alone, and teacher="
                f"{self.teacher!r} teaches by cross-entropy; leave one of them out"
            )
        if len(names := list(self.transforms)) > 1:
            raise ValueError(
                f"{' and '.join(names)} cannot be in one stage; make another stage of {names[-1]}"
            )
        return self


if not TYPE_CHECKING:
    # A field for each further kind of transform.
    _further = {
        name: (config | None, None)
        for name, config in TRANSFORMS.items()
        if name not in Stage.model_fields
    }
    if _further:
        Stage = create_model(
            "Stage", __base__=Stage, __module__=__name__, __doc__=Stage.__doc__, **_further
        )
