"""Commands on a trained model: `evaluate`, `generate` and `prune`."""

import sys
from typing import Annotated

import typer

from braeburn.cli.options import AsJson, Mesh, NewRun, RunFolder, Set
from braeburn.cli.output import print_json, print_rows, say
from braeburn.cli.resolve import begin_computing, parse_mesh, run_folder, warn_of_unused_accelerator
from braeburn.errors import UserError

commands = typer.Typer()


@commands.command()
def evaluate(
    directory: RunFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Text, JSONL or Parquet; without it, the run's held-out text."
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", hidden=True)
    ] = None,  # --data FILE ... takes several
    field: Annotated[
        str, typer.Option(help="The field of JSONL or Parquet rows that holds the text.")
    ] = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens that the model sees at once; as many as in training without it.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens from window to window; with fewer than in one, windows overlap.",
        ),
    ] = None,
    mesh: Mesh = None,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity, next-token accuracy and bits per byte of the newest checkpoint."""
    devices = parse_mesh(mesh)
    folder = run_folder(directory)
    begin_computing()
    from braeburn.evaluate.text import Windows, evaluate_files, evaluate_held_out
    from braeburn.train.trained import load

    trained = load(folder, devices)
    warn_of_unused_accelerator()
    texts = [*(data or []), *(more or [])]
    windows = Windows(sequence_length, stride)
    results = (
        evaluate_files(trained, texts, field, windows)
        if texts
        else evaluate_held_out(trained, windows)
    )
    if as_json:
        print_json({"step": trained.step, "results": results})
        return
    formats = {
        "tokens": ",",
        "loss": ".4f",
        "perplexity": ".3f",
        "accuracy": ".2%",
        "bits_per_byte": ".4f",
    }
    rows = [
        (name, *(format(v[key], how) for key, how in formats.items()))
        for name, v in results.items()
    ]
    print_rows([("text", *(key.replace("_", " ") for key in formats)), *rows])


@commands.command()
def generate(
    directory: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given repeatedly.")],
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
    as_json: AsJson = False,
) -> None:
    """Continue prompts with the newest checkpoint."""
    folder = run_folder(directory)
    begin_computing()
    from braeburn.evaluate.chat import encode_chat
    from braeburn.evaluate.generate import Generation, Sampling, generate, sampling_defaults
    from braeburn.train.trained import load

    trained = load(folder)
    warn_of_unused_accelerator()
    tokenizer = trained.tokenizer
    if chat:
        prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in prompt]
    else:
        prompts = [tokenizer.encode_prompt(text) for text in prompt]
    longest, context = max(map(len, prompts)), trained.sequence_length
    if context and longest + max_new_tokens > context:
        what = (
            "the prompt alone has"
            if longest >= context
            else f"with --max-new-tokens {max_new_tokens} there are"
        )
        say(
            f"warning: {what} up to {longest if longest >= context else longest + max_new_tokens} "
            f"tokens, and the model was trained on sequences of at most {context}: expect poor "
            f"text beyond; shorten the prompt"
            + (
                ""
                if longest >= context
                else f", or set --max-new-tokens to at most {context - longest}"
            )
        )
    default, not_applied = sampling_defaults(tokenizer.sampling)
    if not_applied:
        print(
            f"the model asks for {', '.join(not_applied)}, which is not applied here",
            file=sys.stderr,
        )
    if greedy:
        temperature = 0.0
    sampling = Sampling(
        temperature=default.temperature if temperature is None else temperature,
        top_k=default.top_k if top_k is None else top_k or None,
        top_p=default.top_p if top_p is None else top_p,
    )
    generation = Generation(max_new_tokens, sampling, seed, tokenizer.stops)
    continuations = generate(
        trained.params, prompts, trained.model, trained.run.precision, generation
    )
    texts = [tokenizer.decode(tokens) for tokens in continuations]
    if as_json:
        samples = [
            {"prompt": before, "text": text, "tokens": tokens}
            for before, text, tokens in zip(prompt, texts, continuations, strict=True)
        ]
        print_json({"step": trained.step, "samples": samples})
        return
    if not chat:
        texts = [before + text for before, text in zip(prompt, texts, strict=True)]
    print("\n---\n".join(texts))


@commands.command()
def prune(
    directory: RunFolder,
    ffn: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Hidden units of the FFN that stay in each layer."),
    ],
    out: NewRun,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="T", help="To learn masks on; 3% of the run's without it."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text to learn from; without it, that which the run was trained on.",
        ),
    ] = None,
    field: Annotated[
        str, typer.Option(help="The field of JSONL or Parquet rows that holds the text.")
    ] = "text",
    method: Annotated[
        str,
        typer.Option(
            help="soft_top_k learns what stays; activation, magnitude and random only cut."
        ),
    ] = "soft_top_k",
    assignments: Set = None,
    as_json: AsJson = False,
) -> None:
    """Cut FFN units off the newest checkpoint: a smaller run to evaluate, export or train on."""
    from pydantic import ValidationError

    from braeburn.config import Pruning, Source, explain_validation_error, parse_assignment
    from braeburn.remote import place

    try:
        pruning = Pruning.model_validate({"keep": {"ffn": ffn}, "method": method})
    except ValidationError as error:
        raise UserError(f"--{explain_validation_error(error)}") from None
    changes = dict(parse_assignment(text) for text in assignments or [])
    source, target = run_folder(directory, optimizer=True), place(out, "--out")
    begin_computing()
    from braeburn.prune.run_directory import prune
    from braeburn.train.copies import made_for

    text = Source(paths=tuple(data), field=field) if data else None
    with made_for(target) as made:
        model = prune(source, made, pruning, tokens, changes, text)
    result = {"out": out, "model": model.model_dump(mode="json")}
    print_json(result) if as_json else print(f"pruned {directory!r} to ffn_dim={ffn} into {out!r}")
