"""What the configurations of all sublayers of a kind have in common."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from braeburn.config.base import Frozen, Positive

QKNorm = Literal["none", "head", "width"]


class AttentionConfig(Frozen):
    """Grouped-query attention with rotary positions. The number and size of heads are the model's.

    A subclass has a field `kind` of its own, and `braeburn.layers.sublayers` a module of that name.

    Attributes:
        qk_norm: what the RMSNorm of queries and keys runs over: nothing, each head, or the width of
            all heads. None leaves it to `model.qk_norm`, which chooses between the first two.
        qk_norm_first: whether that norm comes before the rotation, as in most models, or after it.
        rope_base: of these layers alone, whose frequencies are then not scaled; None for the
            model's base and scaling.
        scale: of the scores; None for 1 / sqrt(head_dim).
        bias: whether queries, keys, values and the output have biases.
        sinks: whether each query head has a logit of its own, which is trained, among the scores of
            each of its softmaxes, but no value (gpt-oss): a query need not attend to anything.
    """

    kind: Any
    qk_norm: QKNorm | None = None
    qk_norm_first: bool = True
    rope_base: Positive | None = None
    scale: Positive | None = None
    bias: bool = False
    sinks: bool = False

    def reach(self, sequence_length: int) -> int:
        """The most tokens of a sequence that a token attends to, itself among them."""
        return sequence_length

    def shrunk(self, sequence_length: int) -> Self:
        """The same kind for sequences of a length that are short, as `verify` has them."""
        return self


class FeedForwardConfig(Frozen):
    """A feed-forward sublayer.

    A subclass has a field `kind` of its own, and `braeburn.layers.sublayers` a module of that name.

    Attributes:
        has_ffn_units: whether its hidden units are the model's `ffn_dim`.
    """

    has_ffn_units: ClassVar[bool] = True
    kind: Any

    @property
    def is_by_microbatch(self) -> bool:
        """Whether it adds to the loss what depends on how a batch is divided into microbatches."""
        return False

    def shrunk(self, smaller: Callable[[int], int]) -> Self:
        """The same kind for a narrower model, as `verify` has them.

        Args:
            smaller: a width of the model -> one of the narrower model, which as many devices
                divide.
        """
        return self
