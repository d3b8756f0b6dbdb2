"""The tokenizer: byte-level BPE trained on the corpus, or any `tokenizer.json`, and how documents
are laid out.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braeburn.atomic import write_atomically
from braeburn.data.fast_encoding import QWEN2_PATTERN, Encode, fast_encoder, slow_ids
from braeburn.data.tokenizer_check import check_tokenizer
from braeburn.data.tokenizer_settings import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    Settings,
    fetched_tokenizer,
    parse_settings,
    read_settings,
)
from braeburn.errors import UserError
from braeburn.jsonfile import Unreadable, parse_object
from braeburn.reading import read_text, shown
from braeburn.remote import is_remote

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
PATTERN = QWEN2_PATTERN
SMALLEST_VOCABULARY = 257  # every byte and the document boundary
# Begin tokens in order of preference where no file names one, each with the end tokens that go with
# it.
_BOUNDARIES = {
    END_OF_TEXT: (),
    "<s>": ("</s>",),
    "<|begin_of_text|>": ("<|end_of_text|>", "<|eot_id|>"),
    "<bos>": ("<eos>",),
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>": (
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),  # DeepSeek's
    "<|bos|>": ("<|eos|>",),
    "[BOS]": ("[EOS]",),
}


class Tokenizer:
    """Text to token ids and back. A document is [begin] + tokens, and [end] where the tokenizer has
    a separate one.

    Documents are concatenated, so with one boundary token the next document's begin is the target
    of the last token.

    A prompt is what the tokenizer's own files make of it (`tokenizer.json`'s post-processor, as in
    AutoTokenizer): it begins with the begin token where the model was trained here, and where the
    files of an imported one say so.

    Attributes:
        vocab_size: one more than the largest id.
        json: the tokenizer as canonical JSON, as `tokenizer.json` holds it.
        hash: SHA-256 of all that the ids of a document depend on.
        begin: id of the token that starts a document.
        end: id of the token that ends a text, the `eos_token` of Hugging Face; `begin` where there
            is no separate one.
        stops: ids of all tokens that end generated text, `end` first.
        padding: id of the token that fills up batches, or None.
        prefix: ids that are put before a prompt.
        suffix: ids that are put after a prompt; hardly any tokenizer has one.
        chat_template: Jinja source that lays out a conversation, or several by name, or None.
        sampling: defaults of generation that belong to the model, by their names in transformers.
    """

    def __init__(
        self,
        tokenizer: "tokenizers.Tokenizer",
        origin: str = "tokenizer",
        settings: Settings | None = None,
        *,
        begins_prompts: bool = False,
    ) -> None:
        """Wraps a tokenizer.

        Args:
            tokenizer: of the tokenizers library.
            origin: names it in errors.
            settings: what the files beside it say.
            begins_prompts: whether prompts begin with the begin token, whatever the tokenizer's own
                files say.

        Raises:
            UserError: it has no token to begin a document, or a token that `settings` name is not
                there.
        """
        settings = settings or Settings()
        # A saved tokenizer may truncate or pad, which would lose text without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A document that contains the characters of a special token is text about it, not a
        # boundary.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = {token.content: i for i, token in added.items() if token.special}
        self.prefix, self.suffix = _around_text(tokenizer)
        self._set_boundaries(settings, origin)
        # Where the tokenizer's own files name an end and no begin, chat templates know none,
        # either.
        self._names_begin = begins_prompts or settings.begin is not None or settings.end is None
        if begins_prompts and self.prefix != (self.begin,):
            self.prefix, self.suffix = (self.begin,), ()
            tokenizer.post_processor = _begin_template(self.token(self.begin), self.begin)
        self.padding = self._named("pad_token", settings.padding, origin, required=False)
        if self.padding is None:
            self.padding = next((i for i in settings.padding_ids if i in self._added), None)
        self.chat_template = settings.chat_template
        self.sampling = dict(settings.sampling)

        contents = _canonical(json.loads(tokenizer.to_str()))
        self.json = json.dumps(contents, sort_keys=True, ensure_ascii=False, indent=1)
        # What is put around prompts changes no document.
        of_documents = contents | {
            "post_processor": None,
            "boundaries": [self.begin, self.document_end],
        }
        self.hash = hashlib.sha256(json.dumps(of_documents, sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is pickled. The library's own pickle leaves out that special tokens in a document
        are text.
        """
        return Tokenizer.from_json, (self.to_json(),)

    def _set_boundaries(self, settings: Settings, origin: str) -> None:
        """Finds `begin`, `end` and `stops` as the tokenizer's own files name them, or by well-known
        names.
        """
        named_ends = [i for i in settings.stop_ids if i in self._added]
        end = self._named("eos_token", settings.end, origin)
        begin = self._named("bos_token", settings.begin, origin)
        if begin is None:
            named = [i for i in settings.begin_ids if i in self._added]
            known = [self._special[name] for name in _BOUNDARIES if name in self._special]
            last_resort = [end] if end is not None else named_ends
            candidates = [*self.prefix, *named, *known, *last_resort]
            if not candidates:
                raise UserError(
                    f"{origin} has no token to begin a document: none of {', '.join(_BOUNDARIES)} "
                    f"is among its special tokens ({shown_list(self._special)}); name one as "
                    f"bos_token in a {TOKENIZER_CONFIG} beside it"
                )
            begin = candidates[0]
        if end is None:
            partners = _BOUNDARIES.get(self.token(begin), ())
            ends = [
                *named_ends,
                *(self._special[name] for name in partners if name in self._special),
                begin,
            ]
            end = ends[0]
        self.begin = begin
        self.end = end
        self.stops = tuple(dict.fromkeys([end, *named_ends]))

    def _named(
        self, field: str, name: str | None, origin: str, required: bool = True
    ) -> int | None:
        """The id of a token that the tokenizer's files name; None where they name none.

        Args:
            field: under which they name it.
            name: of the token, or None.
            origin: names the tokenizer in errors.
            required: whether a token that is not there is an error, or left out with a warning.

        Raises:
            UserError: it is required and not there.
        """
        if name is None:
            return None
        found = self._tokenizer.token_to_id(name)
        if found is None and required:
            raise UserError(
                f"{origin} has no token {shown(name)}, which the files beside it name as {field}; "
                f"restore the files that belong together"
            )
        if found is None:
            logging.getLogger(__name__).warning(
                "%s has no token %s, named as %s; it is left out", origin, shown(name), field
            )
        return found

    @property
    def document_end(self) -> int | None:
        """The token that closes each document that is trained on; None where the next one's begin
        does so.
        """
        return None if self.begin in self.stops else self.end

    @classmethod
    def load(cls, path: str | Path, fix: str = "name a sound tokenizer.json") -> "Tokenizer":
        """The tokenizer in a `tokenizer.json`, with what the files beside it say.

        Args:
            path: the file, or its URL.
            fix: what the user can do where it is missing or unsound.

        Raises:
            UserError: a file is missing or cannot be parsed, or the tokenizer has no token to begin
                a document.
        """
        if is_remote(str(path)):
            named, path = str(path), fetched_tokenizer(str(path))
        else:
            path = Path(path).expanduser()
            named = str(path)
        if not path.exists():
            raise UserError(f"there is no file {named!r}; {fix}")
        text = read_text(path, fix)
        tokenizer = _parsed(text, f"{named!r} is not a sound tokenizer.json", fix)
        return cls(tokenizer, repr(named), read_settings(path.parent))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `to_json` gave, or that an earlier version's checkpoint holds.

        Raises:
            UserError: it cannot be parsed.
        """
        fix = "restore the checkpoint, or use another one"
        try:
            files = parse_object(text)
        except Unreadable as error:
            raise UserError(
                f"the tokenizer of the checkpoint cannot be read (it {error}); {fix}"
            ) from None
        # Earlier versions saved the tokenizer alone, and began all prompts with its begin token.
        is_alone = "tokenizer.json" not in files
        own = text if is_alone else json.dumps(files["tokenizer.json"])
        tokenizer = _parsed(own, "the tokenizer of the checkpoint is unsound", fix)
        settings = Settings() if is_alone else parse_settings(files, "checkpoint")
        return cls(tokenizer, "the tokenizer of the checkpoint", settings, begins_prompts=is_alone)

    def to_json(self) -> str:
        """All that is known of the tokenizer as JSON, for a checkpoint: the contents of its files
        by their names.
        """
        return json.dumps(self._files(), ensure_ascii=False)

    def beginning_prompts(self) -> "Tokenizer":
        """The same tokenizer for a model that is trained from scratch, whose texts all begin with
        the begin token.
        """
        import tokenizers

        files = self._files()
        own = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
        return Tokenizer(
            own, "the tokenizer", parse_settings(files, "tokenizer"), begins_prompts=True
        )

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json` alone, canonical; the file appears complete or not at all."""
        write_atomically(Path(path), self.json)

    def save_all(self, folder: Path) -> None:
        """Writes `tokenizer.json` and the files beside it that tell of boundary tokens, chats and
        sampling.
        """
        for name, contents in self._files().items():
            if name != "tokenizer.json":
                write_atomically(
                    folder / name, json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
                )
        self.save(folder / "tokenizer.json")

    def _files(self) -> dict[str, Any]:
        return {
            "tokenizer.json": json.loads(self.json),
            TOKENIZER_CONFIG: self.tokenizer_config(),
            GENERATION_CONFIG: self.generation_config(),
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """The contents of `tokenizer_config.json`, for AutoTokenizer of transformers 4 and 5."""
        settings: dict[str, Any] = {
            # The class that takes tokenizer.json as it is; the one of the family puts a normaliser
            # in front.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **self.named_tokens(),
            # The post-processor of tokenizer.json says the same; these are for software that reads
            # no post-processor.
            "add_bos_token": self.prefix == (self.begin,),
            "add_eos_token": self.suffix == (self.end,),
        }
        if isinstance(self.chat_template, dict):
            settings["chat_template"] = [
                {"name": name, "template": template}
                for name, template in self.chat_template.items()
            ]
        elif self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        return settings

    def generation_config(self) -> dict[str, Any]:
        """The contents of `generation_config.json`."""
        return {**self.special_ids(), **self.sampling}

    def named_tokens(self) -> dict[str, str]:
        """The tokens that have a part, by their names in `tokenizer_config.json` and in chat
        templates.
        """
        tokens = {"eos_token": self.token(self.end)}
        if self._names_begin:
            tokens["bos_token"] = self.token(self.begin)
        if self.padding is not None:
            tokens["pad_token"] = self.token(self.padding)
        return tokens

    def special_ids(self) -> dict[str, Any]:
        """The ids of boundary and padding tokens, as `config.json` and `generation_config.json`
        hold them.
        """
        ids: dict[str, Any] = {
            "bos_token_id": self.begin,
            "eos_token_id": self.end if len(self.stops) == 1 else list(self.stops),
        }
        if self.padding is not None:
            ids["pad_token_id"] = self.padding
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, without boundary tokens; the characters of a special token are
        text.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, with what the tokenizer puts around one; the characters of a special
        token are text.
        """
        return [*self.prefix, *self.encode(text), *self.suffix]

    def encode_markup(self, text: str) -> list[int]:
        """The ids of text in which the characters of a special token stand for that token, as in a
        rendered chat.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The contents of all special tokens."""
        return tuple(self._special)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document with its boundary tokens, int32, on all cores."""
        begin = np.array([self.begin], np.int32)
        return [np.concatenate([begin, ids, self.ends]) for ids in self.encode_pieces(texts)]

    @property
    def ends(self) -> np.ndarray:
        """The ids that end a document, int32: none where the next document's begin token does."""
        return np.array([] if self.document_end is None else [self.document_end], np.int32)

    def encode_pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text alone, without boundary tokens, int32, on all cores."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if self._fast is not None:
            return self._fast(texts)
        return slow_ids(self._tokenizer, texts)

    @functools.cached_property
    def _fast(self) -> Encode | None:
        return fast_encoder(self._tokenizer, json.loads(self.json))

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
        """UTF-8 bytes of text that each token stands for, int32 [vocab_size]; 0 for special tokens
        and unused ids.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        is_byte_level = '"ByteLevel"' in json.dumps(
            [json.loads(self.json)[k] for k in ("pre_tokenizer", "decoder")]
        )
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            # SentencePiece writes a space as U+2581, and a byte that is no character as <0xFF>.
            text = (
                token
                if is_byte_level
                else re.sub("^<0x[0-9A-Fa-f]{2}>$", "?", token).replace("\u2581", " ")
            )
            lengths[i] = len(text) if is_byte_level else len(text.encode())
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths


def _parsed(text: str, problem: str, fix: str) -> "tokenizers.Tokenizer":
    """A tokenizer from untrusted JSON.

    Raises:
        UserError: beginning with `problem`, and ending with `fix`.
    """
    import tokenizers

    try:
        check_tokenizer(text)
        return tokenizers.Tokenizer.from_str(text)
    except ValueError as error:
        raise UserError(f"{problem} ({error}); {fix}") from None


def _around_text(tokenizer: "tokenizers.Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a tokenizer's post-processor puts before and after a text."""
    for text in ("a", "the", "0", "\u4e00", " "):
        encoding = tokenizer.encode(text)
        of_text = [index for index, part in enumerate(encoding.sequence_ids) if part is not None]
        if of_text:
            return tuple(encoding.ids[: of_text[0]]), tuple(encoding.ids[of_text[-1] + 1 :])
    return tuple(tokenizer.encode("").ids), ()


def _begin_template(token: str, i: int) -> Any:
    """The post-processor that puts a token before each text."""
    from tokenizers import processors

    # A template is a list, since a string is split at spaces; a colon in it would begin a type id.
    name = token if ":" not in token and not token.startswith("$") else "begin"
    return processors.TemplateProcessing(
        single=[name, "$A"],
        pair=[name, "$A", f"{name}:1", "$B:1"],
        special_tokens=[{"id": name, "ids": [i], "tokens": [token]}],
    )


def _canonical(contents: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` whose merges are text, the one form that all versions of the tokenizers
    library read.
    """
    merges = contents["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge):
        contents["model"]["merges"] = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ]
    return contents


def shown_list(names: Iterable[str], at_most: int = 10) -> str:
    """Names with commas between them, at most so many."""
    names = list(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return (", ".join(names[:at_most]) or "none") + more


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
    return Tokenizer(tokenizer, begins_prompts=True)


def sample(streams: Iterable[Iterator[str]], limit_bytes: int) -> Iterator[str]:
    """The first texts of each stream in turn, each text once, until their UTF-8 bytes reach the
    limit.
    """
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
