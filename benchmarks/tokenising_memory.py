"""The memory that preparing text takes: one document of a gigabyte, and as much as JSON lines.

    python benchmarks/tokenising_memory.py [--gigabytes 1] [--shapes document lines spaceless]
    [--folder DIR]

The text is the Python files of the standard library, again and again. `document` is one file
without separators, `lines` is JSON lines of a Python file each, `spaceless` one document without
white space. A tokenizer of 6,000 entries is trained on it and the text tokenised, as `braeburn
train` does before its first step, in a process of its own. For each it prints the largest resident
size of that process, beside that of one that prepares a hundredth of the text.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHAPES = ("document", "lines", "spaceless")


def files() -> Iterator[str]:
    """The Python files of the standard library, again and again."""
    library = Path(json.__file__).resolve().parents[1]
    texts = [path.read_text(errors="replace") for path in sorted(library.glob("*.py"))]
    return itertools.cycle(texts)


def write(path: Path, shape: str, size: int) -> None:
    """Writes a file of a shape and of `size` bytes, nearly."""
    with path.open("w") as file:
        written = 0
        for text in files():
            if shape == "lines":
                text = json.dumps({"text": text}) + "\n"
            elif shape == "spaceless":
                text = "".join(text.split())
            written += file.write(text)
            if written >= size:
                break


def prepare(path: Path, cache: Path) -> None:
    """Prepares the text of a file, and prints tokens, seconds and the largest resident size in
    bytes.
    """
    from braeburn.config import Data, Source
    from braeburn.data.prepare import prepare
    from braeburn.recipes import load

    run = load("quickstart")
    run = run.replace(
        model=run.model.model_copy(update={"vocab_size": 6000}),
        stages={"core": run.stages["core"].model_copy(update={"mixture": {"text": 1.0}})},
        data=Data(sources={"text": Source(paths=(str(path),))}, cache=str(cache), held_out=0.0),
    )
    began = time.perf_counter()
    prepared = prepare(run, lambda line: print(line, file=sys.stderr, flush=True))
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    tokens = sum(shards.tokens for shards in prepared.train.values())
    print(json.dumps({"tokens": tokens, "seconds": seconds, "peak": peak}))


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument(
        "--folder", type=Path, help="where to write; the system's temporary folder without it"
    )
    parser.add_argument("--prepare", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(*options.prepare)
        return
    print(
        f"{'text':>10}  {'GB':>6}  {'tokens':>13}  {'seconds':>8}  "
        f"{'largest resident size, GB':>25}"
    )
    for shape in options.shapes:
        for size in (options.gigabytes / 100, options.gigabytes):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                path = Path(folder) / ("text.jsonl" if shape == "lines" else "text.txt")
                write(path, shape, int(size * 1e9))
                command = [
                    sys.executable,
                    __file__,
                    "--prepare",
                    str(path),
                    str(Path(folder) / "cache"),
                ]
                found = json.loads(
                    subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                )
            row = f"{found['tokens']:13,}  {found['seconds']:8.1f}  {found['peak'] / 1e9:25.2f}"
            print(f"{shape:>10}  {size:6.4g}  {row}", flush=True)


if __name__ == "__main__":
    main()
