"""A feed-forward sublayer of experts, of which each token uses a few."""

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braeburn.config.base import Count, NonNegative, Positive, Size, divisors, some
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
        activation: of the gate: "silu", "gelu", or "clamped" as in gpt-oss, where gates of at most
            7 are multiplied by sigmoid(1.702 gate), and by 1 + up, of which the up is between -7
            and 7.
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
        bias: whether a bias is added to the scores by which experts are chosen, and not to their
            weights. No loss trains it: after each step that of an expert with more than an even
            share of all assignments falls by `optimizer.balance_rate`, and that of others rises
            (arXiv 2408.15664).
        linear_bias: whether the products of the router and of each expert have biases, which are
            trained as weights are.
        groups: how many groups of equal size experts are in; a token's experts are those of
            `groups_per_token` groups, of which the two best scores have the highest sum
            (DeepSeek-V3).
        groups_per_token: how many of the groups a token's experts may be of.
        shared_dim: hidden units of a network of the same form that every token uses besides; 0
            where there is none.
        router_z_loss: the coefficient of the mean square of the log-sum-exp of the router's logits
            (ST-MoE, arXiv 2202.08906, equation 5).
    """

    has_ffn_units: ClassVar[bool] = False
    kind: Literal["experts"] = "experts"
    num_experts: Annotated[int, Field(gt=0, le=MOST_EXPERTS)] = 8
    experts_per_token: Size = 2
    expert_dim: Size = 1024
    activation: Literal["silu", "gelu", "clamped"] = "silu"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: Positive = 1.0
    bias: bool = False
    linear_bias: bool = False
    groups: Size = 1
    groups_per_token: Size = 1
    shared_dim: Count = 0
    balance_loss: NonNegative = 1e-3
    router_z_loss: NonNegative = 0.0

    @property
    def is_by_microbatch(self) -> bool:
        """Whether it keeps experts equally busy, which is counted within each microbatch."""
        return self.balance_loss > 0

    def shrunk(self, smaller: Callable[[int], int]) -> Self:
        """The same with smaller experts, of which there are at most eight, and a token uses at most
        half where it uses not all of them.
        """
        count = min(self.num_experts, 8)
        chosen = self.experts_per_token
        most = count if chosen == self.num_experts else max(1, count // 2)
        return self.model_copy(
            update={
                "num_experts": count,
                "experts_per_token": min(chosen, most),
                "expert_dim": smaller(self.expert_dim),
                "shared_dim": smaller(self.shared_dim) if self.shared_dim else 0,
                **self._groups_of(count, min(chosen, most)),
            }
        )

    def _groups_of(self, count: int, chosen: int) -> dict[str, int]:
        """As many groups of fewer experts as there are, or two, where there are several, of which
        as few are used as hold the experts of a token.
        """
        groups = self.groups if count % self.groups == 0 else math.gcd(count, 2)
        if groups == 1:
            return {"groups": 1, "groups_per_token": 1}
        needed = -(-chosen * groups // count)
        return {
            "groups": groups,
            "groups_per_token": max(needed, min(self.groups_per_token, groups)),
        }

    @model_validator(mode="after")
    def _check(self) -> "Experts":
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}; set it to at most {self.num_experts}"
            )
        if self.num_experts % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide num_experts={self.num_experts}; set groups "
                f"to one of {some(divisors(self.num_experts))}"
            )
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} is more than groups={self.groups}; set "
                f"it to at most {self.groups}"
            )
        within = self.num_experts // self.groups * self.groups_per_token
        if self.experts_per_token > within:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than the {within} experts of "
                f"groups_per_token={self.groups_per_token} groups; set it to at most {within}"
            )
        return self
