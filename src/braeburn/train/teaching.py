"""Teachers of stages: their weights, and their labels of the text, which are cached from one pass
over it.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from braeburn.config import ModelConfig, Run, read_run
from braeburn.data.packing import Batch
from braeburn.data.prepare import Prepared
from braeburn.data.teacher_labels import Labelling, TeacherLabels, Writer, build_teacher_labels
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.jsonfile import read_json
from braeburn.layers.spec import Tree, walk
from braeburn.models import decoder
from braeburn.objectives.distillation import top_k_labels
from braeburn.parallel.agreement import main_first
from braeburn.parallel.rules import check
from braeburn.parallel.sequence import zigzag
from braeburn.remote import place
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.copies import fetched
from braeburn.train.record import FETCHED
from braeburn.train.resolved import ResolvedStage
from braeburn.train.stages import abstract_params
from braeburn.train.trained import ordinary_step, read_tokenizer


@dataclass(frozen=True)
class Teacher:
    """A trained model to learn from.

    Attributes:
        model: its sizes and RoPE base.
        tokenizer: its own; None where it is the run's.
        identity: gives a string that tells its weights from all others.
        read: its parameters, with the dtypes and shardings of abstract ones.
    """

    model: ModelConfig
    tokenizer: Tokenizer | None
    identity: Callable[[], str]
    read: Callable[[Tree], Tree]


# The teacher that a path names.
FindTeacher = Callable[[Path], Teacher]


def find_in_run(path: Path) -> Teacher:
    """The teacher that a run directory's newest checkpoint is, or one of its checkpoints.

    Raises:
        UserError: there is no run or no checkpoint, or it was made in the middle of a stage that
            cuts or rounds.
    """
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdigit()
    directory = path.parent.parent if is_checkpoint else path
    run, checkpoints = read_run(directory), Checkpoints(directory)
    step = ordinary_step(run, directory, int(path.name) if is_checkpoint else None)
    return Teacher(
        model=run.model_at(step)[0],
        tokenizer=read_tokenizer(directory),
        identity=lambda: files_identity(directory / "checkpoints" / str(step)),
        read=lambda params: checkpoints.restore_params(step, params),
    )


def files_identity(folder: Path) -> str:
    """A hash of the names, sizes and times of all files below a folder; of a copy from a URL, of
    what tells its version there.
    """
    if (folder / FETCHED).exists():
        version = read_json(folder / FETCHED).get("identity")
        return hashlib.sha256(json.dumps(version).encode()).hexdigest()
    found = [
        (str(path.relative_to(folder)), path.stat())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    listing = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def teachers_of(
    stages: Mapping[str, ResolvedStage], directory: Path, find: FindTeacher
) -> dict[str, Teacher]:
    """The teacher of each stage that has one. A teacher that is an earlier stage need not be
    trained yet.

    Args:
        stages: all stages of a run by name.
        directory: the run's folder.
        find: for teachers that are no stage.

    Raises:
        UserError: there is no such teacher, it has another vocabulary, or the stage's mesh does not
            divide it.
    """
    found = {}
    for name, resolved in stages.items():
        run, stage = resolved.run, resolved.stage
        if stage.teacher is None:
            continue
        field = f"stages.{name}.teacher={stage.teacher!r}"
        if stage.teacher in run.stages:
            teacher = _earlier_stage(run, directory, stage.teacher)
        else:
            path = fetched(place(stage.teacher, f"stages.{name}.teacher"))
            try:
                teacher = find(path)
            except UserError as error:
                raise UserError(f"{field} cannot teach: {error}") from None
        if teacher.model.vocab_size != run.model.vocab_size:
            raise UserError(
                f"{field} has a vocabulary of {teacher.model.vocab_size}, not model.vocab_size="
                f"{run.model.vocab_size}; set model.vocab_size to {teacher.model.vocab_size}, or "
                f"name another teacher"
            )
        if stage.distillation.kept > run.model.vocab_size:
            raise UserError(
                f"stages.{name}.distillation.top_k={stage.distillation.top_k} is more than the "
                f"vocabulary of {run.model.vocab_size}; set it to at most {run.model.vocab_size}"
            )
        specs = walk(decoder.param_specs(teacher.model))
        parameters = {path: (spec.axes, spec.shape, spec.role) for path, spec in specs}
        try:
            check(run, name, teacher.model, resolved.execution, parameters)
        except UserError as error:
            raise UserError(f"{field} does not fit the stage's mesh: {error}") from None
        found[name] = teacher
    return found


def with_teachers(
    stages: Mapping[str, ResolvedStage], teachers: Mapping[str, Teacher]
) -> dict[str, ResolvedStage]:
    """The stages with the models of their teachers."""
    return {
        name: stage.with_teacher(teachers[name].model) if name in teachers else stage
        for name, stage in stages.items()
    }


def check_tokenizers(run: Run, teachers: Mapping[str, Teacher], tokenizer: Tokenizer) -> None:
    """Refuses teachers that read other tokens.

    Raises:
        UserError: naming the stage and its teacher.
    """
    for name, teacher in teachers.items():
        if teacher.tokenizer is not None and teacher.tokenizer.hash != tokenizer.hash:
            path = str(run.stages[name].teacher)
            own = f"{path.rstrip('/')}/tokenizer.json"
            raise UserError(
                f"stages.{name}.teacher={path!r} has another tokenizer than the run; set "
                f"data.tokenizer to that of the "
                f"teacher, as {own!r}, in a new run directory"
            )


def _earlier_stage(run: Run, directory: Path, name: str) -> Teacher:
    step = run.last_steps[name]
    return Teacher(
        model=run.models()[name].left,
        tokenizer=None,
        identity=lambda: files_identity(directory / "checkpoints" / str(step)),
        read=lambda params: Checkpoints(directory).restore_params(step, params),
    )


def cached_labels(
    resolved: ResolvedStage,
    teacher: Teacher,
    prepared: Prepared,
    log: Callable[[str], None],
    proceed: Callable[[], None],
) -> dict[str, TeacherLabels]:
    """A teacher's labels of the text of each source that a stage draws from. They are made in one
    pass over each source that has none in the cache.

    Args:
        resolved: the stage.
        teacher: that of the stage.
        prepared: the text.
        log: takes lines of progress.
        proceed: called before each batch; what it raises ends the pass, of which complete parts
            stay.

    Raises:
        UserError: cached labels are corrupt, in use, or cannot be written.
    """
    name, stage = resolved.name, resolved.stage
    identity = {
        "teacher": teacher.identity(),
        "model": teacher.model.model_dump(mode="json"),
        "tokenizer": prepared.tokenizer.hash,
        "sequence_length": stage.sequence_length,
        "compute": resolved.execution.precision.compute,
        "k": stage.distillation.kept,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    folders = {
        source: shards.directory.with_name(f"{shards.directory.name}.teacher-{key}")
        for source, shards in prepared.train.items()
        if stage.mixture.get(source)
    }
    # Asked of the main process, so that all go the same way.
    missing = [source for source, folder in folders.items() if not folder.exists()]
    if missing:
        label = _labeller(resolved, teacher, proceed)
        for source in missing:
            log(f"stage {name}: the teacher labels {source}")
            labelling = Labelling(
                sequence_length=stage.sequence_length,
                k=stage.distillation.kept,
                vocab_size=teacher.model.vocab_size,
                identity=identity,
                batch_size=stage.batch_size // stage.accumulation_steps,
                label=label,
            )
            writer = Writer(
                log=log,
                writes=jax.process_index() == 0,
                first_part=functools.partial(
                    main_first, f"labels of {source} for {name} were begun"
                ),
            )
            build_teacher_labels(folders[source], prepared.train[source], labelling, writer)
    return main_first(
        f"labels for {name} were made",
        lambda: {
            source: TeacherLabels.open(folder, identity, prepared.verified_for)
            for source, folder in folders.items()
        },
    )


def _labeller(
    resolved: ResolvedStage, teacher: Teacher, proceed: Callable[[], None]
) -> Callable[[Batch], tuple[np.ndarray, np.ndarray]]:
    """A function that gives a batch's top-k tokens and their log-probabilities, [B, T, k], in every
    process.
    """
    stage, layout, own = resolved.stage, resolved.layout, resolved.layout_of(teacher.model)
    params = teacher.read(abstract_params(own))

    def local(params: Tree, batch: dict[str, Any]) -> tuple[Any, Any]:
        inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
        hidden = decoder.forward(params, inputs, teacher.model, layout.execution.forward_only)
        found = top_k_labels(
            hidden, decoder.head_matrix(params), stage.distillation.kept, layout.sizes
        )
        return found.ids, found.log_probs

    program = jax.jit(own.tokenwise(local), out_shardings=layout.everywhere())
    back = np.argsort(zigzag(stage.sequence_length, layout.sizes.context))

    def label(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        proceed()
        sequences = len(batch["inputs"])
        with layout.compiling():
            placed = layout.of_step.place(batch, range(sequences), sequences)
            ids, log_probs = program(params, placed)
        return np.asarray(ids)[:, back], np.asarray(log_probs)[:, back]

    return label
