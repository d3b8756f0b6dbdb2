"""A run goes on with the text that it was begun with, or says that it does not."""

import json
import re
import shutil
from pathlib import Path

import jax
import pytest

from braeburn.config import Run, override, validate
from braeburn.data.prepare import Prepared, prepare
from braeburn.errors import UserError
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.directory import RunDirectory
from braeburn.train.same_text import check_text, require_same_text, saved_text
from support import braeburn, events

MODEL = {
    "vocab_size": 300,
    "d_model": 8,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 8,
    "ffn_dim": 8,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("web", "books", "later"):
        rows = (json.dumps({"text": f"{name} number {i} " * 5}) + "\n" for i in range(100))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Run:
    names = ("web", "books", "later")
    stage = {"tokens": 640, "sequence_length": 16, "batch_tokens": 64, "learning_rate": 1}
    return validate(
        {
            "name": "tiny",
            "model": MODEL,
            "stages": {
                "core": {**stage, "mixture": {"web": 1, "books": 1}},
                "context": {**stage, "mixture": {"later": 1}},
            },
            "data": {
                "sources": {name: {"paths": [str(text / f"{name}.jsonl")]} for name in names},
                "cache": str(tmp_path / "cache"),
                "held_out": 0.1,
            },
        }
    )


class Saved:
    """Stands for the checkpoints of a directory, of which only what is told of the text matters
    here.
    """

    def __init__(self, facts: dict) -> None:
        self._facts = facts

    def __call__(self, directory: Path) -> "Saved":
        return self

    def facts(self, step: int) -> dict:
        return self._facts


def check(
    run: Run, tmp_path: Path, saved: dict, step: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setattr("braeburn.train.same_text.Checkpoints", Saved(saved))
    lines: list[str] = []
    directory = RunDirectory(tmp_path / "run")
    check_text(
        run,
        directory,
        step,
        saved_text(directory, step),
        prepare(run, lambda line: None),
        lines.append,
    )
    return lines


def test_text_that_changed_is_refused_until_its_fingerprint_is_accepted(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"text": prepare(run, lambda line: None).fingerprints}
    assert check(run, tmp_path, saved, 5, monkeypatch) == []
    shutil.copy(text / "books.jsonl", text / "more.jsonl")
    (text / "books.jsonl").write_text((text / "books.jsonl").read_text() + '{"text": "one more"}\n')
    # The tokenizer is the run's own, which a change of text does not change.
    run = override(run, {"data.tokenizer": str(next((tmp_path / "cache/tokenizers").iterdir()))})
    assert check(run, tmp_path, saved, 0, monkeypatch) == []  # nothing was trained on it
    with pytest.raises(UserError) as error:
        check(run, tmp_path, saved, 5, monkeypatch)
    sentence = str(error.value)
    assert sentence.startswith("the text of data.sources.books has changed since checkpoint 5 of ")
    (accept,) = re.findall(r"--set (data\.accept=[0-9a-f]{12})$", sentence)
    path, value = accept.split("=")
    (line,) = check(override(run, {path: value}), tmp_path, saved, 5, monkeypatch)
    assert line == "going on from step 5 with changed text of books, as data.accept says"
    (event,) = events(tmp_path / "run", "text_changed")
    assert (event["step"], event["accepted"], list(event["sources"])) == (5, value, ["books"])
    assert event["sources"]["books"]["before"] == saved["text"]["books"]
    # What was accepted once is no leave for the next change.
    (text / "web.jsonl").write_text((text / "web.jsonl").read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"data\.sources\.books and web has changed"):
        check(override(run, {path: value}), tmp_path, saved, 5, monkeypatch)


def test_text_of_stages_to_come_may_change(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"text": prepare(run, lambda line: None).fingerprints}
    run = override(run, {"data.tokenizer": str(next((tmp_path / "cache/tokenizers").iterdir()))})
    (text / "later.jsonl").write_text((text / "later.jsonl").read_text() + '{"text": "one more"}\n')
    assert check(run, tmp_path, saved, 10, monkeypatch) == []
    with pytest.raises(UserError, match=r"data\.sources\.later has changed"):
        check(run, tmp_path, saved, 11, monkeypatch)


def test_a_checkpoint_that_tells_of_no_text_is_gone_on_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "does not tell on which text" in check(run, tmp_path, {}, 5, monkeypatch)[0]


class Coordinator:
    """What processes tell each other."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self._values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self._values[key]


def test_processes_with_other_text_than_the_main_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator = Coordinator()
    monkeypatch.setattr("braeburn.parallel.agreement._coordinator", lambda: coordinator)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def come(index: int, **fingerprints: str) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: index)
        require_same_text(Prepared(None, {}, {}, fingerprints))  # type: ignore[arg-type]

    come(0, web="a", books="b")
    come(1, web="a", books="b")
    with pytest.raises(
        UserError,
        match=r"^process 1 reads other text than process 0 in data\.sources\.books; give ",
    ):
        come(1, web="a", books="c")


def test_a_checkpoint_tells_of_its_text(finished: Path) -> None:
    checkpoints = Checkpoints(finished)
    step = checkpoints.newest()
    assert step
    assert set(checkpoints.facts(step)["text"]) == {"code", "prose", "long"}


def test_one_more_file_is_noticed_on_resuming(
    copied: Path, corpus: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    more = shutil.copytree(corpus, tmp_path / "more")
    arguments = [argument.replace(str(corpus), str(more)) for argument in tiny_arguments]
    # As if the folder had always been this one: the configuration is the same, and so is the text.
    config = (copied / "config.json").read_text().replace(str(corpus), str(more))
    (copied / "config.json").write_text(config)
    shutil.rmtree(copied / "checkpoints/14")
    shutil.copy(more / "abc.py", more / "one_more.py")
    sentence = braeburn("train", *arguments, "--out", copied).error
    assert "the text of data.sources.code and prose has changed since checkpoint 10" in sentence
    accept = sentence.rpartition("--set ")[2]
    answer = braeburn("train", *arguments, "--out", copied, "--set", accept)
    assert answer.code == 0, answer.err
    assert len(events(copied, "text_changed")) == 1
    assert Checkpoints(copied).newest() == 14
