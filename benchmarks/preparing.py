"""Preparing gigabytes of text: speed a core, memory of all processes, and what kills cost.

    python benchmarks/preparing.py [--gigabytes 2] [--kills 5] [--workers N] [--folder DIR]
    [--data FILE ...] [--first-step]

The text is grown from real corpora, those of benchmarks/corpora.py: documents are runs of ten to
sixty paragraphs of one corpus in a random order, so that no two are alike, until there is as much
text as asked for. A third is JSON lines in one file, a third Parquet, a third eight files of JSON
lines compressed by zstd. `braeburn prepare` is then run on it with a tokenizer trained before:
once undisturbed, then killed as many times as asked for, at random moments, and run to its end; the
token shards of both are compared byte by byte. Memory is the proportional set size of all its
processes together, looked at twice a second (Linux).

`--first-step` then trains on what was prepared, without the files of the text, and on a megabyte of
text prepared in the same way, and tells the seconds until the first step of each. A call before
them has compiled their programs.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from corpora import NAMES, SHARED

VOCABULARY = 16_384
COMMAND = [sys.executable, "-c", "from braeburn.cli import console; console()"]
COMPRESSED_FILES = 8


def paragraphs(files: Sequence[Path]) -> list[list[str]]:
    """The paragraphs of each corpus; of Python's library, where there is none."""
    files = files or [SHARED / name for name in NAMES if (SHARED / name).exists()]
    if not files:
        library = Path(json.__file__).resolve().parents[1]
        texts = [path.read_text(errors="replace") for path in sorted(library.glob("*.py"))]
        return [[part for text in texts for part in text.split("\n\n")]]
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            found.append(["\n".join(map(str, row.values())) for row in rows])
        else:
            lines = text.split("\n\n") if "\n\n" in text else text.splitlines()
            found.append([line for line in lines if line.strip()])
    return found


def documents(corpora: list[list[str]], size: int, generator: random.Random) -> Iterator[str]:
    """Documents of so many bytes together, more or less."""
    while size > 0:
        corpus = generator.choice(corpora)
        text = "\n\n".join(generator.choices(corpus, k=generator.randint(10, 60)))
        size -= len(text.encode())
        yield text


def write(folder: Path, corpora: list[list[str]], size: int) -> None:
    """Writes the text."""
    import pyarrow
    import pyarrow.parquet

    generator = random.Random(0)
    third = size // 3
    with (folder / "lines.jsonl").open("w") as file:
        for text in documents(corpora, third, generator):
            file.write(json.dumps({"text": text}) + "\n")
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / "rows.parquet", schema) as writer:
        for _ in range(0, third, 2**24):
            texts = list(documents(corpora, min(third, 2**24), generator))
            writer.write_table(pyarrow.table({"text": texts}, schema=schema))
    for index in range(COMPRESSED_FILES):
        path = str(folder / f"part-{index}.jsonl.zst")
        with pyarrow.CompressedOutputStream(path, "zstd") as stream:
            for text in documents(corpora, third // COMPRESSED_FILES, generator):
                stream.write((json.dumps({"text": text}) + "\n").encode())


def recipe(folder: Path) -> str:
    """A recipe file on the text."""
    path = folder / "recipe.py"
    path.write_text(
        "from braeburn.config import Data, Source\n"
        "from braeburn.recipes import load\n\n"
        "def run():\n"
        "    run = load('quickstart')\n"
        "    stage = run.stages['core'].model_copy(update={'mixture': {'text': 1.0}})\n"
        f"    model = run.model.model_copy(update={{'vocab_size': {VOCABULARY}}})\n"
        f"    data = Data(sources={{'text': Source(paths=({str(folder / 'text')!r},))}},\n"
        f"                tokenizer={str(folder / 'tokenizer.json')!r})\n"
        "    return run.replace(model=model, stages={'core': stage}, data=data)\n"
    )
    return f"{path}:run"


def memory_of(process: int) -> int:
    """Bytes of memory of a process and all its descendants, shared pages counted once."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(status.parent.name))
        except OSError:
            continue
    total, found = 0, [process]
    while found:
        one = found.pop()
        found += children.get(one, [])
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except OSError:
            continue
    return total


def hashes(cache: Path) -> dict[str, str]:
    """The hash of every file of token shards."""
    from braeburn.data.manifest import sha256_of

    return {
        str(path.relative_to(cache)): sha256_of(path)
        for path in sorted((cache / "stores").rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }


def run(arguments: list[str]) -> dict[str, Any]:
    """Runs `prepare` to its end: what it came to, seconds, and the most memory it took."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, text=True, stderr=sys.stderr
    )
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.5)
    seconds = time.monotonic() - began
    assert process.stdout is not None
    if process.returncode:
        sys.exit(f"error: prepare failed with {process.returncode}")
    found = json.loads(process.stdout.read())["sources"]["text"]
    return {**found, "seconds": seconds, "peak_bytes": peak}


def seconds_to_first_step(arguments: list[str], out: Path) -> float:
    """From the call of `train` until the first row of its metrics."""
    began = time.monotonic()
    process = subprocess.Popen(
        [*COMMAND, "train", *arguments, "--out", str(out), "--stop-after-steps", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll():
            sys.exit(f"error: train failed: {process.communicate()[1]}")
        time.sleep(0.02)
    seconds = time.monotonic() - began
    process.communicate()
    return seconds


def compare_first_steps(folder: Path, corpora: list[list[str]], cache: Path) -> None:
    """Prints how long training takes to its first step, on the text and on a megabyte of it."""
    small = folder / "small"
    (small / "text").mkdir(parents=True)
    write(small / "text", corpora, 1_000_000)
    shutil.copy(folder / "tokenizer.json", small)
    little = [recipe(small), "--set", f"data.cache={small / 'cache'}"]
    run(["prepare", *little])
    much = [recipe(folder), "--set", f"data.cache={cache}"]
    for path in (folder / "text").iterdir():
        path.unlink()
    seconds_to_first_step(little, folder / "first")
    on_little = seconds_to_first_step(little, folder / "second")
    on_much = seconds_to_first_step(much, folder / "third")
    print(
        f"first step after {on_little:.1f} s on a megabyte of text, {on_much:.1f} s on all of it, "
        f"whose files are gone"
    )


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int)
    parser.add_argument(
        "--folder", type=Path, help="where to write; the system's temporary folder without it"
    )
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="corpora to grow from")
    parser.add_argument(
        "--first-step", action="store_true", help="time training's first step on it, too"
    )
    options = parser.parse_args()
    from braeburn.data.tokenizer import train
    from braeburn.data.workers import cores

    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "text").mkdir()
        corpora = paragraphs(options.data)
        write(folder / "text", corpora, int(options.gigabytes * 1e9))
        stored = sum(path.stat().st_size for path in (folder / "text").iterdir())
        sample = list(documents(corpora, VOCABULARY * 1024, random.Random(1)))
        train(sample, VOCABULARY).save(folder / "tokenizer.json")
        workers = options.workers or cores()
        arguments = ["prepare", recipe(folder), "--workers", str(workers)]
        whole = run([*arguments, "--set", f"data.cache={folder / 'whole'}"])
        rate = whole["text_bytes"] / 1e6 / whole["seconds"]
        print(
            f"{whole['text_bytes'] / 1e9:.2f} GB of text in {stored / 1e9:.2f} GB of files, "
            f"{whole['tokens'] + whole['held_out_tokens']:,} tokens: {whole['seconds']:.0f} s, "
            f"{rate:.2f} MB/s, {rate / workers:.2f} MB/s a core with {workers}; at most "
            f"{whole['peak_bytes'] / 1e9:.2f} GB of memory",
            flush=True,
        )
        same = not options.kills or killed_and_finished(folder, arguments, whole, options.kills)
        # It takes the text away.
        if options.first_step:
            compare_first_steps(folder, corpora, folder / "whole")
        sys.exit(not same)


def killed_and_finished(
    folder: Path, arguments: list[str], whole: dict[str, Any], kills: int
) -> bool:
    """Whether a run that is killed so many times, and then run to its end, gives the bytes of an
    undisturbed one.
    """
    generator = random.Random(2)
    killed = [*arguments, "--set", f"data.cache={folder / 'killed'}"]
    for _ in range(kills):
        process = subprocess.Popen([*COMMAND, *killed], stderr=subprocess.DEVNULL)
        seconds = generator.uniform(0.02, 0.9 / kills) * whole["seconds"]
        try:
            process.wait(seconds + 2)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        parts = list((folder / "killed").rglob("manifest.json"))
        print(f"killed after {seconds + 2:.1f} s, {len(parts)} folders complete", flush=True)
    rest = run(killed)
    same = hashes(folder / "whole") == hashes(folder / "killed")
    print(f"the rest took {rest['seconds']:.0f} s; the same bytes: {same}")
    return same


if __name__ == "__main__":
    main()
