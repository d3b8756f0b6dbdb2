"""What the configurations of all objectives have in common."""

from typing import Any

from braeburn.config.base import Frozen


class ObjectiveConfig(Frozen):
    """What a stage minimises where it learns from its text alone.

    A subclass has a field `kind` of its own, and `braeburn.objectives` a module of that name.
    """

    kind: Any
