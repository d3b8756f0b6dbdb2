"""A source read in parts is the source read as a whole, whatever the parts."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braeburn.config import Run, Source, override
from braeburn.data import corpus, division, prepare, tokenising, workers
from braeburn.data.corpus import Document, Report, documents, files, read
from braeburn.data.division import Part, divide
from braeburn.data.joining import copy_shard, plan_joining
from braeburn.data.manifest import TokenManifest, read_manifest
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.tokenizer import train as train_tokenizer
from braeburn.data.workers import Progress, Work, in_processes, in_threads
from braeburn.disk import matching
from braeburn.errors import UserError
from support import PROGRAM, braeburn, contents, damage, on_json_lines, token_shards

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 9, 300)


def text(i: int) -> str:
    """A text of a few words, another for each number."""
    return " ".join(random.Random(i).choices(WORDS, k=3 + i % 17)) + f" {i}"


def in_ranges(source: Source, edges: list[int]) -> list[str]:
    """The texts of a source's one file, read in ranges with these edges."""
    (file,) = files("s", source)
    stops = [*sorted(edges), None]
    starts = [0, *sorted(edges)]
    return [
        document.text
        for start, stop in zip(starts, stops, strict=True)
        for document in read("s", source, Part((file,), start, stop), lambda name: True, Report())
    ]


@given(
    texts=st.lists(st.text(max_size=12), max_size=12),
    blanks=st.lists(st.integers(0, 12), max_size=3),
    ends=st.booleans(),
    edges=st.lists(st.integers(1, 400), max_size=4),
)
def test_json_lines_in_ranges_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    blanks: list[int],
    ends: bool,
    edges: list[int],
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": line}, ensure_ascii=len(line) % 2 == 0) for line in texts]
    for at in blanks:
        lines.insert(at, "")
    path.write_text("\n".join(lines) + "\n" * ends)
    source = Source(paths=(str(path),))
    whole = [d.text for d in documents("s", source, held_out=True, fraction=1.0)]
    assert in_ranges(source, edges) == whole


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_parquet_in_ranges_is_that_of_the_file(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.parquet"
    texts = [text(i) for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=23)
    size = path.stat().st_size
    edges = [size * i // count for i in range(1, count)]
    assert in_ranges(Source(paths=(str(path),)), edges) == texts


def test_small_files_go_together_and_large_ones_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "PART_BYTES", 1000)
    sizes = {"a.jsonl": 400, "b.txt": 700, "c.jsonl": 3400, "d.txt": 5000, "e.jsonl.gz": 4000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    source = Source(paths=(str(tmp_path),))
    parts = divide(source, files("s", source))
    assert [(len(part.files), part.start, part.stop) for part in parts] == [
        (2, 0, None),
        (1, 0, 1133),
        (1, 1133, 2266),
        (1, 2266, None),
        (1, 0, None),
        (1, 0, None),
    ]
    assert [part.size for part in parts] == [1100, 1133, 1133, 1134, 5000, 4000]


def test_a_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text(i)}) for i in range(100)]
    path.write_text("\n".join([*lines[:70], "{", *lines[70:]]))
    source = Source(paths=(str(path),))
    with pytest.raises(UserError) as whole:
        list(documents("s", source))
    assert "a.jsonl' line 71 is not JSON" in str(whole.value)
    size = path.stat().st_size
    for edges in ([size // 2], [size // 3, size // 2], list(range(100, size, 100))):
        with pytest.raises(UserError) as divided:
            in_ranges(source, edges)
        assert str(divided.value) == str(whole.value)


@pytest.fixture
def run(tiny: Run, tmp_path: Path) -> Run:
    """A run on JSON lines of three files, in a cache of its own."""
    for number, name in enumerate(("a", "b", "c")):
        rows = (json.dumps({"text": text(1000 * number + i)}) + "\n" for i in range(600))
        (tmp_path / "text" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.jsonl").write_text("".join(rows))
    return on_json_lines(tiny, tmp_path / "text", tmp_path / "cache", held_out=0.1)


def elsewhere(run: Run, cache: Path) -> Run:
    return override(run, {"data.cache": str(cache)})


def test_parts_in_threads_and_processes_give_the_bytes_of_the_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare.prepare(run, print)
    expected = token_shards(tmp_path / "cache")
    assert len([name for name in expected if "manifest" in name]) == 2
    monkeypatch.setattr(division, "PART_BYTES", 9000)
    divided = prepare.prepare(elsewhere(run, tmp_path / "threads"), print)
    assert token_shards(tmp_path / "threads") == expected
    monkeypatch.setattr(tokenising, "WORTH_PROCESSES_BYTES", 0)
    seen: list[Progress] = []
    work = Work(watch=seen.append, processes=2)
    prepare.prepare(elsewhere(run, tmp_path / "processes"), print, work=work)
    assert token_shards(tmp_path / "processes") == expected
    assert divided.fingerprints == whole.fingerprints
    assert all(0 <= one.done <= one.total for one in seen)
    assert seen[-1].done == seen[-1].total > 0
    # What was only needed on the way is gone.
    for cache in ("threads", "processes"):
        assert sorted(path.name for path in (tmp_path / cache / "stores").iterdir()) == sorted(
            path.name for path in (tmp_path / "cache" / "stores").iterdir()
        )


def test_a_folder_that_goes_while_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may delete it between its name and its contents."""
    for name in ("gone/train.1", "there/train.2", "there/other"):
        (tmp_path / name).mkdir(parents=True)
    real = os.scandir

    def scandir(path: str | os.PathLike[str] = ".") -> Any:
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert matching(tmp_path, "*/train*") == [tmp_path / "there" / "train.2"]


def test_several_that_prepare_at_once_help_each_other(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = prepare.prepare(run, print).tokenizer
    monkeypatch.setattr(division, "PART_BYTES", 3000)
    monkeypatch.setattr("braeburn.data.token_shards.BATCH_CHARACTERS", 500)
    together = elsewhere(run, tmp_path / "together")
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(prepare.prepare, together, print, tokenizer) for _ in range(3)]
    assert len({future.result().fingerprints["web"] for future in futures}) == 1
    assert token_shards(tmp_path / "together") == token_shards(tmp_path / "cache")


@pytest.mark.parametrize("shard_tokens", [7, 100, 1000, 10**6])
def test_joined_shards_are_those_of_one_pass(tmp_path: Path, shard_tokens: int) -> None:
    found = [Document(str(i), text(i)) for i in range(60)]
    build_token_shards(tmp_path / "whole", found, TOKENIZER, shard_tokens=shard_tokens)
    parts = []
    for number, (first, last) in enumerate([(0, 1), (1, 30), (30, 30), (30, 60)]):
        parts.append(tmp_path / f"part-{number}")
        build_token_shards(parts[-1], found[first:last], TOKENIZER, shard_tokens=50)
    manifests = [read_manifest(part / "manifest.json", TokenManifest) for part in parts]
    joining = plan_joining(tmp_path / "joined", tmp_path / "making", parts, manifests, shard_tokens)
    for copy in reversed(joining.copies):
        copy_shard(copy)
        before = {path: path.stat().st_mtime_ns for path in joining.folder.iterdir()}
        copy_shard(copy)  # which is there
        assert before == {path: path.stat().st_mtime_ns for path in joining.folder.iterdir()}
    joining.finish(TOKENIZER, shard_tokens)
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    found = [Document(str(i), text(i)) for i in range(60)]
    build_token_shards(tmp_path / "part", found, TOKENIZER)
    damage(tmp_path / "part" / "tokens-00000.bin", "flip")
    manifests = [read_manifest(tmp_path / "part" / "manifest.json", TokenManifest)]
    joining = plan_joining(
        tmp_path / "joined", tmp_path / "making", [tmp_path / "part"], manifests, 100
    )
    with pytest.raises(UserError, match=r"part/tokens-00000\.bin' does not have the checksum"):
        copy_shard(joining.copies[0])
    assert list((tmp_path / "making").iterdir()) == []


def test_a_source_that_is_all_held_out_leaves_nothing_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "PART_BYTES", 9000)
    train_tokenizer([text(1)], 300).save(tmp_path / "tokenizer.json")
    run = override(
        run, {"data.held_out": 0.99999999, "data.tokenizer": str(tmp_path / "tokenizer.json")}
    )
    with pytest.raises(UserError, match=r"all its documents \(1800\) are held out"):
        prepare.prepare(run, print)
    assert list((tmp_path / "cache" / "stores").iterdir()) == []


def test_prepared_text_is_found_without_its_files(run: Run, tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare.prepare(run, lines.append)
    assert not [line for line in lines if "is ready" in line or "not here" in line]
    shutil.rmtree(tmp_path / "text")
    lines.clear()
    again = prepare.prepare(run, lines.append)
    assert again.fingerprints == first.fingerprints
    assert again.tokenizer.hash == first.tokenizer.hash
    assert f"the text is ready: it was prepared before, in '{tmp_path / 'cache'}'" in lines
    assert (
        "data.sources.web: its files are not here; going on with what was prepared from them"
        in lines
    )
    # Text of which a part is missing cannot be made without them.
    shutil.rmtree(first.train["web"].directory)
    with pytest.raises(UserError, match=r"data\.sources\.web\.paths: no file matches"):
        prepare.prepare(run, print)
    with pytest.raises(UserError, match=r"data\.sources\.web\.paths: no file matches"):
        prepare.prepare(elsewhere(run, tmp_path / "another"), print)


def test_a_pickled_tokenizer_is_the_same(tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert isinstance(copy, Tokenizer) and copy.hash == TOKENIZER.hash
    special = TOKENIZER.token(TOKENIZER.begin)
    for sentence in (f"one {special} two", "three four"):
        assert copy.encode(sentence) == TOKENIZER.encode(sentence)
        (ours,), (its) = TOKENIZER.encode_documents([sentence]), copy.encode_documents([sentence])
        assert np.array_equal(ours, its[0])
    assert np.array_equal(copy.token_bytes, TOKENIZER.token_bytes)


def fail_at_three(task: int, proceed: Callable[[], None]) -> int:
    if task == 3:
        raise UserError("the third cannot be done")
    time.sleep(0.01)
    return task


def die_at_three(task: int, proceed: Callable[[], None]) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_what_a_task_raises_ends_the_work() -> None:
    done: list[int] = []
    with pytest.raises(UserError, match="the third"):
        in_threads(fail_at_three, range(1000), lambda: None, lambda task, _: done.append(task))
    with pytest.raises(UserError, match="the third"):
        in_processes(fail_at_three, range(1000), 2, lambda: None, lambda task, _: done.append(task))
    assert len(done) < 100


def test_a_process_that_is_killed_is_told_of() -> None:
    with pytest.raises(UserError, match=r"a process that tokenises was killed.*--workers 1"):
        in_processes(die_at_three, range(10), 2, lambda: None, lambda task, _: None)


def test_processes_load_neither_jax_nor_the_callers_main_module(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from braeburn.data.workers import in_processes\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import loaded\n"
        "print('main')\n"
        "in_processes(loaded.modules, [1, 2], 2, lambda: None, lambda _, found: print(found))\n"
    )
    done = subprocess.run(
        [*PROGRAM[:1], str(program)], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.splitlines() == ["main", "[]", "[]"], done.stderr


def file_of(run: Run, tmp_path: Path) -> str:
    """A recipe file with the run."""
    path = tmp_path / "recipe.py"
    path.write_text(
        "from braeburn.config import validate\n"
        "def recipe():\n"
        f"    return validate({run.model_dump(mode='json')!r})\n".replace("true", "True")
    )
    return f"{path}:recipe"


def test_the_command(run: Run, tmp_path: Path) -> None:
    recipe = file_of(run, tmp_path)
    answer = braeburn("prepare", recipe, "--json")
    assert answer.code == 0, answer.err
    (source,) = json.loads(answer.out)["sources"].values()
    shards = prepare.prepare(run, print)
    held_out = shards.held_out["web"]
    assert held_out is not None
    assert source["documents"] == shards.train["web"].documents
    assert source["documents"] + source["held_out_documents"] == 1800
    assert source["tokens"] == shards.train["web"].tokens
    assert source["fingerprint"] == shards.fingerprints["web"]
    answer = braeburn("prepare", recipe)
    assert "the text is ready" in answer.err
    assert answer.out.splitlines()[1].split()[0] == "web"
    assert braeburn("prepare", recipe, "--workers", "0").error
    answer = braeburn("train", recipe, "--out", tmp_path / "run", "--stop-after-steps", "1")
    assert answer.code == 0 and "the text is ready" in answer.err, answer.err


@pytest.mark.deep
def test_killed_at_random_moments_it_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in "abc":
        rows = (json.dumps({"text": text(i) * 20}) + "\n" for i in range(8_000))
        (tmp_path / "text" / f"{name}.jsonl").write_text("".join(rows))
    recipe = file_of(run, tmp_path)
    code = (
        "from braeburn.data import division, prepare\n"
        "division.PART_BYTES = 600_000\n"
        "from braeburn.cli import console\n"
        "console()\n"
    )
    command = [PROGRAM[0], "-c", code, "prepare", recipe, "--workers", "2"]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    seconds = time.monotonic() - began
    expected = token_shards(tmp_path / "cache")
    generator = random.Random(0)
    for number in range(5):
        process = subprocess.Popen(
            [*command, "--set", f"data.cache={tmp_path / 'killed'}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(generator.uniform(0.2, 0.7) * seconds)
        process.send_signal((signal.SIGKILL, signal.SIGTERM)[number % 2])
        process.wait(timeout=60)
    subprocess.run(
        [*command, "--set", f"data.cache={tmp_path / 'killed'}"],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert token_shards(tmp_path / "killed") == expected


def test_only_the_side_that_is_asked_for_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "PART_BYTES", 9000)
    tokenizer = prepare.prepare(run, print).tokenizer
    alone = elsewhere(run, tmp_path / "alone")
    held_out = prepare.prepare(alone, print, tokenizer, only_held_out=True).held_out["web"]
    both = prepare.prepare(alone, print, tokenizer)
    assert isinstance(held_out, TokenShards)
    assert both.held_out["web"] is not None
    assert held_out.fingerprint == both.held_out["web"].fingerprint
    assert token_shards(tmp_path / "alone") == token_shards(tmp_path / "cache")


def test_a_report_of_parts_is_that_of_the_whole() -> None:
    one, other = Report({"rows": 2}, True), Report({"rows": 1, "files": 3}, False)
    assert corpus.merge([one, other]) == Report({"files": 3, "rows": 3}, False)
    assert corpus.merge([one, one]) == Report({"rows": 4}, True)
    assert corpus.merge([]) == Report()


def test_progress_tells_what_is_left() -> None:
    assert Progress(0, 10, 1.0).seconds_left is None
    assert Progress(2, 10, 1.0).seconds_left == 4.0
    assert Progress(6, 10, 1.0, before=4).rate == 2.0
    assert Progress(6, 10, 1.0, before=6).seconds_left is None
    assert workers.cores() >= 1
