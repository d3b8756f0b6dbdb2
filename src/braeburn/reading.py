"""Files that others wrote, read with care: whatever they hold, the answer is their contents or one
sentence.

A file may be missing, a folder, a pipe that never ends, too large, not text, not JSON, nested too
deeply, or hold a number of thousands of digits. None of this may hang, fill the memory or end in a
traceback.
"""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from braeburn.errors import UserError
from braeburn.jsonfile import Unreadable, parse_object, read_bytes

# The largest tokenizers and weight indices on the Hugging Face hub have about 40 MB.
LARGEST_TEXT_BYTES = 512 * 2**20


def is_regular(path: Path) -> bool:
    """Whether a path, once links are followed, is an ordinary file: no folder, pipe, socket or
    device.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a ValueError for a name with a null character
        return False


def read_text(path: Path, fix: str, largest_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """The UTF-8 text of a file.

    Args:
        path: the file.
        fix: what the user can do if it cannot be read, as in "download it again".
        largest_bytes: a larger file is refused.

    Raises:
        UserError: it is missing, no ordinary file, too large, not readable or not UTF-8.
    """
    try:
        return read_bytes(path, largest_bytes).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({_reason(error)}); {fix}") from None


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: the file.
        fix: what the user can do if it cannot be read.

    Raises:
        UserError: the file cannot be read, or holds no JSON object.
    """
    text = read_text(path, fix)
    try:
        return parse_object(text)
    except Unreadable as error:
        raise UserError(f"{str(path)!r} cannot be read ({_reason(error)}); {fix}") from None


def shown(value: Any, width: int = 60) -> str:
    """A value as a sentence can show it: its `repr`, cut short where it is long."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of thousands of digits, or lists in lists in lists
        return f"a very long {type(value).__name__}"
    return text if len(text) <= width else f"{text[:width]}..."


def _reason(error: Exception) -> str:
    """The first line of what went wrong."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    message = str(error).partition("\n")[0] or type(error).__name__
    return f"it {message}" if isinstance(error, Unreadable) else message


Foreign = TypeVar("Foreign", bound=BaseModel)


def validated(kind: type[Foreign], contents: Mapping[str, Any], path: str, fix: str) -> Foreign:
    """The fields of a JSON object that are read, once each has the type that it must have.

    Args:
        kind: names the fields and their types; it ignores all others.
        contents: the object.
        path: names the file in errors.
        fix: what the user can do if a field has another type.

    Raises:
        UserError: naming the first field of another type, and its value.
    """
    try:
        return kind.model_validate(contents)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        raise UserError(
            f"{path!r}: {field} cannot be {shown(contents.get(field))}; {fix}"
        ) from None
