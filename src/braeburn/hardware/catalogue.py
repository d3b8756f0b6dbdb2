"""The catalogue of accelerators: `hardware/chips.toml`, and what a file of the user's own adds to
it or overrides.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from braeburn.config import Count, Size, explain_validation_error
from braeburn.errors import UserError, did_you_mean
from braeburn.jsonfile import Unreadable, read_bytes

# The built-in catalogue has a hundredth of it.
MOST_BYTES = 2**20

Confidence = Literal["M", "D", "S", "U", "V"]  # weakest first
LEGEND = (
    "V vendor's documentation, U the user's own file, S secondary source, D derived or "
    "measured, M from memory"
)
_NEEDED = ("bf16_tflops", "memory_gb", "memory_gb_per_s")
_NEEDED_OF_TPUS = (*_NEEDED, "link_gb_per_s", "dimensions", "max_slice")


@dataclass(frozen=True)
class Figure:
    """A number and how far it is to be trusted.

    Attributes:
        value: in the unit that its field's name has.
        confidence: a letter of `LEGEND`.
        note: what else is to be known of it.
        source: title and address of the document that states it, or of several; "" where none is
            noted.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    value: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
    confidence: Confidence = "U"
    note: str = ""
    source: str = ""


@dataclass(frozen=True)
class Flag:
    """An option of XLA's compiler and why it is set."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    value: str | bool | int | float
    reason: str


@dataclass(frozen=True)
class Hidden:
    """The fractions of the time of collectives that pass beside computing, and where they are from.

    Attributes:
        weights: of those on weights and gradients.
        tokens: of those on hidden states.
        reason: the compiled programs whose schedules show it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    weights: Annotated[float, Field(ge=0, le=1)]
    tokens: Annotated[float, Field(ge=0, le=1)]
    reason: str


# A bare number is a figure too.
Known = Annotated[
    Figure | None,
    BeforeValidator(lambda given: given if isinstance(given, dict) else {"value": given}),
]


@dataclass(frozen=True)
class Chip:
    """An accelerator. Units are in the names of its figures; one that is None is unknown."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str  # as targets have it, "v5p"
    title: str  # as people call it, "TPU v5p"
    maker: str = (
        "other"  # "google", "nvidia", "amd", ..., or "cpu" for processes without an accelerator
    )
    family: Literal["tpu", "nvidia", "amd", "other"] = "other"  # of chips with one compiler
    bf16_tflops: Known = None  # dense peak, or of fp16 where there is no bf16
    int8_tops: Known = None  # dense peak
    # Dense peak with e4m3 and e5m2 as the Open Compute Project has them, and XLA's products in fp8
    # with them; a chip that has others alone has none here.
    fp8_tflops: Known = None
    memory_gb: Known = None
    memory_gb_per_s: Known = None
    link_gb_per_s: Known = None  # one way, all scale-up links of a chip together
    domain: Known = None  # chips joined by scale-up links
    network_gb_per_s: Known = None  # one way for each chip, between domains
    watts: Known = None  # thermal design power
    price: Known = None  # USD per chip-hour on demand
    usable_memory_gib: Known = None  # what a compiled program may take
    clock_ghz: Known = None  # of TPUs, which turns the compiler's cycles into seconds
    back_end: str = ""  # what brings JAX for it, if anything does
    refused: str = ""  # why training on it cannot be planned, if so
    per_node: Size = 1
    devices_per_chip: Size = 1  # as JAX counts devices
    extra: Literal["", "tpu", "cuda", "rocm"] = (
        ""  # the extra of the package that installs its back end
    )
    gke_accelerator: str = ""  # value of GKE's node label
    dimensions: Literal[0, 2, 3] = 0  # of a TPU slice's torus
    max_slice: Count = 0  # chips in the largest slice of TPUs
    device_kinds: tuple[str, ...] = ()  # what JAX calls its devices
    # The word for such a GPU, or for one of its architecture, in XLA's descriptions; its name if
    # it is "".
    described_as: str = ""
    compute_capability: tuple[int, int] | None = None  # of NVIDIA's GPUs
    flags: tuple[Flag, ...] = ()  # with which programs are compiled for it
    hidden: Hidden | None = None  # of programs with these; None where no schedule was read

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 peak of one device in FLOP/s."""
        return self.bf16_tflops.value * 1e12 / self.devices_per_chip if self.bf16_tflops else None

    @property
    def device_memory_gib(self) -> Figure | None:
        """What a compiled program may take of one device; of a chip of the user's own its capacity,
        unless it says.
        """
        figure = self.usable_memory_gib
        if figure is None and self.memory_gb:
            figure = Figure(
                self.memory_gb.value * 1e9 / 2**30, weakest("D", self.memory_gb), "its capacity"
            )
        return figure and replace(figure, value=figure.value / self.devices_per_chip)


FIGURES = tuple(field.name for field in fields(Chip) if field.type is Known)
_adapter = cache(TypeAdapter)


_ORDER: dict[Any, int] = {letter: order for order, letter in enumerate(get_args(Confidence))}


def weakest(*figures: Figure | str) -> Confidence:
    """The confidence of what is computed from figures (or from their confidences): that of the
    weakest.
    """
    letters: Any = (
        figure.confidence if isinstance(figure, Figure) else figure for figure in figures
    )
    return min(letters, key=_ORDER.__getitem__)


def catalogue(extra: Path | None = None) -> Mapping[str, Chip]:
    """Every chip by its name.

    `extra` is laid out as `hardware/chips.toml`: it adds chips or replaces figures of one, and its
    bare numbers are of confidence U. A figure's source names a document of the table `sources`, or
    is the document itself.

    Raises:
        UserError: `extra` cannot be read, has an unknown field or a bad value, or lacks what a plan
            needs of a chip.
    """
    tables = _tables(extra)
    documents = _documents(tables)
    del tables["facts"], tables["sources"]
    return {
        name: _chip(name, {field: _cite(given, documents) for field, given in table.items()})
        for name, table in tables.items()
    }


def facts(extra: Path | None = None) -> Mapping[str, Figure]:
    """Figures that are not of one chip, by name, from the table `facts` of the same files; raises
    as `catalogue`.
    """
    tables = _tables(extra)
    documents = _documents(tables)
    return {
        name: _validate(Known, _cite(given, documents), f"facts.{name}")
        for name, given in tables["facts"].items()
    }


@cache
def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls by that name; None where the catalogue lacks it, as CPUs."""
    # GPUs append their memory and form, as in "NVIDIA H100 80GB HBM3" and "NVIDIA A100-SXM4-40GB";
    # TPUs do not.
    tpu, model = device_kind.startswith("TPU"), device_kind.replace("-", " ") + " "
    for chip in catalogue().values():
        if any(
            device_kind == kind or (not tpu and model.startswith(kind + " "))
            for kind in chip.device_kinds
        ):
            return chip
    return None


def _tables(extra: Path | None) -> dict[str, dict[str, Any]]:
    """The tables of the built-in file, with those of `extra` laid over them."""
    tables = tomllib.loads((Path(__file__).with_name("chips.toml")).read_text("utf-8"))
    added: dict[str, Any] = {}
    try:
        added = tomllib.loads(read_bytes(extra, MOST_BYTES).decode("utf-8")) if extra else {}
    except OSError as error:
        raise UserError(
            f"--chips {str(extra)!r} cannot be read ({error.strerror}); name a TOML file"
        ) from None
    except Unreadable as error:
        raise UserError(
            f"--chips {str(extra)!r} cannot be read (it {error}); name a TOML file"
        ) from None
    except (ValueError, RecursionError) as error:
        # Python's advice on numbers of thousands of digits is for programmers.
        reason = str(error).partition("; use sys.")[0]
        raise UserError(
            f"--chips {str(extra)!r} is not TOML ({reason}); write it as hardware/chips.toml is"
        ) from None
    for name, table in added.items():
        if not isinstance(table, dict):
            raise UserError(
                f"{name}={table!r} is of no chip; write the chip's name above it, as in [h100]"
            )
        tables[name.lower()] = {**tables.get(name.lower(), {}), **table}
    return tables


def _documents(tables: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Title and address of each document of the table `sources`, by its name there."""
    documents: dict[str, str] = _validate(dict[str, str], tables["sources"], "sources")
    return documents


def _cite(given: Any, documents: Mapping[str, str]) -> Any:
    """A figure as a file gives it, with the titles and addresses of its sources in place of their
    names.
    """
    if not isinstance(given, dict):
        return given
    source = given.get("source")
    named = source if isinstance(source, list) else [source]
    names = [name for name in named if isinstance(name, str)]
    if not names or len(names) < len(named):  # the validation that follows says what is wrong
        return given
    return {**given, "source": "; ".join(documents.get(name, name) for name in names)}


def _chip(name: str, table: dict[str, Any]) -> Chip:
    """A chip from its table."""
    needed = (
        () if "refused" in table else _NEEDED_OF_TPUS if table.get("family") == "tpu" else _NEEDED
    )
    if missing := [field for field in needed if field not in table]:
        raise UserError(
            f"[{name}] is not in the catalogue, and a new chip needs {', '.join(missing)}; add them"
        )
    return _validate(Chip, {"title": name, **table, "name": name}, name)


def _validate(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`; a mistake is one sentence that begins with where it is."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        if error.errors()[0]["type"] == "unexpected_keyword_argument":
            *path, last = (where, *map(str, error.errors()[0]["loc"]))
            parents = (Chip, Figure, Flag, Hidden)
            known = [field.name for parent in parents for field in fields(parent)]
            raise UserError(
                f"'{'.'.join(path)}.{last}' is not a field; {did_you_mean(last, known)}"
            ) from None
        raise UserError(f"{where}.{explain_validation_error(error)}") from None
