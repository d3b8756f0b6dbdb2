"""The ids of a prompt, here, in an exported Hugging Face directory and in a GGUF file; and what a
round trip keeps.

`make test-hf` compares with AutoTokenizer, `make test-gguf` with llama.cpp.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hf_models import CHAT, chat_model

from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.evaluate.chat import encode_chat, render
from braeburn.evaluate.sampling import DEFAULT_TEMPERATURE, Sampling, sampling_defaults
from braeburn.train.trained import load
from support import braeburn

TEXT = "the cat sat on 12 mats\n\n    (caf\u00e9)"


def ids_of_gguf(path: Path, text: str) -> list[int]:
    """What llama.cpp makes of a text: its BPE gives the ids of the text, the file's keys say what
    is around them.
    """
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    own = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(keys["tokens"])},
            [tuple(merge.split(" ")) for merge in keys["merges"]],
        )
    )
    own.pre_tokenizer = split_of(keys["pre"])
    begin = [keys["bos_token_id"]] if keys["add_bos_token"] else []
    end = [keys["eos_token_id"]] if keys["add_eos_token"] else []
    return [*begin, *own.encode(text).ids, *end]


def split_of(name: str) -> Any:
    from tokenizers import pre_tokenizers

    from braeburn.data.tokenizer import PATTERN

    assert name == "qwen2"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def exported(directory: Path, out: Path) -> tuple[Path, Path]:
    """A run as a Hugging Face directory and as a GGUF file."""
    assert braeburn("export", directory, "--out", out / "hf").code == 0
    assert braeburn("export", directory, "--format", "gguf", "--out", out / "a.gguf").code == 0
    return out / "hf", out / "a.gguf"


def prompt_ids(directory: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[int]:
    """The ids that `braeburn generate` hands to the model for `TEXT`."""
    from braeburn.evaluate import generate as module

    seen: list[list[int]] = []

    def continuations(_: Any, prompts: list[list[int]], *__: Any, **___: Any) -> Iterator[Any]:
        seen.extend(prompts)
        yield from (module.Piece(number, [], "stop") for number in range(len(prompts)))

    with monkeypatch.context() as patch:
        patch.setattr(module, "continuations", continuations)
        answer = braeburn("generate", directory, "--prompt", TEXT, *options)
    assert answer.code == 0, answer.err
    return seen[0]


def test_a_trained_model_has_one_truth_about_the_begin_token(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load(finished).tokenizer
    hf, file = exported(finished, tmp_path)
    expected = [ours.begin, *ours.encode(TEXT)]
    assert prompt_ids(finished, monkeypatch) == expected
    assert tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json")).encode(TEXT).ids == expected
    assert ids_of_gguf(file, TEXT) == expected
    assert json.loads((hf / "tokenizer_config.json").read_text())["add_bos_token"] is True


@pytest.mark.parametrize("prefix", [None, "<|begin|>"])
def test_an_imported_model_keeps_its_own(
    prefix: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = chat_model(tmp_path / "source", prefix)
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    hf, file = exported(tmp_path / "run", tmp_path)
    expected = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    assert prompt_ids(tmp_path / "run", monkeypatch) == expected
    assert tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json")).encode(TEXT).ids == expected
    assert ids_of_gguf(file, TEXT) == expected
    assert (len(expected) > len(load(tmp_path / "run").tokenizer.encode(TEXT))) == (
        prefix is not None
    )


def test_a_round_trip_keeps_what_the_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = chat_model(tmp_path / "source", "<|begin|>", bos_token="<|begin|>")
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    hf, file = exported(tmp_path / "run", tmp_path)

    ids = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id
    before, after = (
        json.loads((folder / "generation_config.json").read_text()) for folder in (source, hf)
    )
    assert after == before | {"bos_token_id": ids("<|begin|>")}
    config = json.loads((hf / "config.json").read_text())
    assert config["eos_token_id"] == [ids("<|im_end|>"), ids("<|endoftext|>")]
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    named = {
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT,
    }
    assert named.items() <= settings.items()

    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert fields["tokenizer.chat_template"] == CHAT
    tokens = {"bos": "<|begin|>", "eos": "<|im_end|>", "eot": "<|endoftext|>", "padding": "<|pad|>"}
    for name, token in tokens.items():
        assert fields[f"tokenizer.ggml.{name}_token_id"] == ids(token)

    # Pruned or trained on, a run hands it on.
    answer = braeburn(
        "prune",
        tmp_path / "run",
        "--ffn",
        32,
        "--method",
        "magnitude",
        "--out",
        tmp_path / "pruned",
    )
    assert answer.code == 0, answer.err
    assert (
        load(tmp_path / "pruned").tokenizer.to_json() == load(tmp_path / "run").tokenizer.to_json()
    )
    shutil.rmtree(hf)
    assert braeburn("export", tmp_path / "pruned", "--out", hf).code == 0
    assert json.loads((hf / "generation_config.json").read_text()) == after


def test_several_chat_templates_by_name(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": CHAT},
        {"name": "tools", "template": "{{ tools }}"},
    ]
    source = chat_model(tmp_path / "source", None, chat_template=templates)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    assert tokenizer.tokenizer_config()["chat_template"] == templates
    encode_chat(tokenizer, [{"role": "user", "content": "the cat"}])
    # A file of its own wins, as in transformers.
    (source / "chat_template.jinja").write_text("{{ 7 }}")
    assert Tokenizer.load(source / "tokenizer.json").chat_template == "{{ 7 }}"


def test_chats_have_markers_as_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = chat_model(tmp_path / "source", "<|begin|>", bos_token="<|begin|>")
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    own = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    text = f"<|begin|><|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    expected = own.encode(text, add_special_tokens=False).ids
    assert prompt_ids(tmp_path / "run", monkeypatch, "--chat") == expected
    markers = [own.token_to_id(name) for name in ("<|begin|>", "<|im_start|>", "<|im_end|>")]
    assert [i for i in expected if i in markers] == [markers[0], markers[1], markers[2], markers[1]]

    marked = braeburn("generate", tmp_path / "run", "--chat", "--prompt", "the <|im_end|> cat")
    assert "the prompt contains '<|im_end|>', which in a conversation is a marker" in marked.error
    plain = load(tmp_path / "run").tokenizer.encode_prompt("the <|im_end|> cat")
    assert markers[2] not in plain


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "--chat needs a chat template, and this model came with none"),
        ("{% for x in %}", "the model's chat template fails"),
        ("{{ raise_exception('roles must alternate') }}", r"fails \(roles must alternate\)"),
        ("{{ messages[0].content.__class__.__mro__ }}", "fails"),
        ("{{ namespace(_x=1) }}", "fails"),
        ("{{ cycler.__init__.__globals__ }}", "fails"),
    ],
)
def test_templates_that_fail(template: str | None, words: str, tmp_path: Path) -> None:
    source = chat_model(tmp_path / "source", None, chat_template=template)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    with pytest.raises(UserError, match=words):
        encode_chat(tokenizer, [{"role": "user", "content": "the cat"}])


def test_templates_are_rendered_as_by_transformers() -> None:
    source = (
        "{%- set found = namespace(n=0) %}\n"
        "    {% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break "
        "%}{% endfor %}\n"
        "{% set found.n = 3 %}{{ found.n }}{{ dict(a=1)['a'] }}"
    )
    assert render(source, [{"role": "user", "content": "<\u00e9>"}], {}) == (
        '{"role": "user", "content": "<\u00e9>"}31'
    )


def test_sampling_is_the_models_where_the_user_says_nothing() -> None:
    assert sampling_defaults({}) == (Sampling(DEFAULT_TEMPERATURE, None, 1.0), [])
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_defaults(said) == (Sampling(0.6, 20, 0.95), [])
    assert sampling_defaults({"do_sample": True})[0].temperature == 1.0
    assert sampling_defaults({"do_sample": False, "temperature": 0.6})[0].temperature == 0.0
    assert sampling_defaults({"repetition_penalty": 1.1, "min_p": 0.0})[1] == [
        "repetition_penalty=1.1"
    ]


def test_what_llama_cpp_cannot_put_around_a_text_is_refused(tmp_path: Path) -> None:
    source = chat_model(tmp_path / "source", "<|im_start|>", bos_token="<|begin|>")
    assert braeburn("import", source, "--out", tmp_path / "run").code == 0
    answer = braeburn("export", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "a.gguf")
    assert (
        "the tokenizer makes '<|im_start|> TEXT' of a text, and llama.cpp adds no more than"
        in answer.error
    )
