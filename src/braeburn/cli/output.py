"""What commands print: lines for the user, JSON, tables."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from braeburn.parallel import processes


def say(line: str) -> None:
    """A line for the user on standard error, once where several processes would say it."""
    if processes.is_main():
        print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Prints a value as JSON, indented, on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(rows: Sequence[tuple[str, ...]], align: str = "l") -> None:
    """Columns as wide as their widest cell: to the left where `align` has an l, the others,
    figures, to the right.
    """
    columns = max(map(len, rows))
    widths = [
        max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)
    ]
    for row in rows:
        sides = (
            str.ljust if align[column : column + 1] == "l" else str.rjust
            for column in range(columns)
        )
        print(
            "  ".join(
                side(cell, width) for side, cell, width in zip(sides, row, widths, strict=False)
            ).rstrip()
        )
