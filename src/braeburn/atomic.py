"""Files that appear complete or not at all."""

import uuid
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new, never a part; UTF-8."""
    # Other hosts may write here too, so that a process's number would not do.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
