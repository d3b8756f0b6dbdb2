"""What is fuzzed: samples of every kind of file that Braeburn reads, and how it reads each.

What reading needs is imported here, once: imported in each input's process it would take most of
the time.
"""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braeburn.config import Run, Source, override, parse_assignment, read_run
from braeburn.data.corpus import documents
from braeburn.data.prepare import prepare
from braeburn.data.tokenizer import Tokenizer
from braeburn.data.tokenizer_settings import read_settings
from braeburn.hardware.catalogue import catalogue, facts
from braeburn.interop import huggingface
from braeburn.interop.exchange import export_huggingface, import_huggingface
from braeburn.recipes import load as recipe
from braeburn.train.directory import RunDirectory
from braeburn.train.trained import load

TEXT = "def answer():\n    return 42\n\n\n" * 40
ROWS = [
    {"text": f"{TEXT[:200]} {number}", "id": number, "more": [None, {"x": 1.5}]}
    for number in range(30)
]
# As people type them; every one is changed in the file, and the file is read line by line.
ASSIGNMENTS = """\
stages.core.tokens=20480
model={"vocab_size": 512, "d_model": 64, "num_layers": 2}
model.num_heads=4
optimizer.kind=adamw
stages.core.mixture={"code": 0.5, "prose": 0.5}
data.sources.code.paths=["a.txt"]
stages.core.schedule.warmup_steps=3
mesh.fsdp=2
seed=7
name=mine
"""


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        name: of the kind.
        weight: how often it is taken.
        files: globs of the files that are changed, below the sample.
        read: reads the sample in a folder, as a command does.
    """

    name: str
    weight: int
    files: tuple[str, ...]
    read: Callable[[Path], object]


def _read_run_files(folder: Path) -> None:
    run = read_run(folder)
    directory = RunDirectory(folder, writes=False)
    directory.stage_results(run.total_steps)
    for stage in run.stages:
        directory.recent_loss(stage)


def _read_run(folder: Path) -> None:
    load(folder)


def _read_hugging_face_settings(folder: Path) -> None:
    huggingface.describe(folder)
    read_settings(folder)


def _import_hugging_face(folder: Path) -> None:
    import_huggingface(folder, folder.parent / "out")


def _read_chips(folder: Path) -> None:
    path = folder / "chips.toml"
    catalogue(path)
    facts(path)


def _read_sources(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        list(documents("fuzzed", Source(paths=(str(path),))))


def _read_token_cache(folder: Path) -> None:
    prepared = prepare(_cached_run(folder), lambda line: None)
    for shards in prepared.train.values():
        shards.read(0, shards.tokens)


def _read_assignments(folder: Path) -> None:
    path = folder / "assignments.txt"
    if not path.is_file():
        return  # the file is of this program alone
    text = path.read_text("utf-8", "replace")
    run = recipe("afm-tiny")
    for line in text.splitlines():
        override(run, dict([parse_assignment(line)]))


TARGETS = (
    Target("assignments", 8, ("assignments.txt",), _read_assignments),
    Target("chips", 8, ("chips.toml",), _read_chips),
    Target("hugging face", 8, ("*",), _import_hugging_face),
    Target("hugging face settings", 22, ("*.json",), _read_hugging_face_settings),
    Target("run", 8, ("*.json", "checkpoints/**/*"), _read_run),
    Target("run files", 16, ("config.json", "*.jsonl"), _read_run_files),
    Target("sources", 22, ("*",), _read_sources),
    Target("token cache", 6, ("cache/**/*",), _read_token_cache),
    Target(
        "tokenizer",
        8,
        ("tokenizer.json",),
        lambda folder: Tokenizer.load(folder / "tokenizer.json"),
    ),
)


def _cached_run(folder: Path) -> Run:
    sources = {
        "data.sources.code.paths": [str(folder / "text")],
        "data.sources.prose.paths": [str(folder / "text")],
    }
    stages = {f"stages.{name}.mixture": {"code": 1.0} for name in ("core", "continued", "context")}
    return override(
        recipe("afm-tiny"),
        {**sources, **stages, "data.cache": str(folder / "cache"), "data.held_out": 0.2},
    )


def build(root: Path) -> None:
    """Makes the sample of each target in a folder of its name below `root`."""
    finished = root / "run"
    _train(finished)
    files = root / "run files"
    files.mkdir()
    for name in ("config.json", "metrics.jsonl", "events.jsonl"):
        shutil.copy(finished / name, files)
    _export(finished, root / "hugging face")
    settings = root / "hugging face settings"
    shutil.copytree(root / "hugging face", settings, ignore=shutil.ignore_patterns("*.safetensors"))
    (settings / "model.safetensors").touch()
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(finished / "tokenizer.json", tokenizer)
    _write_chips(root / "chips")
    _write_sources(root / "sources")
    (root / "assignments").mkdir()
    (root / "assignments" / "assignments.txt").write_text(ASSIGNMENTS)
    cached = root / "token cache"
    (cached / "text").mkdir(parents=True)
    for number in range(20):
        (cached / "text" / f"{number}.py").write_text(f"# {number}\n{TEXT}")
    prepare(_cached_run(cached), lambda line: None)


def _train(out: Path) -> None:
    from braeburn.train.loop import train

    text = out.parent / "text for the run"
    text.mkdir(parents=True)
    for number in range(12):
        (text / f"{number}.py").write_text(f"# {number}\n{TEXT}")
    fields: dict[str, Any] = {
        f"data.sources.{name}.paths": [str(text)] for name in ("code", "prose", "long")
    }
    fields |= {f"stages.{name}.mixture": {"code": 1.0} for name in ("core", "continued", "context")}
    fields |= {f"stages.{name}.tokens": 2048 for name in ("core", "continued", "context")}
    fields |= {
        f"stages.{name}.schedule.warmup_steps": 0 for name in ("core", "continued", "context")
    }
    fields |= {
        "data.held_out": 0.2,
        "data.cache": str(out.parent / "cache for the run"),
        "evaluation.tokens": 1024,
    }
    train(override(recipe("afm-tiny"), {**fields, "mesh.fsdp": 1, "checkpoint.keep_last": 1}), out)


def _export(run: Path, out: Path) -> None:
    export_huggingface(run, out)


def _write_chips(folder: Path) -> None:
    folder.mkdir()
    (folder / "chips.toml").write_text(
        '[mine]\ntitle = "Mine"\nfamily = "nvidia"\nbf16_tflops = 100\nmemory_gb = {value = 24, '
        'confidence = "S"}\n'
        'memory_gb_per_s = 900.5\nper_node = 4\ndevice_kinds = ["NVIDIA Mine"]\nprice = 0.5\n'
        "[h100]\nprice = 2.0\n[facts]\n"
    )


def _write_sources(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "rows.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "plain.txt").write_text(TEXT)
    (folder / "plain.txt.bz2").write_bytes(bz2.compress(TEXT.encode()))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [row["text"] for row in ROWS]}), folder / "rows.parquet"
    )
    with zipfile.ZipFile(folder / "both.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/one.txt", TEXT)
        archive.writestr("a/two.jsonl", lines)
    with tarfile.open(folder / "both.tar.gz", "w:gz") as archive:
        for name, content in (("one.txt", TEXT.encode()), ("two.jsonl", lines)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
