"""How a dense model becomes a mixture of experts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from braeburn.config.base import Frozen, NonNegative, Size
from braeburn.config.sublayers.experts import MOST_EXPERTS, Experts


class Upcycling(Frozen):
    """What becomes of a dense model (sparse upcycling, arXiv 2212.05055).

    Attributes:
        experts: of a layer, each a copy of the layer's feed-forward sublayer.
        experts_per_token: how many of them a token is sent to.
        every: of so many layers the last gets experts.
        noise: the standard deviation of what is added to each expert's matrices, as a share of the
            root-mean-square of the matrix.
        balance_loss: the coefficient of the loss that keeps experts equally busy.
    """

    experts: Annotated[int, Field(gt=1, le=MOST_EXPERTS)]
    experts_per_token: Size = 2
    every: Size = 1
    noise: NonNegative = 0.01
    balance_loss: NonNegative = 1e-3

    def sublayer(self, ffn_dim: int, activation: Literal["silu", "gelu"]) -> Experts:
        """What takes the place of a feed-forward sublayer.

        Args:
            ffn_dim: its hidden units.
            activation: of its gate.
        """
        return Experts(
            num_experts=self.experts,
            experts_per_token=self.experts_per_token,
            expert_dim=ffn_dim,
            activation=activation,
            balance_loss=self.balance_loss,
        )

    @model_validator(mode="after")
    def _check(self) -> "Upcycling":
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than experts={self.experts}; "
                f"give at most {self.experts}"
            )
        return self
