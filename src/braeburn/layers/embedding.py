"""The embedding, whose table stays split over devices."""

from jaxtyping import Array, Float, Int

from braeburn.config import Execution
from braeburn.parallel.collectives import (
    FSDP,
    TENSOR,
    all_gather,
    all_to_all,
    axis_index,
    scatter_tokens,
)


def embed(
    embedding: Float[Array, "v d"], tokens: Int[Array, "B T"], execution: Execution
) -> Float[Array, "B t D"]:
    """The rows of the embedding for this device's tokens, in the type to compute in.

    Each device looks up, in the part of the table that it has, the tokens of all that share the
    rest of the table with it, and the rows are exchanged: far less than the table.

    Args:
        embedding: this device's part of the table, float32.
        tokens: this device's tokens, the same on each shard of `tensor`.
        execution: resolved sizes of the mesh, and types.

    Returns:
        The rows, of which each shard of `tensor` has those of its own tokens, t = T / tensor, or
        all where `execution` splits no tokens.
    """
    mesh, dtype = execution.mesh, execution.precision.compute
    tokens = all_gather(tokens, FSDP, 0, mesh)
    if mesh.tensor == 1:
        x_BTD = embedding[tokens].astype(dtype)
    else:
        own = tokens - axis_index(TENSOR, mesh) * embedding.shape[0]
        rows = embedding.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        x_BTD = rows.astype(dtype)
    return all_to_all(scatter_tokens(x_BTD, mesh, execution.split_tokens), FSDP, 0, 2, mesh)
