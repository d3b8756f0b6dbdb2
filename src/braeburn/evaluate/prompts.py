"""Prompts from the command line, from files and from standard input."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from braeburn.errors import UserError
from braeburn.reading import read_text
from braeburn.remote import is_remote

STANDARD_INPUT = "-"
JSON_LINES = (".jsonl", ".ndjson")


def gather_prompts(texts: Sequence[str], files: Sequence[str], field: str) -> list[str]:
    """All prompts: those of the command line, then those of the files in their order.

    Args:
        texts: prompts; "-" is all that standard input has.
        files: of one prompt a line, or of JSON lines; "-" is standard input, a prompt a line.
        field: of JSON lines that holds the prompt.

    Raises:
        UserError: there is none, a file cannot be read, or a line holds no prompt.
    """
    check_prompts(texts, files)
    found = [_standard_input() if text == STANDARD_INPUT else text for text in texts]
    for file in files:
        found += _of_file(file, field)
    return found


def check_prompts(texts: Sequence[str], files: Sequence[str]) -> None:
    """Refuses what cannot be prompts, before a file is read; arguments as of `gather_prompts`.

    Raises:
        UserError: there is none, a file is a URL, or standard input is named twice.
    """
    if not texts and not files:
        raise UserError(
            "there is no prompt; give one with --prompt TEXT, or a file of them with --prompts FILE"
        )
    if [*texts, *files].count(STANDARD_INPUT) > 1:
        raise UserError(
            "standard input is named more than once, and can be read once; leave one - out"
        )
    for file in files:
        if is_remote(file):
            raise UserError(
                f"--prompts {file!r} is a URL, and prompts are read from disks; copy the file to "
                f"where the command runs"
            )


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8; convert it, as with iconv -t UTF-8") from None


def _of_file(file: str, field: str) -> Iterator[str]:
    where = "standard input" if file == STANDARD_INPUT else repr(file)
    if file == STANDARD_INPUT:
        text = _standard_input()
    else:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"--prompts {file!r} is no file; name one with a prompt a line")
        text = read_text(path, "write it as text with a prompt a line")
    is_json = file.endswith(JSON_LINES)
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        empty = False
        yield _of_row(line, field, f"line {number} of {where}") if is_json else line
    if empty:
        raise UserError(f"{where} holds no prompt; write a prompt a line into it")


def _of_row(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON; write an object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{where} has no text in the field {field!r} (it has {has}); name the field with "
            f"--field"
        )
    text: str = row[field]
    return text
