"""Sequences split over the devices of the `context` axis, in zigzag order.

A sequence of T tokens is cut into 2c chunks for c devices, and device i holds chunks i and 2c-1-i,
one after the other (Llama 3, arXiv 2407.21783, section 3.3.2). Causality then leaves every device
the same work: see `braeburn.layers.attention.ring`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from braeburn.config import MeshConfig
from braeburn.parallel.collectives import CONTEXT, all_gather


def zigzag(length: int, shards: int) -> np.ndarray:
    """The order in which a sequence of `length` tokens is laid out over `shards` devices, int64
    [length].

    `row[..., zigzag(T, c)]`, cut into c equal parts, gives each device its two chunks. For one
    device it is 0, 1, ...

    Raises:
        ValueError: `length` does not divide into 2 * `shards` chunks.
    """
    if shards == 1:
        return np.arange(length)
    if length % (2 * shards):
        raise ValueError(
            f"{length} tokens do not divide into the {2 * shards} chunks of {shards} context shards"
        )
    chunks = np.arange(length).reshape(2 * shards, -1)
    first = np.arange(shards)
    return chunks[np.stack([first, 2 * shards - 1 - first], axis=1)].reshape(-1)


def token_indices(length: int, shard: Array | int, shards: int) -> Int[Array, " t"]:
    """The place in the whole sequence of each of the `length` tokens that the device `shard` of
    `shards` holds.
    """
    if shards == 1:
        return jnp.arange(length)
    chunk = length // 2
    first = jnp.arange(chunk)
    return jnp.concatenate([shard * chunk + first, (2 * shards - 1 - shard) * chunk + first])


def gather_sequence(x: Array, mesh: MeshConfig) -> Array:
    """The tokens of all context shards in the order of the sequence: [B, t, ...] -> [B, T, ...]."""
    if mesh.context == 1:
        return x
    x = all_gather(x, CONTEXT, 1, mesh)
    chunks = x.reshape(x.shape[0], mesh.context, 2, -1, *x.shape[2:])
    # Reversed and not indexed: the transpose of indexing is a scatter, which accelerators do
    # slowly.
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)
