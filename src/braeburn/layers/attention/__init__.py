"""Causal attention that stays within documents, as an ordered list of back ends, a file each.

`attention` takes the first back end that supports what is asked, and logs which, and why those
before it were passed over. All share one meaning: query t of a sequence sees the keys s <= t of the
same segment. Where sequences are split over devices, each attends from its own tokens, in zigzag
order, to the keys of all.

Shapes are named by letters: B sequences, T positions, N query heads, K key-value heads, H head_dim,
and within a back end G = N / K query heads for each key-value head, Q queries of a block.
"""

from braeburn.layers.attention.backend import EVERYTHING, Backend, Request, Scope
from braeburn.layers.attention.blocked import blocked_attention, cached_attention
from braeburn.layers.attention.masked import cudnn_masked_attention
from braeburn.layers.attention.packed import cudnn_attention
from braeburn.layers.attention.select import BACKENDS, attention, select
from braeburn.layers.attention.splash import splash_attention, splash_mask

__all__ = [
    "BACKENDS",
    "EVERYTHING",
    "Backend",
    "Request",
    "Scope",
    "attention",
    "blocked_attention",
    "cached_attention",
    "cudnn_attention",
    "cudnn_masked_attention",
    "select",
    "splash_attention",
    "splash_mask",
]
