"""Writes what transformers says of the models of `hf_models.py`, for tests that install neither it
nor torch.

    make extra-hf && PYTHONPATH=tests/interop .venv-hf/bin/python
    tests/interop/write_golden_logits.py

`golden/FAMILY.json` gets each model's config.json and the names and shapes of its tensors as
transformers writes them, and greedy continuations; `golden/FAMILY.npz` the logits;
`golden/qwen2_pattern.json` the pre-tokenisation of Qwen2. The weights are not stored, for size:
they follow from names, shapes and `golden_weights`, and their hash is. Names of families as
arguments write the files of these alone.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hf_models import FAMILIES, GOLDEN, golden_tokens, golden_weights, hash_of
from safetensors.numpy import load_file, save_file
from theirs import load, their_logits, their_model
from tokenizers import pre_tokenizers
from transformers.models.qwen2 import tokenization_qwen2

from braeburn.config import ModelConfig

# Logits are kept after this many tokens of each sequence, its last one included.
KEPT = 12
PROMPTS = [[5, 17, 3], [42], list(range(1, 71)), [9] * 12]
NEW_TOKENS = 32
# Greedy tokens are compared where the second best logit is further away than both programs could
# differ.
MARGIN = 1e-3
TEXTS = [
    "The quick brown fox; l'été, 1234567890 times.\n",
    "I'LL  go\r\n\r\n\tnow…  12,345.67€ 四五 \u00a0 x_y\n ",
    "  two\n\n\n    four\t\ttabs \r\n   \n trailing   ",
    'def f(a_b: int) -> str:\n    return f"{a_b!r}"  # don\'t\n',
    "cafe\u0301 \u212b \ufb01 \u1100\u1161 \u0664\u0665 2\u00b3 \U0001f469\u200d\U0001f680 "
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0000 \ufffd",
]


def main() -> None:
    """Asks transformers about every model, and writes all files."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    for family in sys.argv[1:] or FAMILIES:
        arrays: dict[str, np.ndarray] = {}
        models = {}
        for name, (model, length) in FAMILIES[family].MODELS.items():
            with tempfile.TemporaryDirectory() as folder:
                models[name], arrays[name] = of_model(model, length, Path(folder))
        write_json(GOLDEN / f"{family}.json", {**versions, "models": models})
        np.savez_compressed(GOLDEN / f"{family}.npz", **arrays)
    if not sys.argv[1:]:
        write_json(GOLDEN / "qwen2_pattern.json", {**versions, **of_qwen2()})


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Writes a file of one object."""
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=True) + "\n")


def of_model(model: ModelConfig, length: int, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What is kept of one model, and its logits [KEPT, V] at the kept positions of its sequence."""
    their_model(model).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: list(tensor.shape) for name, tensor in load_file(file).items()}
    weights = golden_weights(shapes, model)
    save_file(weights, file, {"format": "pt"})
    theirs = load(folder, attn_implementation="eager", dtype=torch.float32)
    logits = their_logits(theirs, golden_tokens(model, length))[0]
    assert 0.5 < logits.std() < 2
    positions = sorted({round(position) for position in np.linspace(0, length - 1, KEPT)})
    kept = {
        "class": type(theirs).__name__,
        "config": json.loads((folder / "config.json").read_text()),
        "shapes": shapes,
        "weights": hash_of(weights),
        "positions": positions,
        "greedy": [greedy(theirs, prompt) for prompt in PROMPTS],
    }
    return kept, logits[positions]


def greedy(theirs: Any, prompt: list[int]) -> dict[str, list[int]]:
    """A prompt and its continuation, up to the first token that is not the best by a margin."""
    tokens = torch.tensor([prompt])
    answer = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    continued = []
    for token, logits in zip(
        answer.sequences[0, len(prompt) :].tolist(), answer.logits, strict=True
    ):
        best, second = logits[0].topk(2).values.tolist()
        if best - second < MARGIN:
            break
        continued.append(token)
    return {"prompt": prompt, "continued": continued}


def of_qwen2() -> dict[str, Any]:
    """The pattern that splits text before tokenisation, and what it makes of some texts."""
    pattern: Any = tokenization_qwen2.Qwen2Tokenizer()._tokenizer.pre_tokenizer
    assert isinstance(pattern, pre_tokenizers.PreTokenizer)
    pieces = {text: [piece for piece, _ in pattern.pre_tokenize_str(text)] for text in TEXTS}
    return {"pattern": tokenization_qwen2.PRETOKENIZE_REGEX, "pieces": pieces}


if __name__ == "__main__":
    main()
