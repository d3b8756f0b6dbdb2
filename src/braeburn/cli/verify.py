"""The command `verify`."""

import dataclasses
import os
import sys

import typer

from braeburn.cli.options import AsJson, On, Recipe, Set
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import begin_computing, resolve

commands = typer.Typer()


@commands.command()
def verify(
    recipe: Recipe, on: On = "cpu:8", assignments: Set = None, as_json: AsJson = False
) -> None:
    """Train a recipe, shrunk, on every layout, killed and resumed too: losses must not change."""
    from braeburn.hardware.targets import parse_target
    from braeburn.verify.shrink import ENVIRONMENT

    os.environ |= ENVIRONMENT  # before JAX, which a recipe of the user's may import
    run, _ = resolve(recipe, assignments)
    target = parse_target(on)
    begin_computing()
    from braeburn.verify.checks import verify

    checks = verify(run, recipe, target, lambda line: print(line, file=sys.stderr, flush=True))
    wrong = sum(not check.passed for check in checks)
    if as_json:
        print_json(
            {
                "passed": not wrong,
                "target": str(target),
                "checks": [dataclasses.asdict(c) for c in checks],
            }
        )
    else:
        rows = [("check", "layout", "steps", "difference", "tolerance", "verdict", "")]
        for c in checks:
            difference = (
                "-" if c.difference is None else f"{c.difference:.1e}" if c.difference else "0"
            )
            tolerance = f"{c.tolerance:g}"
            rows.append(
                (c.check, c.layout, str(c.steps), difference, tolerance, c.verdict, c.reason)
            )
        print_rows(rows, "llrrrll")
        skipped = sum(c.verdict == "skipped" for c in checks)
        print(
            f"\n{len(checks)} checks: {len(checks) - wrong - skipped} passed, {skipped} skipped, "
            f"{wrong} failed"
        )
    if wrong:
        raise typer.Exit(1)
