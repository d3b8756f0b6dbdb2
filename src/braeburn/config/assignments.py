"""Changes to a run by dotted paths, as `--set` makes them, and where each value came from."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from braeburn.config.base import Frozen, flatten
from braeburn.config.data import Source
from braeburn.config.memory import Remat
from braeburn.config.mesh import MeshConfig
from braeburn.config.model import RopeScaling
from braeburn.config.optimizers import KINDS, AfmOptimizer
from braeburn.config.run import Run, validate
from braeburn.config.stage import Stage
from braeburn.config.transforms import Pruning, Quantization
from braeburn.errors import UserError, did_you_mean


def parse_assignment(text: str) -> tuple[str, Any]:
    """`path=value` as (path, value), the value read as JSON where it is JSON and as a string
    otherwise.

    A field that holds text takes a number or a truth value as it was typed.

    Raises:
        UserError: there is no `=`, or the value is beyond what can be read.
    """
    path, equals, raw = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise UserError(
            f"--set {text!r} is not an assignment; write --set path=value, as in --set seed=1"
        )
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = {"None": None, "True": True, "False": False}.get(raw, raw)
    except (ValueError, RecursionError):
        raise UserError(
            f"--set {path} has a number of thousands of digits, or lists within lists beyond "
            f"reason; give it a value that the field can have"
        ) from None
    if isinstance(value, int | float) and _holds_text(path):
        value = raw.strip()
    return path, value


def _holds_text(path: str) -> bool:
    """Whether the field at a path is declared as text, by its last name; those of a mixture are
    sources.
    """
    *parents, last = path.split(".")
    declared = {
        name
        for kind in Frozen.__subclasses__()
        for name, field in kind.model_fields.items()
        if field.annotation in (str, str | None)
    }
    return last in declared and parents[-1:] not in (["mixture"], ["sources"], ["stages"])


def override(run: Run, assignments: Mapping[str, Any]) -> Run:
    """A run with the fields at dotted paths replaced, validated again.

    Raises:
        UserError: a path names no field (the nearest ones are listed) or a value is refused.
    """
    fields = run.model_dump(exclude_unset=True)
    kind = assignments.get("optimizer.kind", run.optimizer.kind)
    if kind != run.optimizer.kind:
        # The other kind has other fields, which may be assigned before or after it.
        fields["optimizer"] = {}
        run = run.model_copy(update={"optimizer": KINDS.get(str(kind), AfmOptimizer)()})
    # A recipe leaves the kind to the type, and so out of the fields that it sets.
    fields["optimizer"] = {"kind": kind, **fields.get("optimizer", {})}
    for path, value in assignments.items():
        _assign(run, fields, path, value)
    try:
        changed = validate(fields)
    except UserError as error:
        raise UserError(f"{error}{_new_stage(run, fields, str(error))}") from None
    for name in _added(run, fields.get("data"), "sources"):
        if all(not stage.mixture.get(name) for stage in changed.stages.values()):
            first = next(iter(changed.stages), "STAGE")
            near = difflib.get_close_matches(name, run.data.sources, n=1)
            meant = f"did you mean {near[0]!r}? Otherwise " if near else ""
            raise UserError(
                f"data.sources.{name} is a new source that no stage draws from; {meant}add its "
                f"weight, as --set stages.{first}.mixture.{name}=1"
            )
    return changed


def _new_stage(run: Run, fields: Mapping[str, Any], error: str) -> str:
    """What to add to the error that a stage lacks a field, where the stage is new: its name may be
    a slip.
    """
    missing = re.match(r"stages\.([^.]+)\.\S+ is missing", error)
    if not missing or missing[1] not in _added(run, fields, "stages"):
        return ""
    near = difflib.get_close_matches(missing[1], run.stages, n=1)
    return f", since {missing[1]!r} is a new stage" + (
        f"; did you mean the stage {near[0]!r}?" if near else ""
    )


def _added(run: Run, fields: Any, kind: Literal["stages", "sources"]) -> list[str]:
    """The stages or sources that `fields`, the run's or its data's, hold and the run does not."""
    present = run.stages if kind == "stages" else run.data.sources
    there = fields.get(kind) if isinstance(fields, Mapping) else None
    return [name for name in there if name not in present] if isinstance(there, Mapping) else []


# What a stage or a source has that is begun by assigning to one of its fields.
_NEW_STAGE = Stage(
    tokens=1, sequence_length=1, batch_tokens=1, mixture={"any": 1.0}, learning_rate=1.0
)
_NEW = {"stages": _NEW_STAGE.model_dump(), "sources": Source.model_construct().model_dump()}


def _assign(run: Run, fields: dict[str, Any], path: str, value: Any) -> None:
    """Sets the leaf at `path` of `fields`, which hold what is set already, if the run has such a
    field.
    """
    *parents, last = path.split(".")
    known: Any = run.model_dump()
    for depth, name in enumerate(parents):
        begins = parents[depth - 1] if depth and parents[depth - 1] in _NEW and name else None
        if not isinstance(known, dict) or (name not in known and not begins):
            raise UserError(_unknown_field(run, path, ".".join(parents[: depth + 1])))
        optional = {
            "rope_scaling": RopeScaling(),
            "mesh": MeshConfig(),
            "remat": Remat(),
            "pruning": Pruning.model_construct(keep={}),
            "quantization": Quantization(),
        }  # may be None, and assigned into all the same
        if begins and name not in known:
            known = _NEW[begins]
        else:
            known = optional[name].model_dump() if name in optional else known[name]
        # A field left at its default is absent, or None where the recipe switched it off.
        fields[name] = fields = fields.get(name) or {}
    if parents[-1:] not in (["stages"], ["sources"], ["mixture"], ["keep"]) and (
        not isinstance(known, dict) or last not in known
    ):
        raise UserError(_unknown_field(run, path, path))
    if last == "separator" and isinstance(value, str):
        value = _unescaped(value)
    fields[last] = value


def _unescaped(separator: str) -> str:
    r"""A separator as it is meant where a shell passed \n, \r, \t or \\ on as they were typed."""
    meant = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nrt\\]", lambda match: meant[match.group()], separator)


def _unknown_field(run: Run, path: str, unknown: str) -> str:
    known = [leaf for leaf, _ in flatten(run.model_dump())]
    # A bare `learning_rate` or a misspelt last part should still find `stages.core.learning_rate`.
    last = path.rpartition(".")[2]
    same_end = [leaf for leaf in known if leaf.rpartition(".")[2] == last]
    candidates = same_end or known
    return f"{unknown!r} is not a field of the run {run.name!r}; {did_you_mean(path, candidates)}"


def provenance(recipe: Run, assignments: Mapping[str, Any]) -> dict[str, str]:
    """Where each leaf of the resolved run came from: "default", "recipe" or "command line"."""
    named = {path for path, _ in flatten(recipe.model_dump(exclude_unset=True))}
    named |= {"optimizer.kind"} & {f"{field}.kind" for field in recipe.model_fields_set}
    resolved = override(recipe, assignments)
    origins = {}
    for path, _ in flatten(resolved.model_dump()):
        if any(path == a or path.startswith(a + ".") for a in assignments):
            origins[path] = "command line"
        else:
            origins[path] = "recipe" if path in named else "default"
    return origins
