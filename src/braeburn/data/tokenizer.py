"""The tokenizer: byte-level BPE trained on the corpus, or any `tokenizer.json`, and how documents are laid out."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braeburn.atomic import write_atomically
from braeburn.errors import UserError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# Qwen2's: words, single digits, punctuation and white space apart.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST_VOCABULARY = 257  # every byte and the document boundary
# Begin tokens in order of preference, each with the end tokens that go with it.
_BOUNDARIES = {
    END_OF_TEXT: (),
    "<s>": ("</s>",),
    "<|begin_of_text|>": ("<|end_of_text|>", "<|eot_id|>"),
    "<bos>": ("<eos>",),
}


class Tokenizer:
    """Text to token ids and back. A document is [begin] + tokens, and [end] where the tokenizer has a separate one.

    Documents are concatenated, so with one boundary token the next document's begin is the target of the last token.

    Attributes:
        vocab_size: one more than the largest id.
        json: the tokenizer as canonical JSON, as `tokenizer.json` holds it.
        hash: SHA-256 of `json`.
        begin: id of the token that starts a document.
        end: id of the token that ends one; `begin` where there is no separate one.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", origin: str = "tokenizer") -> None:
        """Wraps a tokenizer; `origin` names it in errors.

        Raises:
            UserError: it has no token to begin a document.
        """
        # A saved tokenizer may truncate or pad, which would lose text without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that contains the characters of a special token is text about it, not a boundary.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.json = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False, indent=1)
        self.hash = hashlib.sha256(self.json.encode()).hexdigest()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        name = next((begin for begin in _BOUNDARIES if begin in special), None)
        if name is None:
            raise UserError(
                f"{origin} has no token to begin a document: none of {', '.join(_BOUNDARIES)} is among its special "
                f"tokens ({', '.join(special) or 'none'}); add one, or leave data.tokenizer unset to train one"
            )
        self.begin = special[name]
        self.end = next((special[end] for end in _BOUNDARIES[name] if end in special), self.begin)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer in a `tokenizer.json`.

        Raises:
            UserError: the file is missing, cannot be parsed, or has no token to begin a document.
        """
        import tokenizers

        path = Path(path).expanduser()
        fix = "name a tokenizer.json, or leave data.tokenizer unset to train one"
        if not path.is_file():
            raise UserError(f"data.tokenizer: there is no file {str(path)!r}; {fix}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"data.tokenizer: {str(path)!r} is not a sound tokenizer.json ({error}); {fix}") from None
        return cls(tokenizer, repr(str(path)))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `json` of another holds."""
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(text))

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as canonical JSON; the file appears complete or not at all."""
        write_atomically(Path(path), self.json)

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, without boundary tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document with its boundary tokens, int32, on all cores."""
        begin = np.array([self.begin], np.int32)
        return [np.concatenate([begin, ids, self.ends]) for ids in self.encode_pieces(texts)]

    @property
    def ends(self) -> np.ndarray:
        """The ids that end a document, int32: none where the next document's begin token does."""
        return np.array([] if self.end == self.begin else [self.end], np.int32)

    def encode_pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text alone, without boundary tokens, int32, on all cores."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encodes_alike(self, left: str, right: str) -> bool:
        """Whether a text has the same words and tokens in these two pieces as in one."""
        if self._words(left + right) != self._words(left) + self._words(right):
            return False
        whole, *halves = self.encode_pieces([left + right, left, right])
        return np.array_equal(whole, np.concatenate(halves))

    def _words(self, text: str) -> list[str]:
        """What the tokenizer makes tokens of, each by itself."""
        normalizer = self._tokenizer.normalizer
        splitter = self._tokenizer.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        if splitter is None:
            return [text] if text else []
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens have none."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, i: int) -> str:
        """The token of that id as the vocabulary has it."""
        return self._tokenizer.id_to_token(i) or ""

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for, int32 [vocab_size]; 0 for special tokens and unused ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        is_byte_level = '"ByteLevel"' in json.dumps([json.loads(self.json)[k] for k in ("pre_tokenizer", "decoder")])
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            # SentencePiece writes a space as U+2581, and a byte that is no character as <0xFF>.
            text = token if is_byte_level else re.sub("^<0x[0-9A-Fa-f]{2}>$", "?", token).replace("\u2581", " ")
            lengths[i] = len(text) if is_byte_level else len(text.encode())
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` entries; the same texts make the same one.

    Raises:
        UserError: `vocab_size` has no room for every byte.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.vocab_size={vocab_size} has no room for the 256 bytes and {END_OF_TEXT}; "
            f"set model.vocab_size to at least {SMALLEST_VOCABULARY}"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer: Any = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def sample(streams: Iterable[Iterator[str]], limit_bytes: int) -> Iterator[str]:
    """The first texts of each stream in turn, each text once, until their UTF-8 bytes reach the limit."""
    seen, total = set[bytes](), 0
    for text in itertools.chain.from_iterable(itertools.zip_longest(*streams)):
        data = (text or "").encode()  # None where a stream has ended
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen:
            seen.add(digest)
            yield text
            total += len(data)
            if total >= limit_bytes:
                return
