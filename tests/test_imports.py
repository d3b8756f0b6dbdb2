"""No module imports one above it, as `docs/architecture.md` lists them, and no imports go round."""

import ast
from collections.abc import Iterator
from pathlib import Path

import braeburn

SOURCE = Path(braeburn.__file__).parent
# From the top down. Those of one line do not import each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("recipes",),
    ("plan",),
    ("launch", "verify", "interop", "evaluate", "prune", "upcycle"),
    ("train",),
    ("objectives",),
    ("transforms",),
    ("optim",),
    ("models",),
    ("layers",),
    ("parallel",),
    ("data",),
    ("hardware",),
    ("config",),
    # What any of them may need, without a word of training.
    ("remote",),
    ("reading", "atomic", "background", "extras"),
    ("jsonfile", "disk", "discovery"),
    ("errors",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """The path of each module by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = ("braeburn", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules of Braeburn that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("braeburn"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("braeburn"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def part(module: str) -> str:
    """The package or module directly below `braeburn` that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_its_place() -> None:
    assert {part(module) for module in MODULES} - {""} == set(RANK)


def test_imports_go_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        for other in imported(ast.walk(ast.parse(path.read_text()))):
            above, below = part(module), part(other)
            if above != below and below and above and RANK[below] <= RANK[above]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_imports_go_round() -> None:
    # Those within functions run later, when everything is there.
    uses = {
        module: set(imported(iter(ast.parse(path.read_text()).body))) - {module}
        for module, path in MODULES.items()
    }
    while leaves := [module for module, others in uses.items() if not others & uses.keys()]:
        for leaf in leaves:
            del uses[leaf]
    assert not uses
