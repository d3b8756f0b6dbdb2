"""A larger model is trained, pruned, distilled from what it was, and rounded: as one run, whatever
interrupts or splits it.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_resume import begin, curve, stage_ends

from braeburn.config import (
    Distillation,
    Execution,
    MeshConfig,
    Pruning,
    Quantization,
    Run,
    Schedule,
    Stage,
    override,
    validate,
)
from braeburn.data.prepare import prepare
from braeburn.data.tokenizer import train as train_tokenizer
from braeburn.interop import huggingface
from braeburn.layers.spec import abstract, walk
from braeburn.models import decoder
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.loop import train
from braeburn.train.resolved import resolve_stage, trained_specs
from braeburn.train.stage_run import batches_of, calibration
from braeburn.train.stages import abstract_state
from braeburn.train.state import TrainState
from braeburn.train.trained import load
from braeburn.train.transitions import enter, leaving
from braeburn.transforms.pruning import MASKS
from braeburn.verify.following import followed_curve
from support import braeburn, events, rows

# Steps made when each stage ends; of the pruning stage's five, the last is made with hard masks.
LARGER, PRUNED, DISTILLED, ROUNDED = 3, 8, 11, 14
KEEP = 80
FIGURES = ("loss", "grad_norm")


def stage(run: Run, steps: int, **changes: Any) -> Stage:
    """The run's first stage for some steps, changed."""
    fields = {"tokens": steps * 1024, "schedule": Schedule(warmup_steps=1), **changes}
    return next(iter(run.stages.values())).model_copy(update=fields)


def with_stages(run: Run, stages: dict[str, Stage], fields: dict[str, Any] | None = None) -> Run:
    return override(validate(run.model_copy(update={"stages": stages}).model_dump()), fields or {})


@pytest.fixture(scope="module")
def chain(tiny: Run, corpus: Path) -> Run:
    """The chain, in float32, with a checkpoint of every step, on little text: the teacher labels
    all of it.
    """
    stages = {
        "larger": stage(tiny, LARGER),
        "pruned": stage(
            tiny, PRUNED - LARGER, pruning=Pruning(keep={"ffn": KEEP}, calibration_tokens=2048)
        ),
        "distilled": stage(
            tiny, DISTILLED - PRUNED, teacher="larger", distillation=Distillation(cached=True)
        ),
        "rounded": stage(tiny, ROUNDED - DISTILLED, quantization=Quantization(kind="int4")),
    }
    few = [f"{corpus}/[a-f]*.py"]
    fields = {f"data.sources.{name}.paths": few for name in ("code", "prose", "long")} | {
        "precision.compute": "float32",
        "checkpoint.every_steps": 1,
        "checkpoint.keep_last": ROUNDED,
    }
    return with_stages(tiny, stages, fields)


@pytest.fixture(scope="module")
def whole(chain: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the chain, trained without interruption; not to be changed."""
    directory = tmp_path_factory.mktemp("chain") / "whole"
    assert train(chain, directory).finished
    return directory


@pytest.fixture
def as_of(whole: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes a copy of the chain's directory as it was when its newest checkpoint was that of a
    step.
    """

    def copy(step: int) -> Path:
        directory = shutil.copytree(whole, tmp_path / f"as of {step}")
        for folder in (directory / "checkpoints").iterdir():
            if int(folder.name) > step:
                shutil.rmtree(folder)
        return directory

    return copy


def restored(directory: Path, run: Run, name: str, step: int) -> TrainState:
    """The state saved in the middle of a stage, on the run's mesh."""
    resolved = resolve_stage(run, name)
    return Checkpoints(directory).restore(step, abstract_state(resolved), resolved.optimizer.init)


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one: Any, other: Any) -> None:
    for left, right in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_each_stage_leaves(whole: Path, chain: Run) -> None:
    assert [row["step"] for row in rows(whole)] == list(range(1, ROUNDED + 1))
    assert [event["step"] for event in events(whole, "stage_end")] == [
        LARGER,
        PRUNED,
        DISTILLED,
        ROUNDED,
    ]
    read = Checkpoints(whole).restore_params
    for step, width in ((LARGER, 160), (PRUNED, KEEP), (ROUNDED, KEEP)):
        model, _ = chain.model_at(step)
        assert model.ffn_dim == width
        params = read(step, abstract(decoder.param_specs(model)))
        assert params["layers"]["down"].shape == (2, width, 64) and MASKS not in params
    # Of the 32 weights in each group, 16 different values are left at most.
    groups = np.asarray(params["layers"]["query"]).transpose(0, 2, 3, 1).reshape(-1, 32)
    assert max(len(np.unique(group)) for group in groups) <= 16


@pytest.mark.deep
def test_stops_within_stages_and_between_leave_no_trace(
    whole: Path, chain: Run, tmp_path: Path
) -> None:
    run = override(chain, {"checkpoint.every_steps": 1000, "checkpoint.keep_last": 1})
    for stop in (
        LARGER - 1,
        LARGER,
        LARGER + 2,
        PRUNED - 1,
        PRUNED,
        PRUNED + 1,
        DISTILLED,
        DISTILLED + 2,
    ):
        done = rows(tmp_path)[-1]["step"] if (tmp_path / "metrics.jsonl").exists() else 0
        assert train(run, tmp_path, stop_after_steps=stop - done).step == stop
        assert curve(tmp_path) == curve(whole)[:stop]
        # The teacher's stage left a checkpoint that stays, whatever is kept of the others.
        kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
        assert kept == {stop} | ({LARGER} if stop > LARGER else set())
    assert train(run, tmp_path).finished
    assert curve(tmp_path) == curve(whole)
    assert stage_ends(tmp_path) == stage_ends(whole)
    model, _ = chain.model_at(ROUNDED)
    shape = abstract(decoder.param_specs(model))
    same(*(Checkpoints(folder).restore_params(ROUNDED, shape) for folder in (tmp_path, whole)))


@pytest.mark.deep
def test_a_kill_while_pruning_loses_nothing(whole: Path, chain: Run, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.py", tmp_path / "out"
    recipe.write_text(
        f"from braeburn.config import validate\n\ndef run():\n    return "
        f"validate({chain.model_dump()!r})\n"
    )
    process = begin([f"{recipe}:run"], out)
    deadline = time.monotonic() + 200
    while (
        process.poll() is None
        and len((out / "metrics.jsonl").read_text().splitlines()) < PRUNED - 1
    ):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert train(chain, out).finished
    assert curve(out) == curve(whole)
    assert stage_ends(out)[-1] == stage_ends(whole)[-1]


@pytest.mark.deep
@pytest.mark.parametrize("target", ["label", "top_k"])
def test_cached_and_online_teachers_give_the_same_losses(
    whole: Path, as_of: Callable[[int], Path], chain: Run, target: str
) -> None:
    curves = []
    on_disk = str(whole / "checkpoints" / str(LARGER))
    for cached, teacher in ((True, "larger"), (False, "larger"), (False, on_disk)):
        fields = {
            "stages.distilled.distillation.target": target,
            "stages.distilled.distillation.cached": cached,
        }
        fields["stages.distilled.teacher"] = teacher
        directory = as_of(PRUNED)
        train(override(chain, fields), directory, stop_after_steps=DISTILLED - PRUNED)
        curves.append([row["loss"] for row in rows(directory)[PRUNED:]])
        shutil.rmtree(directory)
    assert len(curves[0]) == DISTILLED - PRUNED
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert curves[1] == curves[2]  # the same weights, found elsewhere


def test_after_pruning_it_is_an_ordinary_smaller_model(
    as_of: Callable[[int], Path], corpus: Path, tmp_path: Path
) -> None:
    directory = as_of(PRUNED)
    measured = braeburn("evaluate", directory, "--data", corpus / "abc.py", "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["step"] == PRUNED
    written = braeburn("generate", directory, "--prompt", "import", "--max-new-tokens", 4)
    assert written.code == 0, written.err

    exported = tmp_path / "exported"
    assert braeburn("export", directory, "--format", "hf", "--out", exported).code == 0
    trained = load(directory)
    assert trained.params["layers"]["gate"].shape == (2, 64, KEEP)
    tokens = np.asarray([trained.tokenizer.encode("def encode(self, text):\n    return text")])
    inputs = (tokens, np.arange(tokens.shape[1])[None], np.zeros_like(tokens))
    execution = Execution(precision=trained.run.precision)
    hidden = decoder.forward(trained.params, inputs, trained.model, execution)
    ours = hidden @ decoder.head_matrix(trained.params).T
    model, params, _ = huggingface.read(exported)
    assert model.ffn_dim == KEEP
    params = jax.tree.map(jax.numpy.asarray, params)
    hidden = decoder.forward(params, inputs, model, execution)
    theirs = hidden @ decoder.head_matrix(params).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_the_middle_of_pruning_the_masked_model_is_loaded(
    as_of: Callable[[int], Path], chain: Run
) -> None:
    step = LARGER + 2
    directory = as_of(step)
    raw = Checkpoints(directory).restore_params(step, abstract(trained_specs(chain, "pruned")))
    params = load(directory).params
    assert params.keys() == raw.keys() - {MASKS}
    ratio = np.asarray(params["layers"]["down"]) / np.asarray(raw["layers"]["down"])
    masks = ratio.mean(axis=-1)
    np.testing.assert_allclose(ratio, np.broadcast_to(masks[..., None], ratio.shape), rtol=1e-5)
    np.testing.assert_allclose(masks.sum(axis=-1), [KEEP, KEEP], rtol=1e-5)
    assert 0 <= masks.min() < 0.5 < masks.max() <= 1 + 1e-6
    same(params["layers"]["gate"], raw["layers"]["gate"])


@pytest.mark.parametrize(
    "changes",
    [{}, {"mesh.fsdp": 2, "mesh.tensor": 2}, {"mesh.fsdp": 2, "offload.optimizer": True}],
    ids=["one device", "fsdp 2 x tensor 2", "fsdp 2, offloaded"],
)
def test_what_is_cut_is_cut_from_the_optimizer_too(
    whole: Path, chain: Run, changes: dict[str, Any]
) -> None:
    run = override(chain, {"mesh.fsdp": 1} | changes)
    state = restored(whole, run, "pruned", PRUNED - 1)
    scores = np.asarray(state.params[MASKS]["ffn"])
    units = np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :KEEP], axis=-1)
    before = {path: np.asarray(leaf) for path, leaf in paths(state).items()}
    leave = leaving(resolve_stage(run, "pruned"))
    with compilations() as compiled:
        after = leave(state)
    assert not compiled, "a stop at the stage's last step waits for the compiler"
    for part in (after, state):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(part.optimizer)}
        assert ("pinned_host" in kinds) == run.offload.optimizer
    found = paths(after)
    assert found.keys() == {path for path in before if MASKS not in path}
    cut = 0
    for path, leaf in found.items():
        expected = before[path]
        if path.rpartition("/")[2] in ("gate", "up", "down") and expected.ndim == 3:
            dim = 1 if path.endswith("down") else 2
            chosen = units[:, :, None] if dim == 1 else units[:, None, :]
            expected, cut = np.take_along_axis(expected, chosen, axis=dim), cut + 1
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=path)
    assert cut == 3 * 3  # weights and two moments of each


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of each program that is compiled within, or read from a cache of them."""
    seconds = list[float]()

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def paths(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


ALL_AXES = {"ffn": KEEP, "heads": 2, "embed": 48}


def entered(
    whole: Path, chain: Run, pruning: Pruning, mesh: MeshConfig
) -> tuple[TrainState, TrainState]:
    """The state that the pruning stage finds, and the one that it trains, on a mesh."""
    run = chain.model_copy(
        update={"mesh": mesh, "stages": chain.stages | {"pruned": stage(chain, 5, pruning=pruning)}}
    )
    resolved = resolve_stage(run, "pruned")
    found = resolved.layout_of(chain.model)
    shape = abstract_state(resolved, found)
    state = Checkpoints(whole).restore(LARGER, shape, resolved.optimizer_of(found.specs).init)
    batches = batches_of(resolved, prepare(run, lambda line: None).train)
    first = calibration(resolved.stage, batches, resolved.layout)
    return state, enter(resolved, state, first)


@pytest.mark.parametrize("method", ["activation", "magnitude", "random"])
def test_other_methods_cut_at_the_start(whole: Path, chain: Run, method: Any) -> None:
    pruning = Pruning(keep=ALL_AXES, method=method, calibration_tokens=2048)
    _, one = entered(whole, chain, pruning, MeshConfig(fsdp=1))
    _, split = entered(whole, chain, pruning, MeshConfig(fsdp=2, tensor=2))
    same(one, split)
    shapes = {path: leaf.shape for path, leaf in walk(one.params)}
    assert shapes["layers/down"] == (2, KEEP, 48) and shapes["embedding"] == (
        chain.model.vocab_size,
        48,
    )
    assert shapes["layers/query"] == (2, 48, 2, 16) and shapes["layers/key"] == (2, 48, 2, 16)
    moments = [
        leaf.shape for path, leaf in paths(one.optimizer).items() if path.endswith("layers/down")
    ]
    assert moments == [(2, KEEP, 48)] * 2


def test_magnitude_keeps_the_largest(whole: Path, chain: Run) -> None:
    pruning = Pruning(keep={"ffn": KEEP}, method="magnitude")
    before, after = entered(whole, chain, pruning, MeshConfig(fsdp=1))
    gate, up, down = (
        np.asarray(before.params["layers"][name], np.float64) for name in ("gate", "up", "down")
    )
    norms = (gate**2).sum(axis=1) + (up**2).sum(axis=1) + (down**2).sum(axis=2)
    units = np.sort(np.argsort(-norms, axis=-1)[:, :KEEP], axis=-1)
    expected = np.take_along_axis(
        np.asarray(before.params["layers"]["down"]), units[..., None], axis=1
    )
    np.testing.assert_array_equal(np.asarray(after.params["layers"]["down"]), expected)


@pytest.mark.parametrize(
    "method", [pytest.param("soft_top_k", marks=pytest.mark.deep), "activation"]
)
def test_heads_and_width_are_pruned_in_a_run(
    as_of: Callable[[int], Path], chain: Run, method: str
) -> None:
    directory = as_of(LARGER)
    pruning = {"keep": ALL_AXES, "method": method, "calibration_tokens": 2048}
    run = override(chain, {"stages.pruned.pruning": pruning})
    for steps in (2, PRUNED - LARGER - 2):
        train(run, directory, stop_after_steps=steps)
    (*_, end) = events(directory, "stage_end")
    assert end["step"] == PRUNED and end["stage"] == "pruned"
    trained = load(directory)
    assert (trained.model.ffn_dim, trained.model.num_heads, trained.model.d_model) == (KEEP, 2, 48)
    losses = [row["loss"] for row in rows(directory)]
    assert (
        losses[-1] < losses[LARGER - 1] + 1
    )  # what is left has not forgotten all: without training it knows nothing
    measured = [result["loss"] for result in end["held_out"].values()]
    assert len(measured) == 2 and np.isfinite(measured).all()


@pytest.mark.deep
def test_the_chain_on_a_mesh_is_that_of_one_device(chain: Run, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"optimizer.kind": "adamw"}
    fields |= {f"stages.{name}.learning_rate": 1e-3 for name in chain.stages}
    one = override(chain, fields)
    train(one, tmp_path / "one")
    # Another mesh for the smaller model: by way of the checkpoint just made. Being equal but for
    # rounding errors, the runs would part where a label of two that are as likely, or a weight
    # half-way between two levels, goes by them.
    split = override(one, {"mesh": {"fsdp": 2, "tensor": 2}, "stages.distilled.mesh": {"fsdp": 4}})
    train(split, tmp_path / "split", stop_after_steps=PRUNED)
    expected = [[row[figure] for row in rows(tmp_path / "one")] for figure in FIGURES]
    own = [[row[figure] for row in rows(tmp_path / "split")] for figure in FIGURES]
    np.testing.assert_allclose(own, [values[:PRUNED] for values in expected], rtol=1e-5)
    found = dict(followed_curve(split, tmp_path / "one", PRUNED, FIGURES))
    for figure, values in zip(FIGURES, expected, strict=True):
        steps = [found.pop(f"step {step + 1} {figure}") for step in range(ROUNDED)]
        np.testing.assert_allclose(steps, values, rtol=1e-5)
    ends = {
        f"held-out {source} after step {end['step']}": values["loss"]
        for end in stage_ends(tmp_path / "one")
        for source, values in end["held_out"].items()
    }
    assert found == pytest.approx(ends, rel=1e-5) and len(found) == 8


def test_teachers_that_cannot_teach(
    whole: Path, as_of: Callable[[int], Path], tiny_arguments: list[str], tmp_path: Path
) -> None:
    """One sentence each, and nothing written."""

    def refused(teacher: Path, *more: str) -> str:
        out = tmp_path / "refused"
        sets = (f"stages.continued.teacher={teacher}", *more)
        answer = braeburn(
            "train", *tiny_arguments, *(part for s in sets for part in ("--set", s)), "--out", out
        )
        assert not list(out.glob("[!.]*"))
        return answer.error

    nowhere = tmp_path / "nowhere"
    assert f"stages.continued.teacher={str(nowhere)!r} cannot teach: " in refused(nowhere)
    assert "is not a run directory" in refused(nowhere)
    assert "holds no complete checkpoint" in refused(whole / "checkpoints" / "99")
    middle = as_of(LARGER + 2)
    assert (
        f"checkpoint {LARGER + 2} of {str(middle)!r} is from the middle of the stage 'pruned'"
        in refused(middle)
    )
    sentence = refused(whole, "model.vocab_size=384")
    assert (
        "has a vocabulary of 512, not model.vocab_size=384; set model.vocab_size to 512" in sentence
    )
    other = tmp_path / "other.json"
    train_tokenizer(["some words and other words, some of them again"], 280).save(other)
    assert "has another tokenizer than the run; set data.tokenizer to" in refused(
        whole, f"data.tokenizer={other}"
    )
