"""Nothing that a path names is left out without a word."""

import os
from pathlib import Path

import pytest

from braeburn.config import Source
from braeburn.data.corpus import File, files
from braeburn.errors import UserError


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def found(*paths: object, form: str = "auto") -> list[File]:
    return files("books", Source(paths=tuple(map(str, paths)), format=form))


def names(*paths: object) -> list[str]:
    return [file.name for file in found(*paths)]


def test_links_to_files_are_read_in_folders_and_globs(tmp_path: Path) -> None:
    write(tmp_path, "there/b.txt", "here/a.txt")
    (tmp_path / "here/b.txt").symlink_to("../there/b.txt")
    assert names(tmp_path / "here") == ["a.txt", "b.txt"]
    assert names(f"{tmp_path}/here/*.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path / "here/b.txt") == ["b.txt"]


def test_a_link_has_the_size_and_version_of_its_target(tmp_path: Path) -> None:
    write(tmp_path, "there.txt")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link.txt").symlink_to("../there.txt")
    os.utime(tmp_path / "there.txt", ns=(10**18, 10**18))
    (before,) = found(tmp_path / "here")
    assert before.size == len("there.txt")
    os.utime(tmp_path / "there.txt", ns=(10**18, 10**18 + 1))
    (after,) = found(tmp_path / "here")
    assert before.version != after.version


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "there/deep/b.txt", "here/a.txt")
    (tmp_path / "here/linked").symlink_to("../there")
    assert names(tmp_path / "here") == ["a.txt", "linked/deep/b.txt"]
    assert names(f"{tmp_path}/here/**/*.txt") == ["a.txt", "linked/deep/b.txt"]
    (tmp_path / "other").symlink_to("here")
    assert names(tmp_path / "other") == ["a.txt", "linked/deep/b.txt"]


def test_a_folder_of_the_hub_cache_holds_nothing_but_links(tmp_path: Path) -> None:
    write(tmp_path, "datasets--x/blobs/0af3", "datasets--x/blobs/91bc")
    snapshot = tmp_path / "datasets--x/snapshots/main"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/train.jsonl").symlink_to("../../../blobs/0af3")
    (snapshot / "test.jsonl").symlink_to("../../blobs/91bc")
    assert names(snapshot) == ["data/train.jsonl", "test.jsonl"]


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path: Path) -> None:
    write(tmp_path, "x/a.txt", "y/b.txt")
    (tmp_path / "x/to_y").symlink_to("../y")
    (tmp_path / "y/to_x").symlink_to("../x")
    (tmp_path / "x/self").symlink_to(".")
    assert names(tmp_path / "x") == ["a.txt", "to_y/b.txt"]
    assert names(f"{tmp_path}/x/**") == ["a.txt", "to_y/b.txt"]


def test_a_file_of_several_names_counts_once(tmp_path: Path) -> None:
    write(tmp_path, "2024/a.txt")
    (tmp_path / "latest").symlink_to("2024")
    assert names(tmp_path) == ["2024/a.txt"]
    assert names(f"{tmp_path}/l*/a.txt") == ["latest/a.txt"]


def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    (tmp_path / "c.txt").symlink_to("c.txt")
    with pytest.raises(UserError, match=r"b\.txt' is a link to 'gone\.txt', which cannot be read"):
        found(tmp_path)
    with pytest.raises(UserError, match=r"b\.txt' is a link to 'gone\.txt'"):
        found(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"c\.txt' is a link to 'c\.txt'"):
        found(f"{tmp_path}/c*")


def test_a_pipe_is_refused_by_name_and_never_opened(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", f"{tmp_path}/*"):
        with pytest.raises(
            UserError, match=r"pipe' is no file but a pipe, socket or device; remove it"
        ):
            found(path)
    with pytest.raises(UserError, match=r"/dev/zero' is no file"):
        found("/dev/zero")


def test_a_folder_that_a_glob_matches_is_read_as_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "deep/b.txt", "deep/.hidden", ".git/c.txt")
    assert names(f"{tmp_path}/*") == ["a.txt", "deep/b.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all folders")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "deep/b.txt")
    (tmp_path / "deep").chmod(0)
    with pytest.raises(UserError, match=r"cannot list .*deep"):
        found(tmp_path)


def test_python_formats_look_at_python_files_alone(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "b.txt")
    (tmp_path / "c.txt").symlink_to("gone")
    assert [file.name for file in found(tmp_path, form="python-code")] == ["a.py"]
