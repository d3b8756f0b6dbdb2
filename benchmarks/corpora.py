"""The text that benchmarks train on: files that the user names, real corpora near by, or Python's
own library.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from braeburn.atomic import write_atomically
from braeburn.config import Source

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("tinyshakespeare.txt", "wikitext2-valid.txt", "gsm8k-train.jsonl")
# Files are cut into documents of about as many characters, so that some of each can be held out.
DOCUMENT = 8192


def sources(files: Sequence[Path], folder: Path) -> dict[str, Source]:
    """A source for each file, cut into documents that are written to a folder; by default for each
    real corpus.

    Where none is there, the text is the docstrings and code of Python's library, which one sentence
    says.
    """
    files = files or [SHARED / name for name in NAMES if (SHARED / name).exists()]
    if not files:
        print(
            f"No corpus is in {str(SHARED)!r}, so the text is the library of this Python; name "
            f"others with --data.",
            file=sys.stderr,
        )
        return {"code": Source(format="python-code"), "prose": Source(format="python-prose")}
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for file in files:
        path = folder / f"{file.stem}.jsonl"
        rows = "".join(json.dumps({"text": text}) + "\n" for text in documents_of(file))
        # A file that is written again counts as another, and is tokenised again.
        if not path.exists() or path.read_text() != rows:
            write_atomically(path, rows)
        found[file.stem] = Source(paths=(str(path),))
    return found


def documents_of(file: Path) -> Iterator[str]:
    """The rows of a file of JSON lines, of each all strings; of other files runs of lines."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if file.suffix == ".jsonl":
        rows = (json.loads(line) for line in lines if line.strip())
        yield from (
            "\n".join(value for value in row.values() if isinstance(value, str)) for row in rows
        )
        return
    document = ""
    for line in lines:
        document += line
        if len(document) >= DOCUMENT:
            yield document
            document = ""
    if document:
        yield document
