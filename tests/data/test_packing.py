import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braeburn.data.corpus import Document
from braeburn.data.packing import Row, Sequences, batched, windows
from braeburn.data.token_shards import TokenShards, build_token_shards
from braeburn.data.tokenizer import train
from braeburn.errors import UserError

TOKENIZER = train(["x"], 257)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    def make(lengths: tuple[int, ...]) -> TokenShards:
        """Token shards whose documents have these numbers of tokens, the begin token included."""
        directory = tmp_path_factory.getbasetemp() / f"packing-{hash(lengths)}"
        if not directory.exists():
            texts = [
                "".join(chr(97 + (i + j) % 26) for j in range(n - 1)) for i, n in enumerate(lengths)
            ]
            build_token_shards(
                directory, [Document("", text) for text in texts], TOKENIZER, shard_tokens=11
            )
        return TokenShards.open(directory, TOKENIZER.hash)

    return make


def naive(shards: TokenShards, start: int, length: int) -> Row:
    """One window, token by token."""
    tokens = shards.read(0, shards.tokens + 1).tolist()
    starts = set(shards.document_starts(0, shards.tokens).tolist())
    row: Row = {field: [] for field in ("inputs", "targets", "positions", "segment_ids", "weights")}
    segment, position = 1, 0
    for index in range(start, start + length):
        if index >= shards.tokens:
            values = (shards.begin, shards.begin, 0, 0, 0.0)
        else:
            if index in starts and index > start:
                segment, position = segment + 1, 0
            values = (tokens[index], tokens[index + 1], position, segment, 1.0)
            position += 1
        for field, value in zip(row, values, strict=True):
            row[field].append(value)
    return row


def assert_equal(row: Row, expected: Row) -> None:
    for field, values in expected.items():
        assert row[field].dtype == (np.float32 if field == "weights" else np.int32)
        assert row[field].tolist() == values, field


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12).map(tuple)


@given(lengths=LENGTHS, length=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_windows_cover_the_text_exactly(make, lengths: tuple[int, ...], length: int) -> None:
    shards = make(lengths)
    rows = list(windows(shards, length))
    for index, row in enumerate(rows):
        assert_equal(row, naive(shards, index * length, length))
    for first in (1, len(rows)):
        rest = windows(shards, length, first)
        assert [row["inputs"].tolist() for row in rest] == [
            row["inputs"].tolist() for row in rows[first:]
        ]
    assert sum(int(row["weights"].sum()) for row in rows) == shards.tokens
    inputs = np.concatenate([row["inputs"] for row in rows])[: shards.tokens]
    assert np.array_equal(inputs, shards.read(0, shards.tokens))


@given(lengths=LENGTHS, length=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_sequences_are_windows_of_one_shift_an_epoch(
    make, lengths: tuple[int, ...], length: int, seed: int
) -> None:
    shards = make(lengths)
    if shards.tokens < length:
        with pytest.raises(
            UserError,
            match=rf"'books' has {shards.tokens} .*sequence_length={length}; set it to at most",
        ):
            Sequences(shards, length, seed, "books")
        return
    sequences = Sequences(shards, length, seed, "books")
    assert sequences.windows == max(1, (shards.tokens - (length - 1)) // length)
    possible = [naive(shards, start, length) for start in range(shards.tokens - length + 1)]
    for epoch in range(3):
        rows = [sequences[epoch * sequences.windows + i] for i in range(sequences.windows)]
        fits = [
            shift
            for shift in range(length)
            if shift + sequences.windows * length <= shards.tokens
            and sorted(r["inputs"].tolist() for r in rows)
            == sorted(possible[shift + w * length]["inputs"] for w in range(sequences.windows))
        ]
        assert fits
        for row in rows:
            assert any(row["targets"].tolist() == p["targets"] for p in possible)
            match = next(
                p
                for p in possible
                if all(row[field].tolist() == p[field] for field in ("inputs", "segment_ids"))
            )
            assert row["positions"].tolist() == match["positions"]


@given(lengths=LENGTHS, length=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=20, deadline=None)
def test_aligned_sequences_are_the_whole_windows(
    make, lengths: tuple[int, ...], length: int, seed: int
) -> None:
    shards = make(lengths)
    if shards.tokens < length:
        with pytest.raises(UserError, match="sequence longer than the data"):
            Sequences(shards, length, seed, "books", aligned=True)
        return
    sequences = Sequences(shards, length, seed, "books", aligned=True)
    assert sequences.windows == shards.tokens // length
    whole = sorted(
        str(naive(shards, window * length, length)) for window in range(sequences.windows)
    )
    for epoch in range(2):
        rows = [sequences[epoch * sequences.windows + i] for i in range(sequences.windows)]
        assert (
            sorted(str({field: values.tolist() for field, values in row.items()}) for row in rows)
            == whole
        )


def test_batches_are_filled_up() -> None:
    rows = [
        {"inputs": np.full(3, i + 1, np.int32), "weights": np.ones(3, np.float32)} for i in range(5)
    ]
    first, second, third = batched(rows, 2)
    assert first["inputs"].tolist() == [[1] * 3, [2] * 3]
    assert second["inputs"].tolist() == [[3] * 3, [4] * 3]
    assert third["inputs"].tolist() == [[5] * 3, [0] * 3]
    assert third["weights"].tolist() == [[1] * 3, [0] * 3]
    assert third["inputs"].dtype == np.int32


def test_epochs_differ(make) -> None:
    shards = make((30,) * 20)
    sequences = Sequences(shards, 8, 0, "books")
    epochs = [
        b"".join(
            sequences[e * sequences.windows + i]["inputs"].tobytes()
            for i in range(sequences.windows)
        )
        for e in range(4)
    ]
    assert len(set(epochs)) == 4
    again = Sequences(shards, 8, 1, "books")
    assert again[0]["inputs"].tobytes() != sequences[0]["inputs"].tobytes()
