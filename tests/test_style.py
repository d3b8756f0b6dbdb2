"""What is asked of every function, read from the source."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import braeburn

SOURCE = Path(braeburn.__file__).parent
# An argument of a command is an option of the command line, and its help describes it.
COMMANDS = "cli"

# More than these belong together in small frozen values with names of their own.
MOST_ARGUMENTS = 6
# A public function with more has a section `Args:` with shapes, types and units.
MOST_UNDESCRIBED = 3


def modules() -> Iterator[tuple[str, ast.Module]]:
    """The path and the tree of each module that is held to this."""
    for path in sorted(SOURCE.rglob("*.py")):
        inside = path.relative_to(SOURCE)
        if inside.parts[0] != COMMANDS:
            yield str(inside), ast.parse(path.read_text())


def public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The functions of a module, and the methods of its classes, whose names begin with no `_`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from public(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def count(function: ast.FunctionDef) -> int:
    """How many arguments a function takes, without the one that a method is bound to."""
    found = function.args
    every = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in every)


def test_no_function_takes_more_than_six_arguments() -> None:
    assert not [
        f"{path}: {node.name} takes {count(node)} arguments"
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and count(node) > MOST_ARGUMENTS
    ]


def test_public_functions_with_more_than_three_arguments_describe_them() -> None:
    assert not [
        f"{path}: {function.name} has no section `Args:`"
        for path, tree in modules()
        for function in public(tree)
        if count(function) > MOST_UNDESCRIBED and "Args:" not in (ast.get_docstring(function) or "")
    ]


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their bare names, and refuses the second."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
