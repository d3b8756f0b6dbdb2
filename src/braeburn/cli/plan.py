"""Commands about hardware: `chips`, `plan` and `compile`."""

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from braeburn.cli.options import (
    AsJson,
    Batch,
    ChipsFile,
    Dtype,
    ExportFormat,
    GgufType,
    HostMemory,
    Job,
    NewTokens,
    On,
    PromptTokens,
    ReadSpeed,
    Recipe,
    Set,
    TextTokens,
    WindowTokens,
    WriteSpeed,
)
from braeburn.cli.output import print_json, print_rows
from braeburn.cli.resolve import checked_stage, on_target, parse_mesh, resolve
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
        str | None,
        typer.Option(
            metavar="S",
            help="One stage of the recipe; all by default. Of a job after training, the stage that "
            "it comes after; the last by default.",
        ),
    ] = None,
    job: Job = "train",
    tokens: TextTokens = None,
    sequence_length: WindowTokens = None,
    batch: Batch = None,
    prompt_tokens: PromptTokens = None,
    max_new_tokens: NewTokens = None,
    format: ExportFormat = None,  # noqa: A002
    dtype: Dtype = None,
    type_: GgufType = None,
    host_memory_gb: HostMemory = None,
    read_gb_per_s: ReadSpeed = None,
    write_gb_per_s: WriteSpeed = None,
    layouts: Annotated[
        int, typer.Option(min=1, metavar="N", help="Layouts to show of each stage.")
    ] = 5,
    verify: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Compile the best N of each stage and rank them anew."
        ),
    ] = None,
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
    from braeburn.plan.jobs import TRAIN, check_job, job_of

    settings = {
        "tokens": tokens,
        "sequence_length": sequence_length,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "format": format,
        "dtype": dtype,
        "type": type_,
        "host_memory_gb": host_memory_gb,
        "read_gb_per_s": read_gb_per_s,
        "write_gb_per_s": write_gb_per_s,
    }
    of_training = {
        "verify": verify,
        "failures_per_chip_hour": failures_per_chip_hour,
        "checkpoint_seconds": checkpoint_seconds,
        "restart_seconds": restart_seconds,
        "html": html,
    }
    check_job(job, settings, of_training)
    runs = [on_target(recipe, text, assignments, extra)[:2] for text in [*on, *(more or [])]]
    stages = [checked_stage(recipe, runs[0][0], stage)] if stage else list(runs[0][0].stages)
    if job != TRAIN:
        from braeburn.plan.job_ranking import compare_jobs
        from braeburn.plan.job_table import job_tables

        after = stages[-1] if stages else ""
        found = compare_jobs(recipe, runs, after, job_of(job, runs[0][0], after, settings))
        _show(found, list(job_tables(found, layouts)), as_json)
        return
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
    # A plan needs nearly all that it makes to its end: to look for what it does not need any more
    # takes a seventh of its time.
    gc.disable()
    try:
        plan = compare(recipe, runs, catalogue(extra), stages, failures, **ranking)
    finally:
        gc.enable()
    if html and _planned(plan):
        write(plan, html)
    _show(plan, list(tables(plan, layouts)), as_json)


def _planned(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of a plan on which something fits."""
    return [target for target in plan["targets"] if not target["refused"]]


def _show(plan: dict[str, Any], tables: list[Any], as_json: bool) -> None:
    """Prints a plan.

    Raises:
        UserError: every target is refused.
    """
    refused = [
        f"{target['target']}: {target['refused']}"
        for target in plan["targets"]
        if target["refused"]
    ]
    if not _planned(plan):
        raise UserError("; ".join(refused))
    if as_json:
        print_json(plan)
        return
    for title, rows, align in tables:
        print(title)
        print_rows(rows, align)
        print()
    print("\n".join(f"refused: {reason}" for reason in refused))


@commands.command("compile")
def compile_(
    recipe: Recipe,
    on: On,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the recipe's; the first without it. Of a job after training, the stage that "
            "it comes after; the last without it.",
        ),
    ] = None,
    job: Job = "train",
    tokens: TextTokens = None,
    sequence_length: WindowTokens = None,
    batch: Batch = None,
    prompt_tokens: PromptTokens = None,
    max_new_tokens: NewTokens = None,
    format: ExportFormat = None,  # noqa: A002
    dtype: Dtype = None,
    type_: GgufType = None,
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
    """Compile a train step, or a job after training, for absent hardware: does it fit, how fast."""
    from braeburn.plan.jobs import TRAIN, check_job

    settings = {
        "tokens": tokens,
        "sequence_length": sequence_length,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "format": format,
        "dtype": dtype,
        "type": type_,
    }
    check_job(job, settings, {})
    base, _ = resolve(recipe, assignments)
    if job != TRAIN:
        if stage:
            checked_stage(recipe, base, stage)
        after = stage or next(reversed(base.stages), "")
        run, target, _ = on_target(recipe, on, assignments, extra)
        facts = _compile_job(
            (run, after, target), (job, settings), mesh, fix, (extra, memory_limit)
        )
        _show_compiled(facts, as_json)
        if not facts["fits"]:
            raise typer.Exit(1)
        return
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


def _compile_job(
    where: tuple[Any, str, Any],
    what: tuple[str, dict[str, Any]],
    mesh: str | None,
    fix: bool,
    how: tuple[Path | None, float],
) -> dict[str, Any]:
    """What the compiler says of the programs of a job after training.

    Args:
        where: the run, the stage after which the job works on its model, and the target.
        what: the name of the job, and its settings by the names of options.
        mesh: as the command line has it; None for the best by the plan.
        fix: whether to compile what the plan says would fit, where this does not.
        how: a catalogue of the user's, and what compiling may take of this machine's memory, in GB.
    """
    from braeburn.plan.jobs import Export, JobOn, job_of

    run, after, target = where
    name, settings = what
    chips, memory_gb = how
    job = job_of(name, run, after, settings)
    facts: dict[str, Any] = {
        "recipe": run.name,
        "job": name,
        "stage": after,
        "target": str(target),
        "settings": dataclasses.asdict(job),
    }
    if isinstance(job, Export):
        # Weights go from the disk to the files by way of the host alone.
        return facts | {"fits": True, "programs": [], "mesh": {}}
    from braeburn.plan.child import check_compiler
    from braeburn.plan.job_compilation import compile_job, job_mesh, meshes_that_fit, planned_alone

    check_compiler(target)
    placed = JobOn(job, run, after, target)
    candidate = job_mesh(placed, parse_mesh(mesh))
    shown = candidate.mesh_option
    print(f"compiling {name} of {run.name} for {target}, {shown} ...", file=sys.stderr, flush=True)
    compiled = list(compile_job(placed, candidate, chips, memory_gb))
    before = planned_alone(candidate)
    facts |= {
        "mesh": candidate.sizes.sizes,
        "mesh_option": shown,
        "fits": all(part["fits"] for part in before) and all(each.fits for each in compiled),
        "planned_alone": before,
        "programs": [program.summary() for program in compiled],
    }
    if not facts["fits"]:
        facts["changes"] = meshes_that_fit(placed, verify=fix, chips=chips, memory_gb=memory_gb)
    return facts


def _show_compiled(facts: dict[str, Any], as_json: bool) -> None:
    """Prints what the compiler says of the programs of a job."""
    from braeburn.plan.report import job_report

    if as_json:
        print_json(facts)
    elif facts["job"] == "export":
        print(
            f"export runs no program on {facts['target']}: it streams the checkpoint through the "
            f"memory of one host, so there is nothing to compile; `braeburn plan --job export` "
            f"says what it takes"
        )
    else:
        for rows in job_report(facts):
            print_rows(rows)
