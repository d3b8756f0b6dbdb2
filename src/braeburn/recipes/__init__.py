"""The built-in recipes, and the way to a user's own.

A recipe is a function without arguments that returns a complete `Run`. What it leaves out takes the
default of the field; what it says is its own.
"""

import difflib
import importlib
import inspect
import runpy
from collections.abc import Callable
from pathlib import Path

from braeburn.config import Run, explain_validation_error
from braeburn.errors import UserError

# The modules of this package and the recipes in each; `qwen3-0.6b` is the function `qwen3_0_6b`.
MODULES = {
    "quickstart": ("quickstart", "afm-tiny", "afm-on-device-tiny"),
    "afm_2025": ("afm-on-device-2025", "afm-on-device-2025-tiny"),
    "afm": ("afm-85m", "afm-on-device", "afm-on-device-scratch", "afm-server"),
    "llama": ("llama2-7b", "llama2-70b", "llama3-8b", "llama3-70b"),
    "qwen": ("qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b", "qwen3-235b-a22b"),
    "deepseek": ("deepseek-v3",),
    "gemma": ("gemma3-1b",),
    "olmo": ("olmo2-7b",),
    "gpt_oss": ("gpt-oss-20b", "gpt-oss-120b"),
    "frontier": ("frontier-22b", "frontier-175b", "frontier-1t"),
}
BUILT_IN = {name: module for module, names in MODULES.items() for name in names}


def load(name: str) -> Run:
    """The run of a built-in recipe or of `file.py:function`.

    Raises:
        UserError: there is no such recipe, or it fails.
    """
    return _call(name, _function(name))


def description(name: str) -> str:
    """The first line of a built-in recipe's docstring."""
    return (inspect.getdoc(_function(name)) or "").partition("\n")[0]


def _function(name: str) -> Callable[[], Run]:
    if name in BUILT_IN:
        module = importlib.import_module(f"braeburn.recipes.{BUILT_IN[name]}")
        return getattr(module, name.replace("-", "_").replace(".", "_"))
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), function)
    nearest = difflib.get_close_matches(name, BUILT_IN, n=3, cutoff=0.4)
    hint = (
        "did you mean " + " or ".join(map(repr, nearest))
        if nearest
        else "`braeburn recipes` lists those there are"
    )
    raise UserError(
        f"{name!r} is not a recipe; {hint} (a recipe of your own is written file.py:function)"
    )


def _from_file(path: Path, function: str) -> Callable[[], Run]:
    if not path.is_file():
        raise UserError(
            f"recipe file {str(path)!r} does not exist; check the path before the colon"
        )
    try:
        names = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:
        raise UserError(
            f"recipe file {str(path)!r} fails on import: {type(error).__name__}: {error}"
        ) from error
    if not callable(names.get(function)):
        own = [n for n, v in names.items() if inspect.isfunction(v) and v.__module__ == path.stem]
        raise UserError(
            f"{str(path)!r} has no function {function!r}; its functions are "
            f"{', '.join(own) or 'none'}"
        )
    return names[function]


def _call(name: str, function: Callable[[], Run]) -> Run:
    from pydantic import ValidationError

    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UserError(
            f"recipe {name!r} cannot be called without arguments ({error}); give them defaults"
        ) from error
    try:
        run = function()
        if isinstance(run, Run):
            # A recipe may have been made from another by `model_copy`, which checks nothing.
            run = Run.model_validate(run)
    except ValidationError as error:
        raise UserError(f"recipe {name!r}: {explain_validation_error(error)}") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"recipe {name!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(run, Run):
        raise UserError(
            f"recipe {name!r} returned {type(run).__name__}; it must return a braeburn.config.Run"
        )
    return run
