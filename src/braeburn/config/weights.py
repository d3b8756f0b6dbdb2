"""What weights are held and written in, and what programs are written for, by the names that
commands take.
"""

from typing import Literal

from braeburn.errors import UserError

WeightType = Literal["float32", "bfloat16"]
# What JAX compiles for, all of which programs are written for unless the user says.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The types of weights in the files of each format, the usual one first, by their names.
_WIDE = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
FILE_TYPES: dict[str, dict[str, str]] = {
    "hf": _WIDE,
    "stablehlo": _WIDE,
    "gguf": {"f16": "f16", "q8_0": "q8_0", "q4_0": "q4_0"},
}


def weight_type(name: str | None) -> WeightType | None:
    """The type of weights that `--dtype` names; None without it.

    Raises:
        UserError: it names none.
    """
    if name is None:
        return None
    if name not in FILE_TYPES["hf"]:
        raise UserError(f"--dtype {name!r} is not known; use --dtype fp32 or --dtype bf16")
    return FILE_TYPES["hf"][name]  # type: ignore[return-value]


def file_type(format_: str, dtype: str | None, type_: str | None) -> str:
    """The type of weights in the files of an export.

    Args:
        format_: what `--format` says: "hf", "stablehlo" or "gguf".
        dtype: what `--dtype` says, of any but a GGUF file; None without it.
        type_: what `--type` says, of a GGUF file; None without it.

    Returns:
        The type; "" for that which the run computes in, the default of "stablehlo".

    Raises:
        UserError: the format or the type is not known, or the option is of another format.
    """
    if format_ not in FILE_TYPES:
        raise UserError(
            f"--format {format_!r} is not known; use --format hf, --format gguf or --format "
            f"stablehlo"
        )
    if format_ != "gguf":
        if type_ is not None:
            what = "a Hugging Face directory" if format_ == "hf" else "portable programs"
            raise UserError(
                f"--type {type_} is one of --format gguf; of {what} it is "
                f"--dtype fp32 or --dtype bf16"
            )
        return weight_type(dtype) or ("float32" if format_ == "hf" else "")
    if dtype is not None:
        raise UserError(
            f"--dtype {dtype} is one of --format hf and stablehlo; of a GGUF file it is --type "
            f"f16, q8_0 or q4_0"
        )
    if type_ is not None and type_ not in FILE_TYPES["gguf"]:
        raise UserError(f"--type {type_!r} is not known; use --type f16, q8_0 or q4_0")
    return type_ or "f16"


def platforms_of(format_: str, platforms: str | None) -> tuple[str, ...]:
    """The platforms that an export's programs are for, by JAX's names; none where it has none.

    Args:
        format_: what `--format` says.
        platforms: what `--platforms` says; None without it.

    Raises:
        UserError: one is not known, or the option is of another format.
    """
    if format_ != "stablehlo":
        if platforms is not None:
            raise UserError(
                f"--platforms {platforms!r} is one of --format stablehlo; leave it out, or add "
                f"--format stablehlo"
            )
        return ()
    given = ",".join(PLATFORMS) if platforms is None else platforms
    names = tuple(dict.fromkeys(name.strip().lower() for name in given.split(",")))
    if unknown := [name for name in names if name not in PLATFORMS]:
        raise UserError(
            f"--platforms {platforms!r} names {unknown[0]!r}, which is no platform of JAX; name "
            f"some of {', '.join(PLATFORMS)}, as in --platforms {','.join(PLATFORMS)}"
        )
    return names
