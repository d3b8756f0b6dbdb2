"""Reading JSON files that may have been damaged or made by others.

Whatever is wrong with a file is told in one clause. Callers know what the file is for, and make a
sentence of it.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Far more than any description, event or row that this program writes.
MOST_BYTES = 1 << 26
# Parsed by hand the limit is Python's own depth of calls, which depends on who calls.
DEEPEST = 100


class Unreadable(ValueError):
    """A file does not hold what it should; the message is a clause without its subject, as "is not
    UTF-8".
    """


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The value that a JSON file holds.

    Args:
        path: of the file.
        most_bytes: that the file may have.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is no ordinary file, too large, not UTF-8, or no JSON that could be meant.
        OSError: it cannot be read.
    """
    return parse_json(read_bytes(path, most_bytes))


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file of a size that is sane.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is no ordinary file, or too large.
        OSError: it cannot be read.
    """
    try:
        status = path.stat()
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    _require_ordinary(status)
    if status.st_size > most_bytes:
        raise Unreadable(
            f"has {status.st_size:,} bytes, more than the {most_bytes:,} that such a file can have"
        )
    return path.read_bytes()


def _require_ordinary(status: os.stat_result) -> None:
    """Refuses folders, and pipes and devices, which may be read for ever."""
    if stat.S_ISDIR(status.st_mode):
        raise Unreadable("is a folder where a file belongs")
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("is not an ordinary file")


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text stands for.

    Raises:
        Unreadable: it is not UTF-8, no JSON, nested too deeply, or has half a character or a number
            that is too long.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text)
        if "\\ud" in text.lower():
            # Half of a character in two parts is a string to Python, but to nothing else.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable("has a string with half of a surrogate pair") from None
    except UnicodeDecodeError:
        raise Unreadable("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not JSON (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise Unreadable(f"is nested more than {DEEPEST} deep") from None
    except ValueError:
        raise Unreadable("has a number of thousands of digits") from None
    if _is_deep(value):
        raise Unreadable(f"is nested more than {DEEPEST} deep")
    return value


def parse_object(content: bytes | str) -> dict[str, Any]:
    """The JSON object that text stands for.

    Raises:
        Unreadable: as `parse_json`, or it is another value than an object.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise Unreadable("holds no JSON object")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested beyond the limit, found without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [part for part in level if isinstance(part, dict | list)]
        if not inner:
            return False
        level = [
            child for part in inner for child in (part.values() if isinstance(part, dict) else part)
        ]
    return True


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, but for lines that are none, as one cut short by a full
    disk or a kill.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is no ordinary file.
        OSError: it cannot be read.
    """
    _require_ordinary(path.stat())
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(MOST_BYTES), b""):
            try:
                value = parse_json(line)
            except Unreadable:
                continue
            if isinstance(value, dict):
                yield value
