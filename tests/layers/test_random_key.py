"""Random keys of seeds of any size."""

import jax
import numpy as np
import pytest

from braeburn.layers.spec import ParamSpec, initialize, random_key


def data(seed: int) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(random_key(seed))).tolist())


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_keep_their_keys(seed: int) -> None:
    assert data(seed) == tuple(np.asarray(jax.random.key_data(jax.random.key(seed))).tolist())


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**128]
    assert len({data(seed) for seed in seeds}) == len(seeds)


def test_weights_differ() -> None:
    specs = {"matrix": ParamSpec((4, 4), ("embed", "ffn"), "matrix", ("embed",))}
    first, other = (np.asarray(initialize(specs, seed)["matrix"]) for seed in (0, 2**32))
    assert not np.allclose(first, other)
