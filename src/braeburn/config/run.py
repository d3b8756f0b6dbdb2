"""The run: all parts together, checked against each other."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError, model_validator

from braeburn.config.base import MOST_STEPS, Frozen, Name, Seed, Size, explain_validation_error
from braeburn.config.data import Data
from braeburn.config.execution import Execution
from braeburn.config.memory import NO_OFFLOAD, Offload, Precision, Remat
from braeburn.config.mesh import MeshConfig
from braeburn.config.model import ModelConfig
from braeburn.config.optimizers import AfmOptimizer, Optimizer
from braeburn.config.rules import ShardingRules
from braeburn.config.stage import Stage
from braeburn.errors import UserError, did_you_mean


class Checkpoint(Frozen):
    """When checkpoints are written and which are kept: the newest `keep_last` and every
    `keep_every_steps`-th.
    """

    every_steps: Size = 1000
    keep_last: Size = 2
    keep_every_steps: Size | None = None


class Evaluation(Frozen):
    """Held-out evaluation at the end of each stage and every `every_steps`, over at most `tokens`
    of each source.
    """

    every_steps: Size | None = None
    tokens: Size = 262_144


class StageModels(NamedTuple):
    """The model as a stage finds it, as it trains it, and as it leaves it."""

    found: ModelConfig
    trained: ModelConfig
    left: ModelConfig


class Run(Frozen):
    """One complete training run.

    `initial_weights` is a directory whose weights and tokenizer training starts from, in the place
    of random weights: a run directory, one of its checkpoints, or a Hugging Face directory.
    `ModelConfig.from_directory` gives its model.
    """

    name: Name
    model: ModelConfig
    stages: dict[Name, Stage]
    data: Data = Data()
    optimizer: Optimizer = AfmOptimizer()
    initial_weights: str | None = None
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()
    rules: ShardingRules = ShardingRules()
    checkpoint: Checkpoint = Checkpoint()
    precision: Precision = Precision()
    remat: Remat = Remat()
    offload: Offload = NO_OFFLOAD
    evaluation: Evaluation = Evaluation()

    def execution(self, name: str, mesh: MeshConfig) -> Execution:
        """How the model of a stage is carried out on a mesh, resolved sizes."""
        remat = self.stages[name].remat or self.remat
        return Execution(mesh, self.rules, self.precision, remat, self.offload)

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all stages."""
        return sum(stage.steps for stage in self.stages.values())

    @property
    def first_steps(self) -> dict[str, int]:
        """Steps made in all before each stage begins."""
        before = itertools.accumulate((stage.steps for stage in self.stages.values()), initial=0)
        return dict(zip(self.stages, before, strict=False))

    @property
    def last_steps(self) -> dict[str, int]:
        """Steps made in all when each stage ends."""
        first = self.first_steps
        return {name: first[name] + stage.steps for name, stage in self.stages.items()}

    def begun_by(self, step: int) -> list[str]:
        """The names of the stages that have made a step after `step` steps in all, in order."""
        return [name for name, first in self.first_steps.items() if first < step]

    def tokens_by(self, step: int) -> int:
        """The tokens that the run has been trained on after `step` steps in all."""
        first = self.first_steps
        return sum(
            min(step - first[name], stage.steps) * stage.batch_tokens
            for name, stage in self.stages.items()
            if first[name] < step
        )

    def stage_at(self, step: int) -> tuple[str, Stage, int]:
        """The stage that runs the 0-based global `step`: its name, the stage and the step's index
        within it.
        """
        if step >= self.total_steps:
            raise IndexError(f"step {step} lies beyond the run's {self.total_steps} steps")
        name = self.begun_by(step + 1)[-1]
        return name, self.stages[name], step - self.first_steps[name]

    def model_at(self, step: int) -> tuple[ModelConfig, int]:
        """The model as left after `step` steps, and the longest sequence that it was trained on by
        then, in tokens.
        """
        begun = self.begun_by(step)
        if not begun:
            return self.model, self.model.max_position_embeddings
        lengths = [self.stages[name].sequence_length for name in begun]
        models = self.models()[begun[-1]]
        model = models.left if step >= self.last_steps[begun[-1]] else models.trained
        return model, max(self.model.max_position_embeddings, *lengths)

    def models(self) -> dict[str, StageModels]:
        """The model of each stage: what a transform leaves is what all later stages find, and a
        RoPE base holds for its stage.
        """
        models: dict[str, StageModels] = {}
        model = self.model
        for name, stage in self.stages.items():
            found, trained = model, model
            for transform in stage.transforms.values():
                trained = transform.trained(found)
                model = transform.left(found)
            base = {"rope_base": stage.rope_base} if stage.rope_base else {}
            models[name] = StageModels(
                *(each.model_copy(update=base) for each in (found, trained, model))
            )
        return models

    @model_validator(mode="after")
    def _check(self) -> "Run":
        model, names = self.model, list(self.stages)
        for index, (name, stage) in enumerate(self.stages.items()):
            if stage.teacher in names[index:]:
                remedy = f"one of {names[:index]}" if index else "a directory"
                raise ValueError(
                    f"stages.{name}.teacher={stage.teacher!r} is not an earlier stage; set it to "
                    f"{remedy}"
                )
            for field, transform in stage.transforms.items():
                transform.check(f"stages.{name}.{field}", model)
                if transform.rounds and self.precision.matmul != "compute":
                    raise ValueError(
                        f"stages.{name}.{field} rounds weights as they will be shipped, and "
                        f"precision.matmul={self.precision.matmul!r} would round them once more; "
                        f"set precision.matmul to 'compute' or stages.{name}.{field} to null"
                    )
                model = transform.left(model)
        if self.total_steps > MOST_STEPS:
            raise ValueError(
                f"stages have {self.total_steps:,} steps in all, and a run has at most "
                f"{MOST_STEPS:,}; lower tokens or raise batch_tokens"
            )
        for name, stage in self.stages.items():
            for source in stage.mixture:
                if source not in self.data.sources:
                    raise ValueError(
                        f"stages.{name}.mixture.{source} is not a source of the data; "
                        + did_you_mean(source, self.data.sources)
                    )
        remats = {
            f"stages.{name}.remat": stage.remat
            for name, stage in self.stages.items()
            if stage.remat
        }
        if len(remats) < len(self.stages):
            remats["remat"] = self.remat
        for path, remat in remats.items():
            for name in self.offload.activations:
                if remat.policy != "save_named" or name not in remat.names:
                    raise ValueError(
                        f"offload.activations has {name!r}, which is not kept for the backward "
                        f"pass; set {path}.policy to 'save_named' with {name!r} among {path}.names"
                    )
        return self


def validate(fields: Mapping[str, Any]) -> Run:
    """A run from nested dicts, as `config.json` and overrides hold it.

    Raises:
        UserError: a field is missing, unknown or refused, in one sentence.
    """
    try:
        return Run.model_validate(fields)
    except ValidationError as error:
        raise UserError(explain_validation_error(error)) from None
