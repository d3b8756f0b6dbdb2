"""What a stage may minimise: every module of this package is one objective."""

from typing import TYPE_CHECKING

from braeburn.config.base import tagged_union
from braeburn.config.objectives.base import ObjectiveConfig
from braeburn.config.objectives.cross_entropy import NextToken
from braeburn.discovery import modules_of

modules_of(__name__, __path__)

if TYPE_CHECKING:
    Objective = ObjectiveConfig
else:
    Objective = tagged_union(ObjectiveConfig)

__all__ = ["NextToken", "Objective", "ObjectiveConfig"]
