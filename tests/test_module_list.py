"""The list of modules in the documentation is that of the sources."""

from write_module_list import PACKAGES, PAGE, SOURCE, listing


def test_the_page_lists_the_modules_of_today() -> None:
    assert PAGE.read_text() == listing(), "run python tests/write_module_list.py"


def test_every_package_is_on_it() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(PACKAGES)
