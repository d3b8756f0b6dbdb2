"""What weights are held and written in, by the names that commands take."""

from typing import Literal

from braeburn.errors import UserError

WeightType = Literal["float32", "bfloat16"]
# The types of weights in the files of each format, the usual one first, by their names.
FILE_TYPES: dict[str, dict[str, str]] = {
    "hf": {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"},
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
        format_: what `--format` says: "hf" or "gguf".
        dtype: what `--dtype` says, of a Hugging Face directory; None without it.
        type_: what `--type` says, of a GGUF file; None without it.

    Raises:
        UserError: the format or the type is not known, or the option is of the other format.
    """
    if format_ not in FILE_TYPES:
        raise UserError(f"--format {format_!r} is not known; use --format hf or --format gguf")
    if format_ == "hf":
        if type_ is not None:
            raise UserError(
                f"--type {type_} is one of --format gguf; of a Hugging Face directory it is "
                f"--dtype fp32 or --dtype bf16"
            )
        return weight_type(dtype) or "float32"
    if dtype is not None:
        raise UserError(
            f"--dtype {dtype} is one of --format hf; of a GGUF file it is --type f16, q8_0 or q4_0"
        )
    if type_ is not None and type_ not in FILE_TYPES["gguf"]:
        raise UserError(f"--type {type_!r} is not known; use --type f16, q8_0 or q4_0")
    return type_ or "f16"
