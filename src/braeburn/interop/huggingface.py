"""Hugging Face model directories, without transformers or torch.

The family of a model names the tensor that each of our parameters becomes; shapes and
transpositions follow from the `ParamSpec`.
"""

import itertools
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, which safetensors needs to read it
import numpy as np
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from braeburn.config import ModelConfig, WeightType
from braeburn.data.tokenizer import Tokenizer
from braeburn.disk import remove_stale
from braeburn.errors import UserError
from braeburn.interop.tensor_file import CODES, Entry, write_file
from braeburn.interop.tensors import Joint, Tensor, checked, family_tensors, joint, tensors_of
from braeburn.layers.spec import ParamSpec, Tree, map_specs
from braeburn.models.decoder import param_specs
from braeburn.models.families import Family, families_by_type, family_of
from braeburn.models.huggingface_config import read_config, write_config
from braeburn.parallel.agreement import first_objection, main_first, said_by_main
from braeburn.parallel.processes import is_main
from braeburn.reading import is_regular, read_object, shown, validated
from braeburn.train.progress import tracked
from braeburn.train.stored import Pieces

_READABLE = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Files:
    """What a directory tells of a model beside its sizes, and how it holds the weights.

    Attributes:
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.
        dtype: of all weights.
        max_shard_bytes: tensors beyond this size go to further files.
    """

    max_position_embeddings: int
    dtype: WeightType = "float32"
    max_shard_bytes: int = 5_000_000_000

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return np.dtype(self.dtype).itemsize


def write(
    directory: str | Path,
    params: Tree,
    model: ModelConfig,
    tokenizer: Tokenizer | None,
    files: Files,
) -> None:
    """Writes a directory that `AutoModelForCausalLM` and `AutoTokenizer` of transformers
    4 and 5 load.

    It is written beside its destination and renamed when complete: an interrupted export leaves no
    directory that looks like a model. One tensor at a time is copied from the parameters. Of
    several processes, each writes its share of the files, into a folder that all must see.

    Args:
        directory: where to write; it must not exist or be empty.
        params: arrays of any float type, as `param_specs(model)` describes them, or `StoredArray`s.
        model: the sizes, from which its family follows.
        tokenizer: is shipped, and tells which tokens begin and end a document; None ships none.
        files: what else the directory tells, and in which type.

    Raises:
        UserError: the directory is in use or cannot be written, or the model or tokenizer is one
            that transformers would not load.
        ValueError: `params` are not those of `model`.
    """
    directory = Path(directory).expanduser().resolve()
    number = said_by_main(f"which folder {directory} is made in", uuid.uuid4().hex)
    partial = directory.with_name(f".{directory.name}.partial-{number}")
    made = False

    def begin() -> None:
        nonlocal made
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            problem = "is not empty" if directory.is_dir() else "is a file"
            raise UserError(f"{str(directory)!r} {problem}; name a new folder")
        if refusal := family_of(model).refusal(model):
            raise UserError(refusal)
        remove_stale(directory.parent, directory.name)
        checked(params, model, tokenizer)
        with _explaining(directory):
            partial.mkdir(parents=True)
            made = True
            _write_settings(partial, model, tokenizer, files)

    try:
        main_first(f"{partial.name} was made", begin if is_main() else lambda: None)
        tensors = joint(family_tensors(model))
        objection = None
        try:
            with _explaining(directory):
                _write_weights(partial, tensors, checked(params, model, tokenizer), files)
        except UserError as error:
            objection = str(error)
        if objection := first_objection(f"{partial.name} was written", objection):
            raise UserError(objection)
        if is_main():
            with _explaining(directory):
                partial.rename(directory)
    finally:
        if made:  # what this call did not make is not its to remove
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _explaining(directory: Path) -> Iterator[None]:
    """Turns failures to write into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{str(directory)!r} cannot be written ({error}); free space or name another folder"
        ) from None


def _write_settings(
    folder: Path, model: ModelConfig, tokenizer: Tokenizer | None, files: Files
) -> None:
    """Writes all files but the weights."""
    ids = tokenizer.special_ids() if tokenizer else {"bos_token_id": None, "eos_token_id": None}
    config = write_config(model, files.max_position_embeddings)
    dtypes = {"dtype": files.dtype, "torch_dtype": files.dtype}
    _write_json(folder / "config.json", config | dtypes | ids)
    _write_json(
        folder / "generation_config.json", tokenizer.generation_config() if tokenizer else ids
    )
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        longest = {"model_max_length": files.max_position_embeddings}
        _write_json(folder / "tokenizer_config.json", tokenizer.tokenizer_config() | longest)


def _write_weights(
    directory: Path, tensors: Sequence[Joint], parameters: Mapping[str, Any], files: Files
) -> None:
    """Writes the files of weights; of several processes, each writes its share."""
    sizes = {tensor.name: files.width * math.prod(tensor.shape) for tensor in tensors}
    shards: list[list[Joint]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(sizes[t.name] for t in (*shards[-1], tensor)) > files.max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = ["model.safetensors"]
    own = range(jax.process_index(), len(shards), jax.process_count())
    written = itertools.chain.from_iterable(
        _write_file(directory / names[index], shards[index], parameters, files.dtype)
        for index in own
    )
    for _ in tracked(written, "writing weights", sum(len(shards[index]) for index in own)):
        pass
    if len(shards) > 1 and is_main():
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_file(
    path: Path, tensors: Sequence[Joint], parameters: Mapping[str, Any], dtype: WeightType
) -> Iterator[Entry]:
    """Writes a safetensors file, and gives each tensor once it is written."""

    def values(tensor: Joint) -> Callable[[], np.ndarray]:
        return lambda: tensor.exported(parameters)

    return write_file(
        path, [Entry(tensor.name, tensor.shape, dtype, values(tensor)) for tensor in tensors]
    )


def read(directory: str | Path) -> tuple[ModelConfig, Tree, Path]:
    """The model in a Hugging Face directory.

    Returns:
        Its sizes; its parameters as NumPy float32 arrays; the path of its `tokenizer.json`.

    Raises:
        UserError: a file is missing or unreadable, the architecture is one that Braeburn has not,
            or the tensors are not those that config.json describes.
    """
    model, weights, tokenizer_file = open_weights(directory)
    params = jax.tree.map(lambda pieces: pieces.assembled(np.float32), weights)
    return model, params, tokenizer_file


def open_weights(
    directory: str | Path, dtype: WeightType | None = None
) -> tuple[ModelConfig, Tree, Path]:
    """The model in a Hugging Face directory, whose weights are read as they are used.

    Args:
        directory: of the model.
        dtype: of all parameters but those of norms, which are float32; None for bfloat16 where the
            directory has them so, and float32 otherwise.

    Returns:
        Its sizes; its parameters, each as `Pieces` of one layer; the path of its `tokenizer.json`.

    Raises:
        UserError: a file is missing or unreadable, the architecture is one that Braeburn has not,
            or the tensors are not those that config.json describes.
    """
    directory = Path(directory).expanduser()
    model, tokenizer_file = describe(directory)
    return model, _open_weights(directory, model, dtype), tokenizer_file


def describe(directory: str | Path) -> tuple[ModelConfig, Path]:
    """The sizes of the model in a Hugging Face directory, and the path of its `tokenizer.json`;
    weights are not read.

    Raises:
        UserError: a file is missing or unreadable, or the architecture is one that Braeburn has
            not.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"there is no folder {str(directory)!r}; name a downloaded Hugging Face model"
        )
    model = read_config(directory)
    _weight_files(directory)
    tokenizer_file = directory / "tokenizer.json"
    if not tokenizer_file.exists():
        raise UserError(
            f"{str(directory)!r} holds no tokenizer.json; download it, or save one with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return model, tokenizer_file


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory.

    Raises:
        UserError: there are none, or the index names something else than files in that directory.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if is_regular(single):
        return [single]
    if not index.exists():
        raise UserError(
            f"{str(directory)!r} holds no model.safetensors; download the safetensors weights, or "
            f"convert with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    fix = "download it again"
    weight_map = validated(_Index, read_object(index, fix), str(index), fix).weight_map
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not 0 < len(name) < 256:
            raise UserError(
                f"{str(index)!r} names the file {shown(name)}, which is no file in "
                f"{str(directory)!r}; {fix}"
            )
    return [directory / name for name in names]


class _Index(BaseModel):
    """The fields of `model.safetensors.index.json` that are read."""

    weight_map: dict[str, str] = Field(default_factory=dict)


def _open_weights(directory: Path, model: ModelConfig, dtype: WeightType | None) -> Tree:
    family = family_of(model)
    tensors = family_tensors(model)
    with ExitStack() as stack:
        holders: dict[str, Any] = {}  # name of a tensor -> the open file that holds it
        places: dict[str, Path] = {}  # name of a tensor -> the path of that file
        unread = family.unread(model)
        # Weights of a model without its head lack the prefix.
        passed_over = (unread, unread.removeprefix("model.")) if unread else ()
        for file in _weight_files(directory):
            holder = stack.enter_context(_opened(file))
            names = holder.keys()
            read = [name for name in names if not name.startswith(passed_over)]
            holders |= dict.fromkeys(read, holder)
            places |= dict.fromkeys(read, file)
        wanted = {tensor.name: tensor.whole_shape for tensor in tensors}
        aliases = _aliases(family, model)
        stored = _stored_names(wanted, holders, aliases)
        _check(directory, wanted, stored, holders, aliases)
        types = {name: holders[name].get_slice(name).get_dtype() for name in stored.values()}
    by_path: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_path.setdefault(tensor.path, []).append(tensor)

    def values(tensor: Tensor, kept_as: np.dtype) -> np.ndarray:
        # A file is mapped into memory while it is open, and all that was read of it stays there.
        name = stored[tensor.name]
        with _opened(places[name]) as holder:
            return tensor.imported(holder.get_tensor(name)).astype(kept_as, copy=False)

    def pieces(path: str, spec: ParamSpec) -> Pieces:
        parts = by_path[path]
        is_half = {types[stored[part.name]] for part in parts} == {CODES["bfloat16"]}
        lossless = "bfloat16" if is_half else "float32"
        kept_as = spec.held_in(dtype or lossless)
        if parts[0].layer is None:
            return Pieces.whole(spec.shape, kept_as, lambda: values(parts[0], kept_as))
        of_layer: dict[int | None, list[Tensor]] = {}
        for part in parts:
            of_layer.setdefault(part.layer, []).append(part)

        def layer(number: int) -> np.ndarray:
            first, *others = of_layer[number]
            if first.expert is None:
                return values(first, kept_as)
            return np.stack([values(part, kept_as) for part in (first, *others)])

        return Pieces.of_layers(spec.shape, kept_as, layer)

    return map_specs(pieces, param_specs(model))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if not is_regular(file):
            missing = not file.exists()
            raise OSError("No such file or directory" if missing else "it is not an ordinary file")
        opened = safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}); download it again") from None
    with opened as holder:
        yield holder


def _aliases(family: Family, model: ModelConfig) -> dict[str, str]:
    """The tensors that may also stand under another name, as the family says, and of tied
    embeddings, the embedding under that of the head.
    """
    tied = {family.names["embedding"]: family.names["head"]} if model.tied_embeddings else {}
    if not family.aliases:
        return tied
    usual = tensors_of(model, family.names)
    others = tensors_of(model, {**family.names, **family.aliases})
    pairs = ((one.name, other.name) for one, other in zip(usual, others, strict=True))
    return tied | {one: other for one, other in pairs if one != other}


def _stored_names(
    wanted: Iterable[str], holders: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, str]:
    """The name under which each tensor is stored, where it is; names as transformers finds them.

    The weights of a model without its head, as `LlamaModel` saves them, lack the prefix "model.".
    """
    stored = {}
    for name in wanted:
        candidates = [name, name.removeprefix("model.")]
        if name in aliases:
            candidates.append(aliases[name])
        found = [candidate for candidate in candidates if candidate in holders]
        if found:
            stored[name] = found[0]
    return stored


def _check(
    directory: Path,
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    holders: Mapping[str, Any],
    aliases: Mapping[str, str],
) -> None:
    """Refuses tensors that are not exactly those that config.json describes.

    Args:
        directory: names the model in errors.
        wanted: name of a tensor -> the shape that config.json gives it.
        stored: name of a tensor -> the name under which it is stored.
        holders: name under which a tensor is stored -> the open file.
        aliases: name of a tensor -> another name that it may stand under, too.
    """

    def refuse(names: list[str], problem: str) -> None:
        if names:
            others = f" and {len(names) - 1} more" if names[1:] else ""
            raise UserError(
                f"{str(directory)!r} holds weights unlike its config.json: {names[0]}{others} "
                f"{problem}"
            )

    refuse(sorted(wanted.keys() - stored.keys()), "is missing; download the weights again")
    for name, alias in aliases.items():
        own = stored[name]
        if alias in holders and alias != own:
            same = np.array_equal(holders[alias].get_tensor(alias), holders[own].get_tensor(own))
            refuse(
                [] if same else [alias],
                f"differs from {own}; set tie_word_embeddings to false in config.json, or download "
                f"the weights again",
            )
    # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
    others = holders.keys() - set(stored.values()) - set(aliases.values())
    extra = [name for name in others if not name.endswith(".rotary_emb.inv_freq")]
    readable = ", ".join(families_by_type())
    refuse(sorted(extra), f"has no place; choose a plain model of type {readable}")
    for wanted_name, shape in wanted.items():
        name = stored[wanted_name]
        contents = holders[name].get_slice(name)
        found, code = tuple(contents.get_shape()), contents.get_dtype()
        refuse(
            [name] * (found != shape), f"has the shape {found}, not {shape}; download the two again"
        )
        refuse(
            [name] * (code not in _READABLE),
            f"has the type {code}; choose weights in {', '.join(_READABLE)}",
        )


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
