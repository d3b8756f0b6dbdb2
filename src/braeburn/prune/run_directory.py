"""A narrower model from a trained one: the command around a stage of pruning."""

import functools
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from braeburn.config import (
    AdamW,
    Checkpoint,
    Execution,
    ModelConfig,
    Pruning,
    Run,
    Schedule,
    Source,
    Stage,
    check_pruning,
    override,
    validate,
)
from braeburn.data.packing import Batch
from braeburn.data.prepare import prepare
from braeburn.data.tokenizer import Tokenizer
from braeburn.disk import check_new
from braeburn.errors import UserError
from braeburn.layers.spec import ParamSpec, Tree, abstract, map_params_like, map_specs, walk
from braeburn.models.decoder import param_specs
from braeburn.optim.build import build_optimizer
from braeburn.parallel.agreement import main_first, said_by_main
from braeburn.parallel.layout import Layout
from braeburn.parallel.mesh import build, resolve
from braeburn.parallel.processes import is_main
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.directory import RunDirectory
from braeburn.train.loop import train
from braeburn.train.progress import tracked
from braeburn.train.resolved import resolve_stage
from braeburn.train.stage_run import batches_of, calibration
from braeburn.train.stages import abstract_params
from braeburn.train.state import TrainState
from braeburn.train.stored import Pieces
from braeburn.train.trained import found_run, held, ordinary_step, read_tokenizer, received_run
from braeburn.transforms.definition import Found
from braeburn.transforms.pruning import importance_of_units
from braeburn.transforms.units import kept, sliced_block

log = logging.getLogger(__name__)

STAGE = "prune"
TEXT = "text"  # the name of the source that --data names
LEARN_FROM_TEXT = ("soft_top_k", "activation")
# Of the stage that prunes a model which was not trained here.
LONGEST_SEQUENCE = 1024
BATCH_TOKENS = 8192
# Of the tokens that a run has seen, those that masks are learned on: 188B of 6.3T (arXiv
# 2407.21075).
SHARE_OF_TOKENS = 0.03
FEWEST_STEPS = 100
# An optimizer's state does not depend on the stage, but is described by one.
ANY_STAGE = Stage(
    tokens=1, sequence_length=1, batch_tokens=1, mixture={"any": 1.0}, learning_rate=1.0
)


def prune(
    directory: Path,
    out: Path,
    pruning: Pruning,
    tokens: int | None = None,
    assignments: Mapping[str, Any] | None = None,
    text: Source | None = None,
) -> ModelConfig:
    """Makes a run directory whose checkpoint 0 is a run's newest, pruned: weights, optimizer and
    configuration.

    Several processes share the model over the mesh of the run, and all must see both folders.
    Soft-Top-K trains in a hidden folder beside `out`, where a call that was cut short is gone on
    with; the other methods only measure and cut. A recipe of the smaller model trains on from the
    result.

    Args:
        directory: the run.
        out: the folder to make.
        pruning: how, and what stays.
        tokens: to learn masks on; by default 3% of those that the run has seen, and at least 100
            batches.
        assignments: changes by dotted path to the run that prunes, whose one stage is named
            `prune`.
        text: what to learn from, in the place of the text that the run was trained on; an import
            has none of its own.

    Returns:
        The smaller model.

    Raises:
        UserError: there is no checkpoint or no text to learn from, a size does not fit, or `out` is
            in use.
    """
    check_new(out)
    if tokens and not pruning.learned:
        raise UserError(
            f"--tokens {tokens} is for learned masks, and --method {pruning.method} cuts at once; "
            f"leave one out"
        )
    if text and pruning.method not in LEARN_FROM_TEXT:
        raise UserError(
            f"--data is for --method {' and '.join(LEARN_FROM_TEXT)}, and --method "
            f"{pruning.method} reads no text; leave one out"
        )
    run = received_run(directory)
    step, tokenizer = ordinary_step(run, directory), read_tokenizer(directory)
    model, length = run.model_at(step)
    model = model.model_copy(update={"max_position_embeddings": length})
    try:
        check_pruning("--", pruning, model)
    except ValueError as error:
        raise UserError(str(error)) from None
    if run.stages or text:
        if text:
            has_optimizer = (directory / "checkpoints" / str(step) / "optimizer").is_dir()
            # Weights of other software have met no optimizer of ours: the usual one will do.
            run = _on_text(
                run if has_optimizer else run.model_copy(update={"optimizer": AdamW()}), model, text
            )
        run = _pruning_run(run, model, step, pruning, tokens, assignments or {})
        stage = run.stages[STAGE]
        pruning = stage.pruning or pruning
        if pruning.learned:
            log.info(
                "masks are learned on %s tokens, in %s steps of %s; --tokens sets how many, and "
                "--method activation measures and cuts at once",
                f"{stage.tokens:,}",
                f"{stage.steps:,}",
                f"{stage.batch_tokens:,}",
            )
    elif pruning.method in LEARN_FROM_TEXT or assignments:
        raise UserError(
            f"{str(directory)!r} was not trained here and names no text to measure activations on; "
            f"name some with --data FILE, or use --method magnitude without --set"
        )
    smaller = pruning.left(model)
    work = out.absolute().with_name(f".{out.absolute().name}.prune")
    try:
        if pruning.learned:
            state = _learned(directory, step, run, tokenizer, work)
        else:
            state = _cut(Checkpoints(directory), step, run, model, pruning, tokenizer)
    except UserError as error:
        raise UserError(_as_options(str(error)) if text else str(error)) from None
    left = validate(
        run.model_copy(
            update={
                "name": f"{run.name[:90]}-pruned",
                "model": smaller,
                "stages": {},
                "initial_weights": None,
            }
        ).model_dump()
    )
    found_run(out, left, state, tokenizer, "prune", directory)
    if is_main():
        shutil.rmtree(work, ignore_errors=True)
    return smaller


def _as_options(message: str) -> str:
    """A message about the fields of the source `TEXT`, with the options of the command line in
    their stead.
    """
    field = f"data.sources.{TEXT}"
    return (
        message.replace(f"{field}.paths", "--data")
        .replace(f"{field}.field", "--field")
        .replace(field, "--data")
    )


def _on_text(run: Run, model: ModelConfig, text: Source) -> Run:
    """The run with `text` as its one source, and a stage that draws from it where there is none."""
    if run.stages:
        stages = {
            name: stage.model_copy(update={"mixture": {TEXT: 1.0}})
            for name, stage in run.stages.items()
        }
        changes: dict[str, Any] = {"stages": stages}
    else:
        length = min(model.max_position_embeddings or LONGEST_SEQUENCE, LONGEST_SEQUENCE)
        stage = Stage(
            tokens=BATCH_TOKENS,
            sequence_length=length,
            batch_tokens=max(1, BATCH_TOKENS // length) * length,
            mixture={TEXT: 1.0},
            learning_rate=run.optimizer.fine_tuning_rate,
        )
        changes = {"stages": {STAGE: stage}}
    data = run.data.model_copy(update={"sources": {TEXT: text}})
    return run.model_copy(update={**changes, "data": data})


def _pruning_run(
    run: Run,
    model: ModelConfig,
    step: int,
    pruning: Pruning,
    tokens: int | None,
    assignments: Mapping[str, Any],
) -> Run:
    """The run that prunes a model of `run` at `step`: of its first stage, with other tokens and the
    pruning.
    """
    first = next(iter(run.stages.values()))
    fewest = FEWEST_STEPS * first.batch_tokens
    tokens = tokens or max(round(SHARE_OF_TOKENS * run.tokens_by(step)), fewest)
    steps = -(-tokens // first.batch_tokens)
    changes: dict[str, Any] = {
        "tokens": tokens,
        "schedule": Schedule(warmup_steps=steps // 20, floor=0.1),
        **dict.fromkeys((*first.transforms, "teacher", "rope_base")),
        "pruning": pruning,
    }
    stages = {STAGE: first.model_copy(update=changes)}
    update = {
        "model": model,
        "stages": stages,
        "checkpoint": Checkpoint(every_steps=min(200, max(1, steps // 10))),
        "initial_weights": None,
    }
    return override(validate(run.model_copy(update=update).model_dump()), assignments)


def _learned(directory: Path, step: int, run: Run, tokenizer: Tokenizer, work: Path) -> TrainState:
    """The state that the pruning run leaves, trained in the folder `work` or gone on with there."""
    stage = resolve_stage(run, STAGE)
    if not _has_begun(work):
        found_run(
            work,
            run,
            _state(directory, step, run, stage.layout_of(stage.models.found)),
            tokenizer,
            "prune",
            directory,
        )
    if not train(run, work).finished:
        raise KeyboardInterrupt  # it has saved, and the same command goes on
    return _state(work, stage.last_step, run, stage.layout_of(stage.models.left))


def _has_begun(work: Path) -> bool:
    """Whether a call before this one has begun to learn masks in a folder; the same answer in all
    processes.
    """
    begun = is_main() and work.exists() and RunDirectory(work).begun()
    return said_by_main(f"whether a run has begun in {work}", str(begun)) == str(True)


def _cut(
    checkpoints: Checkpoints,
    step: int,
    run: Run,
    model: ModelConfig,
    pruning: Pruning,
    tokenizer: Tokenizer,
) -> TrainState:
    """The state of a checkpoint without the units that matter least, as their method measures it.

    It is cut as it is copied, one layer after the other. Only activations are measured with all
    parameters in memory.
    """
    specs, layout = param_specs(model), _layout(run, model)
    stored = checkpoints.stored_params(step, abstract(specs))
    if pruning.method == "activation":
        params = held(checkpoints, step, layout, for_programs=True)
        found = Found(model, params, layout, _batches(run, tokenizer), run.seed)
    else:
        found = Found(model, stored, layout, iter(()), run.seed)
    units = kept(importance_of_units(pruning, found), pruning.keep, model)
    units = jax.tree.map(np.asarray, units)

    def cut(tree: Tree) -> Tree:
        arrays = dict(walk(tree))

        def pieces(path: str, spec: ParamSpec) -> Pieces:
            array = arrays[path]
            shape, dtype = smaller[path].shape, array.dtype
            if not spec.stacked:
                whole = functools.partial(sliced_block, path=path, spec=spec, indices=units)
                return Pieces.whole(shape, dtype, lambda: whole(np.asarray(array), layer=None))
            return Pieces.of_layers(
                shape, dtype, lambda layer: sliced_block(array[layer], path, spec, units, layer)
            )

        return map_specs(pieces, specs)

    smaller = dict(walk(param_specs(pruning.left(model))))
    optimizer = build_optimizer(run.optimizer, ANY_STAGE, specs, run.model)
    moments = checkpoints.stored_optimizer(step, jax.eval_shape(optimizer.init, abstract(specs)))
    if moments is not None:
        moments = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, Pieces) else Pieces.of(leaf),
            map_params_like(cut, moments, specs),
            is_leaf=lambda leaf: isinstance(leaf, Pieces),
        )
    return TrainState(np.int32(0), cut(stored), moments)


def _layout(run: Run, model: ModelConfig) -> Layout:
    """Where a model lies on the mesh of its run."""
    if run.stages:
        return resolve_stage(run, STAGE).layout_of(model)
    sizes = resolve(run.mesh, len(jax.devices()))
    execution = Execution(sizes, run.rules, run.precision, offload=run.offload)
    return Layout(execution, build(sizes, jax.devices()), param_specs(model))


def _state(directory: Path, step: int, run: Run, layout: Layout) -> TrainState:
    """The parameters of a checkpoint and its optimizer's state, if it has any, at step 0."""
    checkpoints, params = Checkpoints(directory), abstract_params(layout)
    optimizer = build_optimizer(run.optimizer, ANY_STAGE, layout.specs, run.model)
    shape = jax.eval_shape(optimizer.init, params)
    shape = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shape,
        layout.optimizer_state(shape),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.everywhere())
    state = checkpoints.restore(step, TrainState(count, params, shape), optimizer.init)
    return state._replace(step=jnp.zeros_like(state.step))


def _batches(run: Run, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The batches that activations are measured on, placed."""
    stage = resolve_stage(run, STAGE)
    prepared = main_first(
        "text to prune by was prepared", lambda: prepare(run, lambda line: None, tokenizer)
    )
    batches = batches_of(stage, prepared.train)
    return tracked(calibration(stage.stage, batches, stage.layout), "measuring activations")
