"""Prepared text on a real S3 server, moto's, which cannot be reached for half a minute.

`make test-s3` installs what it needs and runs it.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import s3fs

from braeburn.config import Run, override
from braeburn.data.listing import cache_folder
from braeburn.data.prepare import prepare
from braeburn.train.loop import train
from s3_server import OUTAGE_SECONDS, Proxy, proxy
from support import on_json_lines, rows

__all__ = ["proxy"]  # a fixture


@pytest.fixture
def run(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose text is cached on the server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 1"))
    (tmp_path / "text").mkdir()
    lines = (json.dumps({"text": f"line {i} of a text " * (5 + i % 7)}) + "\n" for i in range(9000))
    (tmp_path / "text" / "a.jsonl").write_text("".join(lines))
    return on_json_lines(tiny, tmp_path / "text", f"s3://bucket/{tmp_path.name}")


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in rows(directory)]


def test_training_reads_by_range_what_another_machine_prepared(
    run: Run, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(run, print)
    train(override(run, {"data.cache": str(tmp_path / "local")}), tmp_path / "local run")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 2"))
    shutil.rmtree(tmp_path / "text")
    outage = threading.Thread(target=proxy.outage, args=(OUTAGE_SECONDS,))
    refused, began = proxy.refused, time.monotonic()
    outage.start()
    there = prepare(run, print)  # in the middle of the outage
    outage.join()
    assert proxy.refused > refused and time.monotonic() - began > OUTAGE_SECONDS - 1
    assert there.train["web"].is_remote
    assert there.fingerprints == prepared.fingerprints
    assert train(run, tmp_path / "remote run").finished
    assert losses(tmp_path / "remote run") == losses(tmp_path / "local run")
    kept = [path.name for path in cache_folder(run.data).rglob("*") if path.is_file()]
    assert not [name for name in kept if name.startswith("tokens-")]


def test_an_outage_while_text_is_published(run: Run, proxy: Proxy, tmp_path: Path) -> None:
    local = prepare(override(run, {"data.cache": str(tmp_path / "local")}), print)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("prepared "):  # what follows is the copying
            threading.Thread(target=proxy.outage, args=(OUTAGE_SECONDS,)).start()
            time.sleep(0.5)

    refused = proxy.refused
    prepared = prepare(run, say)
    assert proxy.refused > refused
    assert prepared.fingerprints == local.fingerprints
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    for side in (local.train["web"], local.held_out["web"]):
        assert side is not None
        for path in side.directory.glob("*.bin"):
            there = f"bucket/{tmp_path.name}/stores/{side.directory.name}/{path.name}"
            assert filesystem.cat_file(there) == path.read_bytes()
