"""A plan as one self-contained HTML page."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from braeburn.atomic import write_atomically


def write(plan: dict[str, Any], path: Path) -> None:
    """Writes what `braeburn plan --json` prints as a page that needs nothing else: no network, no
    other file.

    Raises:
        ValueError: a number of the plan is not finite, which JSON cannot hold.
    """
    # Without "<" no text of the plan can end the element that it stands in, or open a comment.
    text = json.dumps(plan, allow_nan=False).replace("<", "\\u003c")
    write_atomically(
        path, (files("braeburn.plan") / "page.html").read_text("utf-8").replace("{{plan}}", text)
    )
