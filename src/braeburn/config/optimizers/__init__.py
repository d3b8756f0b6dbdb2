"""The optimizers that a run can name: a module for each, which the imports list."""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from braeburn.config.optimizers.adamw import AdamW
from braeburn.config.optimizers.afm import AfmOptimizer
from braeburn.config.optimizers.base import OptimizerConfig

KINDS: dict[str, type[Any]] = {
    config.model_fields["kind"].default: config for config in OptimizerConfig.__subclasses__()
}

if TYPE_CHECKING:
    Optimizer = OptimizerConfig
else:
    Optimizer = Annotated[Union[tuple(KINDS.values())], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["KINDS", "AdamW", "AfmOptimizer", "Optimizer", "OptimizerConfig"]
