"""Changes to a run by dotted paths, as `--set` makes them, and where each value came from."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from braeburn.config.base import Frozen, configurations, flatten, kinds_of
from braeburn.config.data import Source
from braeburn.config.run import Run, validate
from braeburn.config.stage import Stage
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
        for kind in configurations()
        for name, field in kind.model_fields.items()
        if field.annotation in (str, str | None)
    }
    return last in declared and parents[-1:] not in (["mixture"], ["sources"], ["stages"])


def override(run: Run, assignments: Mapping[str, Any]) -> Run:
    """A run with the fields at dotted paths replaced, validated again.

    The layers of a pattern are counted from 0, as in `model.pattern.0.attention.kind`.

    Raises:
        UserError: a path names no field (the nearest ones are listed) or a value is refused.
    """
    fields = _set_fields(run)
    # Another kind has other fields, which may be assigned before or after it.
    for path in sorted(assignments, key=lambda path: path.rpartition(".")[2] != "kind"):
        _assign(run, fields, path, assignments[path])
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


def _set_fields(value: Any) -> Any:
    """The fields of a value that were set, as nested dicts and lists, with the kind of each part
    that is one of several kinds.
    """
    if isinstance(value, Frozen):
        names = set(value.model_fields_set)
        if _is_kind(value):
            names.add("kind")
        return {
            name: _set_fields(getattr(value, name))
            for name in type(value).model_fields
            if name in names
        }
    if isinstance(value, Mapping):
        return {key: _set_fields(child) for key, child in value.items()}
    if isinstance(value, tuple):
        return [_set_fields(child) for child in value]
    return value


def _is_kind(value: Any) -> bool:
    """Whether a part of the configuration is one of several kinds that a field may hold."""
    return any("kind" in getattr(base, "model_fields", ()) for base in type(value).__bases__)


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


def _assign(run: Run, fields: Any, path: str, value: Any) -> None:
    """Sets the leaf at `path` of `fields`, which hold what is set already, if the run has such a
    field.

    Args:
        run: the run, whose values and types tell what fields there are.
        fields: of the run, nested dicts and lists.
        path: dotted.
        value: of the leaf.
    """
    *parents, last = path.split(".")
    there: Any = run
    for depth, name in enumerate(parents):
        child = _child(there, name)
        if not isinstance(child, Frozen | Mapping | tuple):
            # A field that holds no others has none of the name that follows.
            known = depth + 1 + _may_hold(there, name)
            raise UserError(_unknown_field(run, path, ".".join(path.split(".")[:known])))
        place = int(name) if isinstance(there, tuple) else name
        # A field left at its default is absent, or None where the recipe switched it off.
        if not isinstance(there, tuple) and fields.get(place) is None:
            fields[place] = _set_fields(child)
        fields = fields[place]
        kind = fields.get("kind") if isinstance(fields, dict) else None
        if _is_kind(child) and kind != getattr(child, "kind", None):
            child = _other_kind(child, kind)
        there = child
    if not _may_hold(there, last):
        raise UserError(_unknown_field(run, path, path))
    if last == "kind" and _is_kind(there) and value != there.kind:
        fields.clear()
    if last == "separator" and isinstance(value, str):
        value = _unescaped(value)
    if isinstance(there, tuple):
        fields[int(last)] = value
    else:
        fields[last] = value


def _other_kind(value: Any, kind: Any) -> Any:
    """A configuration of another kind that a field may hold; the same where there is no such."""
    # Kinds may be derived from others: the first class that has a kind is what all derive from.
    *_, base = (each for each in type(value).__mro__ if "kind" in getattr(each, "model_fields", ()))
    other = kinds_of(base).get(str(kind))
    return other.model_construct() if other else value


def _child(value: Any, name: str) -> Any:
    """What a value has under a name, or would have if something was assigned below it; None where
    it can have nothing there.
    """
    if isinstance(value, tuple):
        return value[int(name)] if name.isdecimal() and int(name) < len(value) else None
    if isinstance(value, Mapping):
        # A stage or a source is begun by assigning to one of its fields.
        return value.get(name, NEW.get(type(next(iter(value.values()), None)))) if name else None
    field = type(value).model_fields.get(name)
    if field is None:
        return None
    child = getattr(value, name, None)
    if child is None:
        if get_origin(field.annotation) is dict:
            return {}
        optional = [kind for kind in get_args(field.annotation) if isinstance(kind, type)]
        parts = [kind for kind in optional if issubclass(kind, Frozen)]
        return parts[0].model_construct() if parts else None
    return child


# What a dict of stages or sources has for a new name.
NEW: dict[Any, Frozen] = {Stage: Stage.model_construct(), Source: Source.model_construct()}


def _may_hold(value: Any, name: str) -> bool:
    """Whether a value may hold something under a name."""
    if isinstance(value, tuple):
        return name.isdecimal() and int(name) < len(value)
    return isinstance(value, Mapping) or (
        isinstance(value, Frozen) and name in type(value).model_fields
    )


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
    named |= {path for path, _ in flatten(_set_fields(recipe))}
    resolved = override(recipe, assignments)
    origins = {}
    for path, _ in flatten(resolved.model_dump()):
        if any(path == a or path.startswith(a + ".") for a in assignments):
            origins[path] = "command line"
        else:
            origins[path] = "recipe" if path in named else "default"
    return origins
