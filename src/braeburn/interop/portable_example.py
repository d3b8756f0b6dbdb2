"""Continues a prompt with the programs beside this file, greedily.

    pip install jax flatbuffers safetensors tokenizers
    python generate.py --prompt "Once upon a time" --max-new-tokens 64

It runs on whatever JAX finds: a CPU, GPUs of NVIDIA or AMD, a TPU. `program.json` tells the shapes
and types of what the programs take, where b, n and s stand for any sizes.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.flax import load_file
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parent
ABOUT = json.loads((FOLDER / "program.json").read_text("utf-8"))


def program(name: str, **options: Any) -> Callable:
    """A program, which JAX compiles when it is first called with arrays of some shape."""
    data = (FOLDER / ABOUT["programs"][name]["file"]).read_bytes()
    return jax.jit(export.deserialize(bytearray(data)).call, **options)


def continuation(ids: list[int], count: int) -> Iterator[int]:
    """Up to so many tokens after a prompt, each the most probable one, to where the text ends."""
    weights = load_file(FOLDER / ABOUT["weights_file"])
    # The prompt, padded on the right; what the padding leaves in the cache is never looked at.
    multiple = ABOUT["prompt"]["multiple_of"]
    tokens = np.zeros((1, -(-len(ids) // multiple) * multiple), np.int32)
    tokens[0, : len(ids)] = ids
    lengths = np.array([len(ids)], np.int32)
    token, _, cache = program("prefill")(weights, tokens, lengths)
    # Arrays of the cache are [b, heads, slots, head_dim], with a slot for each position. Those of
    # layers that see a window alone have as many as that, and need no more.
    more = max(0, len(ids) + count - tokens.shape[1])
    shapes = [each["shape"] for each in ABOUT["programs"]["step"]["arguments"]["cache"]]
    cache = [
        jnp.pad(each, ((0, 0), (0, 0), (0, more), (0, 0))) if shape[2] == "s" else each
        for each, shape in zip(cache, shapes, strict=True)
    ]
    step = program("step", donate_argnums=3)  # the old cache is given up for the new one
    for number in range(count):
        # The first token follows from the prompt, and each further one from the one before.
        if number:
            positions = np.array([len(ids) + number - 1], np.int32)
            token, _, cache = step(weights, token, positions, cache)
        if int(token[0]) in ABOUT["stop_ids"]:
            return
        yield int(token[0])


def main() -> None:
    """Prints the prompt and what follows it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--ids", action="store_true", help="print the ids of the new tokens alone")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(FOLDER / ABOUT["tokenizer_file"]))
    # The characters of a special token in a prompt are text.
    tokenizer.encode_special_tokens = True
    around = ABOUT["prompt"]
    own = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    found = list(
        continuation([*around["before"], *own, *around["after"]], arguments.max_new_tokens)
    )
    if arguments.ids:
        print(json.dumps(found))
    else:
        print(arguments.prompt + tokenizer.decode(found, skip_special_tokens=True))


if __name__ == "__main__":
    main()
