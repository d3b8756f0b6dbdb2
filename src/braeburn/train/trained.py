"""What a run directory holds for use after training."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from braeburn.config import (
    Checkpoint,
    MeshConfig,
    ModelConfig,
    Run,
    WeightType,
    flatten,
    read_run,
    validate,
)
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.tokenizer_settings import TOKENIZER_CONFIG
from braeburn.disk import SECONDS_TO_APPEAR, appears, explaining, scratch
from braeburn.errors import UserError
from braeburn.layers.spec import ParamSpec, Tree, abstract
from braeburn.layers.weights import type_on_cpus
from braeburn.parallel.agreement import first_objection, main_first, said_by_main, wait_for_all
from braeburn.parallel.layout import Layout
from braeburn.parallel.processes import is_main
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.directory import RunDirectory
from braeburn.train.resolved import model_layout, trained_specs
from braeburn.train.state import TrainState
from braeburn.train.stored import StoredArray
from braeburn.transforms.definition import transform_of


@dataclass(frozen=True)
class Trained:
    """The newest checkpoint of a run, ready to use.

    Attributes:
        run: the run that made it.
        step: steps made by then.
        model: the model as the stage of that step trained it, RoPE base included.
        params: parameters of any float type, or `StoredArray`s of them.
        layout: where they lie.
        tokenizer: the tokenizer that it was trained with.
        sequence_length: of the longest sequences that it was trained on, here or elsewhere; 0 where
            unknown.
    """

    run: Run
    step: int
    model: ModelConfig
    params: Tree
    tokenizer: Tokenizer
    sequence_length: int
    layout: Layout


def load(
    directory: Path,
    mesh: MeshConfig | None = None,
    dtype: WeightType | None = None,
    *,
    for_programs: bool = False,
) -> Trained:
    """Reads the newest checkpoint of a run directory.

    Args:
        directory: of the run.
        mesh: the devices to read it onto, each of which gets its part; None for one device.
        dtype: that all parameters but those of norms are held in; None for that of the checkpoint.
        for_programs: whether nothing but the model's own programs will read the parameters. On CPUs
            those in bfloat16 then come as their bits: see `layers.weights.type_on_cpus`.

    Raises:
        UserError: the folder holds no run or no checkpoint, the newest is damaged or of another
            model than the run, its tokenizer is not the run's, or the mesh does not fit.
    """
    trained, checkpoints = _open(directory, mesh)
    return replace(trained, params=_params(trained, checkpoints, dtype, for_programs))


def open_stored(directory: Path) -> Trained:
    """The newest checkpoint of a run directory, whose parameters are read as they are used.

    Each is a `StoredArray`, of which a layer can be indexed. Only the weights in the middle of a
    stage that masks or rounds them are computed, and so lie in memory.

    Raises:
        UserError: as `load`.
    """
    trained, checkpoints = _open(directory, None)
    if _effective(trained.run, trained.step):
        return replace(trained, params=_params(trained, checkpoints, None, False))
    shapes = abstract(trained.layout.specs)
    return replace(trained, params=checkpoints.stored_params(trained.step, shapes))


def _open(directory: Path, mesh: MeshConfig | None) -> tuple[Trained, Checkpoints]:
    """All of the newest checkpoint but its parameters."""
    run = received_run(directory)
    checkpoints = Checkpoints(directory)
    step = checkpoints.newest()
    if step is None:
        raise UserError(
            f"{str(directory)!r} holds no complete checkpoint; train for at least one checkpoint "
            f"first"
        )
    checkpoints.require_sound(step, ("params", "run"))
    fields, saved_tokenizer = checkpoints.restore_run(step)
    require_same_model(run, validate(fields), step, directory)
    model, sequence_length = run.model_at(step)
    layout = model_layout(run, model, mesh)
    saved = Tokenizer.from_json(saved_tokenizer)
    tokenizer = read_tokenizer(directory)
    require_same_tokenizer(tokenizer, saved, directory / "tokenizer.json", step)
    if not (directory / TOKENIZER_CONFIG).exists():  # as in run directories of earlier versions
        tokenizer = saved
    return Trained(run, step, model, {}, tokenizer, sequence_length, layout), checkpoints


def received_run(directory: Path) -> Run:
    """The run of a directory that is read and not trained in, with the user's own cache of
    tokenised text.

    The folder may come from someone else, and so its `data.cache` may be any folder of this
    machine.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(directory)
    return run.model_copy(update={"data": run.data.model_copy(update={"cache": None})})


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a run directory.

    Raises:
        UserError: its files are missing or unsound.
    """
    return Tokenizer.load(directory / "tokenizer.json", "put the run's own tokenizer.json back")


def _effective(run: Run, step: int) -> Callable[[Tree, Any], Tree] | None:
    """What turns the weights that a checkpoint holds into those that the model uses; None where
    they are the same, as at the end of a stage.
    """
    if step >= run.total_steps:
        return None
    name, stage, index = run.stage_at(step)
    return transform_of(stage, run.models()[name]).effective if index else None


def _params(
    trained: Trained, checkpoints: Checkpoints, dtype: WeightType | None, for_programs: bool
) -> Tree:
    """The parameters of a checkpoint; from the middle of a stage, the stage's effective weights."""
    run, step, layout = trained.run, trained.step, trained.layout
    effective = _effective(run, step)
    if effective is None:
        return held(checkpoints, step, layout, dtype, for_programs=for_programs)
    name, _, index = run.stage_at(step)
    of_stage = replace(layout, specs=trained_specs(run, name))
    used = effective(held(checkpoints, step, of_stage, "float32"), index)
    if dtype is not None:
        used = jax.tree.map(lambda spec, leaf: leaf.astype(spec.held_in(dtype)), layout.specs, used)
    return used if layout.num_devices == 1 else jax.device_put(used, layout.parameters())


def held(
    checkpoints: Checkpoints,
    step: int,
    layout: Layout,
    dtype: WeightType | None = None,
    *,
    for_programs: bool = False,
) -> Tree:
    """The parameters of a checkpoint where a layout has them.

    Args:
        checkpoints: of the run.
        step: of the checkpoint.
        layout: where they are to lie.
        dtype: that all but those of norms are held in; None for that of the checkpoint.
        for_programs: as in `load`.
    """
    stored = checkpoints.stored_params(step, abstract(layout.specs))

    def wanted(spec: ParamSpec, array: StoredArray, place: Any) -> jax.ShapeDtypeStruct:
        kept_as = spec.held_in(dtype or array.dtype)
        if for_programs and layout.platform == "cpu":
            kept_as = type_on_cpus(spec, kept_as)
        return jax.ShapeDtypeStruct(spec.shape, kept_as, sharding=place)

    shapes = jax.tree.map(wanted, layout.specs, stored, layout.parameters())
    return checkpoints.placed(step, stored, shapes)


# What may differ between the model of a configuration and that of a checkpoint: how it is computed,
# or trained.
_NOT_COMPARED = {"scan_layers", "max_position_embeddings", "z_loss"}


def require_same_model(run: Run, saved: Run, step: int, directory: Path) -> None:
    """Refuses a run whose model is not that which a checkpoint was trained with.

    Args:
        run: the run, as it is now.
        saved: the run that the checkpoint holds.
        step: of the checkpoint.
        directory: of the run; named in errors.

    Raises:
        UserError: naming the first field that differs.
    """
    if step > min(run.total_steps, saved.total_steps):
        raise UserError(
            f"checkpoint {step} of {str(directory)!r} lies beyond the run's {run.total_steps} steps"
        )
    ours, theirs = (
        each.model_at(step)[0].model_dump(exclude=_NOT_COMPARED) for each in (run, saved)
    )
    for field, value in ours.items():
        if value != theirs[field]:
            raise UserError(
                f"model.{field} is {value!r}, but checkpoint {step} of {str(directory)!r} was "
                f"trained with "
                f"{theirs[field]!r}; put the fields of model back, in the recipe and in config.json"
            )


def require_same_tokenizer(present: Tokenizer, saved: Tokenizer, path: Path, step: int) -> None:
    """Refuses a tokenizer other than the one that a checkpoint was trained with.

    Args:
        present: the run directory's.
        saved: the checkpoint's.
        path: of the former; named in errors.
        step: of the checkpoint.

    Raises:
        UserError: naming the file and the checkpoint.
    """
    if present.hash != saved.hash:
        raise UserError(
            f"the tokenizer {str(path)!r} is not the one that checkpoint {step} was trained with; "
            f"put that run's own tokenizer.json back"
        )


def ordinary_step(run: Run, directory: Path, step: int | None = None) -> int:
    """A checkpoint's step, the newest by default, if it holds a model as it is between stages or
    while one trains it.

    Raises:
        UserError: there is none, it is damaged, or it was made in the middle of a stage that cuts
            or rounds at its end.
    """
    checkpoints = Checkpoints(directory)
    step = checkpoints.newest() if step is None else step
    if step not in checkpoints.steps():
        raise UserError(
            f"{str(directory)!r} holds no complete checkpoint; train for at least one checkpoint "
            f"first"
        )
    assert step is not None
    checkpoints.require_sound(step, ("params", "run"))
    if step < run.total_steps:
        name, stage, index = run.stage_at(step)
        if index and transform_of(stage, run.models()[name]).effective:
            raise UserError(
                f"checkpoint {step} of {str(directory)!r} is from the middle of the stage "
                f"{name!r}, which cuts or rounds weights at its end; train that stage to its end, "
                f"or name an earlier checkpoint"
            )
    return step


def found_run(
    out: Path, run: Run, state: TrainState, tokenizer: Tokenizer, origin: str, source: Path
) -> None:
    """Makes a run directory whose checkpoint 0 holds a state.

    It is built beside its place and renamed, so that an interrupted call leaves nothing that looks
    whole. What a killed call has left is removed by the next. Of several processes each writes its
    share of the weights.

    Args:
        out: the folder, new or empty; several processes must all see it.
        run: to be told by its `config.json`.
        state: parameters, and the optimizer's state or None.
        tokenizer: of the run.
        origin: of the run's values, and the kind of the event that tells of the making.
        source: the folder that it was made from.
    """
    out = out.absolute()
    with explaining(), _folder_of_all(out) as folder:
        directory = RunDirectory(folder / out.name, writes=is_main())

        def begin() -> None:
            if is_main():
                directory.write_config(run, {path: origin for path, _ in flatten(run.model_dump())})
                tokenizer.save_all(directory.path)

        main_first(f"the run for {out} was described", begin)
        checkpoints = Checkpoints(directory.path, Checkpoint())
        checkpoints.save(0, state, run, tokenizer.to_json())
        checkpoints.close()
        wait_for_all(f"the weights for {out} were saved")
        if is_main():
            directory.event(origin, source=str(source))
            if out.exists():
                out.rmdir()
            directory.path.replace(out)
        wait_for_all(f"{out} was made")


@contextmanager
def _folder_of_all(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` in which all processes make it; gone afterwards.

    Raises:
        UserError: it cannot be made, or a process does not see it.
    """
    with ExitStack() as held:

        def make() -> str:
            if not is_main():
                return ""
            RunDirectory(out.parent)  # with one sentence where it cannot be made
            return str(held.enter_context(scratch(out.parent, out.name)))

        made = main_first(f"a folder for {out} was made", make)
        folder = Path(said_by_main(f"which folder {out} is made in", made))
        unseen = None
        if not appears(folder, SECONDS_TO_APPEAR):
            unseen = (
                f"--out {str(out)!r} is in another folder for process {jax.process_index()} than "
                f"for process 0; name a folder on storage that the machines of all processes mount"
            )
        if unseen := first_objection(f"all processes saw the folder for {out}", unseen):
            raise UserError(unseen)
        yield folder
