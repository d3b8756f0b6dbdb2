"""A feed-forward sublayer of experts, of which each token uses a few."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braeburn.config.base import NonNegative, Positive, Size
from braeburn.config.sublayers.base import FeedForwardConfig

# Far beyond any model that is published.
MOST_EXPERTS = 2**14


class Experts(FeedForwardConfig):
    """Gated feed-forward networks, and a router that sends each token to some of them.

    No expert has a limit: each token reaches the experts that it is sent to (dropless).

    Attributes:
        num_experts: how many there are.
        experts_per_token: how many a token is sent to, those that the router rates highest.
        expert_dim: hidden units of an expert.
        activation: of the gate.
        scores: how the router turns logits into the weights of experts: "softmax" over all of them
            (Qwen3), or a "sigmoid" of each (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16).
        normalize: whether the weights of a token's experts are divided by their sum.
        scale: of these weights.
        balance_loss: the coefficient of the loss that keeps experts equally busy (Switch
            Transformer, arXiv 2101.03961, equation 4). It is the number of experts times the sum
            over experts of (share of all assignments) * (mean score), which is 1 where all is even.
            Libraries that count a share of tokens instead have a value larger by
            `experts_per_token` for the same routing. Assignments are counted over all devices, in
            each microbatch by itself.
        router_z_loss: the coefficient of the mean square of the log-sum-exp of the router's logits
            (ST-MoE, arXiv 2202.08906, equation 5).
    """

    has_ffn_units: ClassVar[bool] = False
    kind: Literal["experts"] = "experts"
    num_experts: Annotated[int, Field(gt=0, le=MOST_EXPERTS)] = 8
    experts_per_token: Size = 2
    expert_dim: Size = 1024
    activation: Literal["silu", "gelu"] = "silu"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: Positive = 1.0
    balance_loss: NonNegative = 1e-3
    router_z_loss: NonNegative = 0.0

    @property
    def is_by_microbatch(self) -> bool:
        """Whether it keeps experts equally busy, which is counted within each microbatch."""
        return self.balance_loss > 0

    def shrunk(self, smaller: Callable[[int], int]) -> Self:
        """The same with smaller experts, of which there are at most eight."""
        count = min(self.num_experts, 8)
        return self.model_copy(
            update={
                "num_experts": count,
                "experts_per_token": min(self.experts_per_token, count),
                "expert_dim": smaller(self.expert_dim),
            }
        )

    @model_validator(mode="after")
    def _check(self) -> "Experts":
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}; set it to at most {self.num_experts}"
            )
        return self
