"""The usual mistakes, each answered with one sentence that names the fix, and nothing on disk the
worse for it.
"""

import functools
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from braeburn.config import Run, override
from braeburn.data.prepare import prepare
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.tokenizer import train as train_tokenizer
from support import PROGRAM, Answer, braeburn, contents, damage, deep_but, events, process, rows


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "other.json"
    train_tokenizer(["some words and other words, some of them again"], 280).save(path)
    return path


def refused(directory: Path, *arguments: object) -> str:
    """The sentence of a refused call; it leaves the run directory as it was."""
    before = contents(directory)
    sentence = braeburn(*arguments).error
    assert contents(directory) == before
    return sentence


def without_jax(*arguments: object) -> Answer:
    """A call in a process of its own that must end before JAX is imported."""
    program = (
        "import sys\nfrom braeburn.cli import main\ntry:\n    main()\n"
        "finally:\n    assert not {'jax', 'orbax'} & set(sys.modules), 'JAX was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["train", "explain"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["afm-tinny"], "'afm-tinny' is not a recipe; did you mean 'afm-tiny'"),
        (["zebra"], "'zebra' is not a recipe; `braeburn recipes` lists those there are"),
        (
            ["afm-tiny", "--set", "stages.core.lerning_rate=1"],
            "did you mean 'stages.core.learning_rate'",
        ),
        (
            ["afm-tiny", "--set", "model.num_kv_heads=3"],
            "model: num_kv_heads=3 does not divide num_heads=4; set",
        ),
        (
            ["afm-tiny", "--set", "stages.core.mixture.cod=1"],
            "is not a source of the data; did you mean 'code'",
        ),
        (
            ["afm-tiny", "--set", "seed"],
            "--set 'seed' is not an assignment; write --set path=value",
        ),
        (["none.py:run"], "recipe file 'none.py' does not exist"),
    ],
)
def test_what_validation_sees_is_refused_before_jax_is_imported(
    command: str, arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out"] if command == "train" else []
    answer = without_jax(command, *arguments, *out)
    assert sentence in answer.error
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "afm-tiny"], "Missing option '--out'; `braeburn train --help`"),
        (
            ["train", "afm-tiny", "--out", "/tmp/x", "--stop-after-steps", "0"],
            "Invalid value for '--stop-after-steps'",
        ),
        (
            ["train", "afm-tiny", "--out", "/tmp/x", "--stop-after-steps", "some"],
            "Invalid value for '--stop-after-steps'",
        ),
        (["train", "--out", "/tmp/x"], "Missing argument 'RECIPE'"),
        (["trian"], "No such command 'trian'"),
        (["train", "afm-tiny", "--output", "/tmp/x"], "No such option: --output"),
        (["generate", "/tmp"], "there is no prompt; give one with --prompt TEXT"),
        (
            ["generate", "/tmp", "--prompt", "x", "--max-new-tokens", "10000000000"],
            "should be less than or equal to 1048576",
        ),
        (
            ["launch", "local", "afm-tiny", "--out", "/tmp/x", "--processes", "1000000"],
            "should be less than or equal to 1024",
        ),
    ],
)
def test_a_wrong_call_is_one_sentence_too(arguments: list[str], sentence: str) -> None:
    answer = without_jax(*arguments)
    assert sentence in answer.error
    assert answer.err.count("\n") == 1


def test_a_process_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    answer = process(
        "train",
        "afm-tiny",
        "--out",
        tmp_path / "out",
        "--set",
        "data.sources.code.paths=['/nowhere']",
    )
    assert "data.sources.code.paths" in answer.error
    assert answer.out == ""


def test_missing_files(finished: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    assert "--data: no file matches '/nowhere.txt'; name an existing file" in refused(
        finished, "evaluate", finished, "--data", "/nowhere.txt"
    )
    answer = braeburn(
        "train",
        *tiny_arguments,
        "--out",
        tmp_path / "out",
        "--set",
        'data.sources.code.paths=["/nowhere/*.py"]',
    )
    assert (
        "data.sources.code.paths: no Python file matches '/nowhere/*.py'; name an existing"
        in answer.error
    )
    answer = braeburn(
        "train",
        *tiny_arguments,
        "--out",
        tmp_path / "out",
        "--set",
        "data.tokenizer=/nowhere/tokenizer.json",
    )
    assert "data.tokenizer: there is no file '/nowhere/tokenizer.json'" in answer.error
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_empty_corpus(finished: Path, tiny_arguments: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.touch()
    answer = braeburn(
        "train",
        *tiny_arguments,
        "--out",
        tmp_path / "out",
        "--set",
        f'data.sources.code.paths=["{empty}"]',
    )
    assert "data.sources.code: empty corpus" in answer.error
    assert "--data: empty corpus" in refused(finished, "evaluate", finished, "--data", empty)


def test_text_that_is_not_there(finished: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"body": "some text"}\n')
    sentence = refused(finished, "evaluate", finished, "--data", lines)
    assert (
        "line 1 has no field 'text' (it has: body); set --field to the one that holds the text"
        in sentence
    )
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refused(finished, "evaluate", finished, "--data", binary)


def test_corrupt_shard(copied: Path, tiny: Run, tiny_arguments: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tokenizer = Tokenizer.load(copied / "tokenizer.json")
    prepared = prepare(override(tiny, {"data.cache": str(cache)}), print, tokenizer)
    damage(prepared.train["code"].directory / "tokens-00000.bin", "flip")
    sentence = refused(
        copied, "train", *tiny_arguments, "--out", copied, "--set", f"data.cache={cache}"
    )
    assert "does not have the checksum in manifest.json; delete the folder" in sentence


def test_tokenizer_of_another_run(
    copied: Path, other_tokenizer: Path, tiny_arguments: list[str]
) -> None:
    shutil.copy(other_tokenizer, copied / "tokenizer.json")
    expected = (
        f"the tokenizer {str(copied / 'tokenizer.json')!r} is not the one that checkpoint 14 "
        f"was trained with"
    )
    for arguments in (
        ["train", *tiny_arguments, "--out", copied],
        ["evaluate", copied],
        ["generate", copied, "--prompt", "x"],
        ["export", copied, "--out", copied.with_name("exported")],
    ):
        sentence = refused(copied, *arguments)
        assert expected in sentence and "put that run's own tokenizer.json back" in sentence
    assert not copied.with_name("exported").exists()


def test_a_lost_tokenizer_is_restored_from_the_checkpoint(
    finished: Path, copied: Path, tiny_arguments: list[str]
) -> None:
    (copied / "tokenizer.json").unlink()
    assert "there is no file" in refused(copied, "evaluate", copied)
    assert braeburn("train", *tiny_arguments, "--out", copied).code == 0
    assert (copied / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "model.ffn_dim=96",
            "model.ffn_dim is 96 but the run in '{}' was begun with 160; put it back to resume",
        ),
        ("model.z_loss=0", "model.z_loss is 0.0 but the run in '{}' was begun with 1e-06"),
        (
            "stages.core.learning_rate=0.5",
            "stages.core.learning_rate is 0.5 but the run in '{}' was begun with 0.01",
        ),
        ("seed=1", "seed is 1 but the run in '{}' was begun with 0"),
        (
            "optimizer.kind=adamw",
            "optimizer.kind is 'adamw' but the run in '{}' was begun with 'afm'",
        ),
    ],
)
def test_going_on_with_another_run(
    copied: Path, tiny_arguments: list[str], assignment: str, sentence: str
) -> None:
    answer = refused(copied, "train", *tiny_arguments, "--out", copied, "--set", assignment)
    assert sentence.format(copied) in answer


def test_going_on_with_other_stages(copied: Path, finished: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\nfrom braeburn.config import read_run\n"
        f"run = read_run(Path({str(finished)!r}))\n"
        "stages = run.stages\n"
        "def dropped(): return run.model_copy(update={'stages': {k: stages[k] for k in ('core', "
        "'continued')}})\n"
        "def turned(): return run.model_copy(update={'stages': dict(reversed(stages.items()))})\n"
        "def added(): return run.model_copy(update={'stages': {'zero': stages['core'], "
        "**stages}})\n"
    )
    for function in ("dropped", "turned", "added"):
        sentence = refused(copied, "train", f"{recipe}:{function}", "--out", copied)
        assert (
            "stages is [" in sentence and "begun with ['core', 'continued', 'context']" in sentence
        )


def test_a_checkpoint_of_another_model_than_the_configuration(
    copied: Path, tiny_arguments: list[str]
) -> None:
    saved = json.loads((copied / "config.json").read_text())
    saved["run"]["model"]["ffn_dim"] = 96
    (copied / "config.json").write_text(json.dumps(saved))
    sentence = refused(
        copied, "train", *tiny_arguments, "--set", "model.ffn_dim=96", "--out", copied
    )
    expected = (
        f"model.ffn_dim is 96, but checkpoint 14 of {str(copied)!r} was trained with 160; put "
        f"the fields of model back"
    )
    assert expected in sentence
    assert expected in refused(copied, "evaluate", copied)
    # What changes no shape changes the numbers all the same.
    saved["run"]["model"] |= {"ffn_dim": 160, "norm_epsilon": 0.1}
    (copied / "config.json").write_text(json.dumps(saved))
    assert "model.norm_epsilon is 0.1, but checkpoint 14 of" in refused(copied, "evaluate", copied)


def test_sequence_longer_than_the_data_in_a_later_stage(
    tiny_arguments: list[str], tmp_path: Path
) -> None:
    assignments = ["stages.context.sequence_length=262144", "stages.context.batch_tokens=262144"]
    assignments += ["stages.context.tokens=1048576"]
    answer = braeburn(
        "train",
        *tiny_arguments,
        *(part for a in assignments for part in ("--set", a)),
        "--out",
        tmp_path / "out",
    )
    tokens = re.search(
        r"sequence longer than the data: source 'long' has (\d+) training tokens", answer.error
    )
    assert tokens is not None and f"set it to at most {tokens[1]}, or add files" in answer.error
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_a_folder_that_holds_other_things(tiny_arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    sentence = refused(tmp_path, "train", *tiny_arguments, "--out", tmp_path)
    assert "holds 'thesis.tex' but no run; choose an empty or new folder" in sentence


@pytest.mark.parametrize(
    ("out", "package", "how"),
    [
        ("gs://bucket/run", "gcsfs", "install the package of that file system"),
        ("s3://bucket/run", "s3fs", "run `make extra-s3"),
    ],
)
def test_a_bucket_whose_package_is_not_installed(
    tiny_arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    package: str,
    how: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, package, None)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, out.partition(":")[0], raising=False)
    for command in (["train", *tiny_arguments, "--out", out], ["evaluate", out]):
        sentence = braeburn(*command).error
        assert f"{out!r} cannot be used (" in sentence and how in sentence
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(
    tiny_arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file / "run", file, Path("/proc/braeburn")):
        sentence = braeburn("train", *tiny_arguments, "--out", out).error
        assert (
            f"--out {str(out)!r} cannot be created (" in sentence
            and "choose another folder" in sentence
        )
    assert "name another folder" in braeburn("export", finished, "--out", file / "exported").error
    assert braeburn("export", finished, "--out", tmp_path / "hf").code == 0
    assert (
        "cannot be created (not a directory)"
        in braeburn("import", tmp_path / "hf", "--out", file / "new").error
    )


@pytest.mark.parametrize(
    "command", [["evaluate"], ["generate", "--prompt", "x"], ["export", "--out", "/tmp/nowhere"]]
)
def test_what_is_no_run_directory(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for directory in (tmp_path / "none", tmp_path, file):
        sentence = braeburn(command[0], directory, *command[1:]).error
        assert (
            "is not a run directory: it holds no config.json; name the folder given to --out"
            in sentence
        )


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"run": []}', b"\xff\xfe{", b'{"run": {"nmae": "x"}}']
)
def test_corrupt_configuration(copied: Path, tiny_arguments: list[str], content: bytes) -> None:
    (copied / "config.json").write_bytes(content)
    for arguments in (["evaluate", copied], ["train", *tiny_arguments, "--out", copied]):
        assert f"{str(copied / 'config.json')!r} does not hold a run" in refused(copied, *arguments)


def test_configuration_of_unknown_fields(copied: Path, tiny_arguments: list[str]) -> None:
    saved = json.loads((copied / "config.json").read_text())
    saved["run"]["model"]["num_experts"] = 8
    (copied / "config.json").write_text(json.dumps(saved))
    for arguments in (["evaluate", copied], ["train", *tiny_arguments, "--out", copied]):
        sentence = refused(copied, *arguments)
        assert (
            "does not hold a run of this version" in sentence
            and "'model.num_experts' is not a field" in sentence
        )


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def change(directory: Path, **fields: Any) -> None:
    """Changes fields of a run directory's configuration, as one that was received may have them."""
    saved = json.loads((directory / "config.json").read_text())
    saved["run"] |= fields
    (directory / "config.json").write_text(json.dumps(saved))


def test_a_received_run_directory_is_only_read(
    finished: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its configuration names is neither written to nor made: only `--out` and the user's own
    cache are.
    """
    monkeypatch.chdir(tmp_path)
    data = json.loads((copied / "config.json").read_text())["run"]["data"]
    change(copied, data=data | {"cache": str(tmp_path / "evil")})
    before, there = contents(copied), everything_below(tmp_path)
    assert braeburn("evaluate", copied).code == 0
    assert braeburn("generate", copied, "--prompt", "x", "--max-new-tokens", 1).code == 0
    assert (
        braeburn(
            "prune", copied, "--ffn", 96, "--method", "activation", "--out", tmp_path / "pruned"
        ).code
        == 0
    )
    assert braeburn("export", copied, "--out", tmp_path / "exported").code == 0
    assert contents(copied) == before
    made = {path.split("/")[0] for path in everything_below(tmp_path) - there}
    assert made == {"pruned", "exported"}


@pytest.mark.parametrize(
    "name", ["/tmp/evil", "../evil", "a/b", "a\\b", ".hidden", "-o", "", "a\nb", "x" * 101, "a "]
)
def test_names_are_names(copied: Path, tiny_arguments: list[str], name: str) -> None:
    change(copied, name=name)
    sentence = refused(
        copied, "export", copied, "--format", "gguf", "--out", copied.with_name("exported")
    )
    assert "config.json' does not hold a run of this version of Braeburn: name: " in sentence
    assert "cannot be a name; use up to 100 letters, digits, spaces" in sentence
    assert not copied.with_name("exported").exists()
    text = json.dumps(name)
    for path in (
        f"data.sources={{{text}: {{}}}}",
        f"stages={{{text}: {{}}}}",
        f"stages.core.mixture={{{text}: 1}}",
    ):
        sentence = braeburn("train", *tiny_arguments, "--out", copied, "--set", path).error
        assert "cannot be a name" in sentence


def test_no_checkpoint_yet(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    assert "holds no checkpoint; train for at least one checkpoint first" in refused(
        copied, "evaluate", copied
    )
    (copied / "checkpoints").mkdir()
    assert "holds no complete checkpoint; train for at least" in refused(copied, "evaluate", copied)


def truncate(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def flip(folder: Path) -> None:
    """One bit of the largest file, as memory or a disk does it."""
    path = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "item"),
    [
        (flip, "params"),
        (truncate, "run"),
        *(
            pytest.param(harm, item, marks=pytest.mark.deep)
            for harm, item in ((flip, "optimizer"), (empty, "optimizer"), (empty, "."))
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_kept(
    finished: Path, copied: Path, tiny_arguments: list[str], damage: Any, item: str
) -> None:
    damage(copied / "checkpoints" / "14" / item)
    damaged = contents(copied / "checkpoints" / "14")
    if (damage, item) != (flip, "optimizer"):  # of which nothing is read
        for arguments in (
            ["evaluate", copied],
            ["generate", copied, "--prompt", "x"],
            ["export", copied, "--out", copied.with_name("exported")],
            ["prune", copied, "--ffn", 96, "--out", copied.with_name("pruned")],
        ):
            sentence = refused(copied, *arguments)
            assert "checkpoints/14' is damaged: " in sentence
            assert sentence.endswith(
                "; checkpoint 10 is sound: move 14 out of the folder to use the newest of those "
                "left"
            )
    answer = braeburn("train", *tiny_arguments, "--out", copied)
    assert answer.code == 0, answer.err
    assert (
        "warning: checkpoint 14 is damaged (" in answer.err
        and "training goes on from step 10" in answer.err
    )
    assert [row["loss"] for row in rows(copied)] == [row["loss"] for row in rows(finished)]
    (event,) = events(copied, "damage")
    assert (event["step"], event["kept"], event["resumed"]) == (14, "14.damaged", 10)
    assert event["reason"] in answer.err
    assert contents(copied / "checkpoints" / "14.damaged") == damaged
    assert braeburn("evaluate", copied).code == 0


def test_training_does_not_begin_again_by_itself(copied: Path, tiny_arguments: list[str]) -> None:
    for step in ("10", "14"):
        flip(copied / "checkpoints" / step)
    sentence = refused(copied, "train", *tiny_arguments, "--out", copied)
    assert (
        "checkpoints/14' is damaged: " in sentence
        and "none of the others is sound: bring back a copy" in sentence
    )
    shutil.rmtree(copied / "checkpoints" / "10")
    sentence = refused(copied, "train", *tiny_arguments, "--out", copied)
    assert (
        "it is the only one: bring back a copy of it, or move it out of the folder to begin again"
        in sentence
    )


def test_a_renamed_checkpoint(copied: Path, tiny_arguments: list[str]) -> None:
    (copied / "checkpoints" / "14").rename(copied / "checkpoints" / "20")
    assert "20' is damaged: it is the checkpoint of step 14 under another name" in refused(
        copied, "evaluate", copied
    )
    answer = braeburn("train", *tiny_arguments, "--out", copied)
    assert answer.code == 0, answer.err
    assert events(copied, "damage")[0]["kept"] == "20.damaged"


def test_a_run_in_use_by_another_process(copied: Path, tiny_arguments: list[str]) -> None:
    from braeburn.train.directory import RunDirectory

    with RunDirectory(copied).claim():
        sentence = refused(copied, "train", *tiny_arguments, "--out", copied)
        assert "is in use by another process that trains there" in sentence
    assert braeburn("train", *tiny_arguments, "--out", copied).code == 0


def test_exports_and_imports_that_cannot_be(finished: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("years of work")
    assert "is not empty; name a new folder" in refused(
        occupied, "export", finished, "--out", occupied
    )
    assert (
        "--format 'onnx' is not known; use --format hf"
        in braeburn("export", finished, "--out", tmp_path / "o", "--format", "onnx").error
    )
    assert braeburn("export", finished, "--out", tmp_path / "hf").code == 0
    assert "is in use; choose a new or empty folder" in refused(
        occupied, "import", tmp_path / "hf", "--out", occupied
    )

    for name, content in {"nonsense": "{", "gpt2": '{"model_type": "gpt2"}', "list": "[]"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(content)
        assert str(folder) in braeburn("import", folder, "--out", tmp_path / "imported").error
    assert (
        "there is no folder"
        in braeburn("import", tmp_path / "none", "--out", tmp_path / "imported").error
    )
    weights = tmp_path / "hf" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert (
        "model.safetensors"
        in braeburn("import", tmp_path / "hf", "--out", tmp_path / "imported").error
    )
    assert not (tmp_path / "imported").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    page = tmp_path / "none" / "page.html"
    sentence = braeburn("plan", "llama3-8b", "--on", "h100:8", "--html", page).error
    assert (
        f"{str(page)!r} cannot be used (no such file or directory); put right what is there"
        in sentence
    )


def test_folders_of_others_beside_an_import(finished: Path, tmp_path: Path) -> None:
    assert braeburn("export", finished, "--out", tmp_path / "hf").code == 0
    for name in (".imported.partial", ".imported.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    assert braeburn("import", tmp_path / "hf", "--out", tmp_path / "imported").code == 0
    for name in (".imported.partial", ".imported.partial-1"):
        assert (tmp_path / name / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".imported.partial",
        ".imported.partial-1",
        "hf",
        "imported",
    ]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--temperature", "-1", "Invalid value for '--temperature'"),
        ("--top-p", "0", "top_p=0.0 is not in (0, 1]; set top_p to 1"),
        ("--top-p", "2", "Invalid value for '--top-p'"),
        ("--max-new-tokens", "0", "Invalid value for '--max-new-tokens'"),
        ("--seed", "-1", "Invalid value for '--seed'"),
    ],
)
def test_sampling_out_of_range(finished: Path, option: str, value: str, sentence: str) -> None:
    assert sentence in refused(finished, "generate", finished, "--prompt", "x", option, value)


@pytest.mark.parametrize(
    "arguments", [("--prompt", "caf\udce9"), ("--prompt", "x", "--seed", "\udcff")]
)
def test_what_is_not_utf_8(finished: Path, arguments: tuple[str, ...]) -> None:
    sentence = refused(finished, "generate", finished, *arguments)
    assert f"the argument {arguments[-1]!r} is not UTF-8; write it in UTF-8" in sentence


def test_text_longer_than_the_context_is_warned_of(finished: Path) -> None:
    answer = braeburn("generate", finished, "--prompt", "x = 1\n" * 200, "--max-new-tokens", 1)
    assert answer.code == 0
    assert (
        "warning: the prompt alone has up to " in answer.err
        and "sequences of at most 256" in answer.err
    )
    answer = braeburn("generate", finished, "--prompt", "x", "--max-new-tokens", 300)
    (limit,) = re.findall(r"set --max-new-tokens to at most (\d+)", answer.err)
    assert braeburn("generate", finished, "--prompt", "x", "--max-new-tokens", limit).err == ""


@pytest.mark.parametrize("seed", deep_but([2**64 - 1], [2**32, 2**63, 2**64 - 1]))
def test_large_seeds_train_another_model(
    finished: Path, tiny_arguments: list[str], tmp_path: Path, seed: int
) -> None:
    command = ["train", *tiny_arguments, "--set", f"seed={seed}", "--out", tmp_path / "run"]
    answer = braeburn(*command, "--stop-after-steps", 1)
    assert answer.code == 0, answer.err
    assert rows(tmp_path / "run")[0]["loss"] != rows(finished)[0]["loss"]
    assert braeburn(*command, "--stop-after-steps", 1).code == 0


def test_nothing_held_out(tiny_arguments: list[str], tmp_path: Path) -> None:
    command = [
        "train",
        *tiny_arguments,
        "--set",
        "data.held_out=0",
        "--out",
        tmp_path,
        "--stop-after-steps",
        6,
    ]
    answer = braeburn(*command)
    assert answer.code == 0, answer.err
    assert "warning" not in answer.err.replace("warning: using 1 of 8 devices", "")
    assert answer.out.splitlines()[1].split()[3:] == ["-", "-", "-"]
    assert (
        "the run holds out no text; name files with --data" in braeburn("evaluate", tmp_path).error
    )


def mount(folder: Path, *options: str) -> bool:
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | None]:
    """A folder that is a disk of the size that the test is marked with; None where the test has
    passed already.

    Without the right to mount one here, the test runs in another process that has its own users and
    mounts.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount(folder, "-o", f"size={request.param}"):
        yield folder
        subprocess.run(["umount", "-l", folder], check=False)
        return
    namespace = ["unshare", "-rm"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], check=False).returncode
    ):
        pytest.skip("neither mount nor unshare -rm is allowed here")
    node = f"{request.path}::{request.node.name}"
    command = [
        *namespace,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-cov",
        node,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    yield None


def on_a_disk(size: str) -> Any:
    """Runs a test on a small disk of its own, here or in another process."""

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def run(small_disk: Path | None, **fixtures: Any) -> None:
            if small_disk is not None:
                test(small_disk=small_disk, **fixtures)

        return pytest.mark.parametrize("small_disk", [size], indirect=True)(run)

    return decorate


@on_a_disk("512k")
def test_no_space_for_the_first_checkpoint(small_disk: Path, tiny_arguments: list[str]) -> None:
    answer = braeburn("train", *tiny_arguments, "--out", small_disk / "run")
    assert "no space left: a checkpoint takes 1,4" in answer.error
    assert "bytes and " in answer.error and "free some or choose another --out" in answer.error
    assert list((small_disk / "run").glob("[!.]*")) == []


@pytest.mark.deep
@on_a_disk("6m")
def test_a_disk_that_fills_up_during_a_checkpoint(
    small_disk: Path, finished: Path, tiny_arguments: list[str]
) -> None:
    out = small_disk / "run"
    arguments = ["train", *tiny_arguments, "--out", out, "--set", "checkpoint.keep_last=5"]
    assert braeburn(*arguments, "--stop-after-steps", 6).code == 0
    # Room for the early check to pass, but not for the next checkpoint with what goes with it.
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 1_600_000))
    answer = process(*arguments)
    assert (
        answer.error.startswith("error: no space left in ")
        and "run the same command to resume" in answer.error
    )
    assert "resuming from step 6" in answer.err
    ballast.unlink()

    assert json.loads(braeburn("evaluate", out, "--json").out)["step"] in (6, 10)
    answer = braeburn(*arguments)
    assert answer.code == 0, answer.err
    assert [(row["step"], row["loss"]) for row in rows(out)] == [
        (row["step"], row["loss"]) for row in rows(finished)
    ]
    assert [event["step"] for event in events(out, "stop")] == [6, 14]


@pytest.mark.deep
@on_a_disk("4m")
def test_a_disk_that_fills_between_checkpoints(small_disk: Path, tiny_arguments: list[str]) -> None:
    """The run goes on without its logs, heeds a request to stop, and says what is wrong once it
    cannot save.
    """
    out, ballast = small_disk / "run", small_disk / "ballast"
    arguments = [
        "train",
        *tiny_arguments,
        "--out",
        str(out),
        "--set",
        "checkpoint.every_steps=100000",
    ]
    long = ["--set", "stages.core.tokens=102400000"]
    training = subprocess.Popen([*PROGRAM, *arguments, *long], stderr=subprocess.PIPE, text=True)
    wait_for_rows(out, training)
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 4096))
    wait_until_full(out)
    assert training.poll() is None
    training.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, log = training.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert training.returncode == 2, log
    assert "Traceback" not in log and "Exception" not in log
    assert log.splitlines()[-1].startswith("error: no space left")
    for name in ("metrics.jsonl", "events.out.tfevents"):
        assert len(re.findall(f"warning: '.*{name}.*' cannot be written .No space left", log)) == 1
    ballast.unlink()
    before = rows(out)
    assert [row["step"] for row in before] == list(range(1, len(before) + 1))
    answer = process(*arguments, *long, "--stop-after-steps", 2)
    assert answer.code == 0, answer.err
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in before[:2]]


def wait_until_full(out: Path) -> None:
    """Returns once the run's files have not grown for a second."""
    sizes: list[int] = []
    deadline = time.monotonic() + 100
    while len(sizes) < 10 or sizes[-1] != sizes[-10]:
        assert time.monotonic() < deadline
        sizes.append(sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))
        time.sleep(0.1)


def wait_for_rows(out: Path, training: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while (
        not (out / "metrics.jsonl").exists()
        or len((out / "metrics.jsonl").read_bytes().splitlines()) < 3
    ):
        assert training.poll() is None and time.monotonic() < deadline, training.communicate()
        time.sleep(0.01)


@pytest.mark.deep
@on_a_disk("64k")
def test_a_full_disk_below_tensorboard(
    small_disk: Path, finished: Path, copied: Path, tiny_arguments: list[str]
) -> None:
    for step in ("10", "14"):
        shutil.rmtree(copied / "checkpoints" / step)
    (small_disk / "ballast").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    shutil.rmtree(copied / "tensorboard")
    (copied / "tensorboard").symlink_to(small_disk)
    answer = process("train", *tiny_arguments, "--out", copied, timeout=100)
    assert answer.code == 0, answer.err
    assert (
        answer.err.count("cannot be written")
        == answer.err.count("records could not be written")
        == 1
    )
    assert [row["loss"] for row in rows(copied)] == [row["loss"] for row in rows(finished)]


def test_a_limit_on_the_size_of_files(
    finished: Path, tiny_arguments: list[str], tmp_path: Path
) -> None:
    arguments = ["train", *tiny_arguments, "--out", tmp_path / "run", "--stop-after-steps", 1]
    limits = (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    answer = process(
        *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    )
    assert (
        "checkpoints' cannot grow (files are limited to 100,000 bytes); raise the limit, as with"
        in answer.error
    )
    assert braeburn(*arguments).code == 0


@on_a_disk("64k")
def test_a_disk_that_cannot_be_written(small_disk: Path, tiny_arguments: list[str]) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for out, problem in (
        (small_disk / "run", "cannot be written to"),
        (small_disk / "new", "cannot be created (read-only"),
    ):
        assert (
            f"--out {str(out)!r} {problem}"
            in braeburn("train", *tiny_arguments, "--out", out).error
        )


def test_interruption_is_no_traceback(tiny_arguments: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "slow.py"
    recipe.write_text("import os, signal\ndef run(): os.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [*PROGRAM, "explain", f"{recipe}:run"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # which shells ignore in the background
    )
    assert done.returncode == 130
    assert done.stderr in ("", "interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory"),
        MemoryError(),
    ],
)
def test_memory_that_is_used_up(
    error: Exception, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("braeburn.evaluate.text.measure", fail)
    sentence = braeburn("evaluate", finished).error
    assert "is used up" in sentence and "--mesh" in sentence and "--dtype bf16" in sentence
    assert str(error) in sentence
