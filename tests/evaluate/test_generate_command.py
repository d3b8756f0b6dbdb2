"""`braeburn generate` from the command line: where prompts come from, what is printed and when."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from braeburn.evaluate.prompts import gather_prompts
from support import PROGRAM, braeburn, together

GREEDY = ("--greedy", "--max-new-tokens", "12")


def samples(directory: Path, *arguments: Any) -> list[dict[str, Any]]:
    answer = braeburn("generate", directory, "--json", *GREEDY, *arguments)
    assert answer.code == 0, answer.err
    return json.loads(answer.out)["samples"]


def test_prompts_come_from_options_files_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\r\n\n two \n")
    rows.write_text('{"text": "a\\nb"}\n{"text": "c", "n": 1}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\n"))
    found = gather_prompts(["first"], [str(lines), "-", str(rows)], "text")
    assert found == ["first", "one", " two ", "x", "y", "a\nb", "c"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\n"))
    assert gather_prompts(["-", "then"], [], "text") == ["x\ny\n", "then"]


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        ("\n\n", "a.txt", "holds no prompt; write a prompt a line into it"),
        ("{", "a.jsonl", "line 1 of '{path}' is not JSON; write an object a line"),
        ('{"text": 1}', "a.jsonl", "has no text in the field 'prompt' (it has text); name the"),
        ("[1]", "a.jsonl", "has no text in the field 'prompt' (it has list)"),
        (b"\xff\xfe", "a.txt", "cannot be read"),
        (None, "a.txt", "is no file; name one with a prompt a line"),
    ],
)
def test_files_without_prompts(
    content: Any, name: str, sentence: str, finished: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = braeburn("generate", finished, "--prompts", path).error
    assert sentence.replace("{path}", str(path)) in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is no prompt; give one with --prompt TEXT, or a file of them with --prompts"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "there are 2 prompts; leave --stream out"),
        (["--prompt", "-", "--prompts", "-"], "standard input is named more than once"),
        (["--prompt", "a", "--dtype", "int8"], "--dtype 'int8' is not known; use --dtype fp32"),
        (["--prompt", "a", "--mesh", "context=2"], "deal prompts out to the devices with --mesh"),
        (["--prompt", "a", "--mesh", "tensor=3"], "mesh.tensor to one of"),
    ],
)
def test_mistakes(arguments: list[str], sentence: str, finished: Path) -> None:
    assert sentence in braeburn("generate", finished, *arguments).error


def test_batches_meshes_and_streams_write_the_same(finished: Path, tmp_path: Path) -> None:
    texts = ["def ", "import os\nimport sys\n\n\nclass Reader", "for x in", "a = 1"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    expected = samples(finished, "--prompts", rows, "--dtype", "fp32")
    assert [sample["prompt"] for sample in expected] == texts
    assert samples(finished, "--prompts", rows, "--dtype", "fp32", "--batch", 3) == expected
    mesh = ("--mesh", "data=2,tensor=2")
    assert samples(finished, "--prompts", rows, "--dtype", "fp32", *mesh) == expected
    options = ("--prompts", rows, "--dtype", "fp32", "--json", "--stream")
    events = [
        json.loads(line)
        for line in braeburn("generate", finished, *GREEDY, *options).out.splitlines()
    ]
    assert len(events) > 2 * len(texts)
    for number, sample in enumerate(expected):
        own = [event for event in events if event["prompt"] == number]
        assert "".join(event["text"] for event in own) == sample["text"]
        assert [token for event in own for token in event["tokens"]] == sample["tokens"]
        assert [event["end"] for event in own] == [None] * (len(own) - 1) + [sample["end"]]


def test_a_stream_prints_what_is_printed_at_once(finished: Path) -> None:
    whole = braeburn("generate", finished, *GREEDY, "--prompt", "def ")
    streamed = braeburn("generate", finished, *GREEDY, "--prompt", "def ", "--stream")
    assert streamed.out == whole.out
    assert whole.out.startswith("def ")


def test_memory_is_that_of_the_type(finished: Path) -> None:
    def memory(dtype: str) -> dict[str, int]:
        answer = braeburn(
            "generate", finished, "--json", "--prompt", "a", *GREEDY, "--dtype", dtype
        )
        return json.loads(answer.out)["memory"]

    wide, half = memory("fp32"), memory("bf16")
    assert half["cache"] * 2 == wide["cache"]
    assert half["weights"] < 0.51 * wide["weights"]


@pytest.mark.deep
def test_two_processes_write_what_one_writes(finished: Path) -> None:
    arguments = ["--prompt", "def ", "--prompt", "import os", "--dtype", "fp32"]
    expected = samples(finished, *arguments)
    command = ["generate", str(finished), "--json", *GREEDY, *arguments]
    command += ["--mesh", "data=2,tensor=2"]
    main, other = together(*[[*PROGRAM, *command]] * 2, devices=2)
    assert json.loads(main.out)["samples"] == expected, main.err[-2000:]
    assert other.out == ""
