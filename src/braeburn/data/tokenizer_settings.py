"""What the files beside a `tokenizer.json` say of it: boundary tokens, chat template, sampling
defaults.

They are the files of the Hugging Face hub: `tokenizer_config.json`, `special_tokens_map.json`,
`chat_template.jinja`, `generation_config.json` and `config.json`. Run directories hold the first
and the fourth of them too, so that one reader serves a downloaded model, a run directory and a
checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat

from braeburn.disk import explaining
from braeburn.errors import UserError
from braeburn.reading import Foreign, is_regular, read_object, read_text, validated
from braeburn.remote import RemoteFolder, folder_for, user_cache

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
# Later files win, as in transformers: a model's own ids are older than those that it generates
# with.
_JSON_FILES = (MODEL_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS)

# How `generate` of transformers draws tokens, as far as it is a matter of the model. Kept on a
# round trip.
SAMPLING_FIELDS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_new_tokens",
)


class _Token(BaseModel):
    content: str


class _NamedTemplate(BaseModel):
    name: str
    template: str


class _TokenizerConfig(BaseModel):
    """The fields of `tokenizer_config.json` that are read."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None


class _SpecialTokens(BaseModel):
    """The fields of `special_tokens_map.json` that are read."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    pad_token: str | _Token | None = None


class _Ids(BaseModel):
    """The ids of tokens in `config.json` and `generation_config.json`."""

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None


class _Generation(_Ids):
    """The fields of `generation_config.json` that are read."""

    do_sample: bool | None = None
    temperature: FiniteFloat | None = None
    top_k: int | None = None
    top_p: FiniteFloat | None = None
    min_p: FiniteFloat | None = None
    typical_p: FiniteFloat | None = None
    epsilon_cutoff: FiniteFloat | None = None
    eta_cutoff: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    no_repeat_ngram_size: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Settings:
    """What is said of a tokenizer; None or empty where the files say nothing.

    Attributes:
        begin: the token that starts a text (`bos_token`).
        end: the token that ends one (`eos_token`).
        padding: the token that fills up batches (`pad_token`).
        begin_ids: of the tokens that the model's configuration names to start a text.
        stop_ids: of the tokens that end generated text, besides `end`.
        padding_ids: of the token that the model's configuration names to fill up batches.
        chat_template: Jinja source that lays out a conversation, or several of them by name.
        sampling: defaults of generation, by their names in transformers.
    """

    begin: str | None = None
    end: str | None = None
    padding: str | None = None
    begin_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    padding_ids: tuple[int, ...] = ()
    chat_template: str | dict[str, str] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


def fetched_tokenizer(url: str) -> Path:
    """The local copy of a `tokenizer.json` at a URL, with those of the files beside it that say
    something of it; missing where the URL has none.

    Raises:
        UserError: the URL does not answer, or the copy cannot be written.
    """
    parent, _, name = url.rpartition("/")
    folder = RemoteFolder(parent, "data.tokenizer")
    copy = folder_for(url, user_cache() / "copies")
    with explaining():
        copy.mkdir(parents=True, exist_ok=True)
        for each in (name, *_JSON_FILES, CHAT_TEMPLATE):
            try:
                folder.fetch(each, copy / each)
            except FileNotFoundError:
                (copy / each).unlink(missing_ok=True)
    return copy / name


def read_settings(folder: Path) -> Settings:
    """What the files in a folder say of the tokenizer there.

    Raises:
        UserError: one of them cannot be read or has a field of another type.
    """
    contents: dict[str, Any] = {}
    for name in _JSON_FILES:
        if (folder / name).exists():
            contents[name] = read_object(folder / name, "download it again or move it away")
    if is_regular(folder / CHAT_TEMPLATE):
        contents[CHAT_TEMPLATE] = read_text(
            folder / CHAT_TEMPLATE, "download it again or move it away"
        )
    return parse_settings(contents, str(folder))


def parse_settings(contents: Mapping[str, Any], folder: str) -> Settings:
    """What files say of a tokenizer.

    Args:
        contents: name of a file -> its JSON object, or the text of the chat template.
        folder: names the files in errors.

    Raises:
        UserError: a field has another type.
    """

    def read(kind: type[Foreign], name: str) -> Foreign:
        own = contents.get(name, {})
        path = str(Path(folder) / name)
        if not isinstance(own, dict):
            raise UserError(f"{path!r} holds no JSON object; download it again")
        return validated(kind, own, path, "download it again or correct that field")

    tokenizer = read(_TokenizerConfig, TOKENIZER_CONFIG)
    special = read(_SpecialTokens, SPECIAL_TOKENS)
    generation = read(_Generation, GENERATION_CONFIG)
    model = read(_Ids, MODEL_CONFIG)

    template = contents.get(CHAT_TEMPLATE) or tokenizer.chat_template
    if isinstance(template, list):
        template = {each.name: each.template for each in template}
    sampling = generation.model_dump(include=set(SAMPLING_FIELDS), exclude_none=True)
    return Settings(
        begin=_content(special.bos_token) or _content(tokenizer.bos_token),
        end=_content(special.eos_token) or _content(tokenizer.eos_token),
        padding=_content(special.pad_token) or _content(tokenizer.pad_token),
        begin_ids=_ids(generation.bos_token_id) or _ids(model.bos_token_id),
        stop_ids=_ids(generation.eos_token_id) or _ids(model.eos_token_id),
        padding_ids=_ids(generation.pad_token_id) or _ids(model.pad_token_id),
        chat_template=template,
        sampling=sampling,
    )


def _content(token: str | _Token | None) -> str | None:
    return token.content if isinstance(token, _Token) else token


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
