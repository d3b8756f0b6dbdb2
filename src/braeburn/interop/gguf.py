"""GGUF, the one file that llama.cpp reads: weights, sizes and tokenizer of the families that it
has.

Keys, names of tensors and the order of rows are those of llama.cpp's own `convert_hf_to_gguf.py`.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braeburn.config import ModelConfig, RopeScaling
from braeburn.data.tokenizer import PATTERN, Tokenizer
from braeburn.disk import remove_stale
from braeburn.errors import UserError
from braeburn.extras import how_to_install
from braeburn.interop.tensors import Tensor, checked, tensors_of
from braeburn.layers import rope
from braeburn.layers.spec import Tree
from braeburn.models.families import family_of
from braeburn.train.progress import tracked

if TYPE_CHECKING:
    import gguf

Type = Literal["f16", "q8_0", "q4_0"]
_BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0
# How text is split before merging, and whether a token is taken whole where the merges do not lead
# to it -> the name under which llama.cpp has the same. "ByteLevel" stands for GPT-2's own pattern.
_SPLITS = {
    ((PATTERN,), False): "qwen2",
    ((PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),), True): "llama-bpe",
    ((PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),), False): "dbrx",
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
}
_ELSEWHERE = (
    "export with --format hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"
)


@dataclass(frozen=True)
class File:
    """What a GGUF file tells of a model beside its sizes, and how it holds the weights.

    Attributes:
        max_position_embeddings: the longest sequence, in tokens, that the model is meant for.
        type_: of matrices and embeddings.
        name: what the model calls itself.
    """

    max_position_embeddings: int
    type_: Type = "f16"
    name: str = "braeburn"


def write(
    path: str | Path, params: Tree, model: ModelConfig, tokenizer: Tokenizer, file: File
) -> list[str]:
    """Writes a file that llama.cpp loads.

    Norms and routers are float32. Matrices and embeddings have the type asked for, but those whose
    rows are no multiple of 32 are float16, as llama.cpp's types of fewer bits have groups of 32.
    The file is written beside its destination and renamed when complete. One tensor at a time is
    copied from the parameters.

    Args:
        path: the file to write; it must not exist.
        params: arrays of any float type, as `param_specs(model)` describes them.
        model: the sizes, from which its family follows.
        tokenizer: byte-level BPE, with a pattern that llama.cpp knows.
        file: the type of the weights, and what the file tells beside them.

    Returns:
        The parameters that are float16 though `file.type_` is another, since their rows are no
        multiple of 32.

    Raises:
        UserError: the `gguf` package is missing, the file exists or cannot be written, or llama.cpp
            would not run the model, or not read text as the tokenizer does.
        ValueError: `params` are not those of `model`.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"--format gguf needs the gguf package; {how_to_install('gguf')}") from None
    path, type_ = Path(path).expanduser().resolve(), file.type_
    if path.exists():
        raise UserError(f"{str(path)!r} exists; remove it or name another file")
    family = family_of(model).gguf
    if family is None:
        raise UserError(
            f"a model of type {family_of(model).model_type} is not written as GGUF; {_ELSEWHERE}"
        )
    if refusal := family.refusal(model) or _yarn_refusal(model):
        raise UserError(refusal)
    remove_stale(path.parent, path.name)
    parameters = checked(params, model, tokenizer)
    vocabulary = _vocabulary(tokenizer, model.vocab_size)

    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    writer = gguf.GGUFWriter(partial, family.architecture)
    writer.add_name(file.name)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.tokenizer_config()["chat_template"])
    writer.add_file_type({"f16": 1, "q8_0": 7, "q4_0": 2}[type_])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    sizes = _sizes(model, file.max_position_embeddings)
    for key, value in {**sizes, **family.keys(model)}.items():
        _add(writer, f"{family.architecture}.{key}", value)
    for key, value in vocabulary.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = tensors_of(model, family.names)
        _write_tensors(writer, tensors, parameters, model, type_)
        partial.rename(path)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be written ({error}); free space or name another folder"
        ) from None
    finally:
        writer.close()
        with suppress(OSError):  # renamed, or never made
            partial.unlink()
    return sorted(
        {
            tensor.path.rpartition("/")[2]
            for tensor in tensors
            if _type_of(tensor, type_) not in ("f32", type_)
        }
    )


def _yarn_refusal(model: ModelConfig) -> str | None:
    """Why llama.cpp would rotate in another way than a model with YaRN; None where it would not."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return None
    usual = RopeScaling(kind="yarn")
    for field in ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale"):
        value = getattr(scaling, field)
        if value != getattr(usual, field):
            return (
                f"rope_scaling.{field}={value!r} is nothing that a GGUF file can say of YaRN; "
                f"export with --format hf, or train with {field}={getattr(usual, field)!r}"
            )
    return None


def _add(writer: "gguf.GGUFWriter", key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):  # before int, of which it is one
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _sizes(model: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """The keys below the architecture's name that all families have."""
    sizes: dict[str, Any] = {
        "context_length": max_position_embeddings,
        "vocab_size": model.vocab_size,
        "embedding_length": model.d_model,
        "block_count": model.num_layers,
        "feed_forward_length": model.ffn_dim,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.norm_epsilon,
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": model.rope_base,
    }
    # Llama 3's scaling is not a key but the tensor of `_rope_factors`.
    scaling = model.rope_scaling
    if scaling is None or scaling.kind == "llama3":
        return sizes
    sizes |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        original = scaling.original_max_position_embeddings
        sizes["rope.scaling.original_context_length"] = original
    return sizes


def _write_tensors(
    writer: "gguf.GGUFWriter",
    tensors: Sequence[Tensor],
    parameters: Mapping[str, Any],
    model: ModelConfig,
    type_: Type,
) -> None:
    import gguf

    family = family_of(model).gguf
    assert family
    interleaved = family.interleaved
    types = [gguf.GGMLQuantizationType[_type_of(tensor, type_).upper()] for tensor in tensors]
    factors = _rope_factors(model)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor, kind in zip(tensors, types, strict=True):
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(tensor.shape) // block_size * block_bytes
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor, kind in tracked(list(zip(tensors, types, strict=True)), "writing weights"):
        values = tensor.exported(parameters)
        if tensor.path.rpartition("/")[2] in interleaved:
            values = _interleaved(values, model.head_dim)
        writer.write_tensor_data(gguf.quants.quantize(values, kind))


def _type_of(tensor: Tensor, type_: Type) -> Literal["f32"] | Type:
    if len(tensor.shape) == 1 or tensor.precise:
        return "f32"
    return "f16" if tensor.shape[-1] % _BLOCK else type_


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Query or key rows [heads * head_dim, inputs] for a rotation of neighbours, where ours rotates
    halves.
    """
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(rows.shape))


def _rope_factors(model: ModelConfig) -> np.ndarray | None:
    """What Llama 3's scaling divides each frequency by, float32 [head_dim / 2]."""
    if model.rope_scaling is None or model.rope_scaling.kind != "llama3":
        return None
    plain = rope.inverse_frequencies(model.head_dim, model.rope_base, None)
    return plain / rope.inverse_frequencies(model.head_dim, model.rope_base, model.rope_scaling)


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys below `tokenizer.ggml`: those of a byte-level BPE, one token for each row of the
    model.

    Raises:
        UserError: llama.cpp would not read text as the tokenizer does.
    """
    import gguf

    if tokenizer.prefix not in ((), (tokenizer.begin,)) or tokenizer.suffix not in (
        (),
        (tokenizer.end,),
    ):
        before = [tokenizer.token(i) for i in tokenizer.prefix]
        after = [tokenizer.token(i) for i in tokenizer.suffix]
        around = " ".join([*before, "TEXT", *after])
        raise UserError(
            f"the tokenizer makes {around!r} of a text, and llama.cpp adds no more than one begin "
            f"and one end token; {_ELSEWHERE}"
        )
    contents = json.loads(tokenizer.json)
    split, bpe = _split(contents), contents["model"]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, i in bpe["vocab"].items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
    for added in contents["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    # llama.cpp stops at these three, and at well-known end tokens, which it finds by their names.
    ends = dict(
        zip(("eos_token_id", "eot_token_id", "eom_token_id"), tokenizer.stops, strict=False)
    )
    padding = {} if tokenizer.padding is None else {"padding_token_id": tokenizer.padding}
    return {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": types,
        # Older files of the tokenizers library hold them as text.
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]],
        "bos_token_id": tokenizer.begin,
        **ends,
        **padding,
        # As the post-processor of tokenizer.json does it.
        "add_bos_token": bool(tokenizer.prefix),
        "add_eos_token": bool(tokenizer.suffix),
    }


def _split(contents: Mapping[str, Any]) -> str:
    """The name that llama.cpp has for how a tokenizer splits text before it merges."""
    whole = contents["pre_tokenizer"] or {}
    *firsts, bytes_ = whole.get("pretokenizers") or [whole]
    if contents["model"]["type"] != "BPE" or bytes_.get("type") != "ByteLevel":
        raise UserError(
            f"the tokenizer is not a byte-level BPE, which is all that GGUF is written for; "
            f"{_ELSEWHERE}"
        )
    # llama.cpp leaves text as it is; NFC is what nearly all text is in already.
    normalizer = contents["normalizer"]
    if bytes_["add_prefix_space"] or (normalizer and normalizer["type"] != "NFC"):
        changed = (
            f"normalises by {normalizer['type']}" if normalizer else "puts a space before the text"
        )
        raise UserError(f"the tokenizer {changed}, which llama.cpp does not; {_ELSEWHERE}")
    splits = [_pattern(step) for step in firsts] + ["ByteLevel"] * bytes_.get("use_regex", True)
    found = _SPLITS.get((tuple(splits), contents["model"].get("ignore_merges", False)))
    if found is None:
        raise UserError(
            f"the tokenizer splits text by {splits}, for which llama.cpp has no name here; "
            f"{_ELSEWHERE}"
        )
    return found


def _pattern(step: Mapping[str, Any]) -> str:
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "")
    return step["type"] if step.get("individual_digits") else json.dumps(step)
