"""What `make demo-real` runs: SmolLM2-135M-Instruct is imported, pruned, distilled from itself,
quantised, exported to GGUF and read back.

Each stage is the command that a user would type, and is printed before it runs. Beside them,
transformers computes the perplexity of the same text, of what was imported and of what was
exported, from the files alone; with --llama-cpp llama.cpp does so too. Run again on the same
folder, finished stages are not repeated.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braeburn.atomic import write_atomically
from braeburn.errors import UserError
from corpora import DOCUMENT, SHARED
from real_programs import NEW_TOKENS, LlamaCpp, Transformers, converted, measured, published, scored

if TYPE_CHECKING:
    from braeburn.interop.gguf import Type

WIKITEXT = SHARED / "wikitext2-valid.txt"
# A line that begins an article of WikiText.
ARTICLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)
RECIPE = Path(__file__).with_name("real_recipe.py")
TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
# The other programs, and the module of each.
PROGRAMS = {TRANSFORMERS: "transformers", LLAMA_CPP: "llama_cpp"}
PROMPT = "The history of the lighthouse begins"
QUESTION = "Which apples keep well over the winter?"
# Run directory, and type of the file that it is shipped in.
EXPORTS: "tuple[tuple[str, Type], ...]" = (
    ("distilled", "f16"),
    ("distilled", "q8_0"),
    ("distilled", "q4_0"),
    ("rounded", "q4_0"),
)
# Perplexities of the same weights in two programs differ by less: what float16 rounds.
SAME = 1e-3


@dataclass(frozen=True)
class Settings:
    """What a demonstration is asked for; results of other settings are not mixed with it.

    Attributes:
        model: a Hugging Face directory in the place of SmolLM2; None for that.
        data: a text file, a WikiText for one; None for docstrings of this Python's library.
        ffn: hidden units that stay in each layer.
        sequence_length: of windows, in tokens.
        evaluation_bytes: about how many bytes at the end of the text are kept for evaluation.
        calibration_tokens: on which activations are measured.
        distilled_tokens: of the stage that distils; None for the recipe's own.
        rounded_tokens: of the stage that quantises; None for the recipe's own.
    """

    model: str | None
    data: str | None
    ffn: int
    sequence_length: int
    evaluation_bytes: int
    calibration_tokens: int
    distilled_tokens: int | None
    rounded_tokens: int | None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other calls out of a folder: two would make the same files.

    Raises:
        UserError: another call works there.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another call works in {str(folder)!r}; wait for its end, or name another --out"
            ) from None
        yield


class Progress:
    """The results of finished stages, in `results.json`, so that a second call goes on.

    Raises:
        UserError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._file = folder / "results.json"
        self._asked = vars(settings)
        self.results: dict[str, Any] = {}
        if self._file.exists():
            held = json.loads(self._file.read_text())
            different = [
                name for name, value in self._asked.items() if held["settings"].get(name) != value
            ]
            if different:
                raise UserError(
                    f"--out {str(folder)!r} holds results of another --"
                    f"{different[0].replace('_', '-')}; delete the folder or name another"
                )
            self.results = held["results"]

    def stage(
        self, name: str, work: Callable[..., dict[str, Any]], *arguments: object
    ) -> dict[str, Any]:
        """What a stage found, now or before; its time in seconds is added as `seconds`.

        Args:
            name: of the stage.
            work: carries it out.
            arguments: of `work`.
        """
        if name in self.results:
            print(f"\n== {name}: finished before", file=sys.stderr)
            return self.results[name]
        print(f"\n== {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        found = work(*arguments)
        self.results[name] = found | {"seconds": time.monotonic() - began}
        contents = {"settings": self._asked, "results": self.results}
        write_atomically(self._file, json.dumps(contents, indent=2) + "\n")
        return self.results[name]


def braeburn(*arguments: object, **environment: str) -> dict[str, Any]:
    """What a command answers with `--json`; its log goes to standard error.

    Raises:
        UserError: it failed, and has said why.
    """
    words = [*map(str, arguments), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "braeburn", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    if done.returncode:
        raise UserError(f"`braeburn {words[0]}` ended with exit code {done.returncode}; see above")
    return json.loads(done.stdout)


def command(*arguments: object, **environment: str) -> dict[str, Any]:
    """The same, printed before it runs."""
    before = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    line = " ".join([*before, "braeburn", *(shlex.quote(str(word)) for word in arguments)])
    print(f"$ {line}", file=sys.stderr, flush=True)
    return braeburn(*arguments, **environment)


def texts(data: Path | None) -> list[str]:
    """The documents of a text: a WikiText's articles, another file's runs of lines, or docstrings.

    Raises:
        UserError: the file cannot be read, or holds too little to be divided.
    """
    from braeburn.config import Source
    from braeburn.data.corpus import documents

    if data is None:
        print(
            "no text is named, so it is the docstrings of this Python's library; name a WikiText-2 "
            "file with --data FILE, or make demo-real DATA=FILE",
            file=sys.stderr,
        )
        whole = "\n\n".join(
            document.text for document in documents("prose", Source(format="python-prose"))
        )
    else:
        try:
            whole = data.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data {str(data)!r} cannot be read as text ({error})") from None
    found = list(_articles(whole)) or list(_runs_of_lines(whole))
    if len(found) < 2:
        raise UserError(
            f"--data {str(data)!r} holds {len(whole):,} characters, too few to train and to "
            f"evaluate on; name a longer text"
        )
    return found


def _articles(whole: str) -> Iterator[str]:
    """The articles of a WikiText; none where no line begins one."""
    starts = [match.start() for match in ARTICLE.finditer(whole)]
    for start, stop in itertools.pairwise([*starts, len(whole)]):
        yield whole[start:stop]


def _runs_of_lines(whole: str) -> Iterator[str]:
    document = ""
    for line in whole.splitlines(keepends=True):
        document += line
        if len(document) >= DOCUMENT:
            yield document
            document = ""
    if document.strip():
        yield document


def divided(documents: list[str], evaluation_bytes: int) -> tuple[list[str], str]:
    """Documents to learn from, and the text to evaluate on: the last documents, of about so many
    bytes, and at least one.
    """
    first = len(documents)
    size = 0
    while first > 1 and size < evaluation_bytes:
        first -= 1
        size += len(documents[first].encode())
    return documents[:first], "".join(documents[first:])


def write_texts(folder: Path, settings: Settings) -> dict[str, Any]:
    """Writes the text to learn from, `text.jsonl`, and that to evaluate on, `evaluation.txt`."""
    data = Path(settings.data) if settings.data else None
    learned, evaluated = divided(texts(data), settings.evaluation_bytes)
    rows = "".join(json.dumps({"text": document}) + "\n" for document in learned)
    write_atomically(folder / "text.jsonl", rows)
    write_atomically(folder / "evaluation.txt", evaluated)
    return {
        "source": data.name if data else "docstrings of Python's library",
        "learned_bytes": sum(len(document.encode()) for document in learned),
        "evaluated_bytes": len(evaluated.encode()),
    }


class Demonstration:
    """All stages in their order, in one folder."""

    def __init__(self, folder: Path, settings: Settings, programs: Container[str]) -> None:
        """
        Args:
            folder: holds everything that is made; it exists.
            settings: what is asked for.
            programs: which compute the same, of `TRANSFORMERS` and `LLAMA_CPP`.
        """
        self.folder = folder
        self.settings = settings
        self.programs = programs
        self.progress = Progress(folder, settings)

    def run(self) -> dict[str, Any]:
        """Carries out what is left to do; returns the results of all stages by their names.

        Raises:
            UserError: something is missing, or a stage failed.
        """
        settings, stage = self.settings, self.progress.stage
        if settings.model:
            source = Path(settings.model)
        else:
            source = self.folder / "hf"
            file, origin = published()
            print(origin, file=sys.stderr)
            stage("convert", converted, file, source)
        stage("text", write_texts, self.folder, settings)
        stage("import", self._made, "imported", "import", source)
        stage("evaluate imported", self._evaluated, "imported")
        if TRANSFORMERS in self.programs:
            stage("transformers imported", self._theirs, source)
            stage("greedy text", self._greedy, source)
        stage("prune", self._prune)
        stage("evaluate pruned", self._evaluated, "pruned")
        stage("distil", self._train, "distilled", settings.distilled_tokens)
        stage("evaluate distilled", self._evaluated, "distilled")
        stage("round", self._train, "rounded", settings.rounded_tokens)
        stage("evaluate rounded", self._evaluated, "rounded")
        for name, type_ in EXPORTS:
            file = self.folder / f"{name}-{type_}.gguf"
            stage(f"export {file.name}", self._export, name, type_, file)
            if TRANSFORMERS in self.programs:
                stage(f"transformers {file.name}", self._theirs, file)
            if LLAMA_CPP in self.programs:
                stage(f"llama.cpp {file.name}", self._llama_cpp, file)
        return self.progress.results

    def _made(self, name: str, *arguments: object) -> dict[str, Any]:
        """Makes the run directory `name` by a command, unless it is there."""
        out = self.folder / name
        if not (out / "config.json").exists():
            command(*arguments, "--out", out)
        return self._sizes(name)

    def _sizes(self, name: str) -> dict[str, Any]:
        from braeburn.config import read_run
        from braeburn.layers.spec import count
        from braeburn.models.decoder import param_specs

        run = read_run(self.folder / name)
        model = run.model_at(run.total_steps)[0]
        return {"parameters": count(param_specs(model)), "ffn_dim": model.ffn_dim}

    def _prune(self) -> dict[str, Any]:
        settings = self.settings
        stage = "stages.prune"
        return self._made(
            "pruned",
            *("prune", self.folder / "imported"),
            *("--ffn", settings.ffn),
            *("--method", "activation"),
            *("--data", self.folder / "text.jsonl"),
            *("--set", f"{stage}.pruning.calibration_tokens={settings.calibration_tokens}"),
            *("--set", f"{stage}.sequence_length={settings.sequence_length}"),
            *("--set", "data.held_out=0"),
        )

    def _train(self, function: str, tokens: int | None) -> dict[str, Any]:
        stage = {"distilled": "distil", "rounded": "round"}[function]
        changes = ["--set", f"stages.{stage}.tokens={tokens}"] if tokens else []
        recipe = os.path.relpath(RECIPE)
        out = self.folder / function
        found = command(
            "train", f"{recipe}:{function}", "--out", out, *changes, REAL=str(self.folder)
        )
        if not found["finished"]:
            raise UserError(f"training stopped at step {found['step']}; run this again to go on")
        return {"steps": found["step"], "tokens": found["stages"][0]["tokens"]} | self._sizes(
            function
        )

    def _evaluated(self, name: str) -> dict[str, Any]:
        file = self.folder / "evaluation.txt"
        length = self.settings.sequence_length
        found = command("evaluate", self.folder / name, "--data", file, "--sequence-length", length)
        return found["results"][str(file)]

    def _theirs(self, path: Path) -> dict[str, Any]:
        theirs = Transformers(path)
        text = (self.folder / "evaluation.txt").read_text(encoding="utf-8")
        tokenizer = theirs.tokenizer
        tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        document = scored(tokens, tokenizer.bos_token_id, tokenizer.eos_token_id)
        found = measured(theirs.logits, document, self.settings.sequence_length)
        return found | {"chat_tokens": theirs.prompt(QUESTION, chat=True)}

    def _llama_cpp(self, file: Path) -> dict[str, Any]:
        theirs = LlamaCpp(file, self.settings.sequence_length)
        text = (self.folder / "evaluation.txt").read_text(encoding="utf-8")
        tokens = theirs.llama.tokenize(text.encode(), add_bos=False, special=False)
        document = scored(tokens, theirs.llama.token_bos(), theirs.llama.token_eos())
        return measured(theirs.logits, document, self.settings.sequence_length)

    def _greedy(self, source: Path) -> dict[str, Any]:
        """The same prompts continued by both programs, one of them as a user's message."""
        theirs = Transformers(source)
        found: dict[str, Any] = {}
        for name, prompt in (("text", PROMPT), ("chat", QUESTION)):
            chat = name == "chat"
            options = ["--chat"] if chat else []
            sample = command(
                *("generate", self.folder / "imported", "--prompt", prompt, "--greedy"),
                *("--max-new-tokens", NEW_TOKENS, *options),
            )["samples"][0]
            expected = theirs.greedy(theirs.prompt(prompt, chat))
            found[name] = {
                "prompt": prompt,
                "continuation": sample["text"],
                "tokens": len(expected),
                "same": sample["tokens"] == expected,
            }
        return found

    def _export(self, name: str, type_: "Type", file: Path) -> dict[str, Any]:
        file.unlink(missing_ok=True)  # of a call that was interrupted before its result was kept
        command(
            *("export", self.folder / name, "--format", "gguf"), *("--type", type_, "--out", file)
        )
        return {"bytes": file.stat().st_size}


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table: a run directory as it is, or a file that it was exported to."""
    found = []
    published_bytes = results["convert"]["bytes"] if "convert" in results else None
    models = (
        ("imported", "import", published_bytes),
        ("pruned", "prune", None),
        ("distilled", "distil", None),
        ("rounded", "round", None),
    )
    for name, stage, size in models:
        ours = results[f"evaluate {name}"]
        found.append(
            {
                "model": name,
                "parameters": results[stage]["parameters"],
                "bytes": size,
                "braeburn": ours["perplexity"],
                "transformers": results.get(f"transformers {name}", {}).get("perplexity"),
                "llama_cpp": None,
                "bits_per_byte": ours["bits_per_byte"],
                "seconds": results[stage]["seconds"],
            }
        )
    for name, type_ in EXPORTS:
        file = f"{name}-{type_}.gguf"
        stage = {"distilled": "distil", "rounded": "round"}[name]
        theirs = results.get(f"transformers {file}", {})
        loss = theirs.get("loss")
        ours = results[f"evaluate {name}"]
        # Bytes and tokens are those of the same text.
        bits = loss and loss * ours["tokens"] / ours["bytes"] / math.log(2)
        found.append(
            {
                "model": file,
                "parameters": results[stage]["parameters"],
                "bytes": results[f"export {file}"]["bytes"],
                "braeburn": None,
                "transformers": theirs.get("perplexity"),
                "llama_cpp": results.get(f"llama.cpp {file}", {}).get("perplexity"),
                "bits_per_byte": bits,
                "seconds": results[f"export {file}"]["seconds"],
            }
        )
    return found


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What must hold -> whether it does: the same weights have the same perplexity everywhere."""
    found = {}
    pairs = [("imported", "imported"), ("distilled", "distilled-f16.gguf")]
    pairs.append(("rounded", "rounded-q4_0.gguf"))
    for name, theirs in pairs:
        ours = results[f"evaluate {name}"]
        for program in PROGRAMS:
            other = results.get(f"{program} {theirs}")
            if other:
                difference = other["perplexity"] / ours["perplexity"] - 1
                line = (
                    f"{theirs} in {program}: {other['tokens']:,} tokens, as in Braeburn; "
                    f"perplexity differs by {difference:+.4%}"
                )
                same = other["tokens"] == ours["tokens"] and abs(difference) < SAME
                found[line] = same
    chats = [result["chat_tokens"] for result in results.values() if "chat_tokens" in result]
    if chats:
        line = "the chat template makes the same tokens of a question in every file"
        found[line] = all(chat == chats[0] for chat in chats)
    for name, sample in results.get("greedy text", {}).items():
        if name != "seconds":
            line = f"greedy {name} of {sample['tokens']} tokens, as in transformers"
            found[line] = sample["same"]
    return found


def report(results: dict[str, Any], settings: Settings) -> str:
    """The results as text."""
    text = results["text"]
    lines = [
        f"{'':<20} {'parameters':>11} {'bytes':>11} {'perplexity:':>11} {'':>12} {'':>9} "
        f"{'bits per':>8} {'made in':>8}",
        f"{'':<20} {'':>11} {'':>11} {'Braeburn':>11} {'transformers':>12} {'llama.cpp':>9} "
        f"{'byte':>8} {'s':>8}",
    ]
    for row in rows(results):
        size = f"{row['bytes']:,}" if row["bytes"] else "-"
        perplexities = [
            f"{row[program]:.4f}" if row[program] else "-"
            for program in ("braeburn", "transformers", "llama_cpp")
        ]
        bits = f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] else "-"
        lines.append(
            f"{row['model']:<20} {row['parameters']:>11,} {size:>11} {perplexities[0]:>11} "
            f"{perplexities[1]:>12} {perplexities[2]:>9} {bits:>8} {row['seconds']:>8.0f}"
        )
    measured_tokens = results["evaluate imported"]["tokens"]
    total = sum(result["seconds"] for result in results.values())
    lines += [
        "",
        f"Perplexity is that of {measured_tokens:,.0f} tokens ({text['evaluated_bytes']:,} bytes) "
        f"of {text['source']} in windows of {settings.sequence_length}; the models learned from "
        f"the {text['learned_bytes']:,} bytes before them.",
        "Bytes of the imported model are those of the file as it was published. All stages: "
        f"{total / 60:.1f} minutes.",
    ]
    for line, held in checks(results).items():
        lines.append(f"{'yes' if held else 'NO'}: {line}")
    if "greedy text" in results:
        sample = results["greedy text"]["chat"]
        lines += ["", f"The imported model, asked {sample['prompt']!r}:", sample["continuation"]]
    else:
        lines.append("Nothing was compared with transformers (--no-comparison).")
    return "\n".join(lines)


def main() -> int:
    """Runs the demonstration; returns the exit code, 1 where programs do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="the folder of all")
    parser.add_argument(
        "--data",
        type=Path,
        help="a text file, as WikiText-2's; without it, one near by or this Python's docstrings",
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face directory, instead of SmolLM2")
    parser.add_argument("--ffn", type=int, default=1024, help="hidden units that stay")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--evaluation-bytes", type=int, default=30_000, help="to evaluate on")
    parser.add_argument("--calibration-tokens", type=int, default=16_384, help="to prune by")
    parser.add_argument("--distilled-tokens", type=int, help="to distil on; else the recipe's")
    parser.add_argument("--rounded-tokens", type=int, help="to quantise on; else the recipe's")
    parser.add_argument(
        "--no-comparison", action="store_true", help="without transformers, where it is missing"
    )
    parser.add_argument(
        "--llama-cpp", action="store_true", help="with llama.cpp, whose Python package is installed"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    arguments = parser.parse_args()

    data = arguments.data or (WIKITEXT if WIKITEXT.exists() else None)
    settings = Settings(
        model=str(arguments.model) if arguments.model else None,
        data=str(data) if data else None,
        ffn=arguments.ffn,
        sequence_length=arguments.sequence_length,
        evaluation_bytes=arguments.evaluation_bytes,
        calibration_tokens=arguments.calibration_tokens,
        distilled_tokens=arguments.distilled_tokens,
        rounded_tokens=arguments.rounded_tokens,
    )
    programs = [
        *([] if arguments.no_comparison else [TRANSFORMERS]),
        *([LLAMA_CPP] if arguments.llama_cpp else []),
    ]
    try:
        for program, module in PROGRAMS.items():
            if program in programs and importlib.util.find_spec(module) is None:
                raise UserError(
                    f"{program} is not installed in this environment; `make demo-real` installs "
                    f"transformers, and --no-comparison does without"
                )
        arguments.out.mkdir(parents=True, exist_ok=True)
        with alone(arguments.out):
            results = Demonstration(arguments.out, settings, programs).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    held = checks(results)
    if arguments.json:
        print(
            json.dumps(
                {
                    "settings": vars(settings),
                    "python": platform.python_version(),
                    "results": results,
                    "rows": rows(results),
                    "checks": held,
                },
                indent=2,
            )
        )
    else:
        print(report(results, settings))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
