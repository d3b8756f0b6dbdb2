"""A plan as rows of text."""

from collections.abc import Iterator
from typing import Any

Rows = list[tuple[str, ...]]


def tables(plan: dict[str, Any], most_layouts: int) -> Iterator[tuple[str, Rows, str]]:
    """Title, rows and alignment of each table of a plan as `compare` gives it, with at most so many
    layouts each.
    """
    planned = [target for target in plan["targets"] if not target["refused"]]
    for target in planned:
        for name, stage in target["stages"].items():
            layouts = stage["layouts"][:most_layouts]
            own = [("own", stage["own"])] if stage["own"] else []
            numbered = [*((str(rank), layout) for rank, layout in enumerate(layouts, 1)), *own]
            idle = f", {stage['idle_chips']} chips idle" if stage["idle_chips"] else ""
            yield (
                f"{plan['recipe']} on {target['target']}, stage {name}{idle}",
                _layouts(numbered),
                "rlll",
            )
            yield (
                "the first of them",
                _parts(layouts[0]) + _labelling(stage["labelling_days"]),
                "ll",
            )
    if planned:
        yield "all stages", _totals(planned), "l"
    if plan["claims"]:
        rows = [
            (c["claim"], number(c["claimed"]), number(c["planned"]), c["verdict"])
            for c in plan["claims"]
        ]
        yield "claims", [("claim", "claimed", "planned", "verdict"), *rows], "lrrl"


def _layouts(layouts: list[tuple[str, dict[str, Any]]]) -> Rows:
    rows: Rows = [
        (
            "",
            "mesh",
            "torus",
            "remat",
            "microbatches",
            "GiB",
            "of",
            "step s",
            "overlapped",
            "serial",
            "MFU",
            "tokens/s",
        )
    ]
    for rank, layout in layouts:
        mesh = (
            " ".join(f"{axis}={size}" for axis, size in layout["mesh"].items() if size > 1)
            or "one device"
        )
        if layout.get("ways"):
            mesh += f" ({', '.join(layout['ways'])})"
        offload = f", offload {'+'.join(layout['offload'])}" if layout["offload"] else ""
        memory = (number(layout["total_gib"]["value"]), number(layout["usable_gib"]["value"]))
        times = (
            _least(layout) + figure(layout["step_seconds"]),
            number(layout["overlapped"]),
            number(layout["serial"]),
        )
        speeds = (f"{layout['mfu']['value']:.1%}", f"{layout['tokens_per_second']['value']:,.0f}")
        what = (
            mesh,
            shown_torus(layout["torus"]),
            layout["remat"] + offload,
            str(layout["accumulation_steps"]),
        )
        said = layout.get("compiled")
        compiled = f"compiled: {_compiled(said)}" if said else ""
        rows.append(
            (
                rank if layout["fits"] else f"{rank}, no room",
                *what,
                *memory,
                *times,
                *speeds,
                compiled,
            )
        )
    return rows


def _compiled(said: dict[str, Any]) -> str:
    if "failed" in said:
        return f"failed: {said['failed']}"
    if not said["fits"]:
        return f"no room, {number(said['required_gib'])} GiB"
    return (
        f"{number(said['required_gib'])} GiB, [{number(said['overlapped'])}, "
        f"{number(said['serial'])}] s"
    )


def _least(layout: dict[str, Any]) -> str:
    """What stands before seconds to which links of unknown speed add some more."""
    return "" if layout["serial"] is not None else ">= "


def shown_torus(torus: dict[str, Any] | None) -> str:
    """How a mesh lies on a torus; a dash where there is none."""
    return (
        " ".join(f"{axis} {'x'.join(map(str, factors))}" for axis, factors in (torus or {}).items())
        or "-"
    )


def _parts(layout: dict[str, Any]) -> Rows:
    collectives = [
        f"{c['kind']} over {c['axis']} ({c['link']}) {number(c['seconds'])} for "
        f"{c['bytes'] / 2**30:.3g} GiB"
        for c in layout["collectives"]
    ]
    return [
        (
            "GiB",
            ", ".join(f"{name} {number(value)}" for name, value in layout["memory_gib"].items()),
        ),
        (
            "seconds",
            ", ".join(f"{name} {number(value)}" for name, value in layout["seconds"].items()),
        ),
        *(("" if i else "collectives", row) for i, row in enumerate(collectives)),
        (
            "set",
            " ".join(f"{path}={_plain(value)}" for path, value in layout["assignments"].items()),
        ),
    ]


def _labelling(days: dict[str, Any] | None) -> Rows:
    return (
        [
            (
                "before",
                f"{figure(days)} days in which the teacher labels the text; they are in the totals",
            )
        ]
        if days
        else []
    )


def _plain(value: Any) -> str:
    return str(value).replace(" ", "").replace("'", '"')


def _totals(planned: list[dict[str, Any]]) -> Rows:
    rows: Rows = [
        (
            "target",
            "step s",
            "MFU",
            "days",
            "chip-hours",
            "USD",
            "MWh",
            "goodput",
            "checkpoint every",
        )
    ]
    for target in planned:
        first, total = next(iter(target["stages"].values()))["layouts"][0], target["total"]
        goodput = total["goodput"]
        kept = (f"{goodput['expected']:.1%}", f"{goodput['interval_seconds'] / 60:.1f} min")
        least = _least(first)
        spent = (total[name] for name in ("chip_hours", "cost_usd", "energy_mwh"))
        money = ((least if value else "") + figure(value) for value in spent)
        speed = (
            least + figure(first["step_seconds"]),
            f"{first['mfu']['value']:.1%}",
            least + figure(total["days"]),
        )
        rows.append((target["target"], *speed, *money, *kept))
    return rows


def figure(value: dict[str, Any] | None) -> str:
    """A figure with the letter of its confidence."""
    return f"{number(value['value'])} {value['confidence']}" if value else "unknown"


def number(value: float | None) -> str:
    """A number to three digits; whole from a thousand on."""
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
