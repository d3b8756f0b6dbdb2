"""Mutations of files: bytes flipped, cut and repeated; JSON of other types and depths; no ordinary
file at all.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**12,
    1e308,
    -0.5,
    1e-320,
    "",
    " ",
    "x",
    "\n",
    "../../x",
    "/tmp/x",
    "\x00",
    "\ud800",
    "é" * 1000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"x": {"x": {}}},
    ["a"] * 1000,
)
# As text, since Python would not write or read them all as values.
STRANGE_TEXTS = (
    "9" * 5001,
    "-" + "9" * 5001,
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"\\ud800"',
    "0" * 100,
    "1.",
    "tru",
    "'x'",
)
MARK = "a mark that is replaced by strange text"


def flip_bits(rng: random.Random, content: bytes) -> bytes:
    """One to eight bits are flipped."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content) + 1)]


def remove(rng: random.Random, content: bytes) -> bytes:
    """A piece is missing."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.randint(1, 64) :]


def repeat(rng: random.Random, content: bytes) -> bytes:
    """A piece is there twice."""
    start = rng.randrange(len(content) + 1)
    end = start + rng.randint(1, 256)
    return content[:end] + content[start:end] + content[end:]


def insert(rng: random.Random, content: bytes) -> bytes:
    """Random bytes are put in."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.randint(1, 32)) + content[start:]


def replace_all(rng: random.Random, content: bytes) -> bytes:
    """The whole is something else."""
    others = (
        b"",
        b"\x00" * 100,
        b"\xff\xfe",
        b"PK\x03\x04",
        b"\x1f\x8b",
        b"[]",
        b"{}",
        b"null",
        b'"x"',
        b"1",
        b"\n" * 50,
    )
    return rng.choice([*others, rng.randbytes(200)])


def change_json(rng: random.Random, content: bytes) -> bytes:
    """A value of a JSON document, or of a line of JSON Lines, is another; or a key is missing,
    renamed or added.
    """
    try:
        return _changed_document(rng, content)
    except ValueError:
        pass
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    at = rng.randrange(len(lines))
    try:
        lines[at] = _changed_document(rng, lines[at]) + b"\n"
    except ValueError:
        return flip_bits(rng, content)
    return b"".join(lines)


def _changed_document(rng: random.Random, content: bytes) -> bytes:
    value = json.loads(content)
    places = list(_places(value))
    if not places:
        return json.dumps(rng.choice(STRANGE)).encode()
    holder, key = rng.choice(places)
    action = rng.random()
    if action < 0.6:
        holder[key] = rng.choice([*STRANGE, MARK])
    elif action < 0.75:
        del holder[key]
    elif isinstance(holder, dict):
        holder["strange" if action < 0.9 else f"{key}s"] = rng.choice(STRANGE)
    else:
        holder.insert(0, rng.choice(STRANGE))
    text = json.dumps(value).replace(json.dumps(MARK), rng.choice(STRANGE_TEXTS))
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value; of long lists and dictionaries the first and the last
    few.
    """
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return
    for key in keys if len(keys) <= 40 else keys[:20] + keys[-20:]:
        yield value, key
        yield from _places(value[key])


CONTENTS: tuple[Mutation, ...] = (flip_bits, cut, remove, repeat, insert, replace_all)


def put_in_place(rng: random.Random, path: Path) -> str:
    """Puts something that is no ordinary file where a file is; returns what."""
    kind = rng.choice(
        ["missing", "folder", "pipe", "loop", "empty", "unreadable", "link to nothing"]
    )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link to nothing":
        path.symlink_to("nothing-here")
    elif kind != "missing":
        path.touch()
        if kind == "unreadable":
            path.chmod(0)
    return kind


def mutate(rng: random.Random, path: Path) -> str:
    """Changes one file; returns what was done to it."""
    if rng.random() < 0.08:
        return f"{path.name}: {put_in_place(rng, path)}"
    content = path.read_bytes()
    textual = path.suffix in (".json", ".jsonl") or content[:1] in (b"{", b"[")
    mutation = change_json if textual and rng.random() < 0.75 else rng.choice(CONTENTS)
    path.write_bytes(mutation(rng, content))
    return f"{path.name}: {mutation.__name__}"
