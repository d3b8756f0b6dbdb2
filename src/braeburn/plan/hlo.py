"""The text of a compiled program taken apart: its instructions, and how often each of them runs.

The text is taken apart by brackets and quotes, not by lines: what kernels write into it may hold
line breaks, and lines that begin with `}`. What is found is counted again in the raw text, so that
nothing is lost in silence.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from braeburn.errors import UserError
from braeburn.plan.graph import is_rarely_entered

# Quotes and brackets, and the one character at which a text is split.
_TOKENS = {mark: re.compile(rf'"(?:[^"\\]|\\.)*"|[\[\](){{}}{mark}]', re.DOTALL) for mark in "\n ,"}
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BEGINNING = re.compile(r"^ +(?:ROOT )?%?[\w.\-]+ = ", re.MULTILINE)
_CALLS = (
    "calls",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def unread(reason: str) -> UserError:
    """The error of a compiled program that cannot be read, for `reason`."""
    return UserError(
        f"the compiled program cannot be read: {reason}; compile with the versions that `make "
        f"extra-compile` installs, or report the recipe and the target"
    )


@dataclass(frozen=True)
class Instruction:
    """`[ROOT] %name = type opcode(operands), key=value, ...`, the operands and what follows as they
    are written.
    """

    name: str
    type: str
    opcode: str
    operands: str
    rest: str
    is_root: bool = False

    @cached_property
    def attributes(self) -> Mapping[str, str]:
        """What follows the operands, by key."""
        pairs = (part.strip().partition("=") for part in split(self.rest, ","))
        return {key: value for key, _, value in pairs}

    @property
    def arguments(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.operands)

    @property
    def source(self) -> str:
        """The operation of the traced program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of its time, None where it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    def called(self, *keys: str) -> list[str]:
        """The names of the computations that attributes of these names refer to."""
        return [
            name for key in keys for name in re.findall(r"[\w.\-]+", self.attributes.get(key, ""))
        ]


@dataclass(frozen=True)
class Execution:
    """An instruction that runs.

    Attributes:
        instruction: what runs.
        computation: the name of the computation that it stands in.
        times: how often: the product of the trip counts of the loops around it.
        conditional: whether it is in a branch that may not be taken.
        endless: a loop around it whose length is not known, and which is counted once, by its name;
            or "".
        caller: the call that runs its computation, whose arguments are the computation's
            parameters; None in the entry computation, in loops and in branches.
    """

    instruction: Instruction
    computation: str
    times: float = 1
    conditional: bool = False
    endless: str = ""
    caller: "Execution | None" = None

    def known_length(self) -> "Execution":
        """Itself.

        Raises:
            UserError: it is in a loop of unknown length.
        """
        if self.endless:
            raise unread(
                f"{self.instruction.name} is in the loop {self.endless}, whose length cannot be "
                f"told"
            )
        return self


@dataclass(frozen=True)
class Module:
    """A compiled module.

    Attributes:
        computations: the instructions of each by its name.
        entry: the computation that it begins with.
        one_round: whether a loop of unknown length in the entry computation counts as one round of
            it, as where a program writes tokens until it is told to stop.
        taken: how often a branch is taken that is in no other.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    one_round: bool = False
    taken: float = 1.0

    def walk(self) -> Iterator[Execution]:
        """Every instruction that runs, in the order of the text within each computation.

        Branches appear as if each of them was taken, or as often as `taken` says; what a fusion is
        made of appears as well as the fusion.
        """
        yield from self._walk(self.beginning)

    def _walk(self, place: Execution) -> Iterator[Execution]:
        for here in self.instructions(place):
            yield here
            for part in self.inside(here):
                yield from self._walk(part)

    @property
    def beginning(self) -> Execution:
        """The entry computation, as `instructions` takes it."""
        return Execution(Instruction("", "", "", "", ""), self.entry)

    def instructions(self, place: Execution) -> Iterator[Execution]:
        """The instructions of the computation of `place`, in the order of the text, which is that
        of the schedule.
        """
        for instruction in self.computations[place.computation].values():
            yield replace(place, instruction=instruction)

    def inside(self, run: Execution) -> Iterator[Execution]:
        """The computations that an instruction runs, each as `instructions` takes it: the body of a
        loop, branches, what a fusion is made of.
        """
        instruction = run.instruction
        if instruction.opcode == "while":
            trips, here = self._trips(run), replace(run, caller=None)
            if trips is None and not (self.one_round and run.computation == self.entry):
                here = replace(here, endless=run.endless or instruction.name)
            names = instruction.called("body", "condition")
            times = run.times * (1 if trips is None else trips)
        elif instruction.opcode.endswith(("-done", "-update")) or "%" not in instruction.rest:
            return  # what was started ran then
        else:
            branches = instruction.opcode == "conditional"
            caller = run if instruction.opcode == "call" else None
            times = run.times * (self.taken if branches and not run.conditional else 1)
            here = replace(run, conditional=run.conditional or branches, caller=caller)
            by_call = instruction.opcode in ("call", "call-start")
            names = instruction.called(*(["to_apply"] if by_call else _CALLS))
        for name in names:
            yield replace(here, computation=name, times=times)

    def _trips(self, place: Execution) -> int | None:
        """How often a loop runs: XLA's own account of it, or else what its counter begins with and
        is compared with.
        """
        loop = place.instruction
        if is_rarely_entered(loop.source):
            return 0
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known[1])
        condition, body = loop.called("condition", "body")
        begin, origin = self._argument(loop.arguments[0], place)
        end = self._root(body)
        if begin.opcode != "tuple" or end.opcode != "tuple":
            return None
        test = self._value(self._root(condition).name, condition)
        if not _is("compare LT", test):
            return None
        _, counter, bound = test
        if _is("element", bound) and self._value(end.arguments[bound[1]], body) == bound:
            # Carried through the loop unchanged.
            bound = self._value(
                begin.arguments[bound[1]], origin.computation, self._parameters(origin)
            )
        if not (_is("element", counter) and isinstance(bound, int)):
            return None
        first = self._value(
            begin.arguments[counter[1]], origin.computation, self._parameters(origin)
        )
        step = self._value(end.arguments[counter[1]], body)
        if not (isinstance(first, int) and _is("add", step) and counter in step):
            return None
        stride = next((value for value in step if isinstance(value, int)), 0)
        return max(0, -(-(bound - first) // stride)) if stride > 0 else None

    def _argument(self, name: str, place: Execution) -> tuple[Instruction, Execution]:
        """The instruction that makes an argument, and where it stands: outside a called computation
        for its parameters.

        XLA's CPU compiler wraps small loops into such computations from JAX 0.12 on.
        """
        found = self.computations[place.computation][name]
        while found.opcode == "parameter" and place.caller is not None:
            place = place.caller
            found = self.computations[place.computation][
                place.instruction.arguments[int(found.operands)]
            ]
        return found, place

    def _parameters(self, place: Execution) -> list[Any]:
        """The values of the parameters of the computation that something stands in, where a call
        gives them.
        """
        if place.caller is None:
            return []
        call = place.caller
        values = self._parameters(call)
        return [
            self._value(argument, call.computation, values)
            for argument in call.instruction.arguments
        ]

    def _root(self, computation: str) -> Instruction:
        return next(found for found in self.computations[computation].values() if found.is_root)

    def _value(self, name: str, computation: str, parameters: Sequence[Any] = ()) -> Any:
        """What a scalar is: an int, ("element", index in the computation's tuple), or (operation,
        operand, operand).
        """
        found = self.computations[computation][name]
        if found.opcode == "parameter":
            return parameters[int(found.operands)] if parameters else None
        if found.opcode == "constant":
            return int(found.operands) if re.fullmatch(r"-?\d+", found.operands) else None
        if found.opcode == "get-tuple-element":
            whole = self.computations[computation][found.arguments[0]]
            return (
                ("element", int(found.attributes["index"])) if whole.opcode == "parameter" else None
            )
        if found.opcode not in ("copy", "bitcast", "convert", "fusion", "add", "compare"):
            return None
        inputs = [self._value(argument, computation, parameters) for argument in found.arguments]
        if found.opcode == "fusion":
            (inner,) = found.called("calls")
            return self._value(self._root(inner).name, inner, inputs)
        operation = f"{found.opcode} {found.attributes.get('direction', '')}".strip()
        return (operation, *inputs) if found.opcode in ("add", "compare") else inputs[0]


def _is(kind: str, value: Any) -> bool:
    return isinstance(value, tuple) and value[0] == kind


def parse(text: str) -> Module:
    """A module from its text, as `compiled.as_text()` writes it.

    Raises:
        UserError: the text is not that of a whole module, or some of its instructions were not
            found.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    for statement in split(text, "\n"):
        # `%name (parameters) -> type {`, instructions, `}`
        head, _, body = statement.partition(" {\n")
        if " -> " not in head or not body:
            continue
        name = head.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        lines = split(body[: body.rindex("}")], "\n")
        computations[name] = {found.name: found for found in map(_instruction, lines) if found.name}
        entry = name if head.startswith("ENTRY ") else entry
    if not entry:
        raise unread("the text has no ENTRY computation: it is not that of a whole HLO module")
    module = Module(computations, entry)
    check(text, module)
    return module


def check(text: str, module: Module) -> None:
    """Compares what was found in a text with a count of it that knows nothing of computations.

    Raises:
        UserError: instructions, or cycles that the compiler estimates, are missing.
    """
    found = [instruction for body in module.computations.values() for instruction in body.values()]
    counts = {
        "instructions": (len(found), len(_BEGINNING.findall(_QUOTED.sub('""', text)))),
        "cycles": (sum(i.cycles or 0 for i in found), sum(map(int, _CYCLES.findall(text)))),
    }
    for what, (here, there) in counts.items():
        if here != there:
            raise unread(f"{here} {what} were found in HLO text that has {there}")


def split(text: str, mark: str) -> Iterator[str]:
    """The parts of a text between marks that stand outside all brackets and quotes.

    Raises:
        UserError: brackets do not match.
    """
    depth = start = 0
    for token in _TOKENS[mark].finditer(text):
        if token[0] in "([{":
            depth += 1
        elif token[0] in ")]}":
            depth -= 1
        elif token[0] == mark and depth == 0:
            yield text[start : token.start()]
            start = token.end()
    if depth:
        raise unread(f"unbalanced brackets in HLO text that begins {text[:80]!r}")
    yield text[start:]


def _instruction(line: str) -> Instruction:
    line = line.strip()
    plain = line.removeprefix("ROOT ")
    head = list(itertools.islice(split(plain, " "), 4))
    if len(head) < 4:
        return Instruction("", "", "", "", "")
    name, _, type_, call = head
    opcode, _, operands = call.removesuffix(",").partition("(")
    return Instruction(
        name.lstrip("%"),
        type_,
        opcode,
        operands[:-1],
        plain[sum(map(len, head)) + 4 :],
        is_root=plain != line,
    )
