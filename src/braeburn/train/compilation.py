"""Where compiled programs are kept between processes."""

import os
from pathlib import Path

import jax


def cache_compilations() -> None:
    """Keeps compiled programs below the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "braeburn" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
