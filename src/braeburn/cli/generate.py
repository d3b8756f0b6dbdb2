"""The command `generate`: what a model writes."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braeburn.cli.options import AsJson, Mesh, RunFolder
from braeburn.cli.output import print_json, say
from braeburn.cli.resolve import (
    begin_computing,
    join,
    parse_mesh,
    run_folder,
    warn_of_unused_accelerator,
)
from braeburn.errors import UserError
from braeburn.parallel import processes

if TYPE_CHECKING:
    from braeburn.data.tokenizer import Tokenizer
    from braeburn.evaluate.generate import Generation, Piece, Ready

commands = typer.Typer()


@commands.command()
def generate(
    directory: RunFolder,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text to continue; may be given repeatedly. - is what standard input has.",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A file of prompts, one a line, or JSON lines (.jsonl); - is standard input.",
        ),
    ] = None,
    field: Annotated[
        str, typer.Option(help="The field of JSON lines that holds the prompt.")
    ] = "prompt",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Tokens to write at most.")
    ] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 is greedy; the model's own default without it, or 0.8."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0, help="Sample among the top k tokens only; 0 is all, unless the model says."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among the most probable tokens of this mass."),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the most probable token.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Lay prompts out by the model's chat template, as a user's messages."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random choices.")] = 0,
    batch: Annotated[
        int,
        typer.Option(
            min=1, max=2**16, metavar="N", help="Prompts that are continued at once, at most."
        ),
    ] = 32,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Print the text as it comes, as on a terminal; with --json, events a line each.",
        ),
    ] = False,
    mesh: Mesh = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and cache: fp32 or bf16; what the run computes in without it."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with the newest checkpoint."""
    from braeburn.config import weight_type
    from braeburn.evaluate.prompts import gather_prompts

    devices = parse_mesh(mesh)
    compute = weight_type(dtype)
    texts = gather_prompts(prompt or [], prompts or [], field)
    if stream and not as_json and len(texts) > 1:
        raise UserError(
            f"--stream prints one text as it comes, and there are {len(texts)} prompts; leave "
            f"--stream out, or add --json, whose events tell the texts apart"
        )
    folder = run_folder(directory)
    join("generate", mesh)
    begin_computing()
    from braeburn.evaluate.generate import load_ready

    trained, at_hand = load_ready(folder, devices, compute)
    warn_of_unused_accelerator()
    tokenizer = trained.tokenizer
    ids = _encoded(tokenizer, texts, chat)
    _warn_of_length(max(map(len, ids)), max_new_tokens, trained.sequence_length)
    sampling = _sampling(tokenizer, 0.0 if greedy else temperature, top_k, top_p)
    from braeburn.evaluate.generate import Generation

    generation = Generation(max_new_tokens, sampling, seed, tokenizer.stops)
    with _without_choices_of_kernels():
        if as_json and stream:
            _print_events(_pieces(at_hand, ids, generation, batch, stream=True), tokenizer, texts)
        elif as_json:
            result = _result(at_hand, ids, generation, batch, tokenizer, texts)
            if processes.is_main():
                print_json({"step": trained.step, **result})
        elif len(texts) == 1 and (stream or sys.stdout.isatty()):
            pieces = _pieces(at_hand, ids, generation, batch, stream=True)
            _print_as_it_comes(pieces, tokenizer, "" if chat else texts[0])
        else:
            written = _written(_pieces(at_hand, ids, generation, batch), len(texts))
            if processes.is_main():
                before = [""] * len(texts) if chat else texts
                print(
                    "\n---\n".join(
                        text + tokenizer.decode(tokens)
                        for text, (tokens, _) in zip(before, written, strict=True)
                    )
                )


def _encoded(tokenizer: "Tokenizer", texts: Sequence[str], chat: bool) -> list[list[int]]:
    from braeburn.evaluate.chat import encode_chat

    if chat:
        return [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [tokenizer.encode_prompt(text) for text in texts]


def _warn_of_length(longest: int, new: int, context: int) -> None:
    """Warns where texts get longer than what the model was trained on, if that is known."""
    if not context or longest + new <= context:
        return
    alone = longest >= context
    what = "the prompt alone has" if alone else f"with --max-new-tokens {new} there are"
    say(
        f"warning: {what} up to {longest if alone else longest + new} tokens, and the model was "
        f"trained on sequences of at most {context}: expect poor text beyond; shorten the prompt"
        + ("" if alone else f", or set --max-new-tokens to at most {context - longest}")
    )


def _sampling(
    tokenizer: "Tokenizer", temperature: float | None, top_k: int | None, top_p: float | None
) -> Any:
    """How tokens are drawn: as the options say, and the model where they do not."""
    from braeburn.evaluate.sampling import Sampling, sampling_defaults

    default, not_applied = sampling_defaults(tokenizer.sampling)
    if not_applied:
        say(f"the model asks for {', '.join(not_applied)}, which is not applied here")
    return Sampling(
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k if top_k is None else top_k or None,
        top_p=default.top_p if top_p is None else top_p,
    )


@contextmanager
def _without_choices_of_kernels() -> Iterator[None]:
    """Leaves out of the log which back end attention takes, which would stand amid the text."""
    log = logging.getLogger("braeburn.layers.attention")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _pieces(
    at_hand: "Ready",
    ids: Sequence[Sequence[int]],
    generation: "Generation",
    batch: int,
    *,
    stream: bool = False,
) -> Iterator["Piece"]:
    from braeburn.evaluate.generate import STEPS_AT_ONCE, STEPS_OF_STREAM, continuations

    steps = STEPS_OF_STREAM if stream else STEPS_AT_ONCE
    return continuations(at_hand, ids, generation, rows=batch, steps=steps)


def _written(pieces: Iterable["Piece"], count: int) -> list[tuple[list[int], str]]:
    """The new tokens of each prompt, and why they end, with a progress bar."""
    from braeburn.train.progress import tracked

    texts: list[list[int]] = [[] for _ in range(count)]
    ends = [""] * count

    def finished() -> Iterator[int]:
        for piece in pieces:
            texts[piece.prompt] += piece.tokens
            if piece.end:
                ends[piece.prompt] = piece.end
                yield piece.prompt

    for _ in tracked(finished(), "generating", count):
        pass
    return list(zip(texts, ends, strict=True))


def _result(
    at_hand: "Ready",
    ids: Sequence[Sequence[int]],
    generation: "Generation",
    batch: int,
    tokenizer: "Tokenizer",
    texts: Sequence[str],
) -> dict[str, Any]:
    """What `--json` tells: the samples, and the memory on each device."""
    from braeburn.evaluate.generate import memory

    written = _written(_pieces(at_hand, ids, generation, batch), len(texts))
    samples = [
        {"prompt": before, "text": tokenizer.decode(tokens), "tokens": tokens, "end": end}
        for before, (tokens, end) in zip(texts, written, strict=True)
    ]
    return {"samples": samples, "memory": memory(at_hand, ids, generation, batch)}


def _print_as_it_comes(pieces: Iterable["Piece"], tokenizer: "Tokenizer", before: str) -> None:
    from braeburn.evaluate.streaming import TextStream

    text = TextStream(tokenizer)
    if processes.is_main():
        print(before, end="", flush=True)
    for piece in pieces:
        new = text.add(piece.tokens) + (text.finish() if piece.end else "")
        if new and processes.is_main():
            print(new, end="", flush=True)
    if processes.is_main():
        print()


def _print_events(pieces: Iterable["Piece"], tokenizer: "Tokenizer", texts: Sequence[str]) -> None:
    """A line of JSON for each piece of text, with why its prompt's text ends where it does."""
    from braeburn.evaluate.streaming import TextStream

    streams = [TextStream(tokenizer) for _ in texts]
    for piece in pieces:
        stream = streams[piece.prompt]
        text = stream.add(piece.tokens) + (stream.finish() if piece.end else "")
        event = {"prompt": piece.prompt, "text": text, "tokens": piece.tokens, "end": piece.end}
        if processes.is_main():
            print(json.dumps(event, ensure_ascii=False), flush=True)
