"""Models at URLs: fetched once, fetched anew where they changed, and made there whole or not at
all.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from braeburn.config import ModelConfig
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.remote import RemoteFolder, explained, folder_for, user_cache
from braeburn.train.checkpoint import Checkpoints
from braeburn.train.copies import fetched, made_for
from braeburn.train.teaching import files_identity
from braeburn.train.trained import load
from support import braeburn, contents, empty_bucket

URL = "memory://bucket/model"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty file system, on a machine that has met none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    with empty_bucket() as filesystem:
        yield filesystem


@pytest.fixture
def gets(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are fetched, as they are."""
    found: list[str] = []
    real = type(bucket).get_file

    def noted(self: Any, path: str, target: str, **options: Any) -> None:
        found.append(path.removeprefix("/bucket/model/"))
        real(self, path, target, **options)

    monkeypatch.setattr(type(bucket), "get_file", noted)
    return found


def model(url: str = URL) -> RemoteFolder:
    return RemoteFolder(url, "DIR")


def put(directory: Path) -> None:
    names = [name for name in contents(directory) if not name.startswith(".")]
    list(model().put_all(directory, names))


def test_of_a_run_what_is_needed_is_fetched_once(
    finished: Path, gets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(finished)
    copy = fetched(model())
    parts = {name.split("/")[2] for name in gets if name.startswith("checkpoints/14/")}
    assert {"params", "run", "record.json"} <= parts and "optimizer" not in parts
    assert not [name for name in gets if name.startswith(("metrics", "checkpoints/10/"))]
    here, there = load(finished), load(copy)
    assert here.step == there.step == 14
    assert here.tokenizer.hash == there.tokenizer.hash
    gets.clear()
    identity = files_identity(copy / "checkpoints" / "14")
    assert fetched(model(f"{URL}/checkpoints/14")) == copy / "checkpoints" / "14"
    assert not [name for name in gets if name.startswith("checkpoints/")]
    # The optimizer's state is fetched when it is needed, and nothing else again.
    fetched(model(), optimizer=True)
    arrays = {name.split("/")[2] for name in gets if "/d/" in name}
    assert arrays == {"optimizer"}
    assert Checkpoints(copy).fault(14) is None
    assert files_identity(copy / "checkpoints" / "14") == identity
    # On another machine, too, these are the same weights.
    monkeypatch.setenv("XDG_CACHE_HOME", f"{user_cache()}-2")
    elsewhere = fetched(model())
    assert elsewhere != copy
    assert files_identity(elsewhere / "checkpoints" / "14") == identity
    assert ModelConfig.from_directory(URL) == ModelConfig.from_directory(finished)
    assert ModelConfig.from_directory(f"{URL}/checkpoints/14").d_model == there.model.d_model
    with pytest.raises(UserError, match=r"there is no such checkpoint; .*, or name one of \[10"):
        ModelConfig.from_directory(f"{URL}/checkpoints/3")


def test_another_checkpoint_is_fetched_and_the_old_copy_goes(finished: Path) -> None:
    put(finished)
    names = [name for name in model().list() if name.startswith("checkpoints/14/")]
    model().delete(names)
    copy = fetched(model())
    assert load(copy).step == 10
    put(finished)
    assert load(fetched(model())).step == 14
    # The run there may have been put back to an earlier step.
    model().delete(names)
    assert load(fetched(model())).step == 10
    model().delete(name for name in model().list() if name.startswith("checkpoints/10/"))
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        load(fetched(model()))


def test_a_tokenizer_at_a_url(finished: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    put(finished)
    local = Tokenizer.load(finished / "tokenizer.json")
    there = Tokenizer.load(f"{URL}/tokenizer.json")
    assert there.hash == local.hash
    assert there.to_json() == local.to_json()
    prepared = braeburn(
        "prepare", *tiny_arguments, "--set", f"data.tokenizer={URL}/tokenizer.json", "--json"
    )
    assert prepared.code == 0, prepared.err
    assert json.loads(prepared.out)["vocab_size"] == local.vocab_size
    missing = ["--set", f"data.tokenizer={URL}/none/tokenizer.json"]
    answer = braeburn("prepare", *tiny_arguments, *missing)
    assert f"data.tokenizer: there is no file '{URL}/none/tokenizer.json'" in answer.error


def test_a_damaged_copy_is_told_of(finished: Path) -> None:
    put(finished)
    record = json.loads(model().read("checkpoints/14/record.json"))
    name = next(name for name in record["files"] if name.startswith("params/"))
    model().write(f"checkpoints/14/{name}", b"nonsense")
    answer = braeburn("evaluate", URL)
    assert "is damaged: " in answer.error
    assert f"is this machine's copy of {URL!r})" in answer.error


def test_a_hugging_face_directory(
    finished: Path, tmp_path: Path, gets: list[str], bucket: Any
) -> None:
    assert braeburn("export", finished, "--out", tmp_path / "hf").code == 0
    assert braeburn("export", finished, "--out", URL).code == 0
    assert set(model().list()) == set(contents(tmp_path / "hf"))
    assert braeburn("import", URL, "--out", tmp_path / "imported").code == 0
    model().write("pytorch_model.bin", b"not needed")
    model().write("original/consolidated.safetensors", b"not needed")
    gets.clear()
    copy = fetched(model())
    assert gets == []
    identity = files_identity(copy)
    model().write("generation_config.json", b"{}")
    fetched(model())
    assert gets == ["generation_config.json"]
    assert files_identity(copy) != identity
    kept = {name for name in contents(copy) if not name.startswith(".")}
    assert kept == {*contents(tmp_path / "hf"), "fetched.json"}
    assert (
        "--out 'memory://bucket/model' is in use"
        in braeburn("export", finished, "--out", URL).error
    )
    answer = braeburn("import", URL, "--out", "memory://bucket/imported", "--json")
    assert json.loads(answer.out)["out"] == "memory://bucket/imported"
    assert load(fetched(RemoteFolder("memory://bucket/imported", "DIR"))).step == 0
    assert not list((user_cache() / "outgoing").iterdir())


def test_gguf_files_lie_beside_others(bucket: Any) -> None:
    def make(url: str, content: str) -> None:
        with made_for(model(url), among_others=True) as made:
            if made.suffix != ".gguf":
                made.mkdir(parents=True)
                made /= "a.gguf"
            made.write_text(content)

    model().write("others.txt", b"stay")
    make(URL, "in the folder")
    make(f"{URL}/b.gguf", "by its name")
    assert model().read("a.gguf") == b"in the folder"
    assert model().read("b.gguf") == b"by its name"
    with pytest.raises(UserError, match=r"'memory://bucket/model/a.gguf' is in use; name another"):
        make(URL, "again")
    with pytest.raises(UserError, match=r"'memory://bucket/model/b.gguf' is in use; name a new"):
        make(f"{URL}/b.gguf", "again")
    assert model().read("a.gguf") == b"in the folder"
    with pytest.raises(UserError, match="is neither a run directory nor a Hugging Face directory"):
        fetched(model(f"{URL}/others.txt"))


def test_a_checkpoint_that_is_deleted_while_it_is_fetched(
    finished: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on there deletes the checkpoint before the one that it has just made."""
    put(finished)
    later = {name for name in model().list() if name.startswith("checkpoints/14/")}
    kept = {name: model().read(name) for name in later}
    model().delete(later)
    real, gone_on = type(bucket).get_file, []

    def get(self: Any, path: str, target: str, **options: Any) -> None:
        if "checkpoints/10/params" in path and not gone_on:
            gone_on.append(path)
            for name, content in kept.items():
                model().write(name, content)
            model().delete(name for name in model().list() if name.startswith("checkpoints/10/"))
        real(self, path, target, **options)

    monkeypatch.setattr(type(bucket), "get_file", get)
    assert load(fetched(model())).step == 14
    assert gone_on


def test_what_was_cut_short_is_made_anew(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(content: str) -> None:
        with made_for(model()) as folder:
            (folder / "weights").mkdir(parents=True)
            (folder / "weights" / content).write_text(content)
            (folder / "config.json").write_text(content)

    real, calls = type(bucket).put_file, []

    def killed(self: Any, source: str, target: str, **options: Any) -> None:
        calls.append(target)
        if target.endswith("config.json"):
            raise KeyboardInterrupt
        real(self, source, target, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            make("first")
    assert set(model().list()) == {".being-made.json", "weights/first"}
    assert calls[-1].endswith("config.json")
    with pytest.raises(UserError, match="is neither a run directory nor a Hugging Face"):
        fetched(model())
    make("second")
    assert set(model().list()) == {"weights/second", "config.json"}
    with pytest.raises(UserError, match="is in use; choose a new or empty folder"):
        make("third")


def test_messages_about_a_copy_name_its_url(tmp_path: Path) -> None:
    folder = folder_for(URL, tmp_path)
    told = explained(f"{str(folder)!r} is damaged")
    assert told == f"{str(folder)!r} is damaged ({str(folder)!r} is this machine's copy of {URL!r})"
    assert explained("nothing of the kind") == "nothing of the kind"
    assert folder.name.startswith("model-")
