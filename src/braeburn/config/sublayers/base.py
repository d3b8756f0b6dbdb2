"""What the configurations of all sublayers of a kind have in common."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from braeburn.config.base import Frozen, Positive

QKNorm = Literal["none", "head", "width"]


class AttentionConfig(Frozen):
    """Attention with rotary positions. The number of heads is the model's.

    A subclass has a field `kind` of its own, and `braeburn.layers.sublayers` a module of that name.

    Attributes:
        makes_keys: whether layers of it make keys and values that later ones may reuse.
        reuses_keys: whether layers of it reuse those of an earlier layer.
        rope_base: of these layers alone, whose frequencies are then not scaled; None for the
            model's base and scaling.
        scale: of the scores; None for 1 / sqrt(numbers of a head's key).
    """

    makes_keys: ClassVar[bool] = False
    reuses_keys: ClassVar[bool] = False
    kind: Any
    rope_base: Positive | None = None
    scale: Positive | None = None

    def head_dims(self, head_dim: int) -> tuple[int, int]:
        """The numbers of a head's key and of its value.

        Args:
            head_dim: `model.head_dim`.
        """
        return head_dim, head_dim

    def reach(self, sequence_length: int) -> int:
        """The most tokens of a sequence that a token attends to, itself among them."""
        return sequence_length

    def shrunk(self, sequence_length: int, smaller: Callable[[int], int]) -> Self:
        """The same kind for a narrower model and short sequences, as `verify` has them.

        Args:
            sequence_length: in tokens.
            smaller: a width of the model -> one of the narrower model, which as many devices
                divide.
        """
        return self


class GroupedQueryConfig(AttentionConfig):
    """Attention of query heads to fewer key heads. The number and size of both are the model's.

    Attributes:
        qk_norm: what the RMSNorm of queries and keys runs over: nothing, each head, or the width of
            all heads. None leaves it to `model.qk_norm`, which chooses between the first two.
        qk_norm_first: whether that norm comes before the rotation, as in most models, or after it.
        bias: whether queries, keys, values and the output have biases.
        sinks: whether each query head has a logit of its own, which is trained, among the scores of
            each of its softmaxes, but no value (gpt-oss): a query need not attend to anything.
    """

    makes_keys: ClassVar[bool] = True
    qk_norm: QKNorm | None = None
    qk_norm_first: bool = True
    bias: bool = False
    sinks: bool = False


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
