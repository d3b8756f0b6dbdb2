"""Hugging Face model directories of the Llama and Qwen3 families, without transformers or torch.

A table names the tensor that each of our parameters becomes; shapes and transpositions follow from the `ParamSpec`. A
model that normalises its queries and keys is a Qwen3, one that does not is a Llama.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, which safetensors needs to read it
import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from braeburn.config import Model, explain_validation_error
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.interop.tensors import Tensor, checked, tensors_of
from braeburn.model.spec import Tree, map_specs, walk
from braeburn.model.transformer import param_specs
from braeburn.train.progress import tracked

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Path of our parameter -> name of the tensor, with `{}` for the layer's index.
_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/query": "model.layers.{}.self_attn.q_proj.weight",
    "layers/query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/key": "model.layers.{}.self_attn.k_proj.weight",
    "layers/key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/value": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention_output": "model.layers.{}.self_attn.o_proj.weight",
    "layers/ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_READABLE = ("F32", "BF16", "F16")


def write(
    directory: str | Path,
    params: Tree,
    model: Model,
    tokenizer: Tokenizer | None,
    max_position_embeddings: int,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory in float32 that `AutoModelForCausalLM` and `AutoTokenizer` of transformers 4 and 5 load.

    It is written beside its destination and renamed when complete: an interrupted export leaves no directory that
    looks like a model. One file's tensors at a time are copied from the parameters.

    Args:
        directory: where to write; it must not exist or be empty.
        params: arrays of any float type, as `param_specs(model)` describes them.
        model: the sizes; its family follows from `qk_norm`.
        tokenizer: is shipped, and tells which tokens begin and end a document; None ships none.
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.
        max_shard_bytes: tensors beyond this size go to further files.

    Raises:
        UserError: the directory is in use or cannot be written, or the model or tokenizer is one that transformers
            would not load.
        ValueError: `params` are not those of `model`.
    """
    directory = Path(directory).expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        problem = "is not empty" if directory.is_dir() else "is a file"
        raise UserError(f"{str(directory)!r} {problem}; name a new folder")
    if not model.qk_norm and model.d_model % model.num_heads:
        raise UserError(
            f"d_model={model.d_model} is not a multiple of num_heads={model.num_heads}, which transformers refuses in "
            f"a Llama; train with d_model={-(-model.d_model // model.num_heads) * model.num_heads} or with qk_norm=true"
        )
    parameters = checked(params, model, tokenizer)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    ids = {"bos_token_id": tokenizer and tokenizer.begin, "eos_token_id": tokenizer and tokenizer.end}
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", _config(model, max_position_embeddings) | ids)
        _write_json(partial / "generation_config.json", ids)
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer.json")
            settings = {
                # The class that takes tokenizer.json as it is; the one of the family puts a normaliser in front.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": max_position_embeddings,
                "model_input_names": ["input_ids", "attention_mask"],
                "clean_up_tokenization_spaces": False,
                "bos_token": tokenizer.token(tokenizer.begin),
                "eos_token": tokenizer.token(tokenizer.end),
            }
            _write_json(partial / "tokenizer_config.json", settings)
        _write_weights(partial, tensors_of(param_specs(model), _NAMES), parameters, max_shard_bytes)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(directory)!r} cannot be written ({error}); free space or name another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(model: Model, max_position_embeddings: int) -> dict[str, Any]:
    family = "qwen3" if model.qk_norm else "llama"
    scaling = model.rope_scaling
    stretched = scaling and {"rope_type": scaling.kind} | {f: getattr(scaling, f) for f in _SCALINGS[scaling.kind]}
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        **{field: getattr(model, ours) for ours, field in _SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": max_position_embeddings,
        # transformers 5 reads the first of these, transformers 4 and what was built on it the other two.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base} | (stretched or {}),
        "rope_theta": model.rope_base,
        "rope_scaling": stretched,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _write_weights(
    directory: Path, tensors: Sequence[Tensor], parameters: Mapping[str, Any], max_shard_bytes: int
) -> None:
    sizes = {tensor.name: 4 * math.prod(tensor.shape) for tensor in tensors}
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(sizes[t.name] for t in (*shards[-1], tensor)) > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(tracked(shards, "writing weights"), start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: tensor.exported(parameters) for tensor in shard}, directory / name, {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def read(directory: str | Path) -> tuple[Model, Tree, Path]:
    """The model in a Hugging Face directory.

    Returns:
        Its sizes; its parameters as NumPy float32 arrays; the path of its `tokenizer.json`.

    Raises:
        UserError: a file is missing or unreadable, the architecture is one that Braeburn has not, or the tensors are
            not those that config.json describes.
    """
    directory = Path(directory).expanduser()
    model, tokenizer_file = describe(directory)
    return model, _read_weights(directory, _weight_files(directory), model), tokenizer_file


def describe(directory: str | Path) -> tuple[Model, Path]:
    """The sizes of the model in a Hugging Face directory, and the path of its `tokenizer.json`; weights are not read.

    Raises:
        UserError: a file is missing or unreadable, or the architecture is one that Braeburn has not.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"there is no folder {str(directory)!r}; name a downloaded Hugging Face model")
    config = _read_json(directory / "config.json", "name the folder of a downloaded Hugging Face model")
    try:
        model = _parse_config(config)
    except UserError as error:
        raise UserError(f"{str(directory / 'config.json')!r}: {error}") from None
    _weight_files(directory)
    tokenizer_file = directory / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise UserError(
            f"{str(directory)!r} holds no tokenizer.json; download it, or save one with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return model, tokenizer_file


# Fields that change the computation, with the only value under which it is ours.
_ONLY = {
    "layer_types": "full_attention",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
}
_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _parse_config(config: Mapping[str, Any]) -> Model:
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        raise UserError(f"model_type={family!r} cannot be imported; choose a model of type llama or qwen3")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    other_layer = next((kind for kind in config.get("layer_types") or () if kind != "full_attention"), None)
    stated = {**config, **rope, "layer_types": other_layer}
    for field, only in _ONLY.items():
        if stated.get(field) not in (None, only):
            raise UserError(f"{field}={stated[field]!r} cannot be imported; choose a model with {field}={only!r}")
    fields: dict[str, Any] = {
        "qk_norm": family == "qwen3",
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope_base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "rope_scaling": _parse_scaling(rope, config),
        "max_position_embeddings": config.get("max_position_embeddings") or 0,
    }
    for ours, field in _SIZES.items():
        value = config.get(field)
        if value is None and ours == "num_kv_heads":
            value = fields["num_heads"]
        if value is None and ours == "head_dim":
            # transformers takes an absent field of a Qwen3 for 128, but a null for the quotient.
            value = 128 if fields["qk_norm"] and field not in config else fields["d_model"] // fields["num_heads"]
        if type(value) is not int or value < 1:
            raise UserError(f"{field}={value!r} is not a size; give it the positive integer that the weights have")
        fields[ours] = value
    try:
        return Model.model_validate(fields)
    except ValidationError as error:
        raise UserError(explain_validation_error(error)) from None


def _parse_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`, as any version of transformers writes them."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("rope_parameters differ by kind of layer; choose a model with one set of them for all")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _SCALINGS:
        raise UserError(
            f"rope_type={kind!r} cannot be imported; choose a model with rope_type default, {' or '.join(_SCALINGS)}"
        )
    rope = {"original_max_position_embeddings": config.get("max_position_embeddings")} | dict(rope)
    missing = [field for field in _SCALINGS[kind] if field not in rope]
    if missing:
        raise UserError(f"rope_type={kind!r} lacks {', '.join(missing)}; download config.json again")
    return {"kind": kind} | {field: rope[field] for field in _SCALINGS[kind]}


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = _read_json(index, "download it again").get("weight_map") or {}
        return [directory / name for name in sorted(set(weight_map.values()))]
    raise UserError(
        f"{str(directory)!r} holds no model.safetensors; download the safetensors weights, or convert with "
        f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


def _read_weights(directory: Path, files: Sequence[Path], model: Model) -> Tree:
    specs = param_specs(model)
    tensors = tensors_of(specs, _NAMES)
    with ExitStack() as stack:
        holders: dict[str, Any] = {}  # name of a tensor -> the open file that holds it
        for file in files:
            try:
                holder = stack.enter_context(safe_open(file, framework="np"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{str(file)!r} cannot be read ({error}); download it again") from None
            holders |= dict.fromkeys(holder.keys(), holder)
        _check(directory, {tensor.name: tensor.shape for tensor in tensors}, holders, model.tied_embeddings)
        params = map_specs(lambda _, spec: np.empty(spec.shape, np.float32), specs)
        parameters = dict(walk(params))
        for tensor in tracked(tensors, "reading weights"):
            tensor.of(parameters[tensor.path])[...] = tensor.imported(holders[tensor.name].get_tensor(tensor.name))
    return params


def _check(directory: Path, wanted: Mapping[str, tuple[int, ...]], holders: Mapping[str, Any], tied: bool) -> None:
    """Refuses tensors that are not exactly those that config.json describes."""

    def refuse(names: list[str], problem: str) -> None:
        if names:
            others = f" and {len(names) - 1} more" if names[1:] else ""
            raise UserError(f"{str(directory)!r} holds weights unlike its config.json: {names[0]}{others} {problem}")

    refuse(sorted(wanted.keys() - holders.keys()), "is missing; download the weights again")
    head, embedding = _NAMES["head"], _NAMES["embedding"]
    ignored = {head} if tied else set()
    if tied and head in holders:
        same = np.array_equal(holders[head].get_tensor(head), holders[embedding].get_tensor(embedding))
        refuse([] if same else [head], f"differs from {embedding}; set tie_word_embeddings to false in config.json")
    # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
    extra = (name for name in holders.keys() - wanted.keys() - ignored if not name.endswith(".rotary_emb.inv_freq"))
    refuse(sorted(extra), "has no place; choose a plain llama or qwen3 model")
    for name, shape in wanted.items():
        contents = holders[name].get_slice(name)
        found, code = tuple(contents.get_shape()), contents.get_dtype()
        refuse([name] * (found != shape), f"has the shape {found}, not {shape}; download the two again")
        refuse([name] * (code not in _READABLE), f"has the type {code}; choose weights in {', '.join(_READABLE)}")


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); {fix}") from None
    return contents
