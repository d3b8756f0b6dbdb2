"""A tokenizer that the tests of both formats ship."""

from pathlib import Path

import pytest
from real_demo import Demo

from braeburn.data.tokenizer import train


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small tokenizer; not to be changed."""
    tokenizer = train(["the cat sat on the mat\n\n    in 1234 ways " * 20], 300)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return path


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """The program of `make demo-real` on a tiny random model."""
    return Demo(tmp_path, monkeypatch)
