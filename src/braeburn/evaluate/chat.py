"""Conversations as a model's own chat template lays them out, with its markers as tokens.

The template is Jinja source that came with the model, so it runs in Jinja's sandbox, as in
transformers: it can format text, but reaches no file and no attribute that starts with an
underscore.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.extras import how_to_install

Message = Mapping[str, str]  # role and content


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to where the model's answer begins, those of AutoTokenizer's
    apply_chat_template.

    Special tokens that the template writes become those tokens. In what a user says they are
    refused: the user would end a turn, or speak for someone else.

    Args:
        tokenizer: holds the template.
        messages: role ("system", "user", "assistant") and content of each.

    Raises:
        UserError: there is no template, Jinja is missing, the template fails or refuses the
            conversation, or a content holds the characters of a special token.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if source is None:
        raise UserError(
            "--chat needs a chat template, and this model came with none; leave --chat out, or "
            "import a model whose tokenizer_config.json or chat_template.jinja has one"
        )
    for message in messages:
        for token in tokenizer.special_tokens:
            if token and token in message["content"]:
                raise UserError(
                    f"the prompt contains {token!r}, which in a conversation is a marker and not "
                    f"text; take it out of the prompt, or leave --chat out, where it is text"
                )
    return tokenizer.encode_markup(render(source, messages, tokenizer.named_tokens()))


def render(source: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """The text that a template makes of a conversation, up to where the answer begins.

    Args:
        source: the template in Jinja.
        messages: role and content of each.
        tokens: `bos_token`, `eos_token` and `pad_token`, which templates write.

    Raises:
        UserError: Jinja is missing, or the template is unsound, fails or refuses the conversation.
    """
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError(f"--chat needs Jinja; {how_to_install('chat')}") from None

    class GenerationBlock(Extension):
        """`{% generation %}`, which marks the assistant's words for training; here it is what
        stands inside.
        """

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way to say it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class GuardedNamespace(jinja2.utils.Namespace):
        """`namespace(...)`, whose names begin with no underscore."""

        def __init__(*arguments: Any, **fields: Any) -> None:
            self, *values = arguments
            for name in dict(*values, **fields):
                GuardedNamespace.check(name)
            jinja2.utils.Namespace.__init__(self, *values, **fields)

        def __setitem__(self, name: str, value: Any) -> None:
            GuardedNamespace.check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    # Without what has been a way out of the sandbox: objects of Python's own, and names with
    # underscores.
    for name in ("cycler", "joiner", "lipsum"):
        del environment.globals[name]
    environment.globals["dict"] = lambda *arguments, **fields: dict(*arguments, **fields)
    environment.globals["namespace"] = GuardedNamespace
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
        return template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **tokens,
        )
    except Exception as error:  # a template is a program, and can fail in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"the model's chat template fails ({reason}); leave --chat out") from None
