"""Finds the modules of a package, so that a new one need not be listed anywhere."""

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType


def modules_of(package: str, path: Sequence[str]) -> list[ModuleType]:
    """Every module of a package, imported, by name.

    Args:
        package: its name, as `__name__` in its `__init__`.
        path: its folders, as `__path__` there.
    """
    names = sorted(found.name for found in pkgutil.iter_modules(path))
    return [importlib.import_module(f"{package}.{name}") for name in names]
