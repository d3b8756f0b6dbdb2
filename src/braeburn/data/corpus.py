"""Documents from files of any fsspec file system, streamed, and split into training and held-out
text by hash.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from braeburn.config import Source
from braeburn.data import formats
from braeburn.data.division import Part, divide
from braeburn.data.files import File, files
from braeburn.data.formats import ROWS, Document, Reading
from braeburn.data.streams import DAMAGE, kind_of, members, shortened
from braeburn.errors import UserError
from braeburn.extras import how_to_install

__all__ = [
    "READING_VERSION",
    "Document",
    "File",
    "Report",
    "documents",
    "files",
    "is_held_out",
    "merge",
    "nothing_found",
    "read",
]

# Goes up when the same files give other documents, so that what was tokenised before is not taken
# for the same.
READING_VERSION = 2


@dataclass
class Report:
    """What was met while documents were read.

    Attributes:
        passed_over: what held no text, by kind, and how often it was met.
        separator_missing: whether the source has a separator that is in none of its files.
    """

    passed_over: dict[str, int] = field(default_factory=dict)
    separator_missing: bool = False


def documents(
    name: str,
    source: Source,
    held_out: bool | None = None,
    fraction: float = 0.0,
    report: Report | None = None,
) -> Iterator[Document]:
    """The documents of a source in a fixed order, at most one row or a part of a text in memory at
    a time.

    Files are named by their path below the source's root, so the split survives a move of the
    folder; rows by the hash of their text, so duplicates land on one side. Documents of white space
    alone are left out.

    Args:
        name: the source's name in `data.sources`, for errors.
        source: where the files are and how to read them.
        held_out: True for the held-out documents alone, False for the others, None for all.
        fraction: the share of documents, in [0, 1], that is held out.
        report: filled in by the time of the last document.

    Raises:
        UserError: no file matches, a file cannot be read, or nothing is left to train on.
    """
    side = _Side(held_out, fraction)
    reports = []
    found = False
    for part in divide(source, files(name, source)):
        reports.append(Report())
        for document in read(name, source, part, side.holds, reports[-1]):
            found = True
            yield document
    whole = merge(reports)
    if report is not None:
        report.passed_over = whole.passed_over
        report.separator_missing = whole.separator_missing
    if not found and held_out is not True:
        raise UserError(nothing_found(name, source, side.left_out, whole))


def merge(reports: Sequence[Report]) -> Report:
    """The report of a source, given those of all its parts."""
    passed_over: Counter[str] = Counter()
    for report in reports:
        passed_over.update(report.passed_over)
    return Report(
        dict(sorted(passed_over.items())),
        bool(reports) and all(report.separator_missing for report in reports),
    )


def read(
    name: str, source: Source, part: Part, wanted: Callable[[str], bool], report: Report
) -> Iterator[Document]:
    """The documents of a part of a source that are wanted, in a fixed order; see `documents`.

    Args:
        name: the source's name in `data.sources`, for errors.
        source: how to read its files.
        part: which of them.
        wanted: tells by a document's name whether it is to be read.
        report: filled in by the time of the last document.

    Raises:
        UserError: a file cannot be read.
    """
    reading = Reading(wanted)
    for file in part.files:
        # Where it can be, the side is decided before the file is opened.
        if not _is_one_document(source, file) or wanted(file.name):
            yield from _read(name, source, file, part, reading)
    report.passed_over = dict(sorted(reading.passed_over.items()))
    report.separator_missing = source.separator is not None and not reading.separated


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out `fraction`."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
        < fraction
    )


class _Side:
    """The documents of one side of the split, told by their names."""

    def __init__(self, held_out: bool | None, fraction: float) -> None:
        self._held_out = held_out
        self._fraction = fraction
        self._last_left_out: str | None = None
        self.left_out = 0

    def holds(self, name: str) -> bool:
        """Whether the document is on this side.

        Asked of one document several times in a row, it counts it once.
        """
        if self._held_out is None or self._held_out == is_held_out(name, self._fraction):
            return True
        if name != self._last_left_out:
            self.left_out += 1
        self._last_left_out = name
        return False


def _is_one_document(source: Source, file: File) -> bool:
    """Whether the file's name alone tells that it is one document."""
    kind = kind_of(file.path)
    if kind.archive:
        return False
    if source.format == "auto":
        return source.separator is None and kind.suffix not in ROWS and kind.suffix != ".json"
    return source.format.startswith("python-") or (
        source.format == "text" and source.separator is None
    )


def nothing_found(name: str, source: Source, left_out: int, report: Report) -> str:
    """The sentence about a source that leaves nothing to train on.

    Args:
        name: of the source.
        source: its configuration.
        left_out: documents that are held out.
        report: of reading its files.
    """
    if left_out:
        return (
            f"data.sources.{name}: all its documents ({left_out}) are held out; add files, "
            f"set data.sources.{name}.separator to cut them into documents, or lower data.held_out"
        )
    met = ", ".join(f"{count:,} {kind}" for kind, count in report.passed_over.items())
    return (
        f"data.sources.{name}: empty corpus, its files hold no text{f' ({met})' if met else ''}; "
        f"name files that do in data.sources.{name}.paths, or mend "
        f"data.sources.{name}.format={source.format!r}"
    )


def _read(
    name: str, source: Source, file: File, part: Part, reading: Reading
) -> Iterator[Document]:
    """The documents of a file, or of all members of an archive, that are wanted."""
    where = f"data.sources.{name}: {file.path!r}"
    fix = f"set data.sources.{name}.field to the one that holds the text"
    try:
        for member in members(file, where, reading.pass_over):
            form = formats.format_of(source, member)
            if form in ("jsonl", "parquet"):
                member = replace(member, start=part.start, stop=part.stop)
                yield from formats.rows(member, form, source, reading, fix)
            elif form.startswith("python-"):
                yield from formats.python(member, form, reading)
            else:
                yield from formats.text(member, source.separator, reading)
    except ImportError as error:
        raise UserError(f"{where} needs a package ({error}); {how_to_install('data')}") from None
    except DAMAGE as error:
        raise UserError(
            f"{where} is unreadable, truncated or corrupt ({shortened(error)}); fetch it again or "
            f"leave it out"
        ) from None
