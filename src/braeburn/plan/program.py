"""A train step compiled by the real compiler of hardware that is not there, and what its program
tells.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from braeburn.config import MeshConfig, ModelConfig, Run, override
from braeburn.errors import UserError
from braeburn.hardware.links import Links
from braeburn.hardware.products import speedup
from braeburn.hardware.targets import Target
from braeburn.hardware.torus import across_slices
from braeburn.layers.low_precision import in_eight_bits
from braeburn.layers.spec import walk
from braeburn.models.decoder import param_specs
from braeburn.parallel.schedule import schedule_of
from braeburn.plan.child import compile_in_child
from braeburn.plan.collectives import Collective, collectives, transfers
from braeburn.plan.cost import estimate, online_teacher
from braeburn.plan.hlo import Module, parse, unread
from braeburn.plan.kernels import Computing, computing
from braeburn.plan.overlap import Overlap, Site, overlaps
from braeburn.plan.ranking import Ranking
from braeburn.plan.search import Candidate, candidates, larger_targets
from braeburn.train.metrics import flops_per_token

EFFORT = (
    "cached",
    "seconds",
    "cpu_seconds",
    "resident_gib",
    "versions",
    "flags",
    "stubs",
    "fingerprint",
)
# Beside gradients, slices sum what the metrics and the gradient's norm need.
SLACK = 2**20
MOST_CHANGES = 3


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same axes: bytes on each chip in a step, and seconds on
    their link.

    Attributes:
        kind: as HLO names it, "all-gather".
        axes: of the mesh; None where they are not known.
        link: that they take.
        calls: in a step.
        bytes: of all.
        seconds: of all, one after the other; None where the link's speed is not known. Two permutes
            that go opposite ways at the same time count as one.
        asynchronous: of the calls, those that are started and awaited apart.
        beside_seconds: of computing between start and end, of all that are.
        hidden_seconds: of `seconds`, those that pass beside computing: see `overlap.Overlap`.
    """

    kind: str
    axes: tuple[str, ...] | None
    link: str
    calls: int
    bytes: int
    seconds: float | None
    asynchronous: int = 0
    beside_seconds: float = 0.0
    hidden_seconds: float = 0.0


class Moved(NamedTuple):
    """A collective with the kind of its link, and its seconds there each time that it runs."""

    collective: Collective
    link: str
    seconds: float | None


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
        run: whose model it is for.
        stage: of the run.
        target: that it is for.
        answer: of the child process, see `compiler.compile_request`.
    """

    run: Run
    stage: str
    target: Target
    answer: dict[str, Any]

    @property
    def usable_gib(self) -> float:
        """Memory of a chip that a program may take."""
        usable = self.target.facts.device_memory_gib
        assert usable is not None  # the catalogue has it of every chip with a compiler
        return self.answer.get("available_gib") or usable.value

    @property
    def required_gib(self) -> float:
        """Memory of a chip that the program takes, at its peak."""
        return self.answer.get("required_gib") or self.answer["memory"]["peak"]

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return "memory" in self.answer and self.required_gib <= self.usable_gib

    @cached_property
    def module(self) -> Module:
        """The compiled program.

        Raises:
            UserError: some of its instructions are not in its text.
        """
        module = parse(Path(self.answer["program"]).read_text(encoding="utf-8"))
        found = sum(len(body) for body in module.computations.values())
        if found != self.answer["instructions"]:
            raise unread(
                f"the program has {self.answer['instructions']} instructions, and its text {found}"
            )
        return replace(module, taken=self.taken)

    @property
    def taken(self) -> float:
        """How often a branch of the program is taken."""
        return 1.0

    @cached_property
    def computing(self) -> Computing:
        """What each chip computes."""
        return computing(self.module, self.target.facts)

    @property
    def mesh(self) -> MeshConfig:
        """The mesh, resolved."""
        return MeshConfig.model_validate(self.answer["mesh"])

    @cached_property
    def _across(self) -> tuple[MeshConfig, dict[str, int]]:
        """The mesh, resolved, and how many slices each of its axes crosses."""
        mesh = self.mesh
        return mesh, across_slices(
            mesh, self.target.slices if self.target.facts.family == "tpu" else 1
        )

    @cached_property
    def transfers(self) -> list[Collective]:
        """What leaves a slice of TPUs."""
        mesh, across = self._across
        return transfers(self.module, tuple(axis for axis in mesh.sizes if across[axis] > 1))

    @cached_property
    def moved(self) -> list[Moved]:
        """Every collective within slices, and every transfer across, over more than one device."""
        mesh, across = self._across
        within = {axis: size // across[axis] for axis, size in mesh.sizes.items()}
        slices, each = math.prod(across.values()), self.target.chips_per_slice
        inside = Links(
            replace(self.target, slices=self.target.slices // slices),
            mesh.model_copy(update=within),
        )
        found = [_over(one, inside, one.axes) for one in collectives(self.module, within)]
        if self.transfers:
            outside = Links(self.target, MeshConfig(replica=slices, fsdp=each))
            found += [_over(one, outside, ("replica",)) for one in self.transfers]
        return [one for one in found if one.collective.axes != ()]

    @cached_property
    def overlaps(self) -> dict[Site, Overlap]:
        """What the program's schedule has beside each collective."""
        timed = {id(one.collective): one.seconds for one in self.moved}
        found = [one.collective for one in self.moved]
        return overlaps(self.module, self.target.facts, found, lambda one: timed[id(one)])

    @cached_property
    def traffic(self) -> list[Traffic]:
        """Every collective by kind, axes and link, what moves most first."""
        groups: dict[tuple[str, tuple[str, ...] | None, str], list[Moved]] = {}
        for one in self.moved:
            key = one.collective.kind, one.collective.axes, one.link
            groups.setdefault(key, []).append(one)
        rows = [self._row(*key, members) for key, members in groups.items()]
        return sorted(rows, key=lambda row: -row.bytes)

    def _row(
        self, kind: str, axes: tuple[str, ...] | None, link: str, members: list[Moved]
    ) -> Traffic:
        calls = moved = started = beside = hidden = 0.0
        seconds: float | None = 0.0
        for one in members:
            times, overlap = one.collective.times, self.overlaps[one.collective.site]
            # Of two that go opposite ways at the same time each has half of the time of both.
            part = times / 2 if overlap.shared else times
            calls += times
            moved += times * one.collective.bytes
            started += times if overlap.asynchronous else 0.0
            beside += times * overlap.beside
            if one.seconds is None:
                seconds = None
            elif seconds is not None:
                seconds += part * one.seconds
                hidden += part * one.seconds * self._hidden[one.collective.site]
        whole = round(calls), round(moved), seconds, round(started)
        return Traffic(kind, axes, link, *whole, beside, hidden)

    @cached_property
    def _hidden(self) -> dict[Site, float]:
        """Of the seconds of each collective, the fraction that passes beside computing."""
        sums: dict[Site, float] = {}
        for one in self.moved:
            site = one.collective.site
            sums[site] = sums.get(site, 0.0) + (one.seconds or 0.0)
        return {
            site: self.overlaps[site].hidden / sums[site] if sums[site] else 0.0 for site in sums
        }

    @property
    def interval(self) -> tuple[float, float | None]:
        """Seconds of a step with all communication beside computing, and with none: None if a
        link's speed is unknown.
        """
        compute, communication = (
            self.computing.seconds,
            sum(row.seconds or 0.0 for row in self.traffic),
        )
        unknown = any(row.seconds is None for row in self.traffic)
        return max(compute, communication), None if unknown else compute + communication

    @property
    def scheduled(self) -> float | None:
        """Seconds of a step with as much communication beside computing as the schedule shows; None
        if a link's speed is unknown.
        """
        least, serial = self.interval
        if serial is None:
            return None
        return max(least, serial - sum(row.hidden_seconds for row in self.traffic))

    @property
    def by_axes(self) -> list[dict[str, Any]]:
        """Seconds of collectives along the same mesh axes, and those of them that pass beside
        computing, as JSON.
        """
        groups: dict[tuple[str, ...] | None, list[Traffic]] = {}
        for row in self.traffic:
            groups.setdefault(row.axes, []).append(row)
        return [
            {
                "axes": axes,
                "seconds": None
                if any(row.seconds is None for row in rows)
                else sum(row.seconds or 0.0 for row in rows),
                "hidden_seconds": sum(row.hidden_seconds for row in rows),
            }
            for axes, rows in groups.items()
        ]

    @property
    def measured(self) -> dict[str, Any]:
        """What is known of a program that was compiled whole."""
        axes = [axis for axis, size in self.answer["mesh"].items() if size > 1]
        return {
            "compute_seconds": self.computing.seconds,
            "kernels": [asdict(kernel) for kernel in self.computing.kernels],
            "untimed": self.computing.untimed,
            "collectives": [asdict(row) for row in self.traffic],
            "bytes": {
                axis: sum(row.bytes for row in self.traffic if axis in (row.axes or ()))
                for axis in axes
            },
            "axes": self.by_axes,
            "overlapped": self.interval[0],
            "scheduled": self.scheduled,
            "serial": self.interval[1],
            "program": self.answer["program"],
        }

    @property
    def memory(self) -> dict[str, float]:
        """GiB by part, with what is required and usable."""
        return {
            **self.answer.get("memory", {}),
            "required": self.required_gib,
            "usable": self.usable_gib,
        }

    @property
    def effort(self) -> dict[str, Any]:
        """What compiling took."""
        return {key: self.answer[key] for key in EFFORT}


@dataclass(frozen=True)
class Compilation(Compiled):
    """What the compiler says of the train step of a stage."""

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the stage, resolved."""
        mesh = self.run.stages[self.stage].mesh or self.run.mesh
        return mesh.model_copy(update=self.answer["mesh"])

    @property
    def taken(self) -> float:
        """How often a branch of the program is taken: by a pipeline, where it has a task for it."""
        mesh = self.mesh
        if mesh.pipeline == 1:
            return 1.0
        steps = self.run.stages[self.stage].accumulation_steps
        return schedule_of(mesh, steps).taken

    @cached_property
    def flop_bound(self) -> float:
        """Seconds of computing below which the peak does not allow: the models' products, attention
        causal.
        """
        stage = self.run.stages[self.stage]

        def least(model: ModelConfig) -> int:
            # Of a window, which most tokens see whole, causality masks nothing.
            full = sum(
                sum(layer.attention.head_dims(model.head_dim)) * stage.sequence_length
                for layer in model.layer_configs
                if layer.attention.reach(stage.sequence_length) == stage.sequence_length
            )
            masked = 3 * model.num_heads * full
            return flops_per_token(model, param_specs(model), stage.sequence_length) - masked

        teacher = online_teacher(self.run, self.stage)
        # A teacher runs forward alone, a third of training.
        model = self.run.models()[self.stage].trained
        flops = least(model) + (least(teacher) / 3 if teacher else 0)
        peak, matmul = self.target.facts.peak_flops, self.run.precision.matmul
        assert peak
        if matmul != "compute":
            # Forward, backward, and the gradient of weights.
            faster = 1 - 1 / speedup(self.target.facts, matmul)
            covered = sum(spec.size for _, spec in walk(param_specs(model)) if in_eight_bits(spec))
            flops -= 2 * covered * (2 if matmul == "int8" else 3) * faster
        return flops * stage.batch_tokens / (self.target.devices * peak)

    @cached_property
    def offenders(self) -> list[Collective]:
        """Of what leaves a slice, all that is not the sum of gradients."""
        allowed = self.answer["padded_gradient_bytes"] + SLACK
        sums = [
            t
            for t in self.transfers
            if t.kind == "all-reduce" and not t.source.endswith("all_gather")
        ]
        if sum(t.bytes * t.times for t in sums) > allowed:
            # There are not so many gradients: gathers written as sums with zeros. Only the backward
            # pass has gradients.
            sums = [t for t in sums if "transpose(" in t.source]
            if sum(t.bytes * t.times for t in sums) > allowed:
                sums = []
        return [t for t in self.transfers if t not in sums]

    def summary(self) -> dict[str, Any]:
        """All that is known, as JSON has it."""
        plan, answer = estimate(self.run, self.stage, self.target), self.answer
        axes = [axis for axis, size in answer["mesh"].items() if size > 1]
        known = {
            "recipe": self.run.name,
            "target": str(self.target),
            "stage": self.stage,
            "mesh": answer["mesh"],
            "fits": self.fits,
            "memory_gib": self.memory,
            "plan": {
                "memory_gib": plan.total_gib,
                "compute_seconds": plan.compute,
                "step_seconds": plan.step,
                "overlapped": plan.overlapped,
                "serial": plan.serial,
                "bytes": {
                    axis: sum(total.bytes for total, *_ in plan.collectives if axis in total.axes)
                    for axis in axes
                },
            },
            "compiler": self.effort,
        }
        if "memory" not in answer:
            return known
        crossing = [
            {
                "kind": t.kind,
                "bytes": t.bytes * t.times,
                "source": t.source,
                "offends": t in self.offenders,
            }
            for t in self.transfers
        ]
        slices = {
            "holds": not self.offenders,
            "gradient_bytes": answer["gradient_bytes"],
            "transfers": crossing,
        }
        return {
            **known,
            **self.measured,
            "flop_bound_seconds": self.flop_bound,
            "slices": slices if crossing else None,
        }


def _over(one: Collective, links: Links, axes: tuple[str, ...] | None) -> Moved:
    """A collective with its link and its seconds along axes, None where they are not known."""
    if not axes:
        return Moved(one, "?", None)
    return Moved(one, links.name(axes), links.seconds(one.kind, one.bytes, axes))


def changes_that_fit(
    compilation: Compilation, *, verify: bool, chips: Path | None = None, memory_gb: float = 5.0
) -> list[dict[str, Any]]:
    """The fastest layouts of a stage that fit by the plan, on more chips where none does on the
    target's, as JSON.

    Args:
        compilation: of a step that does not fit.
        verify: whether to compile them, the best first, until one is known to fit; "verified" is
            None of the others.
        chips: a catalogue of the user's.
        memory_gb: as of `compile_step`.
    """
    run, stage, target = compilation.run, compilation.stage, compilation.target
    fits = [(target, found) for found in candidates(run, stage, target) if found.estimate.fits]
    changes: list[dict[str, Any]] = []
    for where, found in islice(fits or larger_targets(run, stage, target), MOST_CHANGES):
        done = not verify or any(change["verified"] for change in changes)
        if done and changes and not fits:
            break  # one number of chips that is enough will do
        facts = {
            "target": str(where),
            "assignments": found.assignments,
            "total_gib": found.estimate.total_gib,
        }
        changed = (
            None
            if done
            else compile_step(override(run, found.assignments), stage, where, chips, memory_gb)
        )
        changes.append({**facts, "verified": changed and changed.fits})
    return changes


def compile_step(
    run: Run, stage: str, target: Target, chips: Path | None = None, memory_gb: float = 5.0
) -> Compilation:
    """A stage's train step compiled for a target, now or before.

    Args:
        run: the run.
        stage: which of its stages.
        target: of TPUs or GPUs; none of them needs to be there.
        chips: a catalogue of the user's.
        memory_gb: what the compiler may take of this machine's memory.

    Raises:
        UserError: as `compile_in_child` does.
    """
    return Compilation(run, stage, target, compile_in_child(run, stage, target, chips, memory_gb))


def ranked_by_compiling(most: int, chips: Path | None = None) -> Ranking:
    """An order of layouts for `plan.compare`: the best `most` compiled, then those that fit by
    their serial seconds.
    """

    def rank(
        run: Run, stage: str, target: Target, found: list[Candidate]
    ) -> list[tuple[Candidate, Any]]:
        said = []
        for candidate in found[:most]:
            try:
                compiled = compile_step(candidate.run, stage, target, chips)
                overlapped, serial = compiled.interval if compiled.fits else (math.inf, None)
            except UserError as failure:
                said.append((math.inf, candidate, {"fits": False, "failed": str(failure)}))
                continue
            facts: dict[str, Any] = {"fits": compiled.fits, "required_gib": compiled.required_gib}
            if compiled.fits:
                facts |= {
                    "overlapped": overlapped,
                    "serial": serial,
                    "compute_seconds": compiled.computing.seconds,
                }
            said.append((serial or overlapped, candidate, facts))
        said.sort(key=lambda entry: entry[0])
        fit = [(candidate, facts) for _, candidate, facts in said if facts["fits"]]
        rest = [(candidate, facts) for _, candidate, facts in said if not facts["fits"]]
        return [*fit, *((candidate, None) for candidate in found[most:]), *rest]

    return rank
