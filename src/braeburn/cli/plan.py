"""Commands about hardware: `chips`, `plan` and `compile`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from braeburn.cli.options import AsJson, ChipsFile, On, Recipe, Set
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import checked_stage, on_target, resolve
from braeburn.errors import UserError

commands = typer.Typer()


@commands.command()
def chips(
    claims: Annotated[
        bool, typer.Option("--claims", help="Check an article's claims against the catalogue.")
    ] = False,
    extra: ChipsFile = None,
    as_json: AsJson = False,
) -> None:
    """List the accelerators, each figure with how far it is to be trusted."""
    from braeburn.hardware.catalogue import FIGURES, LEGEND, catalogue, facts
    from braeburn.plan.claims import claims as check

    table = catalogue(extra)
    checked = check(table, facts(extra)) if claims else []
    if as_json:
        listed = {name: dataclasses.asdict(chip) for name, chip in table.items()}
        print_json([dataclasses.asdict(claim) for claim in checked] if claims else listed)
        return
    for c in checked:
        figures = ", ".join(map(str, c.checks))
        print(
            f"{c.claim}\n  figure   {figures} ({c.confidence or 'no figure'})\n  verdict  "
            f"{c.verdict}\n"
        )
    if not claims:
        rows = [("chip", *(name.replace("_", " ") for name in FIGURES), "JAX")]
        for name, chip in table.items():
            known = [getattr(chip, field) for field in FIGURES]
            cells = (
                f"{figure.value:,.10g} {figure.confidence}" if figure else "unknown"
                for figure in known
            )
            rows.append(
                (
                    name,
                    *cells,
                    f"refused: {chip.refused}" if chip.refused else chip.back_end or "unknown",
                )
            )
        print_rows(rows, "l" + "r" * len(FIGURES) + "l")
    print(f"confidence: {LEGEND}")


@commands.command()
def plan(
    recipe: Recipe,
    on: Annotated[
        list[str],
        typer.Option(
            "--on", metavar="TARGET ...", help="One or more of chip:count or chip:slicesxchips."
        ),
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="TARGET", hidden=True)
    ] = None,  # --on takes several
    assignments: Set = None,
    stage: Annotated[
        str | None, typer.Option(metavar="S", help="One stage of the recipe; all by default.")
    ] = None,
    layouts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Layouts to show of each stage.")
    ] = 5,
    verify: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Compile the best N of each stage and rank them anew."
        ),
    ] = 0,
    failures_per_chip_hour: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Of chips and all that belongs to them; Llama 3's by default."
        ),
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="That training stands still for a checkpoint.")
    ] = None,
    restart_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="From a failure until training goes on.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with charts, too.")
    ] = None,
    extra: ChipsFile = None,
    as_json: AsJson = False,
) -> None:
    """Rank the layouts of a recipe on hardware by memory, time, MFU, cost, energy and goodput."""
    runs = [on_target(recipe, text, assignments, extra)[:2] for text in [*on, *(more or [])]]
    stages = [checked_stage(recipe, runs[0][0], stage)] if stage else list(runs[0][0].stages)
    from braeburn.hardware.catalogue import catalogue
    from braeburn.plan.page import write
    from braeburn.plan.program import ranked_by_compiling
    from braeburn.plan.ranking import compare
    from braeburn.plan.table import tables

    given = {
        "failures_per_chip_hour": failures_per_chip_hour,
        "checkpoint_seconds": checkpoint_seconds,
        "restart_seconds": restart_seconds,
    }
    failures = {name: value for name, value in given.items() if value is not None}
    ranking = {"ranked": ranked_by_compiling(verify, extra)} if verify else {}
    plan = compare(recipe, runs, catalogue(extra), stages, failures, **ranking)
    refused = [
        f"{target['target']}: {target['refused']}"
        for target in plan["targets"]
        if target["refused"]
    ]
    if len(refused) == len(runs):
        raise UserError("; ".join(refused))
    if html:
        write(plan, html)
    if as_json:
        print_json(plan)
        return
    for title, rows, align in tables(plan, layouts):
        print(title)
        print_rows(rows, align)
        print()
    print("\n".join(f"refused: {reason}" for reason in refused))


@commands.command("compile")
def compile_(
    recipe: Recipe,
    on: On,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the recipe's; the first without it.")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=N,...", help="Sizes of the mesh, as replica=1,fsdp=2048,tensor=4."
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix", help="Where it does not fit, compile what the plan says would, best first."
        ),
    ] = False,
    assignments: Set = None,
    extra: ChipsFile = None,
    memory_limit: Annotated[
        float,
        typer.Option(
            min=0.1, metavar="GB", help="What compiling may take of this machine's memory."
        ),
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Compile a train step for absent hardware: does it fit, how fast, what crosses which link."""
    base, _ = resolve(recipe, assignments)
    stage = checked_stage(recipe, base, stage or next(iter(base.stages)))
    path = f"stages.{stage}.mesh" if base.stages[stage].mesh else "mesh"
    sizes = [f"{path}.{part.strip()}" for part in mesh.split(",")] if mesh else []
    run, target, _ = on_target(recipe, on, [*(assignments or []), *sizes], extra)
    from braeburn.plan.child import check_compiler

    check_compiler(target)
    from braeburn.plan.program import changes_that_fit, compile_step
    from braeburn.plan.report import report

    print(f"compiling {stage} of {run.name} for {target} ...", file=sys.stderr, flush=True)
    compiled = compile_step(run, stage, target, extra, memory_limit)
    facts = compiled.summary()
    if not compiled.fits:
        facts["changes"] = changes_that_fit(
            compiled, verify=fix, chips=extra, memory_gb=memory_limit
        )
    if as_json:
        print_json(facts)
    else:
        for rows in report(facts):
            print_rows(rows)
    if not compiled.fits or compiled.offenders:
        raise typer.Exit(1)
