"""Cross-entropy in chunks of tokens: the logits of a whole batch never exist.

The gradient is worked out in the forward pass, chunk by chunk, while each chunk's logits are at hand (the idea of
Liger Kernel, arXiv 2410.10989), so nothing of the size of the vocabulary is kept or computed twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
    """Positions per chunk.

    A chunk has 1,024 tokens, or fewer where these would have over 2^26 logits (256 MiB in float32). Large batches take
    a sixteenth of their tokens at once, up to 4,096: each chunk reads and writes the head's whole gradient.
    """
    tokens = max(min(1024, 2**26 // vocab_size), min(4096, batch * length // 16))
    return max(1, min(length, tokens // batch))


def _chunks(array: Array, length: int) -> Array:
    """[B, T, ...] as [T / length, B, length, ...], padded with zeros where `length` does not divide T."""
    batch, total = array.shape[:2]
    array = jnp.pad(array, [(0, 0), (0, -total % length)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(array.reshape(batch, -1, length, *array.shape[2:]), 1, 0)


def _whole(chunks: Array, total: int) -> Array:
    """The inverse of `_chunks`."""
    array = jnp.moveaxis(chunks, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :total]


def _logits(hidden_BTD: Array, head_DV: Array) -> Array:
    return jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)


def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """For each token, in float32: its negative log-likelihood in nats, log Z, and 1 where it was the likeliest."""
    batch, total = targets.shape
    head_DV = head.astype(hidden.dtype).T

    def one_chunk(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        hidden_BTD, targets_BT = chunk
        logits = _logits(hidden_BTD, head_DV)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
        correct = (jnp.argmax(logits, axis=-1) == targets_BT).astype(jnp.float32)
        return None, (log_z - chosen, log_z, correct)

    length = chunk_length(batch, total, head.shape[0])
    _, results = jax.lax.scan(one_chunk, None, (_chunks(hidden, length), _chunks(targets, length)))
    losses, log_z, correct = (_whole(result, total) for result in results)
    return losses, log_z, correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens: (nll + z_loss * log(Z)^2, to be differentiated; nll alone, which has no gradient).

    The z-loss keeps the logits' normaliser near one (PaLM, arXiv 2204.02311, section 5).
    """
    losses, log_z, _ = token_losses(hidden, head, targets)
    nll = jnp.sum(weights * losses)
    return nll + z_loss * jnp.sum(weights * jnp.square(log_z)), nll


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, z_loss: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    batch, total = targets.shape
    length = chunk_length(batch, total, head.shape[0])
    head_VD = head.astype(hidden.dtype)
    # Transposed once for all chunks: a CPU multiplies rows faster than it multiplies columns.
    head_DV = head_VD.T

    def one_chunk(head_gradient: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        hidden_BTD, targets_BT, weights_BT = chunk
        logits = _logits(hidden_BTD, head_DV)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
        nll = jnp.sum(weights_BT * (log_z - chosen))
        penalty = jnp.sum(weights_BT * jnp.square(log_z))

        probabilities = jnp.exp(logits - log_z[..., None])
        one_hot = targets_BT[..., None] == jnp.arange(head.shape[0])
        slope = (probabilities * (1 + 2 * z_loss * log_z[..., None]) - one_hot) * weights_BT[..., None]
        slope = slope.astype(hidden.dtype)
        hidden_gradient = jnp.einsum("BTV,VD->BTD", slope, head_VD)
        head_gradient += jnp.einsum("BTV,BTD->VD", slope, hidden_BTD, preferred_element_type=jnp.float32)
        return head_gradient, (nll, penalty, hidden_gradient)

    chunks = (_chunks(hidden, length), _chunks(targets, length), _chunks(weights, length))
    head_gradient, (nll, penalty, hidden_gradient) = jax.lax.scan(one_chunk, jnp.zeros(head.shape, jnp.float32), chunks)
    total_nll = jnp.sum(nll)
    outputs = (total_nll + z_loss * jnp.sum(penalty), total_nll)
    return outputs, (_whole(hidden_gradient, total), head_gradient.astype(head.dtype))


def _backward(
    z_loss: float, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    hidden_gradient, head_gradient = residuals
    scale = cotangents[0]
    return (scale * hidden_gradient).astype(hidden_gradient.dtype), scale * head_gradient, None, None


cross_entropy.defvjp(_forward, _backward)
