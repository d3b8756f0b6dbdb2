"""A faster engine for byte-level BPE, used where its ids are those of the tokenizers library.

The tokenizers library is what decides: it reads every `tokenizer.json`, trains, decodes, and its
ids are what token shards hold. fastokens gives the same ids some fifty times as fast for the
tokenizers that `agrees_on` names, which tests compare over random text and every character. For all
others, such as those whose regular expressions meet another version of Unicode in the two, and
where fastokens is not installed, the library itself encodes.
"""

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

_NOT_THE_ENGINES = (KeyboardInterrupt, SystemExit)
Encode = Callable[[Sequence[str]], list[np.ndarray]]

# Qwen2's: words, single digits, punctuation and white space apart.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's: digits in threes.
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
# Each of what ends one run of characters and begins another, in several scripts, and what
# implementations disagree about: contractions, combining marks, white space beyond ASCII, emoji.
PROBE = (
    "The cat's 3 mats; I'LL we'Re 'S '\u017f '\u212a don't 1234567 3.14 x_1 __init__ -> ==\r\n"
    "  \t indented\n\n\n   \u00a0\u2028 \u3000\u180e \x85 \u200b\ufeff end  \n"
    "na\u00efve stra\u00dfe \ufb01 \u0130\u0131 e\u0301 o\u0323\u0308 \u212b \u1100\u1161\u11a8"
    " \uac01 \u6f22\u5b57 \u304b\u306a \u043f\u0440\u0438 \u0645\u0631\u062d \u0928\u092e\u0938"
    "\u094d\u0924\u0947 \u0e44\u0e17\u0e22 \U0001f469\u200d\U0001f467\U0001f3fd \u00bc\u00b2"
    "\u2167 \u0967\u0968 \U0001d54f \ue000 <|endoftext|> <s>[INST] https://example.org/?q=a%20b "
    "#include <x.h> {'a': [1, 2]} $5 \u20ac6 !!?! ...\x00\x7f"
)


def fast_encoder(tokenizer: "tokenizers.Tokenizer", contents: dict[str, Any]) -> Encode | None:
    """A function that gives the ids of each text alone, int32, as the tokenizers library does.

    Args:
        tokenizer: of that library, by which special tokens in a text are text.
        contents: of its `tokenizer.json`.

    Returns:
        The function, or None where the library is to encode.
    """
    if not agrees_on(contents):
        return None
    try:
        from fastokens import Tokenizer

        # What stands around a text, or cuts it off, is no matter of the text alone.
        alone = contents | {"post_processor": None, "truncation": None, "padding": None}
        engine = Tokenizer.from_json_str(json.dumps(alone))
        encode = _encoder(engine, tokenizer)
        names = [token["content"] for token in contents.get("added_tokens", ())]
        probes = [PROBE, *(f"a{name}b {name} {name}" for name in names)]
        pairs = zip(encode(probes), slow_ids(tokenizer, probes), strict=True)
        same = all(np.array_equal(fast, slow) for fast, slow in pairs)
    except ImportError:
        return None
    except BaseException as error:
        # Of another version, or for a file that only the library reads. A panic of native code is
        # no Exception.
        if isinstance(error, _NOT_THE_ENGINES):
            raise
        logging.getLogger(__name__).debug("fastokens is not used: %s", error)
        return None
    if same:
        return encode
    logging.getLogger(__name__).warning(
        "warning: the installed fastokens gives other ids than the tokenizers library for this "
        "tokenizer, so the library encodes, more slowly; install the fastokens of constraints.txt"
    )
    return None


def slow_ids(tokenizer: "tokenizers.Tokenizer", texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text alone, int32, by the tokenizers library."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _encoder(engine: Any, tokenizer: "tokenizers.Tokenizer") -> Encode:
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        try:
            flat, edges = engine.encode_batch_flat(list(texts), split_special_tokens=True)
        except BaseException as error:  # its regular expressions have limits
            if isinstance(error, _NOT_THE_ENGINES):
                raise
            return slow_ids(tokenizer, texts)
        ids = np.frombuffer(flat, "<u4").astype(np.int32, copy=False)
        return np.split(ids, np.frombuffer(edges, "<u8")[1:-1].astype(np.int64))

    return encode


def agrees_on(contents: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is one for which both give the same ids: byte-level BPE with all
    bytes, as trained here, of Qwen2 and 3, Llama 3 or GPT-2.
    """
    model, splitter = contents["model"], contents.get("pre_tokenizer")
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in _OTHER_KINDS_OF_BPE)
        and _has_all_bytes(model.get("vocab", {}))
        and (contents.get("normalizer") or _NFC) == _NFC
        and _splits_alike(splitter)
        and all(_is_plain(token) for token in contents.get("added_tokens", ()))
    )


_OTHER_KINDS_OF_BPE = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
)
_NFC = {"type": "NFC"}


def _has_all_bytes(vocabulary: dict[str, int]) -> bool:
    from tokenizers import pre_tokenizers

    return all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())


def _splits_alike(splitter: Any) -> bool:
    if not isinstance(splitter, dict):
        return False
    if splitter.get("type") != "Sequence":
        return _is_byte_level(splitter, use_regex=True)
    parts = splitter.get("pretokenizers", ())
    return (
        len(parts) == 2
        and parts[0].get("type") == "Split"
        and parts[0].get("pattern", {}).get("Regex") in (QWEN2_PATTERN, LLAMA3_PATTERN)
        and parts[0].get("behavior") == "Isolated"
        and not parts[0].get("invert")
        and _is_byte_level(parts[1], use_regex=False)
    )


def _is_byte_level(splitter: dict[str, Any], use_regex: bool) -> bool:
    return (
        splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True) == use_regex
    )


def _is_plain(token: dict[str, Any]) -> bool:
    """Whether an added token is text in documents, or is found wherever its characters stand."""
    return bool(token.get("special")) or not any(
        token.get(name) for name in ("single_word", "lstrip", "rstrip", "normalized")
    )
