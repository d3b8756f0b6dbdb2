"""The parts of a source: some of its files, or a range of one, that are read and tokenised by
themselves.

The division depends on the files and their sizes alone, so that any number of workers on any
machines agree on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from braeburn.config import Source
from braeburn.data.files import File
from braeburn.data.formats import ROWS
from braeburn.data.streams import kind_of

# Ten seconds' work for a core, more or less.
PART_BYTES = 64 * 2**20
LONG_FILE_BYTES = 32 * 1024


@dataclass(frozen=True)
class Part:
    """Neighbouring files of a source, or the rows of one file that begin in a range of its bytes.

    Attributes:
        files: which files, in their order.
        start: the range's first byte, where there is one file.
        stop: the byte behind its last; None for the end of the file.
    """

    files: tuple[File, ...]
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the files on disk, compressed where they are."""
        whole = sum(file.size for file in self.files)
        return (whole if self.stop is None else self.stop) - self.start


def divide(source: Source, files: Sequence[File]) -> list[Part]:
    """The parts of a source, which in this order hold what its files do.

    Small files go together. A large file of JSON lines or Parquet that is not compressed is
    divided; any other file, which can be read from its beginning alone, is in one part.

    Args:
        source: how its files are read.
        files: all of them, in order.
    """
    parts: list[Part] = []
    together: list[File] = []
    size = 0

    def end_part() -> None:
        nonlocal together, size
        if together:
            parts.append(Part(tuple(together)))
        together, size = [], 0

    for file in files:
        if source.format == "python-long" and file.size < LONG_FILE_BYTES:
            continue
        count = round(file.size / PART_BYTES) if _can_be_divided(source, file) else 1
        if count > 1:
            end_part()
            edges = [file.size * index // count for index in range(count)]
            stops = [*edges[1:], None]
            parts += [Part((file,), start, stop) for start, stop in zip(edges, stops, strict=True)]
            continue
        together.append(file)
        size += file.size
        if size >= PART_BYTES:
            end_part()
    end_part()
    return parts


def _can_be_divided(source: Source, file: File) -> bool:
    """Whether rows can be found from anywhere in a file."""
    kind = kind_of(file.path)
    if kind.compression or kind.archive:
        return False
    return source.format in ("jsonl", "parquet") or (
        source.format == "auto" and kind.suffix in ROWS
    )
