"""How a stage is distilled from its teacher."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from braeburn.config.base import Frozen, Positive, Size


class Distillation(Frozen):
    """How a stage is distilled from its teacher: a share of `weight` of the targets is the
    teacher's, and the rest is the text itself.

    `label` is the teacher's top-1 token (arXiv 2407.21075), `top_k` its top `top_k` tokens with
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
