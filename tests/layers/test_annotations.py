"""What functions are annotated with is checked while tests run: see tests/conftest.py."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from braeburn.config import Execution
from braeburn.layers.attention import blocked_attention
from braeburn.layers.embedding import embed
from braeburn.layers.norm import rms_norm
from braeburn.models.decoder import head_matrix
from braeburn.parallel.sequence import token_indices


def test_sizes_that_do_not_agree_are_refused():
    assert rms_norm(jnp.ones((2, 3, 8)), jnp.ones(8), 1e-5).shape == (2, 3, 8)
    with pytest.raises(TypeCheckError, match=r"parameters of braeburn\.layers\.norm\.rms_norm"):
        # Without the check it would broadcast.
        rms_norm(jnp.ones((2, 3, 8)), jnp.ones(1), 1e-5)


def test_arrays_in_the_wrong_order_are_refused():
    heads, keys = jnp.ones((2, 16, 4, 8)), jnp.ones((2, 16, 2, 8))
    with pytest.raises(TypeCheckError, match="parameter 'segment_ids'"):
        blocked_attention(heads, keys, keys, jnp.ones((16, 2), jnp.int32))


def test_tokens_are_integers():
    with pytest.raises(TypeCheckError, match="parameter 'tokens'"):
        embed(jnp.ones((32, 8)), jnp.ones((2, 4)), Execution())


def test_models_and_parallel_are_checked_too():
    with pytest.raises(TypeCheckError, match="return value"):
        head_matrix({"head": jnp.ones(8)})
    with pytest.raises(TypeCheckError, match="parameter 'length'"):
        token_indices("16", 0, 1)
