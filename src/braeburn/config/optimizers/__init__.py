"""The optimizers that a run can name: every module of this package is one."""

from typing import TYPE_CHECKING

from braeburn.config.base import kinds_of, tagged_union
from braeburn.config.optimizers.adamw import AdamW
from braeburn.config.optimizers.afm import AfmOptimizer
from braeburn.config.optimizers.base import OptimizerConfig
from braeburn.discovery import modules_of

modules_of(__name__, __path__)
KINDS = kinds_of(OptimizerConfig)

if TYPE_CHECKING:
    Optimizer = OptimizerConfig
else:
    Optimizer = tagged_union(OptimizerConfig)

__all__ = ["KINDS", "AdamW", "AfmOptimizer", "Optimizer", "OptimizerConfig"]
