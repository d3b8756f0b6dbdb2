"""Remembering the results of functions of configurations, which a search asks for many times."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

from braeburn.config import MeshConfig
from braeburn.config.base import Frozen
from braeburn.config.mesh import AXES

Found = TypeVar("Found")

_OF_MESH = attrgetter(*AXES, "expert_dispatch", "expert_room")


def by_identity(function: Callable[..., Found]) -> Callable[..., Found]:
    """A function of configurations and other values that remembers its results.

    Configurations, which take longer to hash than most results to work out, are told apart by which
    object they are; meshes by their sizes and by how tokens reach experts, on which alone the
    result may depend.
    """
    found: dict[Any, tuple[Found, Any]] = {}

    def identity(argument: Any) -> Any:
        if isinstance(argument, MeshConfig):
            return _OF_MESH(argument)
        return id(argument) if isinstance(argument, Frozen) else argument

    def remembering(*arguments: Any) -> Found:
        key = tuple(map(identity, arguments))
        if key not in found:
            # With the arguments, so that no other object gets the identity of one of them.
            found[key] = function(*arguments), arguments
        return found[key][0]

    return remembering
