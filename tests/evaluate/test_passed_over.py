"""Evaluation of files says what of them it did not read."""

from pathlib import Path

import pytest

from braeburn.config import Source
from braeburn.evaluate.text import _told_documents


def test_rows_without_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n')
    assert [
        document.text for document in _told_documents(str(path), Source(paths=(str(path),)))
    ] == ["one"]
    (record,) = caplog.records
    told = f"warning: --data {path}: passed over 1 rows whose text is null, 1 rows without text"
    assert record.getMessage() == told
