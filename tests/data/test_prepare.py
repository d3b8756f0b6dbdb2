import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from braeburn.config import Run, override, validate
from braeburn.data.listing import cache_folder
from braeburn.data.prepare import prepare
from braeburn.data.tokenizer import train
from braeburn.data.workers import Work
from braeburn.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    for name in ("web", "books"):
        rows = (json.dumps({"text": f"{name} number {i} " * 5}) + "\n" for i in range(200))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    sources = {name: {"paths": [str(tmp_path / f"{name}.jsonl")]} for name in ("web", "books")}
    return validate(
        {
            "name": "tiny",
            "model": {
                "vocab_size": 300,
                "d_model": 8,
                "num_layers": 1,
                "num_heads": 1,
                "num_kv_heads": 1,
                "head_dim": 8,
                "ffn_dim": 8,
            },
            "stages": {
                "core": {
                    "tokens": 640,
                    "sequence_length": 16,
                    "batch_tokens": 64,
                    "learning_rate": 1,
                    "mixture": {"web": 1, "books": 1, "unused": 0},
                }
            },
            "data": {
                "sources": sources | {"unused": {"paths": ["/nowhere"]}},
                "cache": str(tmp_path / "cache"),
                "held_out": 0.1,
            },
        }
    )


def test_builds_once_and_again_only_what_changed(run: Run, tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare(run, lines.append)
    assert first.tokenizer.vocab_size <= 300
    assert set(first.train) == set(first.held_out) == {"web", "books"}
    for name, shards in first.train.items():
        held_out = first.held_out[name]
        assert held_out is not None and held_out.documents > 5
        assert shards.documents + held_out.documents == 200
    assert sum("trained a tokenizer" in line for line in lines) == 1
    assert sum("tokenised" in line for line in lines) == 2

    lines.clear()
    second = prepare(run, lines.append)
    assert second.tokenizer.hash == first.tokenizer.hash
    assert not [line for line in lines if "tokenised" in line or "trained a" in line]

    lines.clear()
    with (tmp_path / "web.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    prepare(run, lines.append, tokenizer=first.tokenizer)
    assert sum("tokenised web" in line for line in lines) == 1
    assert not [line for line in lines if "tokenised books" in line or "trained a" in line]


def test_corrupt_cached_tokenizer_is_trained_again(run: Run, tmp_path: Path) -> None:
    first = prepare(run, print)
    (path,) = (tmp_path / "cache/tokenizers").iterdir()
    path.write_text("{")
    lines: list[str] = []
    assert prepare(run, lines.append).tokenizer.hash == first.tokenizer.hash
    assert "corrupt" in lines[0]


def test_own_tokenizer_must_fit_the_model(run: Run, tmp_path: Path) -> None:
    train(["several words several words"], 269).save(tmp_path / "tokenizer.json")
    mine = override(run, {"data.tokenizer": str(tmp_path / "tokenizer.json")})
    assert prepare(mine, print).tokenizer.vocab_size == 269
    with pytest.raises(UserError, match=r"model\.vocab_size=260 .* 269 .*at least 269"):
        prepare(override(mine, {"model.vocab_size": 260}), print)


def test_nothing_held_out_is_said(run: Run) -> None:
    lines: list[str] = []
    prepared = prepare(override(run, {"data.held_out": 1e-9}), lines.append)
    assert prepared.held_out == {"web": None, "books": None}
    assert (
        sum("warning: data.held_out=1e-09 holds out no document of web" in line for line in lines)
        == 1
    )


def test_cache_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    data = run.data.model_copy(update={"cache": None})
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(data) == Path("/somewhere/braeburn/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(data) == Path.home() / ".cache/braeburn/data"


class Stop(Exception):
    pass


def stopping_after(calls: int) -> Callable[[], None]:
    """What stops the work at a call, in whatever thread; each later call stops it too."""
    made = itertools.count()

    def proceed() -> None:
        if next(made) >= calls:
            raise Stop

    return proceed


def test_preparing_may_be_stopped_anywhere_and_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = prepare(run, print)
    monkeypatch.setattr("braeburn.data.token_shards.BATCH_CHARACTERS", 500)
    run = override(run, {"data.cache": str(tmp_path / "stopped")})
    for calls in itertools.count():
        try:
            prepared = prepare(run, print, work=Work(stopping_after(calls % 9)))
        except Stop:
            continue
        break
    assert calls > 5
    assert prepared.fingerprints == undisturbed.fingerprints
    assert prepared.tokenizer.hash == undisturbed.tokenizer.hash
    assert not list((tmp_path / "stopped").rglob("*.partial-*"))


def test_training_a_tokenizer_is_left_to_itself_when_asked_to_stop(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, forever = threading.Event(), threading.Event()

    def endless(texts: object, vocab_size: int) -> None:
        begun.set()
        forever.wait()

    def proceed() -> None:
        if begun.is_set():
            raise Stop

    monkeypatch.setattr("braeburn.data.prepare.train", endless)
    with pytest.raises(Stop):
        prepare(run, print, work=Work(proceed))
    forever.set()


def test_a_source_of_one_document_is_warned_of(run: Run, tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("a long text\n" * 400)
    one = override(run, {"data.sources.web.paths": [str(tmp_path / "web.txt")]})
    lines: list[str] = []
    prepare(one, lines.append)
    (line,) = [line for line in lines if "is one document" in line]
    assert line.startswith(
        "warning: data.sources.web is one document; set data.sources.web.separator"
    )
    lines.clear()
    prepare(one, lines.append)  # from the cache
    assert line in lines


def test_a_separator_that_is_nowhere_is_warned_of(run: Run, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"a long text {name}\n" * 400)
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    wrong = override(run, {"data.sources.web.paths": paths, "data.sources.web.separator": "---"})
    for _ in range(2):  # the second time from the cache
        lines: list[str] = []
        prepare(wrong, lines.append)
        assert (
            sum(
                "warning: data.sources.web.separator='---' is in none of its files" in line
                for line in lines
            )
            == 1
        )


def test_rows_that_were_passed_over_are_told(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "web.jsonl").open("a") as file:
        file.write('{"text": null}\n{"text": ""}\n{"text": null}\n')
    for _ in range(2):  # the second time from the cache
        lines: list[str] = []
        prepare(run, lines.append)
        told = "data.sources.web: passed over 2 rows whose text is null, 1 rows without text"
        assert [line for line in lines if "passed over" in line] == [told]


def test_the_fingerprint_is_that_of_the_tokens_not_of_the_files(run: Run, tmp_path: Path) -> None:
    first = prepare(run, print)
    (tmp_path / "web.jsonl").touch()
    second = prepare(run, print, first.tokenizer)
    assert second.train["web"].directory != first.train["web"].directory
    assert second.fingerprints == first.fingerprints
    with (tmp_path / "web.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    third = prepare(run, print, first.tokenizer)
    assert third.fingerprints["web"] != first.fingerprints["web"]
    assert third.fingerprints["books"] == first.fingerprints["books"]


def test_evaluation_leaves_the_text_to_train_on_alone(run: Run, tmp_path: Path) -> None:
    tokenizer = prepare(run, print).tokenizer
    run = override(run, {"data.cache": str(tmp_path / "another")})
    prepared = prepare(run, print, tokenizer, only_held_out=True)
    assert prepared.train == {}
    assert {
        name for name, shards in prepared.held_out.items() if shards and shards.documents > 5
    } == {"web", "books"}
    assert sorted(
        path.name.rpartition("-")[0] for path in (tmp_path / "another/stores").iterdir()
    ) == ["books-held-out", "web-held-out"]
