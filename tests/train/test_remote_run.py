"""A run directory at a URL: copied there, gone on with from there, and never half of one."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from braeburn import remote
from braeburn.config import Checkpoint, ModelConfig, Run, override, read_run
from braeburn.errors import UserError
from braeburn.layers.spec import abstract
from braeburn.models import decoder
from braeburn.remote import RemoteFolder
from braeburn.train import lease, remote_run
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.directory import RunDirectory
from braeburn.train.loop import train
from braeburn.train.remote_run import RemoteRun, check_machines, kept, working_folder
from support import braeburn, contents, damage, empty_bucket, events, rows

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty file system, on a machine that has met none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 1"))
    monkeypatch.setattr(remote_run, "POLL_SECONDS", 0.01)
    with empty_bucket() as filesystem:
        yield filesystem


@pytest.fixture
def short(tiny: Run, shared: Path) -> Run:
    """Six steps with checkpoints at 2, 4 and 6, of which the last two stay; its text is shared."""
    return override(
        tiny.model_copy(update={"stages": {"core": tiny.stages["core"]}}),
        {
            "checkpoint.every_steps": 2,
            "evaluation.tokens": 256,
            "data.cache": str(shared / "cache of remote runs"),
        },
    )


@pytest.fixture(scope="session")
def at(shared: Path) -> Callable[[Run, int], Path]:
    """Gives the folder of a run, trained on this disk for some steps."""
    trained: dict[int, Path] = {}

    def found(run: Run, steps: int) -> Path:
        if steps not in trained:
            trained[steps] = shared / f"local run of {steps}"
            train(run, trained[steps], stop_after_steps=steps)
        return trained[steps]

    return found


def folder() -> RemoteFolder:
    return RemoteFolder(URL, "--out")


def there(path: str = "") -> set[str]:
    return {name for name in folder().list() if name.startswith(path)}


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(directory)]


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


def fetched(tmp_path: Path) -> Path:
    """All that is at the URL, as files."""
    target = tmp_path / "fetched"
    shutil.rmtree(target, ignore_errors=True)
    list(folder().fetch_all(folder().list(), target))
    return target


def same_weights(left: Path, right: Path, step: int) -> bool:
    """Whether two run directories hold the same weights after a step, bit for bit."""
    specs = decoder.param_specs(read_run(left).model)
    one, other = (Checkpoints(each).restore_params(step, abstract(specs)) for each in (left, right))
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def test_a_run_goes_on_from_its_url_on_another_machine(
    short: Run, at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = at(short, 6)
    assert train(short, folder(), stop_after_steps=3).step == 3
    assert {name for name in there() if name.startswith(".")} == set()
    assert remote_run.steps_of(there()) == [2, 3]
    on_another_machine(monkeypatch, tmp_path, "machine 2")
    outcome = train(short, folder())
    assert outcome.finished
    assert remote_run.steps_of(there()) == [4, 6]
    copy = fetched(tmp_path)
    assert losses(copy) == losses(local)
    assert [event["step"] for event in events(copy, "resume")] == [3]
    mine = contents(working_folder(folder()))
    assert contents(copy) == {
        name: value for name, value in mine.items() if not name.startswith(".")
    }
    assert Checkpoints(copy).fault(6) is None
    assert same_weights(copy, local, 6)
    # On a third machine it is finished, too, and nothing is made again.
    on_another_machine(monkeypatch, tmp_path, "machine 3")
    before = contents(copy)
    assert train(short, folder()).finished
    after = contents(fetched(tmp_path))
    same = {name for name in before if name.startswith(("checkpoints/", "metrics"))}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


@pytest.mark.deep
def test_an_older_copy_follows_and_a_newer_one_leads(
    short: Run, at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short, folder(), stop_after_steps=2)
    on_another_machine(monkeypatch, tmp_path, "machine 2")
    train(short, folder(), stop_after_steps=2)
    assert remote_run.steps_of(there()) == [2, 4]
    newer = fetched(tmp_path).rename(tmp_path / "newer")
    # The first machine has step 2 alone.
    on_another_machine(monkeypatch, tmp_path, "machine 1")
    train(short, folder(), stop_after_steps=1)
    first = working_folder(folder())
    assert [event["step"] for event in events(first, "resume")] == [2, 4]
    assert losses(first)[:4] == losses(newer)
    # What it was killed before it could copy is gone on with.
    for name in there("checkpoints/5/"):
        folder().delete([name])
    for name, path in (("metrics.jsonl", newer), ("events.jsonl", newer)):
        folder().put(path / name, name)
    train(short, folder())
    assert [event["step"] for event in events(first, "resume")] == [2, 4, 5]
    assert losses(fetched(tmp_path)) == losses(at(short, 6))


@pytest.mark.deep
def test_half_a_checkpoint_is_none(
    short: Run, at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short, folder(), stop_after_steps=4)
    folder().delete(["checkpoints/4/record.json"])
    on_another_machine(monkeypatch, tmp_path, "machine 2")
    train(short, folder())
    assert [event["step"] for event in events(working_folder(folder()), "resume")] == [2]
    assert losses(fetched(tmp_path)) == losses(at(short, 6))
    assert {name.split("/")[1] for name in there("checkpoints/")} == {"4", "6"}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.deep
def test_whenever_copying_ends_what_is_there_is_whole(
    finished: Path, tiny: Run, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after every third number of changes to the URL, where a checkpoint replaces one."""
    monkeypatch.setattr(remote, "TRANSFERS", 1)
    run = override(tiny, {"checkpoint.keep_last": 1})
    left: int | None = None
    for name in ("put_file", "pipe_file", "rm_file"):
        real = getattr(type(bucket), name)

        def counted(self: Any, *arguments: Any, real: Any = real, **options: Any) -> Any:
            nonlocal left
            if left is not None and not str(arguments[-1]).endswith(lease.LEASE):
                if left == 0:
                    raise Killed
                left -= 1
            return real(self, *arguments, **options)

        monkeypatch.setattr(type(bucket), name, counted)

    def copy() -> None:
        own = RemoteRun(folder(), print)
        own.claim(run)
        try:
            with own.copying(run):
                pass
        finally:
            own._lease._released.set()  # as the end of the process does, without more

    shutil.copytree(finished, working_folder(folder()))
    older = working_folder(folder()) / "checkpoints" / "14"
    newer = older.rename(tmp_path / "14")
    copy()
    begun = dict(bucket.store)
    shutil.copytree(newer, older)
    wholes = []
    for number in itertools.count(0, 3):
        bucket.store.clear()
        bucket.store.update(begun)
        left = number
        try:
            copy()
            break
        except Killed:
            pass
        left = None
        there_now = fetched(tmp_path)
        wholes.append(remote_run.steps_of(contents(there_now)))
        for step in wholes[-1]:
            assert Checkpoints(there_now).fault(step) is None
        assert max(row["step"] for row in rows(there_now)) >= wholes[-1][-1]
    # The older one stays until the newer counts; a kill between the two is not always met.
    seen = [steps for steps, _ in itertools.groupby(wholes)]
    assert seen in ([[10], [10, 14], [14]], [[10], [14]])
    assert len(wholes) > 20
    assert remote_run.steps_of(there()) == [14]
    assert not there("checkpoints/10/")


def test_whenever_fetching_ends_it_is_gone_on_with(
    finished: Path, tiny: Run, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended after several numbers of files on a new machine, and then done there by another."""
    monkeypatch.setattr(remote, "TRANSFERS", 1)
    list(folder().put_all(finished, [n for n in contents(finished) if not n.startswith(".")]))
    real, left = type(bucket).get_file, None

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal left
        if left is not None:
            if left == 0:
                raise Killed
            left -= 1
        real(self, *arguments, **options)

    monkeypatch.setattr(type(bucket), "get_file", counted)

    def fetch() -> None:
        directory = RunDirectory(working_folder(folder()))
        own = RemoteRun(folder(), print)
        with directory.claim():
            try:
                own.claim(tiny)
            finally:
                own.release()

    for number in (0, 1, 2, 3, 5, 9, 20):
        on_another_machine(monkeypatch, tmp_path, f"machine {number}")
        left = number
        with pytest.raises(Killed):
            fetch()
        left = None
        fetch()
        here = working_folder(folder())
        assert rows(here) == rows(finished)
        assert remote_run.steps_of(contents(here)) == [14]
        assert Checkpoints(here).fault(14) is None
        assert read_run(here) == read_run(finished)
        assert (here / "tokenizer.json").exists()


@pytest.mark.deep
def test_a_damaged_checkpoint_there_is_passed_over(
    short: Run, at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short, folder(), stop_after_steps=4)
    name = max(there("checkpoints/4/params/"), key=lambda name: folder().list()[name].size)
    folder().fetch(name, tmp_path / "damaged")
    damage(tmp_path / "damaged", "flip")
    folder().put(tmp_path / "damaged", name)
    on_another_machine(monkeypatch, tmp_path, "machine 2")
    train(short, folder())
    copy = fetched(tmp_path)
    assert [event["resumed"] for event in events(copy, "damage")] == [2]
    assert losses(copy) == losses(at(short, 6))
    assert Checkpoints(copy).fault(4) is None
    assert (copy / "checkpoints" / "4.damaged").is_dir()


def test_an_outage_costs_nothing_and_a_longer_one_is_told(
    short: Run, at: Any, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes while the run trains, and comes back only for the next call."""
    real = type(bucket).put_file
    is_out = False

    def failing(self: Any, source: str, target: str, **options: Any) -> None:
        nonlocal is_out
        if target.endswith("checkpoints/2/record.json"):
            is_out = True
        if is_out:
            raise ConnectionError("no route")
        real(self, source, target, **options)

    monkeypatch.setattr(type(bucket), "put_file", failing)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(remote_run, "SECONDS_AFTER_FAILURE", 0.1)
    with pytest.raises(
        UserError, match=r"--out 'memory://bucket/run' has not got all of the run, which is whole"
    ):
        train(short, folder())
    assert remote_run.steps_of(there()) == []
    assert losses(working_folder(folder())) == losses(at(short, 6))
    is_out = False
    monkeypatch.setattr(type(bucket), "put_file", real)
    assert train(short, folder()).finished
    assert remote_run.steps_of(there()) == [4, 6]
    assert losses(fetched(tmp_path)) == losses(at(short, 6))


def test_what_is_no_run_is_refused(tiny_arguments: list[str], tmp_path: Path) -> None:
    folder().write("thesis.tex", b"years of work")
    answer = braeburn("train", *tiny_arguments, "--out", URL)
    assert (
        f"--out '{URL}' holds 'thesis.tex' but no run; choose an empty or new folder"
        in answer.error
    )
    assert there() == {"thesis.tex"}
    folder().write("config.json", b'{"model_type": "llama"}')
    answer = braeburn("train", *tiny_arguments, "--out", URL)
    assert f"--out '{URL}' holds 'config.json' but no run; restore it, or choose" in answer.error
    assert there() == {"thesis.tex", "config.json"}
    assert not (working_folder(folder()) / "config.json").exists()
    folder().delete(["config.json"])
    answer = braeburn("evaluate", URL)
    assert f"DIR={URL!r} is neither a run directory nor a Hugging Face" in answer.error
    answer = braeburn("train", *tiny_arguments, "--out", "s3:/bucket/run")
    assert "--out 's3:/bucket/run' is no URL; write two slashes, as s3://bucket/run" in answer.error


@pytest.mark.deep
def test_another_run_or_none_is_not_taken_for_the_one_here(
    short: Run, tmp_path: Path, bucket: Any
) -> None:
    train(short, folder(), stop_after_steps=2)
    kept_here = working_folder(folder())
    config = json.loads(folder().read("config.json"))
    folder().write("config.json", json.dumps({**config, "identity": "another"}).encode())
    with pytest.raises(
        UserError, match=r"holds another run than its copy '.*'; delete that folder"
    ):
        try:
            train(short, folder())
        except UserError as error:
            raise UserError(str(error).replace(" on this machine", "")) from None
    bucket.store.clear()
    with pytest.raises(UserError, match=r"no longer holds the run that '.*' is a copy of; delete"):
        train(short, folder())
    shutil.rmtree(kept_here)  # as advised
    assert train(short, folder(), stop_after_steps=1).step == 1


@pytest.mark.deep
def test_an_import_is_trained_where_it_was_made(
    finished: Path, tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe names its run directory as the weights to start from, too."""
    assert braeburn("export", finished, "--out", tmp_path / "hf").code == 0
    assert braeburn("import", tmp_path / "hf", "--out", URL).code == 0
    on_another_machine(monkeypatch, tmp_path, "machine 2")
    model = ModelConfig.from_directory(URL)
    changes = [f"model={model.model_dump_json()}", f"initial_weights={URL}"]
    changes += [f"data.cache={finished.parent / 'cache of imports'}"]
    command = ["train", *tiny_arguments, *(p for change in changes for p in ("--set", change))]
    answer = braeburn(*command, "--out", URL, "--stop-after-steps", 1)
    assert answer.code == 0, answer.err
    assert remote_run.steps_of(there()) == [0, 1]
    begin = ["--set", f"initial_weights={URL}/checkpoints/0", "--out", tmp_path / "local"]
    elsewhere = braeburn(*command, *begin, "--stop-after-steps", 1)
    assert elsewhere.code == 0, elsewhere.err
    assert losses(fetched(tmp_path)) == losses(tmp_path / "local")


@pytest.mark.deep
def test_two_machines_do_not_train_in_one_run(
    short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS_TO_WAIT", 0.5)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    holder = {"token": "theirs", "host": "elsewhere", "process": 7, "numbered_by": ["elsewhere"]}
    renewals = itertools.count()
    real = RemoteFolder.read

    def renewed(self: RemoteFolder, name: str, *arguments: Any) -> bytes:
        if name == lease.LEASE:
            return json.dumps({**holder, "renewals": next(renewals)}).encode()
        return real(self, name, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "read", renewed)
        with pytest.raises(UserError, match=r"is in use by another process on 'elsewhere'"):
            train(short, folder())
    assert there() == set()
    # One that is renewed no more is taken over, with the run that was begun.
    folder().write(lease.LEASE, json.dumps(holder).encode())
    assert train(short, folder(), stop_after_steps=1).step == 1
    assert lease.LEASE not in there()


def test_a_run_that_was_taken_over_is_left_alone(short: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_RENEWALS", 0.01)
    own = lease.Lease(folder())
    own.take(print, lambda: None)
    folder().write(lease.LEASE, json.dumps({"token": "theirs", "host": "elsewhere"}).encode())
    own._thread.join(timeout=10)
    with pytest.raises(UserError, match=r"was taken over by another process on 'elsewhere'"):
        own.check()
    own.release()
    assert json.loads(folder().read(lease.LEASE))["token"] == "theirs"


@given(
    steps=st.sets(st.integers(0, 60)),
    options=st.builds(
        Checkpoint, keep_last=st.integers(1, 4), keep_every_steps=st.none() | st.integers(1, 20)
    ),
    lasting=st.sets(st.integers(0, 60), max_size=3),
)
def test_at_the_url_stays_what_stays_on_the_disk(
    steps: set[int], options: Checkpoint, lasting: set[int]
) -> None:
    rules = [policies.LatestN(options.keep_last), policies.CustomSteps(list(lasting))]
    if options.keep_every_steps:
        rules.append(policies.EveryNSteps(options.keep_every_steps))
    infos = [SimpleNamespace(step=step, metrics=None) for step in sorted(steps)]
    stay = policies.AnyPreservationPolicy(rules).should_preserve(
        infos, context=policies.PreservationContext()
    )
    assert kept(steps, options, lasting) == {
        info.step for info, stays in zip(infos, stay, strict=True) if stays
    }


def test_several_machines_need_a_folder_that_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_machines(folder(), several=False)
    with pytest.raises(UserError, match=r"cannot be written by processes on several machines"):
        check_machines(folder(), several=True)
    monkeypatch.setenv("BRAEBURN_RUNS", str(tmp_path / "mounted"))  # as advised
    check_machines(folder(), several=True)
    assert working_folder(folder()).parent == tmp_path / "mounted"
