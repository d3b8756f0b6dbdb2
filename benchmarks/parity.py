"""Compares a trained run with its own export in transformers: the same greedy tokens after the same
prompts.

    make extra-hf && .venv-hf/bin/python benchmarks/parity.py runs/quickstart

Exits with 1 where a token differs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

PROMPTS = ("def ", "import os\n\n\nclass ", "    for name in ", '"""Return the ')


def main() -> None:
    """Exports the newest checkpoint, loads it with transformers and continues each prompt with
    both.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="a run directory")
    parser.add_argument("--tokens", type=int, default=64, help="to write after each prompt")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from braeburn.config import Precision
    from braeburn.evaluate.generate import Generation, Sampling, generate
    from braeburn.interop.exchange import export_huggingface
    from braeburn.train.trained import load

    trained = load(arguments.directory)
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(arguments.directory, Path(folder) / "hf")
        theirs = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "hf", dtype=torch.float32
        ).eval()
        their_tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "hf")
    differ = 0
    for prompt in PROMPTS:
        tokens = trained.tokenizer.encode_prompt(prompt)
        if their_tokenizer(prompt)["input_ids"] != tokens:
            sys.exit(f"the exported tokenizer encodes {prompt!r} otherwise")
        ours = generate(
            trained.params,
            [tokens],
            trained.model,
            Precision(compute="float32"),
            Generation(arguments.tokens, Sampling(temperature=0.0)),
        )[0]
        batch = torch.tensor([tokens])
        # Without a mask transformers takes the begin token for padding, whose id it shares, and
        # hides it.
        settings = {
            "max_new_tokens": arguments.tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        continued = theirs.generate(batch, attention_mask=torch.ones_like(batch), **settings)[
            0, len(tokens) :
        ].tolist()
        same = sum(a == b for a, b in zip(ours, continued, strict=True))
        differ += same < arguments.tokens
        print(f"{prompt!r}: {same} of {arguments.tokens} tokens are the same")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
