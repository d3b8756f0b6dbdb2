"""Writes `docs/modules.md`: all modules, each with the first sentence of its docstring."""

import ast
from pathlib import Path

from test_imports import LAYERS, SOURCE

PAGE = Path(__file__).parents[1] / "docs" / "modules.md"
# From the top down.
PACKAGES = tuple(name for row in LAYERS for name in row if (SOURCE / name).is_dir())
HEAD = """# Modules

Every module with the first sentence of its docstring, from the top of the
[architecture](architecture.md) down. `python tests/write_module_list.py` writes this page.
"""


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, in one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    for end in (". ", ": "):
        if end in text:
            text = text[: text.index(end)]
    return text.removesuffix(".")


def rows(package: str) -> list[str]:
    """The rows of a table of the modules of a package, with those of packages within it."""
    folder = SOURCE / package
    paths = sorted(
        (path for path in folder.rglob("*.py") if path.name != "__init__.py"),
        key=lambda path: (len(path.relative_to(folder).parts), path),
    )
    return [
        f"| `{path.relative_to(folder)}` | {first_sentence(path).replace('|', chr(92) + '|')} |"
        for path in paths
    ]


def listing() -> str:
    """The page."""
    parts = [HEAD]
    for package in PACKAGES:
        parts.append(f"\n## {package}\n\n| module | what it is |\n|---|---|\n")
        parts.append("\n".join(rows(package)) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(listing())
