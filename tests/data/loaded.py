"""Tells which modules a process of `in_processes` has loaded that it should not."""

import sys
from collections.abc import Callable


def modules(task: int, proceed: Callable[[], None]) -> list[str]:
    return [name for name in ("jax", "program") if name in sys.modules]
