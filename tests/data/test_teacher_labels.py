import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.config import Execution, Stage
from braeburn.data import teacher_labels, token_shards
from braeburn.data.corpus import Document
from braeburn.data.loader import Batches, prefetch
from braeburn.data.packing import Batch, windows
from braeburn.data.teacher_labels import Labelling, TeacherLabels, Writer, build_teacher_labels
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import train
from braeburn.errors import UserError
from support import damage

TOKENIZER = train(["x"], 257)
LENGTH, K, BATCH_SIZE, PART_TOKENS = 16, 3, 4, 80
IDENTITY = {"teacher": "abc", "tokenizer": TOKENIZER.hash, "sequence_length": LENGTH, "k": K}


def label(batch: Batch, k: int = K, vocab_size: int = 257) -> tuple[np.ndarray, np.ndarray]:
    """What depends on all that is before in the window, on the position in it and on the rank, as
    float16 holds it.
    """
    seen = np.cumsum(batch["inputs"], axis=1)
    rest = np.arange(seen.shape[1])[:, None] * 7 + np.arange(k)
    ids = (seen[..., None] * 31 + rest * 65537) % vocab_size
    return ids.astype(np.int32), (-(seen[..., None] * 17 + rest) % 1000 / 64).astype(np.float32)


def build(
    directory: Path,
    shards: TokenShards,
    label: Callable[..., Any] = label,
    *,
    batch_size: int = BATCH_SIZE,
    **fields: Any,
) -> None:
    labelling = Labelling(LENGTH, K, 257, IDENTITY, batch_size, label)
    writer = Writer(**({"log": lambda line: None, "part_tokens": PART_TOKENS} | fields))
    build_teacher_labels(directory, shards, labelling, writer)


def content(directory: Path) -> dict[str, bytes]:
    """What the files in a folder hold, which does not tell when they were made."""
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != "verified.json"
    }


def everything(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """The labels of all positions, from every window at once."""
    rows = list(windows(shards, LENGTH))
    ids, log_probs = label({"inputs": np.stack([row["inputs"] for row in rows])})
    return ids.reshape(-1, K)[: shards.tokens], log_probs.reshape(-1, K)[: shards.tokens]


class Calls:
    """A label that counts its calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        self.count += 1
        return label(batch)


@pytest.fixture(scope="module")
def shards_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenShards]:
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (("a", 19), ("b", 9)):
        texts = [f"{name}{i} " * (i + 1) for i in range(count)] + ["." * 65]
        build_token_shards(
            folder / name, [Document("", text) for text in texts], TOKENIZER, shard_tokens=101
        )
    return {name: TokenShards.open(folder / name, TOKENIZER.hash) for name in "ab"}


@pytest.fixture(scope="module")
def shards(shards_of: dict[str, TokenShards]) -> TokenShards:
    """790 tokens: 50 windows, the last not full; 13 batches; 10 parts of 5 windows, the last not
    full either.
    """
    assert shards_of["a"].tokens == 790
    return shards_of["a"]


@pytest.fixture(scope="module")
def undisturbed(shards: TokenShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labels that must not be changed."""
    directory = tmp_path_factory.mktemp("undisturbed") / "labels"
    build(directory, shards)
    return directory


@pytest.fixture
def directory(shards: TokenShards, tmp_path: Path) -> Path:
    """A folder of labels to be damaged."""
    build(tmp_path / "labels", shards)
    return tmp_path / "labels"


def test_labels_come_back_by_position_in_every_epoch(
    shards_of: dict[str, TokenShards], tmp_path: Path
) -> None:
    for name, shards in shards_of.items():
        build(tmp_path / name, shards)
    labels = {name: TeacherLabels.open(tmp_path / name, IDENTITY) for name in shards_of}
    mixture = {"a": 3, "b": 1}
    stage = Stage(
        tokens=96 * 40,
        sequence_length=LENGTH,
        batch_tokens=96,
        mixture=mixture,
        learning_rate=1,
        teacher="core",
    )
    batches = Batches(stage, "distilled", 0, shards_of, labels=labels)
    online = Batches(stage, "distilled", 0, shards_of)
    for step in range(40):
        batch, ids_and_log_probs = batches[step], label(batches[step])
        assert batch["teacher_ids"].shape == batch["teacher_log_probs"].shape == (6, LENGTH, K)
        assert (batch["teacher_ids"].dtype, batch["teacher_log_probs"].dtype) == (
            np.int32,
            np.float32,
        )
        assert np.array_equal(batch["teacher_ids"], ids_and_log_probs[0])
        assert np.array_equal(batch["teacher_log_probs"], ids_and_log_probs[1])
        # Whether the teacher is asked now or was before changes nothing else.
        assert online[step].keys() == batch.keys() - {"teacher_ids", "teacher_log_probs"}
        assert all(np.array_equal(values, batch[field]) for field, values in online[step].items())
    half = Batches(stage, "distilled", 0, shards_of, rows=range(3, 6), labels=labels)
    assert np.array_equal(half[7]["teacher_ids"], batches[7]["teacher_ids"][3:])
    assert all(
        np.array_equal(batch["teacher_ids"], batches[38 + index]["teacher_ids"])
        for index, batch in enumerate(prefetch(batches, 38, workers=1, prefetch=1))
    )


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_range_across_parts(
    data: st.DataObject, undisturbed: Path, shards: TokenShards
) -> None:
    teacher = TeacherLabels.open(undisturbed, IDENTITY)
    start = data.draw(st.integers(0, shards.tokens))
    stop = data.draw(st.integers(start, shards.tokens))
    for read, all_of_them, dtype in zip(
        teacher.read(start, stop), everything(shards), (np.int32, np.float32), strict=True
    ):
        assert (type(read), read.dtype, read.shape) == (np.ndarray, dtype, (stop - start, K))
        assert np.array_equal(read, all_of_them[start:stop])


@given(batch_size=st.integers(1, 60), part_tokens=st.integers(1, 900))
@settings(max_examples=15, deadline=None)
def test_how_the_work_is_divided_changes_no_label(
    shards: TokenShards, tmp_path_factory: pytest.TempPathFactory, batch_size: int, part_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("divided") / "labels"
    build(directory, shards, batch_size=batch_size, part_tokens=part_tokens)
    read = TeacherLabels.open(directory, IDENTITY).read(0, shards.tokens)
    assert all(np.array_equal(*pair) for pair in zip(read, everything(shards), strict=True))


def test_ranges_outside_are_refused(undisturbed: Path) -> None:
    teacher = TeacherLabels.open(undisturbed, IDENTITY)
    for start, stop in ((-1, 3), (0, 791), (5, 4)):
        with pytest.raises(IndexError):
            teacher.read(start, stop)


def test_pickles_without_its_maps(undisturbed: Path) -> None:
    teacher = TeacherLabels.open(undisturbed, IDENTITY)
    expected = teacher.read(0, 790)
    data = pickle.dumps(teacher)
    assert len(data) < 2000
    assert all(
        np.array_equal(*pair)
        for pair in zip(pickle.loads(data).read(0, 790), expected, strict=True)
    )


@pytest.mark.parametrize(("vocab_size", "width"), [(2**16, 32), (2**16 + 1, 48)])
def test_bytes_per_token(tmp_path: Path, vocab_size: int, width: int) -> None:
    build_token_shards(tmp_path / "shards", [Document("", "some text " * 700)], TOKENIZER)
    shards = TokenShards.open(tmp_path / "shards", TOKENIZER.hash)

    def label_all(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        return label(batch, 8, vocab_size)

    labelling = Labelling(64, 8, vocab_size, IDENTITY, 4, label_all)
    build_teacher_labels(tmp_path / "t", shards, labelling, Writer(log=lambda line: None))
    teacher = TeacherLabels.open(tmp_path / "t", IDENTITY)
    assert teacher.bytes_per_token == width
    size = sum(path.stat().st_size for path in (tmp_path / "t").iterdir())
    assert width < size / shards.tokens <= min(60, width + 1)
    ids, log_probs = teacher.read(0, 64)
    expected = label_all(next(windows(shards, 64)) | {"inputs": shards.read(0, 64)[None]})
    assert np.array_equal(ids, expected[0][0])
    assert np.array_equal(log_probs, expected[1][0])
    assert teacher.read(0, shards.tokens)[0].max() > 0.99 * vocab_size


def test_no_documents(tmp_path: Path) -> None:
    build_token_shards(tmp_path / "shards", [], TOKENIZER)
    build(tmp_path / "labels", TokenShards.open(tmp_path / "shards", TOKENIZER.hash))
    assert TeacherLabels.open(tmp_path / "labels", IDENTITY).read(0, 0)[0].shape == (0, K)


KILLED = """
import sys, time
from pathlib import Path
from braeburn.data.token_shards import TokenShards
from test_teacher_labels import TOKENIZER, build, label
calls = 0
def slow(batch):
    global calls
    calls += 1
    if calls == 8:
        print("midway", flush=True)
        time.sleep(60)
    return label(batch)
build(Path(sys.argv[1]), TokenShards.open(Path(sys.argv[2]), TOKENIZER.hash), slow)
"""


def test_a_killed_build_goes_on(shards: TokenShards, undisturbed: Path, tmp_path: Path) -> None:
    directory, lines, calls = tmp_path / "labels", list[str](), Calls()
    arguments = [sys.executable, "-c", KILLED, str(directory), str(shards.directory)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"midway\n"
        (partial,) = tmp_path.iterdir()
        # The other builder lives.
        with pytest.raises(
            UserError, match=rf"another process is writing .*{partial.name}.*; wait for it to end"
        ):
            build(directory, shards, calls)
        process.send_signal(signal.SIGKILL)
    assert calls.count == 0
    assert list(tmp_path.iterdir()) == [partial]
    # Seven batches of four windows make five parts of five.
    made = {path.name: path.stat().st_mtime_ns for path in partial.glob("part-*.bin")}
    assert sorted(made) == [f"part-{index:05d}.bin" for index in range(5)]
    build(directory, shards, calls, log=lines.append)
    assert calls.count == 7  # of 13: 25 windows are left
    assert lines[0] == "labels: going on after 400 of 790 tokens"
    assert lines[-1].startswith("labels: the teacher labelled 390 tokens in ")
    assert list(tmp_path.iterdir()) == [directory]
    assert content(directory) == content(undisturbed)
    assert {name: (directory / name).stat().st_mtime_ns for name in made} == made
    TeacherLabels.open(directory, IDENTITY)
    build(directory, shards, calls)
    assert calls.count == 7


class Killed(BaseException):
    """Nothing runs after it, as after SIGKILL; but for closing the lock."""


def test_a_kill_at_any_write_is_mended(
    shards: TokenShards, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One builder is cut short within its n-th write, the next two with other batch sizes early on,
    the last is not.
    """
    left = 0

    def cut_short(path: Path, data: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            path.write_bytes(data[: len(data) // 2])
            raise Killed
        token_shards.write(path, data)

    monkeypatch.setattr(teacher_labels, "write", cut_short)
    for n in range(1, 22):  # the manifest, then ten times a part and the manifest
        directory, killed = tmp_path / str(n), 0
        for attempt, writes in enumerate((n, 3, 4, 0)):
            left = writes
            try:
                build(directory, shards, batch_size=BATCH_SIZE + attempt)
            except Killed:
                killed += 1
                assert not directory.exists()
        assert killed == (3 if n <= 19 else 2)
        assert content(directory) == content(undisturbed)


def test_a_builder_stopped_at_the_rename_goes_on(
    shards: TokenShards, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(path: Path, target: Path) -> None:
        raise Killed

    calls = Calls()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        build(tmp_path / "labels", shards)
    build(tmp_path / "labels", shards, calls)
    assert calls.count == 0
    assert content(tmp_path / "labels") == content(undisturbed)


def test_another_builder_that_finishes_first_is_left_alone(
    shards: TokenShards, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, calls = teacher_labels._claim, Calls()

    def late(partial: Path, directory: Path) -> Any:
        monkeypatch.setattr(teacher_labels, "_claim", claim)
        build(directory, shards)
        return claim(partial, directory)

    monkeypatch.setattr(teacher_labels, "_claim", late)
    build(tmp_path / "labels", shards, calls)
    assert calls.count == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "labels"]
    assert content(tmp_path / "labels") == content(undisturbed)


def test_processes_that_do_not_write_label_in_lock_step(
    shards: TokenShards, tmp_path: Path
) -> None:
    batches: dict[bool, list[bytes]] = {True: [], False: []}

    def run(writes: bool, last: int, begun: int | None = None) -> int:
        """Labels until a batch; the part that was begun with."""
        parts = -1

        def first_part(begin: Callable[[], int]) -> int:
            nonlocal parts
            parts = begin() if begun is None else begun
            return parts

        def stopping(batch: Batch) -> tuple[np.ndarray, np.ndarray] | None:
            if len(batches[writes]) == last:
                raise Killed
            batches[writes].append(batch["inputs"].tobytes())
            return label(batch) if writes else None

        with contextlib.suppress(Killed):
            build(tmp_path / "labels", shards, stopping, writes=writes, first_part=first_part)
        return parts

    assert run(True, last=6) == 0
    assert run(False, last=0) == 4  # 24 windows are four parts
    batches[True].clear()
    assert run(True, last=-1, begun=3) == 3  # another process has but three
    assert run(False, last=-1) == 10
    assert batches[False] == []
    assert run(False, last=-1, begun=3) == 3
    assert len(batches[True]) == 9
    assert batches[True] == batches[False]
    read = TeacherLabels.open(tmp_path / "labels", IDENTITY).read(0, shards.tokens)
    assert all(np.array_equal(*pair) for pair in zip(read, everything(shards), strict=True))


def test_a_kill_while_complete_parts_are_made_anew_is_mended(
    shards: TokenShards, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the processes agree on the part that the one with the fewest has."""

    def cut_short(path: Path, data: Any) -> None:
        if path.name == f"part-{cut:05d}.bin":
            path.write_bytes(data[: len(data) // 2])
            raise Killed
        token_shards.write(path, data)

    monkeypatch.setattr(teacher_labels, "write", cut_short)
    cut = 6
    with pytest.raises(Killed):
        build(tmp_path / "labels", shards)
    cut = 2
    with pytest.raises(Killed):
        build(tmp_path / "labels", shards, first_part=lambda begin: min(begin(), 2))
    cut = -1
    build(tmp_path / "labels", shards)
    assert content(tmp_path / "labels") == content(undisturbed)


def test_progress_is_told(
    shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = list[str]()
    monkeypatch.setattr(teacher_labels, "LOG_SECONDS", 0.0)
    build(tmp_path / "labels", shards, log=lines.append)
    assert len(lines) == 14
    assert lines[1].startswith("labels: 128 of 790 tokens, ")
    assert lines[1].endswith("0 min left")


@pytest.mark.parametrize("name", ["part-00000.bin", "part-00009.bin"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_corruption_is_found(directory: Path, name: str, harm: str) -> None:
    TeacherLabels.open(directory, IDENTITY)  # records the sound files
    damage(directory / name, harm)
    with pytest.raises(
        UserError, match=rf"{name}.*delete the folder '{directory}' and it will be built again"
    ):
        TeacherLabels.open(directory, IDENTITY)


def test_a_corrupt_part_is_not_built_upon(shards: TokenShards, tmp_path: Path) -> None:
    def stopping(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        if calls.count == 6:
            raise Killed
        return calls(batch)

    calls = Calls()
    with pytest.raises(Killed):
        build(tmp_path / "labels", shards, stopping)
    (partial,) = tmp_path.iterdir()
    damage(partial / "part-00001.bin", "flip")
    with pytest.raises(
        UserError, match=rf"part-00001.*delete the folder '{partial}' and it will be built again"
    ):
        build(tmp_path / "labels", shards)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"format_version": 0}', "fewer parts"]
)
def test_corrupt_manifest(directory: Path, content: str | None) -> None:
    path = directory / "manifest.json"
    if content == "fewer parts":
        manifest = json.loads(path.read_text())
        content = json.dumps({**manifest, "parts": manifest["parts"][:-1]})
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json.*delete the folder"):
        TeacherLabels.open(directory, IDENTITY)


@pytest.mark.parametrize(
    "other", [{"teacher": "abd"}, {"k": 4}, {"sequence_length": 8}, {"temperature": 2.0}]
)
def test_the_labels_of_another_teacher(undisturbed: Path, other: dict[str, Any]) -> None:
    ((field, value),) = other.items()
    sentence = (
        rf"labels made with {field}={IDENTITY.get(field)!r}, not {value!r}; delete that folder"
    )
    with pytest.raises(UserError, match=sentence):
        TeacherLabels.open(undisturbed, IDENTITY | other)


def test_full_disk(shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full answers every write as a full disk does.
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"cannot write .*No space left .*data\.cache"),
    ):
        patch.setattr(teacher_labels, "_part_path", lambda directory, index: Path("/dev/full"))
        build(tmp_path / "labels", shards)
    build(tmp_path / "labels", shards)
    TeacherLabels.open(tmp_path / "labels", IDENTITY)


def test_a_disk_without_room_is_told_before_work_begins(
    shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [790 * 12]  # at k = 3 an id of two bytes and a logarithm of two for each of three
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free[0]))
    build(tmp_path / "labels", shards)
    free[0] -= 1
    calls = Calls()
    with pytest.raises(
        UserError,
        match=r"labels take 9,480 bytes and .* has 9,479 free; free some, or set data.cache",
    ):
        build(tmp_path / "others", shards, calls)
    assert calls.count == 0


def test_cache_that_cannot_be_written(shards: TokenShards, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*data\.cache"):
        build(tmp_path / "cache/labels", shards)


def test_labels_are_laid_out_with_their_tokens() -> None:
    """Entries [B, T, k] are split over batch and sequence as the tokens [B, T] are."""
    from braeburn.config import MeshConfig
    from braeburn.parallel.layout import Layout
    from braeburn.parallel.mesh import build as build_mesh

    mesh = MeshConfig(fsdp=2, context=2)
    layout = Layout(Execution(mesh), build_mesh(mesh), {})
    inputs = np.arange(4 * 16, dtype=np.int32).reshape(4, 16)
    placed = layout.place(
        {"teacher_ids": np.stack([inputs * 2, inputs * 2 + 1], -1), "inputs": inputs}, range(4), 4
    )
    # Chunks of four tokens: the first device along `context` has 0 and 3, the second 1 and 2.
    order = [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    assert np.array_equal(np.asarray(placed["inputs"]), inputs[:, order])
    assert np.array_equal(
        np.asarray(placed["teacher_ids"]) // 2, np.stack([inputs[:, order]] * 2, -1)
    )
    assert {shard.data.shape for shard in placed["teacher_ids"].addressable_shards} == {(2, 8, 2)}
    for ids, tokens in zip(
        *(placed[name].addressable_shards for name in ("teacher_ids", "inputs")), strict=True
    ):
        assert ids.device == tokens.device
        assert np.array_equal(np.asarray(ids.data)[..., 0], np.asarray(tokens.data) * 2)


def flip(path: Path) -> None:
    """Changes a bit and leaves the size and the time of modification alone, as a disk does that
    loses one.
    """
    status = path.stat()
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("run", [None, "runs/one"])
def test_a_flip_that_leaves_the_time_alone_is_found(directory: Path, run: str | None) -> None:
    TeacherLabels.open(directory, IDENTITY, run)
    flip(directory / "part-00001.bin")
    with pytest.raises(UserError, match=r"part-00001\.bin' does not have the checksum"):
        TeacherLabels.open(directory, IDENTITY, run)


@pytest.mark.parametrize(
    "edit",
    [
        {"tokens": 80},
        {"k": 2},
        {"k": "3"},
        {"ids": "uint32"},
        {"ids": ["uint16"]},
        {"part_tokens": 160},
        {"identity": {}},
        {"identity": {"a": [[[[]]]]}},
        {"parts": []},
        {"parts": [{"tokens": 80}]},
        {"more": 1},
        {"manifest_sha256": "0" * 64},
        {"manifest_sha256": None},
    ],
    ids=str,
)
def test_an_edit_of_the_manifest_is_found(directory: Path, edit: dict[str, Any]) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(UserError, match=r"manifest\.json' .*delete the folder"):
        TeacherLabels.open(directory, IDENTITY)


def test_what_is_open_can_be_read_when_its_folder_is_gone(directory: Path) -> None:
    opened = TeacherLabels.open(directory, IDENTITY)
    expected = opened.read(0, opened.tokens)
    shutil.rmtree(directory)
    assert all(map(np.array_equal, opened.read(0, opened.tokens), expected))
