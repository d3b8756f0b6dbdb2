"""Programs for several simulated devices are not kept between runs of the tests: see
`Layout.compiling`.
"""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
