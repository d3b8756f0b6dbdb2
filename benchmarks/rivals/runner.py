"""Braeburn beside other trainers on the CPUs of one machine: the same model, the same batches.

Each program is a process of its own that makes steps when it is told. They are started one after
the other, so that the time to the first step is each one's own, and then take turns, in another
order each round: first in blocks of several steps, of which the first is not counted, then step by
step, so that other programs ran between two steps of one. A block in which other processes used
more than a small share of a core is made again. What is compared are ratios within a round.

    python benchmarks/rivals/runner.py --python torch=.venv-hf/bin/python \\
        --python maxtext=ENV/bin/python --python levanter=ENV/bin/python

An environment for each: `.venv-hf` of `make extra-hf` for PyTorch, and for MaxText and Levanter
what requirements-maxtext.txt and requirements-levanter.txt beside this file say. Those that are
not given are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import protocol

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "src"


@dataclass(frozen=True)
class Entry:
    """A program in the comparison.

    Attributes:
        library: whose environment it runs in.
        script: of this folder.
        setting: its options.
        environment: variables of its process.
    """

    library: str
    script: str
    setting: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


# `braeburn train` starts itself again with this variable.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ENTRIES = {
    "braeburn": Entry("braeburn", "braeburn_rival.py", {}, HUGE_PAGES),
    "braeburn-scanned": Entry(
        "braeburn", "braeburn_rival.py", {"model.scan_layers": True}, HUGE_PAGES
    ),
    "torch": Entry("torch", "torch_rival.py"),
    "torch-compiled": Entry("torch", "torch_rival.py", {"compile": True}),
    "maxtext": Entry("maxtext", "maxtext_rival.py"),
    "maxtext-scanned": Entry(
        "maxtext", "maxtext_rival.py", {"scan_layers": True, "remat_policy": "full"}
    ),
    "levanter": Entry("levanter", "levanter_rival.py"),
    "levanter-remat": Entry("levanter", "levanter_rival.py", {"gradient_checkpointing": True}),
}


class Failed(Exception):
    """A program ended, or said something else than it should."""


class Program:
    """A started program."""

    def __init__(self, name: str, entry: Entry, work: protocol.Work, python: str) -> None:
        self.name = name
        self.caches = tempfile.TemporaryDirectory()
        self.log = Path(self.caches.name) / "log"
        environment = dict(os.environ, JAX_PLATFORMS="cpu", TOKENIZERS_PARALLELISM="false")
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        # Nothing that an earlier process compiled.
        environment["TORCHINDUCTOR_CACHE_DIR"] = self.caches.name
        environment["XDG_CACHE_HOME"] = self.caches.name
        if entry.library == "braeburn":
            environment["PYTHONPATH"] = str(SOURCES)
        environment.update(entry.environment)
        work = replace(work, setting={**entry.setting, **work.setting})
        self.process = subprocess.Popen(
            [python, str(HERE / entry.script), json.dumps(asdict(work))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment,
            text=True,
        )
        self.first = self.said()

    def said(self) -> dict[str, Any]:
        """The next line of the program."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").splitlines()[-8:]
            raise Failed(f"{self.name} ended; the end of what it wrote:\n" + "\n".join(tail))
        return dict(json.loads(line))

    def steps(self, count: int) -> dict[str, Any]:
        """Makes steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.said()

    def end(self) -> None:
        """Ends the program."""
        self.process.kill()
        self.process.wait()
        self.caches.cleanup()


def busy_seconds() -> float:
    """Of all processors of the machine since it started, by all processes."""
    with Path("/proc/stat").open() as file:
        values = [int(value) for value in file.readline().split()[1:]]
    idle = values[3] + values[4]
    return (sum(values[:8]) - idle) / os.sysconf("SC_CLK_TCK")


@dataclass
class Block:
    """Steps of a program that were made one after the other.

    Attributes:
        seconds: of each step.
        processor_seconds: of all of them.
        other: processor seconds of other processes in a second.
        peak_bytes: of memory so far.
        losses: of each step.
    """

    seconds: list[float]
    processor_seconds: float
    other: float
    peak_bytes: int
    losses: list[float]


def block(program: Program, count: int) -> Block:
    """Makes a block of steps and sees what else the machine did meanwhile."""
    began, busy = time.perf_counter(), busy_seconds()
    said = program.steps(count)
    elapsed, used = time.perf_counter() - began, busy_seconds() - busy
    other = max(0.0, used - said["processor_seconds"]) / elapsed
    return Block(
        said["seconds"], said["processor_seconds"], other, said["peak_bytes"], said["losses"]
    )


def quiet_block(program: Program, count: int, most: float, tries: int) -> Block:
    """A block beside which other processes used at most `most` of a core, or the quietest of
    `tries`.
    """
    found = []
    for _ in range(tries):
        found.append(block(program, count))
        if found[-1].other <= most:
            break
    return min(found, key=lambda each: each.other)


def rotated(names: list[str], by: int) -> list[str]:
    """The names in another order each round: rotated, and every other time the other way round."""
    start = by % len(names)
    turned = names[start:] + names[:start]
    return turned if by // len(names) % 2 == 0 else turned[::-1]


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return ordered[0], ordered[0], ordered[0]
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, median, high


def product_rate(size: int = 2048, repeats: int = 5) -> float:
    """The most FLOP/s of float32 products of two square matrices by NumPy's BLAS."""
    import numpy as np

    left = np.random.default_rng(0).random((size, size), np.float32)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def measured(
    programs: dict[str, Program], arguments: argparse.Namespace
) -> tuple[list[dict[str, Block]], list[dict[str, Block]], list[float]]:
    """The rounds in blocks, the rounds step by step, and the rate of products in each round."""
    names = list(programs)
    rounds: list[dict[str, Block]] = []
    rates: list[float] = []
    for turn in range(arguments.rounds):
        rates.append(product_rate())
        found = {
            name: quiet_block(programs[name], arguments.steps + 1, arguments.other, arguments.tries)
            for name in rotated(names, turn)
        }
        rounds.append(found)
        print(
            f"round {turn + 1} of {arguments.rounds}: "
            + ", ".join(f"{name} {seconds(found[name]):.3f} s" for name in names),
            file=sys.stderr,
            flush=True,
        )
    alternating: list[dict[str, Block]] = []
    for turn in range(arguments.alternating):
        alternating.append({name: block(programs[name], 1) for name in rotated(names, turn)})
    return rounds, alternating, rates


def seconds(found: Block) -> float:
    """The median step of a block without its first one."""
    return statistics.median(found.seconds[1:])


def summary(
    programs: dict[str, Program],
    measurements: tuple[list[dict[str, Block]], list[dict[str, Block]], list[float]],
    work: protocol.Work,
    starts: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """All figures of the comparison, by program."""
    rounds, alternating, rates = measurements
    rate = statistics.median(rates)
    found: dict[str, Any] = {"product_flops": rate, "work": asdict(work), "programs": {}}
    for name, program in programs.items():
        times = [seconds(each[name]) for each in rounds]
        median = statistics.median(times)
        first = "braeburn" if "braeburn" in programs else name
        ratios = [seconds(each[name]) / seconds(each[first]) for each in rounds]
        between = [each[name].seconds[0] for each in alternating]
        steps = len(rounds[0][name].seconds)
        found["programs"][name] = {
            "tokens_per_second": work.tokens / median,
            "step_seconds": quartiles(times),
            "braeburn_is_faster_by": quartiles(ratios),
            "processor_seconds_a_step": statistics.median(
                each[name].processor_seconds / steps for each in rounds
            ),
            "share_of_product_rate": work.flops / median / rate,
            "between_others": statistics.median(between) / median if between else None,
            "first_step_seconds": statistics.median(
                each["first_step_seconds"] for each in starts[name]
            ),
            "peak_bytes": max(each[name].peak_bytes for each in rounds + alternating),
            "other_load": max(each[name].other for each in rounds),
            "first_loss": program.first["loss"],
            "last_loss": rounds[-1][name].losses[-1],
            "parameters": program.first.get("parameters"),
            "versions": program.first["versions"],
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        f"Float32 products of NumPy: {found['product_flops'] / 1e9:.0f} GFLOP/s.",
        "",
        "| | tokens/s | Braeburn is faster by | step, s | share of products | CPU-s a step | "
        "between others | first step, s | peak, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in found["programs"].items():
        low, median, high = facts["braeburn_is_faster_by"]
        between = facts["between_others"]
        lines.append(
            f"| {name} | {facts['tokens_per_second']:,.0f} | {median:.2f} ({low:.2f} to {high:.2f})"
            f" | {facts['step_seconds'][1]:.3f} | {facts['share_of_product_rate']:.0%} "
            f"| {facts['processor_seconds_a_step']:.2f} "
            f"| {'' if between is None else f'{between:.2f}'} | {facts['first_step_seconds']:.1f} "
            f"| {facts['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="the Python of a library's environment; braeburn has this one unless it is given",
    )
    parser.add_argument("--only", nargs="*", help="the programs to compare; all by default")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of blocks")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a block")
    parser.add_argument("--alternating", type=int, default=15, help="rounds step by step")
    parser.add_argument("--starts", type=int, default=1, help="how often each is started")
    parser.add_argument(
        "--other", type=float, default=0.15, help="share of a core that others may use"
    )
    parser.add_argument("--tries", type=int, default=4, help="how often a block is made at most")
    parser.add_argument(
        "--work",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a size of the work, such as layers=4",
    )
    parser.add_argument("--json", type=Path, help="a file for all figures")
    return parser


def main() -> int:
    """Compares; returns the exit code."""
    parser = options()
    arguments = parser.parse_args()
    pythons = {"braeburn": sys.executable, **dict(x.split("=", 1) for x in arguments.python)}
    sizes = {name: int(value) for name, value in (x.split("=", 1) for x in arguments.work)}
    work = protocol.Work(**sizes)
    unknown = sorted(set(arguments.only or ()) - set(ENTRIES))
    if unknown:
        parser.error(f"--only {unknown[0]} is none of {', '.join(ENTRIES)}")
    chosen = {
        name: entry
        for name, entry in ENTRIES.items()
        if entry.library in pythons and (not arguments.only or name in arguments.only)
    }
    programs: dict[str, Program] = {}
    starts: dict[str, list[dict[str, Any]]] = {}
    try:
        for name, entry in chosen.items():
            starts[name] = []
            for start in range(arguments.starts):
                program = Program(name, entry, work, pythons[entry.library])
                starts[name].append(program.first)
                if start + 1 < arguments.starts:
                    program.end()
            programs[name] = program
            print(f"{name}: {json.dumps(program.first)}", file=sys.stderr, flush=True)
        found = summary(programs, measured(programs, arguments), work, starts)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for program in programs.values():
            program.end()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
