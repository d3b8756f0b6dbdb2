"""Hugging Face model directories of the Llama and Qwen3 families, without transformers or torch.

A table for each family names the tensor that each of our parameters becomes; shapes and transpositions follow from the
`ParamSpec`. A model that normalises its queries and keys is a Qwen3, one that does not is a Llama.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy, which safetensors needs to read it
import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from braeburn.config import Model, RopeScaling, explain_validation_error
from braeburn.errors import UserError
from braeburn.model.spec import ParamSpec, Tree, map_specs, walk
from braeburn.model.transformer import param_specs

_LLAMA_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/query": "model.layers.{}.self_attn.q_proj.weight",
    "layers/key": "model.layers.{}.self_attn.k_proj.weight",
    "layers/value": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention_output": "model.layers.{}.self_attn.o_proj.weight",
    "layers/ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_QWEN3_NAMES = _LLAMA_NAMES | {
    "layers/query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/key_norm": "model.layers.{}.self_attn.k_norm.weight",
}


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        model_type: its name in config.json.
        architecture: the class that transformers loads it with.
        qk_norm: whether queries and keys are normalised.
        head_dim: what an absent `head_dim` means; None for hidden_size / num_attention_heads.
        names: path of our parameter -> name of the tensor, with `{}` for the layer's index.
    """

    model_type: str
    architecture: str
    qk_norm: bool
    head_dim: int | None
    names: Mapping[str, str]


LLAMA = Family("llama", "LlamaForCausalLM", qk_norm=False, head_dim=None, names=_LLAMA_NAMES)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, head_dim=128, names=_QWEN3_NAMES)
FAMILIES = {family.model_type: family for family in (LLAMA, QWEN3)}

_WRITABLE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SAFETENSORS_CODES = {"float32": "F32", "bfloat16": "BF16"}
_READABLE_CODES = ("F32", "BF16", "F16")
_ROPE_BASE = 10_000.0  # where a config.json names none


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the checkpoint: one of our parameters, or one layer of a stacked one.

    The weight of a `torch.nn.Linear` is [outputs, inputs]; our matrices hold the inputs (`fan_in`) first.
    """

    name: str
    path: str
    layer: int | None
    spec: ParamSpec

    @property
    def block(self) -> tuple[int, ...]:
        """The shape on our side, without the layers."""
        return tuple(self.spec.shape[dim] for dim in self.spec.block_dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        if self.spec.role != "matrix":
            return self.block
        inputs = int(np.prod([self.spec.shape[self.spec.axes.index(axis)] for axis in self.spec.fan_in]))
        return int(np.prod(self.block)) // inputs, inputs

    def of(self, parameter: Any) -> Any:
        """The part of our parameter that this tensor holds."""
        return parameter if self.layer is None else parameter[self.layer]

    def exported(self, block: np.ndarray) -> np.ndarray:
        """Our values in the checkpoint's layout."""
        return block.reshape(self.shape[::-1]).T if self.spec.role == "matrix" else block

    def imported(self, tensor: np.ndarray) -> np.ndarray:
        """The checkpoint's values in our layout."""
        return tensor.T.reshape(self.block) if self.spec.role == "matrix" else tensor


def _tensors(family: Family, specs: Tree) -> list[_Tensor]:
    """Every tensor of a checkpoint, layer by layer, the unstacked ones first."""
    found = []
    for path, spec in walk(specs):
        layers = range(spec.shape[0]) if spec.stacked else [None]
        found += [_Tensor(family.names[path].format(layer), path, layer, spec) for layer in layers]
    return sorted(found, key=lambda tensor: -1 if tensor.layer is None else tensor.layer)


def write(
    directory: str | Path,
    params: Tree,
    model: Model,
    tokenizer_file: str | Path | None,
    max_position_embeddings: int,
    begin_id: int | None,
    end_id: int | None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `AutoModelForCausalLM` and `AutoTokenizer` of transformers 4 and 5 load.

    It is written beside its destination and renamed when complete: an interrupted export leaves no directory that
    looks like a model. One tensor at a time is copied from the parameters.

    Args:
        directory: where to write; it must not exist or be empty.
        params: arrays of any float type, as `param_specs(model)` describes them.
        model: the sizes; its family follows from `qk_norm`.
        tokenizer_file: the `tokenizer.json` to ship, unchanged; None writes no tokenizer.
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.
        begin_id: id of the token that starts a document, or None.
        end_id: id of the token that ends one and stops generation, or None.
        dtype: "float32" or "bfloat16".
        max_shard_bytes: tensors beyond this size go to further files.

    Raises:
        UserError: the directory is in use or cannot be written, or the model, an id, the tokenizer or `dtype` is one
            that transformers would not load.
        ValueError: `params` are not those of `model`.
    """
    directory = Path(directory).expanduser().resolve()
    family = QWEN3 if model.qk_norm else LLAMA
    _check_free(directory)
    _check_exportable(model, dtype, max_position_embeddings, {"begin_id": begin_id, "end_id": end_id})
    special_tokens = None
    if tokenizer_file is not None:
        special_tokens = _special_tokens(Path(tokenizer_file), model.vocab_size)
    parameters = dict(walk(params))
    tensors = _tensors(family, param_specs(model))
    for tensor in tensors:
        found = getattr(parameters.get(tensor.path), "shape", None)
        if found != tensor.spec.shape:
            raise ValueError(f"params[{tensor.path!r}] has the shape {found}, the model's is {tensor.spec.shape}")

    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        ids = {"bos_token_id": begin_id, "eos_token_id": end_id}
        _write_json(partial / "config.json", _config(model, family, max_position_embeddings, dtype) | ids)
        _write_json(partial / "generation_config.json", ids)
        if tokenizer_file is not None and special_tokens is not None:
            shutil.copyfile(tokenizer_file, partial / "tokenizer.json")
            names = {"bos_token": special_tokens.get(begin_id), "eos_token": special_tokens.get(end_id)}
            _write_json(partial / "tokenizer_config.json", _tokenizer_config(max_position_embeddings) | names)
        _write_weights(partial, tensors, parameters, dtype, max_shard_bytes)
        partial.rename(directory)
    except OSError as error:
        raise UserError(
            f"{str(directory)!r} cannot be written ({error.strerror or error}); free space there or name another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_free(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{str(directory)!r} is not empty; name a new folder, or remove it first")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{str(directory)!r} is a file; name a new folder")


def _check_exportable(model: Model, dtype: str, max_position_embeddings: int, ids: Mapping[str, int | None]) -> None:
    if dtype not in _WRITABLE:
        raise UserError(f"dtype={dtype!r} cannot be written; set dtype to one of {', '.join(_WRITABLE)}")
    if max_position_embeddings < 1:
        raise UserError(f"max_position_embeddings={max_position_embeddings} is not positive; set it to 1 or more")
    for field, token in ids.items():
        if token is not None and not 0 <= token < model.vocab_size:
            raise UserError(f"{field}={token} is no token; set {field} to None or to 0 ... {model.vocab_size - 1}")
    if not model.qk_norm and model.d_model % model.num_heads:
        raise UserError(
            f"d_model={model.d_model} is not a multiple of num_heads={model.num_heads}, which transformers refuses in "
            f"a Llama; train with d_model={-(-model.d_model // model.num_heads) * model.num_heads} or with qk_norm=true"
        )


def _config(model: Model, family: Family, max_position_embeddings: int, dtype: str) -> dict[str, Any]:
    scaling = _rope_scaling(model.rope_scaling)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": max_position_embeddings,
        # transformers 5 reads the first of these, transformers 4 and what was built on it the other two.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base} | (scaling or {}),
        "rope_theta": model.rope_base,
        "rope_scaling": scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {"rope_type": "llama3"} | scaling.model_dump(exclude={"kind"})


def _tokenizer_config(max_position_embeddings: int) -> dict[str, Any]:
    return {
        # The class that takes tokenizer.json as it is; the one of the family puts its own normaliser in front.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _special_tokens(path: Path, vocab_size: int) -> dict[int | None, str]:
    """The special tokens of a tokenizer.json by id. No other may be declared special: it would split text anew."""
    contents = _read_json(path, "name a readable tokenizer.json")
    try:
        added = {token["id"]: token for token in contents.get("added_tokens") or ()}
        vocabulary = contents["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *added])
        special = {i: token["content"] for i, token in added.items() if token["special"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{str(path)!r} does not hold a tokenizer; name a readable tokenizer.json") from None
    if largest >= vocab_size:
        raise UserError(
            f"{str(path)!r} holds the token {largest}, which vocab_size={vocab_size} has no row for; name the "
            f"tokenizer that the model was trained with"
        )
    return special


def _write_weights(
    directory: Path, tensors: Sequence[_Tensor], parameters: Mapping[str, Any], dtype: str, max_shard_bytes: int
) -> None:
    shards = list(_shards(tensors, max_shard_bytes // _WRITABLE[dtype].itemsize))
    if len(shards) == 1:
        _write_safetensors(directory / "model.safetensors", shards[0], parameters, dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / name, shard, parameters, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    total_size = sum(_bytes(tensor, dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _shards(tensors: Sequence[_Tensor], max_values: int) -> Iterator[list[_Tensor]]:
    """The tensors in order, cut into files of at most `max_values`, or of one tensor that is larger."""
    shard: list[_Tensor] = []
    values = 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape))
        if shard and values + size > max_values:
            yield shard
            shard, values = [], 0
        shard.append(tensor)
        values += size
    yield shard


def _bytes(tensor: _Tensor, dtype: str) -> int:
    return int(np.prod(tensor.shape)) * _WRITABLE[dtype].itemsize


def _write_safetensors(file: Path, tensors: Sequence[_Tensor], parameters: Mapping[str, Any], dtype: str) -> None:
    """The safetensors format by hand, tensor by tensor: its own writer wants all of a file in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + _bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": _SAFETENSORS_CODES[dtype],
            "shape": tensor.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = tensor.exported(np.asarray(tensor.of(parameters[tensor.path])))
            out.write(np.ascontiguousarray(values, _WRITABLE[dtype]).reshape(-1).view(np.uint8).data)


def read(directory: str | Path) -> tuple[Model, Tree, Path]:
    """The model in a Hugging Face directory.

    Returns:
        Its sizes; its parameters as NumPy float32 arrays; the path of its `tokenizer.json`.

    Raises:
        UserError: a file is missing or unreadable, the architecture is one that Braeburn has not, or the tensors are
            not those that config.json describes.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"there is no folder {str(directory)!r}; name a downloaded Hugging Face model")
    config = _read_json(directory / "config.json", "name the folder of a Hugging Face model, or download it again")
    try:
        family, model = _parse_config(config)
    except UserError as error:
        raise UserError(f"{str(directory / 'config.json')!r}: {error}") from None
    files = _weight_files(directory)
    tokenizer_file = directory / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise UserError(
            f"{str(directory)!r} holds no tokenizer.json; download it, or save one with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return model, _read_weights(directory, files, family, model), tokenizer_file


# Fields that change the computation, with the only value under which it is ours.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def _parse_config(config: Mapping[str, Any]) -> tuple[Family, Model]:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"model_type={model_type!r} cannot be imported; choose a model of type {' or '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for field, only in _ONLY.items():
        if config.get(field) not in (None, only):
            raise UserError(f"{field}={config[field]!r} cannot be imported; choose a model with {field}={only!r}")
    other_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    if other_layers:
        raise UserError(
            f"layer_types names {', '.join(sorted(other_layers))}, which cannot be imported; "
            f"choose a model whose layers all have full_attention"
        )
    d_model, num_heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    absent_head_dim = None if "head_dim" in config else family.head_dim
    base, scaling = _parse_rope(config)
    fields = {
        "vocab_size": _size(config, "vocab_size"),
        "d_model": d_model,
        "num_layers": _size(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _size(config, "num_key_value_heads", num_heads),
        "head_dim": _size(config, "head_dim", absent_head_dim or d_model // num_heads),
        "ffn_dim": _size(config, "intermediate_size"),
        "qk_norm": family.qk_norm,
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope_base": base,
        "rope_scaling": scaling,
    }
    try:
        return family, Model.model_validate(fields)
    except ValidationError as error:
        raise UserError(explain_validation_error(error)) from None


def _size(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise UserError(f"{field}={value!r} is not a size; give it the positive integer that the weights have")
    return value


def _parse_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """The base and the fields of a `RopeScaling`, wherever a version of transformers put them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = rope.get("rope_theta", config.get("rope_theta", _ROPE_BASE))
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UserError(
            f"rope_parameters differ by kind of layer ({', '.join(nested)}), which cannot be imported; "
            f"choose a model with one set of them"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r} cannot be imported; choose a model with "
            f"partial_rotary_factor=1.0"
        )
    if kind == "default":
        return base, None
    required = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in required:
        raise UserError(
            f"rope_type={kind!r} cannot be imported; choose a model with rope_type default, {' or '.join(required)}"
        )
    missing = [field for field in required[kind] if field not in rope]
    if missing:
        raise UserError(f"rope_type={kind!r} lacks {', '.join(missing)}; download config.json again")
    scaling = {"kind": kind} | {field: rope[field] for field in required[kind]}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = original
    return base, scaling


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = _read_json(index, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{str(index)!r} has no weight_map; download it again")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{str(file)!r} is missing, though {index.name} names it; download it again")
        return files
    others = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for file in directory.glob(pattern))
    found = f" but {others[0]}" if others else ""
    raise UserError(
        f"{str(directory)!r} holds no model.safetensors{found}; download the safetensors weights, or convert with "
        f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


def _read_weights(directory: Path, files: Sequence[Path], family: Family, model: Model) -> Tree:
    specs = param_specs(model)
    tensors = _tensors(family, specs)
    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for file in files:
            try:
                holder = stack.enter_context(safe_open(file, framework="np"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{str(file)!r} cannot be read ({error}); download it again") from None
            holders |= dict.fromkeys(holder.keys(), holder)
        _check_tensors(directory, tensors, holders, model.tied_embeddings)
        params = map_specs(lambda _, spec: np.empty(spec.shape, np.float32), specs)
        parameters = dict(walk(params))
        for tensor in tensors:
            tensor.of(parameters[tensor.path])[...] = tensor.imported(holders[tensor.name].get_tensor(tensor.name))
    return params


def _check_tensors(directory: Path, tensors: Sequence[_Tensor], holders: Mapping[str, Any], tied: bool) -> None:
    """Refuses weights that are not exactly those that config.json describes."""
    wanted = {tensor.name for tensor in tensors}
    missing = sorted(wanted - holders.keys())
    if missing:
        raise UserError(
            f"{str(directory)!r} lacks {_some(missing)}, which its config.json asks for; download the weights again"
        )
    # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
    extra = sorted(name for name in holders.keys() - wanted if not name.endswith(".rotary_emb.inv_freq"))
    head, embedding = _LLAMA_NAMES["head"], _LLAMA_NAMES["embedding"]
    if extra == [head] and tied:
        if np.array_equal(holders[head].get_tensor(head), holders[embedding].get_tensor(embedding)):
            extra = []
        else:
            raise UserError(
                f"{str(directory)!r} holds a {head} unlike {embedding}, though tie_word_embeddings=True; set "
                f"tie_word_embeddings to false in its config.json"
            )
    if extra:
        raise UserError(
            f"{str(directory)!r} holds {_some(extra)}, which its config.json has no place for; choose a plain "
            f"{' or '.join(FAMILIES)} model"
        )
    for tensor in tensors:
        contents = holders[tensor.name].get_slice(tensor.name)
        shape, code = tuple(contents.get_shape()), contents.get_dtype()
        if shape != tensor.shape:
            raise UserError(
                f"{tensor.name} in {str(directory)!r} has the shape {shape}, though config.json makes it "
                f"{tensor.shape}; download the two again"
            )
        if code not in _READABLE_CODES:
            raise UserError(
                f"{tensor.name} in {str(directory)!r} has the type {code}, which cannot be imported; choose weights "
                f"in {', '.join(_READABLE_CODES)}"
            )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {str(path)!r}; {fix}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); {fix}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{str(path)!r} holds no JSON object; {fix}")
    return contents
