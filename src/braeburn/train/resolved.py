"""All that follows from a run and one of its stages: worked out once, and handed on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax

from braeburn.config import Execution, MeshConfig, ModelConfig, Run, Stage, StageModels
from braeburn.errors import UserError
from braeburn.hardware.catalogue import chip_of
from braeburn.hardware.products import check_matmul
from braeburn.layers.spec import Tree, walk
from braeburn.models.decoder import param_specs
from braeburn.optim.build import build_optimizer
from braeburn.parallel.layout import Layout, can_offload, one_device
from braeburn.parallel.mesh import build, resolve
from braeburn.parallel.rules import check, check_model
from braeburn.train.frozen import updating
from braeburn.transforms.definition import Transform, transform_of


@dataclass(frozen=True, eq=False)
class ResolvedStage:
    """A stage of a run on its devices.

    Attributes:
        run: the run.
        name: of the stage.
        layout: where all that the stage trains lies.
        transform: what the stage does to its model besides training it.
        optimizer: of all that the stage trains.
        teacher: the model of an online teacher, whose weights each step is given; None where the
            stage has no teacher, or its labels are cached.
    """

    run: Run
    name: str
    layout: Layout
    transform: Transform
    optimizer: optax.GradientTransformation
    teacher: ModelConfig | None = None

    @property
    def stage(self) -> Stage:
        """The stage's configuration."""
        return self.run.stages[self.name]

    @cached_property
    def models(self) -> StageModels:
        """The model as the stage finds, trains and leaves it."""
        return self.run.models()[self.name]

    @cached_property
    def first_step(self) -> int:
        """Steps that the run has made when the stage begins."""
        return self.run.first_steps[self.name]

    @cached_property
    def first_token(self) -> int:
        """Tokens that the run has been trained on when the stage begins."""
        return self.run.tokens_by(self.first_step)

    @property
    def last_step(self) -> int:
        """Steps that the run has made when the stage ends."""
        return self.first_step + self.stage.steps

    @property
    def execution(self) -> Execution:
        """How the stage's models are carried out."""
        return self.layout.execution

    @property
    def specs(self) -> Tree:
        """The specs of all that the stage trains: of its model and its transform."""
        return self.layout.specs

    def tokens_by(self, step: int) -> int:
        """The tokens that the run has been trained on after `step` steps in all, within the
        stage.
        """
        return self.first_token + (step - self.first_step) * self.stage.batch_tokens

    def layout_of(self, model: ModelConfig) -> Layout:
        """Where the parameters of a model lie on the stage's mesh."""
        return of_model(self.layout, model)

    def optimizer_of(self, specs: Tree) -> optax.GradientTransformation:
        """The stage's optimizer for parameters of other specs, as of the model that it finds: for
        its state, which is the same on any mesh.
        """
        return build_optimizer(self.run.optimizer, self.stage, specs, self.models.trained)

    def with_teacher(self, teacher: ModelConfig | None) -> "ResolvedStage":
        """The same stage with the model of its teacher, unless the teacher's labels are cached."""
        online = None if self.stage.distillation.cached else teacher
        return dataclasses.replace(self, teacher=online)


def resolve_stages(run: Run, devices: Sequence[Any] | None = None) -> dict[str, ResolvedStage]:
    """All stages of a run by name: see `resolve_stage`."""
    return {name: resolve_stage(run, name, devices) for name in run.stages}


def resolve_stage(run: Run, name: str, devices: Sequence[Any] | None = None) -> ResolvedStage:
    """A stage of a run.

    The model of a teacher is known here where the teacher is another stage; `with_teacher` adds
    that of a teacher which is read from disk.

    Args:
        run: the run.
        name: of the stage.
        devices: that the stage runs on; by default all that there are.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the stage.
    """
    models, stage = run.models(), run.stages[name]
    transform = transform_of(stage, models[name])
    specs = param_specs(models[name].trained) | transform.extra_specs
    layout = _layout(run, name, specs, devices)
    model, execution = models[name].trained, layout.execution
    optimizer = build_optimizer(run.optimizer, stage, specs, model, execution)
    resolved = ResolvedStage(run, name, layout, transform, updating(optimizer, transform, specs))
    return resolved.with_teacher(models[stage.teacher].left if stage.teacher in models else None)


def trained_specs(run: Run, name: str) -> Tree:
    """The specs of all that a stage trains, which no device need be there for."""
    models = run.models()[name]
    return param_specs(models.trained) | transform_of(run.stages[name], models).extra_specs


def of_model(layout: Layout, model: ModelConfig) -> Layout:
    """Where the parameters of a model lie on the mesh of a layout."""
    return dataclasses.replace(layout, specs=param_specs(model))


def model_layout(run: Run, model: ModelConfig, mesh: MeshConfig | None) -> Layout:
    """Where the parameters of a trained model lie, for what is done with it after training.

    Args:
        run: that trained it.
        model: the model.
        mesh: sizes of the mesh; None for one device of this process.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the model.
    """
    specs = param_specs(model)
    if mesh is None:
        return one_device(specs, run.precision)
    sizes = resolve(mesh, len(jax.devices()))
    execution = Execution(mesh=sizes, rules=run.rules, precision=run.precision)
    check_model(model, execution, _described(specs))
    return Layout(execution, build(sizes), specs)


def _layout(run: Run, name: str, specs: Tree, devices: Sequence[Any] | None) -> Layout:
    if -1 not in (run.stages[name].mesh or run.mesh).sizes.values():
        sizes_of(run, name)  # before the devices are looked for
    devices = jax.devices() if devices is None else devices
    check_matmul(run.precision, chip_of(devices[0].device_kind))
    sizes = sizes_of(run, name, len(devices))
    if (run.offload.optimizer or run.offload.activations) and not can_offload(devices[0]):
        raise UserError(
            f"offload needs host memory that the device can reach, and {devices[0].device_kind} "
            f"has none; set offload.optimizer to false and offload.activations to []"
        )
    return Layout(run.execution(name, sizes), build(sizes, devices), specs)


def sizes_of(run: Run, name: str, num_devices: int | None = None) -> MeshConfig:
    """The sizes of a stage's mesh, resolved for a number of devices unless none is inferred.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the stage or the model that
            it leaves.
    """
    mesh = run.stages[name].mesh or run.mesh
    if num_devices is not None:
        mesh = resolve(mesh, num_devices)
    execution = run.execution(name, mesh)
    for model in dict.fromkeys(run.models()[name]):
        check(run, name, model, execution, _described(param_specs(model)))
    return mesh


def _described(specs: Tree) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], str]]:
    """The logical axes, shape and role of each parameter by its path."""
    return {path: (spec.axes, spec.shape, spec.role) for path, spec in walk(specs)}
