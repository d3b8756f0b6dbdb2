"""Text prepared on a real Ray cluster of two nodes on this machine."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from braeburn.config import Run, override
from braeburn.data import division, prepare
from braeburn.data.workers import Work
from braeburn.errors import UserError
from support import braeburn, on_json_lines, token_shards

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.deep


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of a head without processors and two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.nodes = [made.add_node(num_cpus=1), made.add_node(num_cpus=1)]
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def run(tiny: Run, tmp_path: Path) -> Run:
    """A run on some megabytes of JSON lines."""
    (tmp_path / "text").mkdir()
    for name in "abcd":
        rows = (
            json.dumps({"text": f"{name} line {i} of some text " * 40}) + "\n" for i in range(4000)
        )
        (tmp_path / "text" / f"{name}.jsonl").write_text("".join(rows))
    return on_json_lines(tiny, tmp_path / "text", tmp_path / "alone")


def test_a_node_is_killed_and_the_bytes_are_the_same(
    cluster: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = prepare.prepare(run, print)
    monkeypatch.setattr(division, "PART_BYTES", 500_000)
    there = override(run, {"data.cache": str(tmp_path / "cluster")})
    lines: list[str] = []

    def kill() -> None:
        while len(list((tmp_path / "cluster" / "stores").glob("*.parts/*/train/*"))) < 10:
            time.sleep(0.05)
        cluster.remove_node(cluster.nodes[0], allow_graceful=False)
        lines.append("killed")

    killer = threading.Thread(target=kill)
    killer.start()
    work = Work(ray=cluster.address)
    prepared = prepare.prepare(there, lines.append, alone.tokenizer, work=work)
    killer.join(timeout=1)
    assert "killed" in lines
    assert lines.index("killed") < lines.index(next(x for x in lines if "tokenised web" in x))
    assert prepared.fingerprints == alone.fingerprints
    assert token_shards(tmp_path / "alone") == token_shards(tmp_path / "cluster")


def test_mistakes_are_one_sentence(cluster: Any, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text" / "b.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"b\.jsonl' line 1 holds a number in the field 'text'"):
        prepare.prepare(run, print, work=Work(ray=cluster.address))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:x", "auto"])
def test_a_cluster_that_is_not_there(address: str, tmp_path: Path) -> None:
    answer = braeburn("prepare", "afm-tiny", "--ray", address, "--set", f"data.cache={tmp_path}")
    assert f"--ray {address!r} leads to no Ray cluster" in answer.error
