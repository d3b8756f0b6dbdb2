"""Compares the speed of generation with that of transformers and its cache: a batch of 8 prompts of
different lengths, greedy, float32, on the CPU.

    make extra-hf && .venv-hf/bin/python benchmarks/generation.py

The model is a Llama of random weights with the sizes of SmolLM2-135M, which transformers writes and
`braeburn import` reads. The two take turns, and the ratio of each turn is told; loading and
compiling are not counted. Exits with 1 where a token differs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "max_position_embeddings": 2048,
}
# Tokens of the prompts of a batch of eight.
LENGTHS = (5, 9, 16, 23, 31, 38, 47, 60)
# Of the weights of layers: with transformers' own 0.02 a tied model says the same token for ever.
SPREAD = 0.06


def make(folder: Path) -> Any:
    """Writes the model and a small tokenizer as a Hugging Face directory; returns the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from braeburn.data.tokenizer import train

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=SPREAD)).eval()
    model.save_pretrained(folder)
    train([__doc__ or ""], 300).save_all(folder)
    return model


def prompts_of(batch: int) -> list[list[int]]:
    """Random token ids of different lengths."""
    import numpy as np

    generator = np.random.default_rng(1)
    lengths = [LENGTHS[row % len(LENGTHS)] for row in range(batch)]
    return [generator.integers(5, SIZES["vocab_size"], length).tolist() for length in lengths]


def with_transformers(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The continuations by `generate` of transformers, prompts padded on the left."""
    import torch

    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        found = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[:, longest:].tolist()


def main() -> None:
    """Makes the model, and has both continue the same prompts in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=128, help="to write after each prompt")
    parser.add_argument("--batch", type=int, default=8, help="prompts")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()

    from braeburn.evaluate.generate import (
        STEPS_AT_ONCE,
        STEPS_OF_STREAM,
        Generation,
        collected,
        continuations,
        ready,
    )
    from braeburn.evaluate.sampling import Sampling
    from braeburn.interop.exchange import import_huggingface
    from braeburn.train.trained import load

    with tempfile.TemporaryDirectory() as folder:
        theirs = make(Path(folder) / "hf")
        import_huggingface(Path(folder) / "hf", Path(folder) / "run")
        trained = load(Path(folder) / "run")
    at_hand = ready(trained.params, trained.model, trained.layout, consume=True)
    prompts = prompts_of(arguments.batch)
    generation = Generation(arguments.tokens, Sampling(0.0))

    def ours(steps: int = STEPS_AT_ONCE) -> list[list[int]]:
        pieces = continuations(at_hand, prompts, generation, rows=len(prompts), steps=steps)
        return collected(pieces, len(prompts))

    began = time.monotonic()
    texts = ours()
    print(f"the first call, which compiles, takes {time.monotonic() - began:.1f} s")
    if texts != with_transformers(theirs, prompts, arguments.tokens):
        sys.exit("the continuations differ")
    kinds = [len(set(text)) for text in texts]
    print(f"the same tokens, {min(kinds)} to {max(kinds)} different ones in each row")
    ratios, streaming = [], []
    total = arguments.tokens * len(prompts)
    for turn in range(arguments.turns):
        began = time.monotonic()
        ours()
        middle = time.monotonic()
        with_transformers(theirs, prompts, arguments.tokens)
        end = time.monotonic()
        ours(STEPS_OF_STREAM)
        own, their, streamed = middle - began, end - middle, time.monotonic() - end
        streaming.append(own / streamed)
        ratios.append(their / own)
        print(
            f"turn {turn + 1}: {total / own:.1f} tokens/s, transformers {total / their:.1f}, "
            f"ratio {ratios[-1]:.2f}; streamed {streaming[-1]:.2f} of the speed at once"
        )
    print(
        f"median ratio {statistics.median(ratios):.2f}, "
        f"streamed {statistics.median(streaming):.2f} of the speed at once"
    )


if __name__ == "__main__":
    main()
