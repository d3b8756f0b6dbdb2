"""Files that appear complete or not at all."""

import os
import uuid
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new, never a part; UTF-8.

    The text is on the disk itself before the file has its name, so that not even a power cut leaves
    an empty one.

    Raises:
        OSError: naming the file, which is as it was.
    """
    # Other hosts may write here too, so that a process's number would not do.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Returns once the names in a folder are on the disk itself, where its file system can tell."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
