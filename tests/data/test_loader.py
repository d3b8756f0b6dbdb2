import errno
import hashlib
import itertools
import multiprocessing.synchronize
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braeburn.config import Stage
from braeburn.data import loader
from braeburn.data.corpus import Document
from braeburn.data.loader import Batches, held_out_batches, prefetch
from braeburn.data.packing import Batch
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import train
from braeburn.errors import UserError

TOKENIZER = train(["x"], 257)
STAGE = Stage(
    tokens=12 * 6 * 16,
    sequence_length=16,
    batch_tokens=96,
    mixture={"a": 3, "b": 1},
    learning_rate=1,
)
FIELDS = {
    "inputs": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenShards]:
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (("a", 40), ("b", 15)):
        build_token_shards(
            folder / name, [Document("", f"{name}{i} " * (i + 1)) for i in range(count)], TOKENIZER
        )
    return {name: TokenShards.open(folder / name, TOKENIZER.hash) for name in "ab"}


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[field], b[field]) for field in a)


def test_batches_depend_on_seed_stage_and_step_alone(shards: dict[str, TokenShards]) -> None:
    batches = Batches(STAGE, "core", 0, shards)
    assert len(batches) == 12
    for field, values in batches[3].items():
        assert (values.shape, values.dtype) == ((6, 16), FIELDS[field])
    assert batches[3].keys() == FIELDS.keys()
    assert all(same(batches[i], Batches(STAGE, "core", 0, shards)[i]) for i in reversed(range(12)))
    assert not same(batches[0], batches[1])
    assert not same(batches[0], Batches(STAGE, "core", 1, shards)[0])
    assert not same(batches[0], Batches(STAGE, "decay", 0, shards)[0])
    with pytest.raises(IndexError):
        batches[12]


def test_batches_stay_what_they_were(shards: dict[str, TokenShards]) -> None:
    """Runs that began earlier go on with the same text, over several epochs of both sources."""
    batches = Batches(STAGE.model_copy(update={"tokens": 100 * 96}), "core", 0, shards)
    digest = hashlib.sha256()
    for step in range(100):
        for field, values in sorted(batches[step].items()):
            digest.update(field.encode() + values.tobytes())
    assert digest.hexdigest() == "3fca1ba2a5cffe757eeb66244d63bcdf44bb68ac508db15cd4b753f62665d9e5"


def test_a_teacher_meets_the_same_windows_in_every_epoch(shards: dict[str, TokenShards]) -> None:
    def seen(stage: Stage) -> set[bytes]:
        batches = Batches(stage, "core", 0, shards)
        return {row.tobytes() for step in range(100) for row in batches[step]["inputs"]}

    stage = STAGE.model_copy(update={"tokens": 100 * 96, "mixture": {"a": 1.0}})
    cut = {
        shards["a"].read(start, start + 16).tobytes()
        for start in range(0, shards["a"].tokens - 15, 16)
    }
    assert seen(stage.model_copy(update={"teacher": "larger"})) == cut
    assert len(seen(stage)) > 2 * len(cut)


@pytest.mark.parametrize("start", [0, 5, 12])
def test_prefetch_equals_indexing(shards: dict[str, TokenShards], start: int) -> None:
    batches = Batches(STAGE, "core", 0, shards)
    read = list(prefetch(batches, start, workers=0, prefetch=3))
    assert len(read) == 12 - start
    assert all(same(batch, batches[start + i]) for i, batch in enumerate(read))


def test_prefetch_by_processes_equals_indexing(shards: dict[str, TokenShards]) -> None:
    batches = Batches(STAGE, "core", 0, shards)
    read = list(prefetch(batches, 5, workers=2, prefetch=2))
    assert len(read) == 7
    assert all(same(batch, batches[5 + i]) for i, batch in enumerate(read))


class Broken(Batches):
    def __getitem__(self, step: int) -> Batch:
        if step == 1:
            raise UserError("one sentence")
        return super().__getitem__(step)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_surface_as_they_are(
    shards: dict[str, TokenShards], workers: int
) -> None:
    iterator: Iterator[Batch] = prefetch(
        Broken(STAGE, "core", 0, shards), 0, workers=workers, prefetch=2
    )
    next(iterator)
    with pytest.raises(UserError) as error:
        next(iterator)
    assert str(error.value) == "one sentence"


def test_stopping_early_ends_the_reader(shards: dict[str, TokenShards]) -> None:
    iterator = prefetch(Batches(STAGE, "core", 0, shards), 0, workers=0, prefetch=2)
    assert len(list(islice(iterator, 2))) == 2
    iterator.close()  # type: ignore[attr-defined]
    assert list(iterator) == []


def test_rows_of_processes_make_up_the_batch(shards: dict[str, TokenShards]) -> None:
    whole = Batches(STAGE, "core", 0, shards)[4]
    parts = [
        Batches(STAGE, "core", 0, shards, rows=rows)[4]
        for rows in (range(2), range(2, 3), range(3, 6))
    ]
    assert same(whole, {field: np.concatenate([part[field] for part in parts]) for field in whole})


def test_a_sequence_longer_than_the_data_is_refused(shards: dict[str, TokenShards]) -> None:
    stage = Stage(
        tokens=10**6, sequence_length=10**5, batch_tokens=10**5, mixture={"a": 1}, learning_rate=1
    )
    with pytest.raises(UserError, match="sequence longer than the data: source 'a'"):
        Batches(stage, "core", 0, shards)


def test_held_out_batches_have_one_shape(shards: dict[str, TokenShards]) -> None:
    held_out = shards["b"]
    batches = list(held_out_batches(held_out, 16, 4, max_tokens=10**9))
    assert {values.shape for batch in batches for values in batch.values()} == {(4, 16)}
    weights = np.concatenate([batch["weights"].ravel() for batch in batches])
    assert weights.sum() == held_out.tokens
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])[weights > 0]
    assert np.array_equal(targets, held_out.read(1, held_out.tokens + 1))
    assert TOKENIZER.token_bytes[targets].sum() == held_out.text_bytes
    few = list(held_out_batches(held_out, 16, 4, max_tokens=100))
    assert sum(batch["weights"].sum() for batch in few) == 96
    assert (
        sum(batch["weights"].sum() for batch in held_out_batches(held_out, 16, 4, max_tokens=1))
        == 16
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, braeburn.data.loader, braeburn.data.prepare; print([m for m in "
        "sys.modules if m in HEAVY])"
    )
    code = code.replace("HEAVY", "('jax', 'grain', 'pyarrow', 'fsspec', 'tokenizers', 'zstandard')")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("refused_at", [0, 3])
def test_a_thread_takes_over_where_processes_cannot_share_things(
    shards: dict[str, TokenShards],
    refused_at: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_ahead = loader._read_ahead

    def refusing(batches: Batches, start: int, workers: int, prefetch: int) -> Iterator[Batch]:
        if not workers:
            yield from read_ahead(batches, start, workers, prefetch)
            return
        yield from islice(read_ahead(batches, start, 0, prefetch), refused_at)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loader, "_read_ahead", refusing)
    batches = Batches(STAGE, "core", 0, shards)
    read = list(prefetch(batches, 2, workers=2, prefetch=2))
    assert len(read) == 10
    assert all(same(batch, batches[2 + i]) for i, batch in enumerate(read))
    (record,) = caplog.records
    assert (
        "data.workers=2 cannot read ahead (/dev/shm has no room for what they share)"
        in record.getMessage()
    )


@pytest.mark.parametrize("limit", [0, 3])
def test_training_reads_on_with_a_full_shared_memory(
    shards: dict[str, TokenShards], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = itertools.count()
    make = multiprocessing.synchronize.SemLock.__init__

    def full(*arguments: Any, **options: Any) -> None:
        if next(made) >= limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        make(*arguments, **options)

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    batches = Batches(STAGE, "core", 0, shards)
    read = list(prefetch(batches, 5, workers=2, prefetch=2))
    assert len(read) == 7
    assert all(same(batch, batches[5 + i]) for i, batch in enumerate(read))


def test_training_reads_on_when_the_token_shards_are_deleted(tmp_path: Path) -> None:
    documents = [Document("", f"a{i} " * (i + 1)) for i in range(40)]
    build_token_shards(tmp_path / "a", documents, TOKENIZER)
    shards = TokenShards.open(tmp_path / "a", TOKENIZER.hash)
    batches = Batches(STAGE.model_copy(update={"mixture": {"a": 1.0}}), "core", 0, {"a": shards})
    expected = [batches[step] for step in range(12)]
    shutil.rmtree(tmp_path / "a")
    assert all(map(same, prefetch(batches, 0, workers=2, prefetch=2), expected))
    assert all(map(same, prefetch(batches, 0, workers=0, prefetch=2), expected))
