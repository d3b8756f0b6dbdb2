"""Attention whose keys and values are made of one latent that all heads share."""

from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field

from braeburn.config.base import Count, Size
from braeburn.config.sublayers.base import AttentionConfig

# Far beyond any model that is published.
LARGEST_LATENT = 2**20
Latent = Annotated[Size, Field(le=LARGEST_LATENT)]


class LatentAttention(AttentionConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3).

    A token's keys and values are made of a latent of `latent_dim` numbers by a matrix of each head,
    and of a part of the key that is rotated and that all heads share. To generate, only the latent
    and that part are kept of each token. Queries and keys of a head have `plain_dim + rotated_dim`
    numbers, and values `model.head_dim`. Heads share no keys, so that `model.num_kv_heads` means
    nothing here.

    Attributes:
        latent_dim: numbers of the latent (kv_lora_rank).
        query_latent_dim: of the latent that queries are made of (q_lora_rank); 0 where they are
            made of the hidden states themselves.
        plain_dim: numbers of a head's query and key that are not rotated (qk_nope_head_dim).
        rotated_dim: numbers that are, an even one (qk_rope_head_dim).
    """

    kind: Literal["latent"] = "latent"
    latent_dim: Latent = 512
    query_latent_dim: Annotated[Count, Field(le=LARGEST_LATENT)] = 1536
    plain_dim: Latent = 128
    rotated_dim: Annotated[int, Field(gt=0, le=LARGEST_LATENT, multiple_of=2)] = 64

    def head_dims(self, head_dim: int) -> tuple[int, int]:
        """The numbers of a head's key and of its value.

        Args:
            head_dim: `model.head_dim`.
        """
        return self.plain_dim + self.rotated_dim, head_dim

    def shrunk(self, sequence_length: int, smaller: Callable[[int], int]) -> Self:
        """The same with smaller latents and heads."""
        return self.model_copy(
            update={
                "latent_dim": smaller(self.latent_dim),
                "query_latent_dim": self.query_latent_dim and smaller(self.query_latent_dim),
                "plain_dim": min(self.plain_dim, 8),
                "rotated_dim": min(self.rotated_dim, 4),
            }
        )
