"""What is known of a compiled train step, as tables to be read."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

Rows = list[tuple[str, ...]]
MIB, GIB = 2**20, 2**30


def report(facts: dict[str, Any]) -> Iterator[Rows]:
    """The tables of a compilation's summary, see `compiled.Compilation.summary`; a sentence is a
    row of one cell.
    """
    mesh = (
        " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
        or "one device"
    )
    memory, plan, compiler = facts["memory_gib"], facts["plan"], facts["compiler"]
    yield [
        (f"{facts['recipe']}, stage {facts['stage']}, on {facts['target']}: {mesh}",),
        (
            f"{_verdict(facts)}: {memory['required']:,.2f} GiB of {memory['usable']:,.2f} on each "
            f"device (the plan says {plan['memory_gib']:,.2f})",
        ),
    ]
    if "compute_seconds" in facts:
        yield _memory(memory)
        yield from _speed(facts, plan)
    if facts.get("slices"):
        yield from _slices(facts["slices"])
    for change in facts.get("changes", []):
        values = (f"{path}={json.dumps(value)}" for path, value in change["assignments"].items())
        sets = " ".join(f"--set {shlex.quote(value)}" for value in values)
        yield _change(change, sets)
    if not facts["fits"] and not facts["changes"]:
        yield [("",), ("the plan knows no layout and no number of these chips that would do",)]
    yield _effort(compiler)


def job_report(facts: dict[str, Any]) -> Iterator[Rows]:
    """The tables of the programs of a job after training: of each its summary, see
    `job_compilation.JobCompilation.summary`.
    """
    mesh = (
        " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
        or "one device"
    )
    yield [(f"{facts['job']} with {facts['recipe']} on {facts['target']}: {mesh}",)]
    for part in facts["planned_alone"]:
        yield [
            ("",),
            (
                f"{part['name']}, which is not compiled, {_verdict(part)}: by the plan "
                f"{part['memory_gib']:,.2f} GiB of {part['usable_gib']:,.2f} on each device",
            ),
        ]
    for program in facts["programs"]:
        memory, plan = program["memory_gib"], program["plan"]
        yield [
            ("",),
            (
                f"{program['name']}, which runs {program['rounds']:,} times, {_verdict(program)}: "
                f"{memory['required']:,.2f} GiB of {memory['usable']:,.2f} on each device (the "
                f"plan says {plan['memory_gib']:,.2f})",
            ),
        ]
        if "compute_seconds" in program:
            yield _memory(memory)
            yield from _speed(program, plan)
        yield _effort(program["compiler"])
    for change in facts.get("changes", []):
        yield _change(change, f"--mesh {change['mesh_option']}")
    if not facts["fits"] and not facts["changes"]:
        yield [("",), ("the plan knows no mesh and no number of these chips that would do",)]


def _verdict(of: dict[str, Any]) -> str:
    return "fits" if of["fits"] else "does not fit"


def _memory(memory: dict[str, Any]) -> Rows:
    parts = ("arguments", "temporaries", "program", "host")
    return [("",), ("memory", "GiB"), *((part, f"{memory[part]:,.2f}") for part in parts)]


def _change(change: dict[str, Any], how: str) -> Rows:
    """What would fit, and how it is asked for."""
    said = {None: "not compiled", True: "compiles and fits", False: "compiled: does not fit"}
    return [
        ("",),
        (
            f"would fit on {change['target']}, {change['total_gib']:.2f} GiB "
            f"({said[change['verified']]}):",
        ),
        (how,),
    ]


def _effort(compiler: dict[str, Any]) -> Rows:
    how = "found compiled before, then in" if compiler["cached"] else "compiled in"
    versions = ", ".join(f"{name} {version}" for name, version in compiler["versions"].items())
    took = f"{compiler['seconds']:.0f} s, {compiler['cpu_seconds']:.0f} of the processor"
    rows: Rows = [("",), (f"{how} {took}, {compiler['resident_gib']:.1f} GiB; {versions}",)]
    if compiler["stubs"]:
        names = ", ".join(compiler["stubs"])
        rows.append(
            (f"libraries that are not installed here, which compiling goes without: {names}",)
        )
    return rows


def _speed(facts: dict[str, Any], plan: dict[str, Any]) -> Iterator[Rows]:
    yield [("",), ("kernel", "calls", "seconds")] + [
        (kernel["name"], f"{kernel['calls']:,}", _seconds(kernel["seconds"]))
        for kernel in facts["kernels"]
    ]
    yield [("",), ("collective", "axes", "link", "calls", "GiB a step", "seconds", "hidden")] + [
        (
            row["kind"],
            _named(row["axes"]),
            row["link"],
            f"{row['calls']:,}",
            f"{row['bytes'] / GIB:,.3f}",
            _seconds(row["seconds"]),
            _seconds(row["hidden_seconds"]),
        )
        for row in facts["collectives"]
    ]
    yield [("",), ("seconds by axis", "collectives", "hidden")] + [
        (_named(row["axes"]), _seconds(row["seconds"]), _seconds(row["hidden_seconds"]))
        for row in facts["axes"]
    ]
    named = {
        axis: (facts["bytes"][axis] / GIB, plan["bytes"][axis] / GIB) for axis in facts["bytes"]
    }
    yield [("",), ("bytes by axis", "compiler, GiB", "plan, GiB")] + [
        (axis, f"{here:,.3f}", f"{there:,.3f}") for axis, (here, there) in named.items()
    ]
    yield [
        ("",),
        ("seconds of a step", "compiler", "plan"),
        ("computing", _seconds(facts["compute_seconds"]), _seconds(plan["compute_seconds"])),
        *(
            [("least, by the peak", _seconds(facts["flop_bound_seconds"]))]
            if "flop_bound_seconds" in facts
            else []
        ),
        (
            "all communication beside it",
            _seconds(facts["overlapped"]),
            _seconds(plan["overlapped"]),
        ),
        ("with the overlap that the schedule shows", _seconds(facts["scheduled"]), ""),
        ("none beside it", _seconds(facts["serial"]), _seconds(plan["serial"])),
        ("predicted", "", _seconds(plan["step_seconds"])),
    ]
    if facts["compute_seconds"] < facts.get("flop_bound_seconds", 0.0):
        yield [
            (
                "computing takes less than the peak allows: some of it has no time in the "
                "program's text",
            )
        ]
    if facts["untimed"]:
        yield [(f"without a time, and so not counted: {', '.join(sorted(set(facts['untimed'])))}",)]


def _slices(slices: dict[str, Any]) -> Iterator[Rows]:
    rows: Rows = [
        (
            t["kind"],
            f"{t['bytes'] / MIB:,.2f}",
            "offends" if t["offends"] else "gradients",
            t["source"],
        )
        for t in sorted(slices["transfers"], key=lambda t: (not t["offends"], -t["bytes"]))
    ]
    yield [("",), ("leaves a slice", "MiB a step", "", "operation"), *rows]
    total, needed = (
        sum(t["bytes"] for t in slices["transfers"]) / MIB,
        slices["gradient_bytes"] / MIB,
    )
    offenders = sum(t["offends"] for t in slices["transfers"])
    amounts = f"{total:,.1f} MiB, where the gradients of a chip have {needed:,.1f}"
    if offenders:
        yield [
            (f"{offenders} transfers that are not the sum of gradients leave a slice: {amounts}",)
        ]
    else:
        yield [(f"only the sum of gradients leaves a slice: {amounts}",)]


def _named(axes: list[str] | None) -> str:
    return "?" if axes is None else " x ".join(axes)


def _seconds(value: float | None) -> str:
    if value is None:
        return "unknown"
    # The programs that write tokens take less than a millisecond where chips are many.
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
