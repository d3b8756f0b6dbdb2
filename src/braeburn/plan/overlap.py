"""How much of its communication a compiled program carries out beside computing, as its schedule
says.

A collective that is started and awaited apart has the computing of the instructions between the two
beside it. One that is a single instruction has none.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from braeburn.hardware.catalogue import Chip
from braeburn.plan.collectives import KINDS, Collective
from braeburn.plan.hlo import Execution, Instruction, Module, unread
from braeburn.plan.kernels import work_of

# A computation and an instruction in it.
Site = tuple[str, str]
# The links along a mesh axis, in one direction.
Way = tuple[str, str]

_CHAIN = re.compile(r'chain_id="(\d+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
# Written by XLA for GPUs: a start that waits for the end.
_SYNCHRONOUS = '"is_sync":true'
# Starts of a computation, which may hold a collective: the long form of XLA, and that of what the
# SparseCores of TPUs carry out, which has its operands with the update that follows.
_GENERAL = ("async-start", "call-start")
_STARTS = (*_GENERAL, *(f"{kind}-start" for kind in KINDS))


@dataclass(frozen=True)
class Overlap:
    """What the schedule of a program has beside one collective, each time that it runs.

    Attributes:
        asynchronous: whether it is started and awaited apart.
        beside: seconds of computing between its start and its end.
        hidden: seconds of its own, of those that it takes on its links, that pass beside computing
            which no earlier collective on the same links takes up.
        shared: whether it goes one way along an axis while another goes the other way, so that the
            two take the time of one.
    """

    asynchronous: bool = False
    beside: float = 0.0
    hidden: float = 0.0
    shared: bool = False


@dataclass
class _Flight:
    """A collective under way.

    Attributes:
        site: of its start.
        ways: the links that it takes.
        left: seconds that it still has to go.
        beside: seconds of computing since its start.
        hidden: seconds that it went beside these.
        partner: the collective that goes the other way at the same time.
    """

    site: Site
    ways: frozenset[Way]
    left: float
    beside: float = 0.0
    hidden: float = 0.0
    partner: "_Flight | None" = None


@dataclass
class _Block:
    """What one run of a computation does: seconds of computing, and of these, on each link, those
    that collectives within it take up.
    """

    seconds: float = 0.0
    taken: Counter[Way] = field(default_factory=Counter)


def overlaps(
    module: Module,
    chip: Chip,
    found: Iterable[Collective],
    seconds: Callable[[Collective], float | None],
) -> dict[Site, Overlap]:
    """What the schedule of a program has beside each of its collectives, by their sites.

    Collectives on the same links go one after the other, the one that started first before the
    others. Those along other axes, and permutes the other way along one, have links of their own.

    Args:
        module: the compiled program, whose instructions are in the order of its schedule.
        chip: that it is compiled for.
        found: its collectives and transfers.
        seconds: how long each array of one takes on its links; None where that is not known.

    Raises:
        UserError: a collective is started and not awaited in the same computation, or the other
            way round; something runs in a loop of unknown length.
    """
    return _Schedule(module, chip, found, seconds).read()


class _Schedule:
    def __init__(
        self,
        module: Module,
        chip: Chip,
        found: Iterable[Collective],
        seconds: Callable[[Collective], float | None],
    ):
        self._module, self._chip = module, chip
        self._ways: dict[Site, frozenset[Way]] = {}
        self._seconds: dict[Site, float] = {}
        for each in found:
            self._ways[each.site] = _ways(each)
            self._seconds[each.site] = self._seconds.get(each.site, 0.0) + (seconds(each) or 0.0)
        self._found = dict.fromkeys(self._ways, Overlap())
        self._has_chains = any(
            _CHAIN.search(found.rest)
            for body in module.computations.values()
            for found in body.values()
        )

    def read(self) -> dict[Site, Overlap]:
        self._run(self._module.beginning)
        return self._found

    def _run(self, place: Execution) -> _Block:
        """Follows one run of a computation, in the order of its schedule."""
        block = _Block()
        flying: dict[str, list[_Flight]] = {}
        waiting: dict[str, list[Site]] = {}
        body = self._module.computations[place.computation]
        chains = self._chains(place)
        for run in self._module.instructions(place):
            instruction = run.known_length().instruction
            parts = list(self._module.inside(run))
            if instruction.opcode in _STARTS or instruction.opcode == "send":
                sites = self._started(run, parts)
                if instruction.arguments:
                    self._take_off(instruction.name, sites, flying)
                else:
                    waiting[instruction.name] = sites
            elif instruction.opcode.endswith("-update") and len(instruction.arguments) > 1:
                name = _beginning(instruction, body)
                self._take_off(name, waiting.pop(name, []), flying)
            for chain, names in chains.items():
                if instruction.name == names[0]:
                    self._take_off(chain, [self._site_of(chain, parts)], flying)
            self._compute(run, parts, block, flying)
            for chain, names in chains.items():
                if instruction.name == names[-1]:
                    self._land(flying.pop(chain))
            if instruction.opcode.endswith("-done"):
                self._end(instruction, body, flying)
        if flying:
            raise unread(
                f"{next(iter(flying))} in {place.computation} is started and never awaited"
            )
        return block

    def _compute(
        self,
        run: Execution,
        parts: list[Execution],
        block: _Block,
        flying: Mapping[str, list[_Flight]],
    ) -> None:
        """Adds what an instruction computes to a block, beside the collectives under way."""
        work = work_of(self._module, run, self._chip)
        blocks = [_Block(work.seconds or 0.0)] if work else []
        for part in parts:
            times = part.times / run.times if run.times else 0.0
            inner = self._run(part)
            taken = Counter({way: times * spent for way, spent in inner.taken.items()})
            blocks.append(_Block(times * inner.seconds, taken))
        for inner in blocks:
            for flight in (flight for flights in flying.values() for flight in flights):
                flight.beside += inner.seconds
                room = (inner.seconds - inner.taken[way] for way in flight.ways)
                hidden = max(0.0, min(flight.left, *room)) if flight.ways else 0.0
                flight.left -= hidden
                flight.hidden += hidden
                inner.taken.update(dict.fromkeys(flight.ways, hidden))
            block.seconds += inner.seconds
            block.taken.update(inner.taken)

    def _started(self, run: Execution, parts: list[Execution]) -> list[Site]:
        """The collectives that an instruction starts and does not wait for."""
        instruction = run.instruction
        sites = [(run.computation, instruction.name)]
        if instruction.opcode in _GENERAL:
            sites = [site for part in parts for site in self._sites(part)]
        sites = [site for site in sites if site in self._ways]
        if not sites and instruction.opcode not in (*_GENERAL, "send"):
            raise unread(f"{instruction.name} starts a collective that was not counted")
        return [] if _SYNCHRONOUS in instruction.rest else sites

    def _end(
        self, done: Instruction, body: Mapping[str, Instruction], flying: dict[str, list[_Flight]]
    ) -> None:
        """Notes the end of a collective, if an instruction awaits one."""
        kind, name = done.opcode.removesuffix("-done"), _beginning(done, body)
        if kind == "recv":  # what was sent by its partner is there
            name = _sender(body[name], body) or name
        elif kind == "send":
            return
        if name in flying:
            self._land(flying.pop(name))
        elif kind in KINDS and _SYNCHRONOUS not in body[name].rest:
            raise unread(f"{done.name} awaits a collective that {name} does not start")

    def _take_off(self, name: str, sites: list[Site], flying: dict[str, list[_Flight]]) -> None:
        started = []
        for site in sites:
            flight = _Flight(site, self._ways[site], self._seconds[site])
            for other in (other for flights in flying.values() for other in flights):
                free = not (flight.partner or other.partner)
                if free and other.ways and other.ways == _opposite(flight.ways):
                    flight.partner, other.partner = other, flight
            started.append(flight)
        if started:
            flying[name] = started

    def _land(self, flights: list[_Flight]) -> None:
        for flight in flights:
            shared = flight.partner is not None
            self._found[flight.site] = Overlap(True, flight.beside, flight.hidden, shared)

    def _sites(self, place: Execution) -> Iterator[Site]:
        """The instructions of a computation and of all that it runs."""
        for run in self._module.instructions(place):
            yield run.computation, run.instruction.name
            for part in self._module.inside(run):
                yield from self._sites(part)

    def _chains(self, place: Execution) -> dict[str, list[str]]:
        """The fusions of a computation that carry out a collective piece by piece beside other
        work, by the chain of these pieces.
        """
        chains: dict[str, list[str]] = {}
        for run in self._module.instructions(place):
            if not self._has_chains or run.instruction.opcode != "fusion":
                continue
            within = {
                chain[1]
                for part in self._module.inside(run)
                for computation, name in self._sites(part)
                if (chain := _CHAIN.search(self._module.computations[computation][name].rest))
            }
            for each in sorted(within):
                chains.setdefault(each, []).append(run.instruction.name)
        return chains

    def _site_of(self, chain: str, parts: list[Execution]) -> Site:
        """The piece of a chain that the collective was counted at."""
        for part in parts:
            for site in self._sites(part):
                piece = _CHAIN.search(self._module.computations[site[0]][site[1]].rest)
                if piece and piece[1] == chain and site in self._ways:
                    return site
        raise unread(f"the pieces of the collective of chain {chain} are in several computations")


def _ways(collective: Collective) -> frozenset[Way]:
    """The links that a collective takes; none where its groups are not those of any axes."""
    return frozenset(product(collective.axes or (), collective.direction or "+-"))


def _opposite(ways: frozenset[Way]) -> frozenset[Way]:
    """The other direction of links along the same axes; empty where both are taken."""
    if len({direction for _, direction in ways}) > 1:
        return frozenset()
    return frozenset((axis, {"+": "-", "-": "+"}[direction]) for axis, direction in ways)


def _beginning(end: Instruction, body: Mapping[str, Instruction]) -> str:
    """The name of the start that an update or an end belongs to."""
    name = end.arguments[0]
    while body[name].opcode.endswith("-update"):
        name = body[name].arguments[0]
    return name


def _sender(received: Instruction, body: Mapping[str, Instruction]) -> str:
    """The name of the `send` that a `recv` between slices belongs to; "" where there is none."""
    name = _RENDEZVOUS.search(received.rest)
    for found in body.values():
        if found.opcode == "send" and name and f'="{name[1]}"' in found.rest:
            return found.name
    return ""
