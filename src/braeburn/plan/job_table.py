"""The plan of a job after training as rows of text."""

from collections.abc import Iterator
from typing import Any

from braeburn.plan.jobs import option
from braeburn.plan.table import Rows, figure, number, shown_torus


def job_tables(plan: dict[str, Any], most_layouts: int) -> Iterator[tuple[str, Rows, str]]:
    """Title, rows and alignment of each table of a plan as `compare_jobs` gives it, with at most so
    many layouts each.
    """
    planned = [target for target in plan["targets"] if not target["refused"]]
    yield "settings, of which --help tells more", _settings(plan), "ll"
    for target in planned:
        title = f"{plan['job']} with {plan['recipe']} on {target['target']}"
        if plan["job"] == "export":
            yield f"{title}: one host, no chip", _export(target["host"]), "ll"
            continue
        idle = f", {target['idle_chips']} chips idle" if target["idle_chips"] else ""
        layouts = target["layouts"][:most_layouts]
        rows, align = _layouts(layouts)
        yield f"{title}{idle}", rows, align
        yield "the first of them", _parts(layouts[0], plan["job"]), "ll"
    if planned:
        yield "all targets", _totals(planned), "l"


def _settings(plan: dict[str, Any]) -> Rows:
    of = f"{plan['recipe']}, {plan['parameters'] / 1e9:,.2f}B parameters"
    rows: Rows = [("model", of + (f", after stage {plan['stage']}" if plan["stage"] else ""))]
    for name, value in plan["settings"].items():
        if name == "type":
            name = "type" if plan["settings"]["format"] == "gguf" else "dtype"
        shown = f"{value:,}" if isinstance(value, int) else value
        rows.append((option(name), "unknown" if value is None else str(shown)))
    return rows


def _layouts(layouts: list[dict[str, Any]]) -> tuple[Rows, str]:
    programs = [program["name"] for program in layouts[0]["programs"]]
    rows: Rows = [
        ("", "mesh", "torus", "GiB", "of", *(f"{name} s" for name in programs), "all s", "tokens/s")
    ]
    for rank, layout in enumerate(layouts, 1):
        least = ">= " if layout["least"] else ""
        rows.append(
            (
                str(rank) if layout["fits"] else f"{rank}, no room",
                layout["mesh_option"].replace(",", " "),
                shown_torus(layout["torus"]),
                number(layout["total_gib"]["value"]),
                number(layout["usable_gib"]["value"]),
                *(
                    f"{least}{number(program['seconds']['value'])} x {program['rounds']:,}"
                    for program in layout["programs"]
                ),
                least + figure(layout["working_seconds"]),
                f"{layout['tokens_per_second']['value']:,.0f}",
            )
        )
    return rows, "rll" + "r" * (4 + len(programs))


def _parts(layout: dict[str, Any], job: str) -> Rows:
    rows: Rows = []
    for program in layout["programs"]:
        memory, computing = (
            ", ".join(f"{name} {number(value)}" for name, value in program[key].items())
            for key in ("memory_gib", "computing")
        )
        rows += [(f"{program['name']}, GiB", memory), ("seconds", computing)]
        rows += [
            (
                "" if i else "collectives",
                f"{c['kind']} over {c['axis']} ({c['link']}) {number(c['seconds'])} for "
                f"{c['bytes'] / 2**30:.3g} GiB",
            )
            for i, c in enumerate(program["collectives"])
        ]
    if "first_token_seconds" in layout:
        rows.append(("first token", f"after {figure(layout['first_token_seconds'])} s"))
    rows.append(("use", f"braeburn {job} DIR --mesh {layout['mesh_option']}"))
    return rows


def _export(host: dict[str, Any]) -> Rows:
    fits = {None: "whether the host has it is not known", True: "fits", False: "does not fit"}
    return [
        (
            "host memory",
            f"{figure(host['peak_gb'])} GB at its fullest, most of it for {host['fullest_at']}: "
            f"{fits[host['fits']]}",
        ),
        (
            "read",
            f"{number(host['read_gb'])} GB of the checkpoint in "
            f"{figure(host['reading_seconds'])} s",
        ),
        ("written", f"{number(host['written_gb'])} GB in {figure(host['writing_seconds'])} s"),
    ]


def _totals(planned: list[dict[str, Any]]) -> Rows:
    rows: Rows = [("target", "reading s", "all s", "chip-hours", "USD", "MWh")]
    for target in planned:
        total = target["total"]
        least = ">= " if total.get("least") else ""
        reading = (
            total["reading_seconds"]
            if "reading_seconds" in total
            else target["host"]["reading_seconds"]
        )
        spent = (total[name] for name in ("seconds", "chip_hours", "cost_usd", "energy_mwh"))
        rows.append(
            (
                target["target"],
                figure(reading),
                *((least if value else "") + figure(value) for value in spent),
            )
        )
    return rows
