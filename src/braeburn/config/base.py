"""What all parts of the configuration share: types with limits, their base, errors in words."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from braeburn.errors import UserError, did_you_mean

# What a number of steps, tokens or bytes can be at all; with more, sums leave what tables and files
# can hold.
MOST = 10**18
Size = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
# The state counts steps in 32 bits.
MOST_STEPS = 2**31 - 1
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def check_name(name: str) -> str:
    """A name that can be a part of a file's name, and of a line.

    Raises:
        ValueError: it is empty or too long, or has characters that mean something in paths or
            scripts.
    """
    if not re.fullmatch(r"\w[\w .,'+=@()\[\]-]{0,99}", name) or name.endswith(" "):
        shown = ascii(name) if len(name) <= 100 else f"{name[:60]!a}..."
        raise ValueError(
            f"{shown} cannot be a name; use up to 100 letters, digits, spaces and any of . , ' + = "
            f"@ ( ) [ ] _ -, beginning with a letter or digit"
        )
    return name


# Of a run, a stage or a source: each becomes a part of names of files, of a script's lines, of a
# job's name.
Name = Annotated[str, AfterValidator(check_name)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# The random keys of weights take 32 bits at a time, those of the data any number.
Seed = Annotated[int, Field(ge=0, lt=2**64)]


def _one_or_more(value: Any) -> Any:
    """A single value as a tuple of one; it is what people type where several are allowed."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        example = value.replace("'", '"')
        raise ValueError(f"{value!r} is no list in JSON; write it with double quotes, as {example}")
    return (value,) if isinstance(value, str | int) else value


OneOrMore = BeforeValidator(_one_or_more)


class Frozen(BaseModel):
    """A part of the configuration: a value that does not change, and that knows all its fields."""

    # What a value is made of is checked again with it, since `model_copy` checks nothing.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, revalidate_instances="always"
    )

    def replace(self, **changes: Any) -> Self:
        """The same with some fields replaced, validated as a whole; what was left at its default
        stays so.

        Raises:
            UserError: there is no such field, or a value is refused.
        """
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        try:
            return type(self).model_validate({**fields, **changes})
        except ValidationError as error:
            raise UserError(explain_validation_error(error)) from None


def configurations(base: type[Frozen] = Frozen) -> Iterator[type[Frozen]]:
    """Every part of the configuration that derives from `base`, however far."""
    for derived in base.__subclasses__():
        yield derived
        yield from configurations(derived)


def kinds_of(base: type[Frozen]) -> dict[str, type[Any]]:
    """The configurations derived from one, by the value that their field `kind` always has; not
    those without such a value, which others are derived from.
    """
    found: dict[str, type[Any]] = {}
    for config in base.__subclasses__():
        field = config.model_fields["kind"]
        if not field.is_required():
            found[field.default] = config
        found |= kinds_of(config)
    return found


def tagged_union(base: type[Frozen]) -> Any:
    """The type of a field that holds any of the configurations derived from `base`, told apart by
    their `kind`.
    """
    kinds = tuple(kinds_of(base).values())
    if len(kinds) == 1:
        return kinds[0]
    return Annotated[Union[kinds], Field(discriminator="kind")]  # noqa: UP007


def divisors(number: int) -> list[int]:
    """All numbers that divide one, in order; in time of its square root."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    large = [number // n for n in reversed(small) if n * n != number]
    return small + large


def some(values: Sequence[int]) -> str:
    """A list of numbers for a sentence, of many only the first."""
    shown = ", ".join(map(str, values[:12]))
    return f"[{shown}{', ...' if len(values) > 12 else ''}]"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts and of lists of them as (dotted path, value)."""
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if is_list and all(isinstance(child, Mapping) for child in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from flatten(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def explain_validation_error(error: ValidationError) -> str:
    """The first problem of a validation as one sentence that names field, value and fix."""
    problem = error.errors()[0]
    # Behind a field that holds one of several kinds stands the kind, which is no field itself.
    tagged = {
        name
        for configuration in configurations()
        for name, field in configuration.model_fields.items()
        if field.discriminator
    }
    pairs = zip([None, *problem["loc"]], problem["loc"], strict=False)
    is_tag = problem["type"] not in ("union_tag_invalid", "union_tag_not_found")
    place = [part for before, part in pairs if not (is_tag and before in tagged)]
    path = ".".join(map(str, place))
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        if problem["loc"][-1:] == ("[key]",):
            return f"{'.'.join(map(str, problem['loc'][:-2]))}: {message}"
        return f"{path}: {message}" if path else message
    if problem["type"] == "extra_forbidden":
        known = {field for kind in configurations() for field in kind.model_fields}
        return f"{path!r} is not a field; {did_you_mean(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{path} is missing; give it a value"
    if problem["type"].startswith("union_tag"):
        kind = (
            problem["input"].get("kind") if isinstance(problem["input"], dict) else problem["input"]
        )
        known = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"{path}.kind={_short(kind)} is not valid: it must be {known}"
    reason = problem["msg"].removeprefix("Input ")
    return f"{path or 'the run'}={_short(problem['input'])} is not valid: it {reason}"


def _short(value: Any) -> str:
    """A value as Python writes it, but for the middle of one that would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"
