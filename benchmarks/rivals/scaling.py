"""How the speed of Braeburn on one machine's CPUs follows the size of the work.

One size of the model of the comparison is changed at a time. What the count of floating-point
operations predicts from the model as it is stands beside what was measured: where more operations
a second are made than there, the work suits the machine better, and where fewer, something else
than products takes time. Programs take turns with the model as it is, so that a machine that slows
down does not look like a size that does.

    python benchmarks/rivals/scaling.py
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import protocol
import runner

# By what is changed, the values that it takes. Heads follow the width.
SIZES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 16),
    "width": (192, 768),
    "length": (128, 1024, 2048),
    "sequences": (2, 4, 16),
}


def changed(work: protocol.Work, name: str, value: int) -> protocol.Work:
    """The work with one size changed. A width takes heads and hidden units along with it, and a
    length leaves the tokens of a step as they are.
    """
    if name == "width":
        factor = value / work.width
        return replace(
            work,
            width=value,
            heads=round(work.heads * factor),
            kv_heads=max(1, round(work.kv_heads * factor)),
            ffn=round(work.ffn * factor),
        )
    if name == "length":
        return replace(work, length=value, sequences=work.tokens // value)
    return replace(work, **{name: value})


def measured(work: protocol.Work, base: runner.Program, arguments: argparse.Namespace) -> float:
    """The median of the seconds of a step by those of the model as it is, round by round."""
    entry = runner.ENTRIES["braeburn"]
    program = runner.Program("braeburn", entry, work, sys.executable)
    try:
        ratios = []
        for turn in range(arguments.rounds):
            programs = {"changed": program, "as it is": base}
            found = {
                name: runner.quiet_block(
                    programs[name], arguments.steps + 1, arguments.other, arguments.tries
                )
                for name in runner.rotated(list(programs), turn)
            }
            ratios.append(runner.seconds(found["changed"]) / runner.seconds(found["as it is"]))
        return statistics.median(ratios)
    finally:
        program.end()


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of each size."""
    work = protocol.Work()
    base = runner.Program("braeburn", runner.ENTRIES["braeburn"], work, sys.executable)
    found = []
    try:
        for name, values in SIZES.items():
            for value in values:
                other = changed(work, name, value)
                ratio = measured(other, base, arguments)
                predicted = other.flops / work.flops
                row = {
                    "size": name,
                    "value": value,
                    "as_it_is": getattr(work, name),
                    "seconds": ratio,
                    "predicted_seconds": predicted,
                    "tokens_per_second": other.tokens / work.tokens / ratio,
                    "flops_per_second": predicted / ratio,
                }
                print(json.dumps(row), file=sys.stderr, flush=True)
                found.append(row)
    finally:
        base.end()
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The figures as a table in Markdown, all by those of the model as it is."""
    lines = [
        "| size | as it is | changed | seconds a step | by the count | tokens/s | FLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['size']} | {row['as_it_is']} | {row['value']} | {row['seconds']:.2f} "
            f"| {row['predicted_seconds']:.2f} | {row['tokens_per_second']:.2f} "
            f"| {row['flops_per_second']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each size")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a block")
    parser.add_argument("--other", type=float, default=0.15, help="share of a core that others use")
    parser.add_argument("--tries", type=int, default=3, help="how often a block is made at most")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    arguments = parser.parse_args()
    try:
        found = rows(arguments)
    except runner.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
