"""The models of gpu_recipes.py in PyTorch on one GPU, for comparison: the Qwen3 of transformers,
trained in bfloat16.

    python benchmarks/gpu_torch.py 1_5b [--compile] [--sequences 8] [--json]

Parameters and AdamW's moments are float32, products run in bfloat16 under autocast, and attention
is PyTorch's fused causal one over whole sequences: documents are not kept apart. The loss is worked
out in chunks of tokens that are computed again in the backward pass; without this the logits would
not fit. With no `--sequences` the largest batch of 16, 8, 4, 2, 1 that fits is taken.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# d_model, layers, heads, FFN: as in gpu_recipes.py.
MODELS = {
    "tiny": (128, 2, 4, 256),
    "0_6b": (1024, 28, 16, 3072),
    "1_5b": (2048, 24, 16, 6144),
    "3b": (2560, 28, 20, 9728),
}
VOCABULARY, LENGTH, CHUNK = 151_936, 4096, 4096


def build(name: str, device: str) -> Any:
    """The model of transformers, float32, with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width, layers, heads, ffn = MODELS[name]
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        intermediate_size=ffn,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config).float().train()


def loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, the logits of a chunk at a time."""
    hidden = model.model(input_ids=inputs).last_hidden_state.flatten(0, 1)

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            model.lm_head(hidden).float(), targets, reduction="sum"
        )

    chunks = zip(hidden.split(CHUNK), targets.flatten().split(CHUNK), strict=True)
    total = sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
    return total / targets.numel()  # type: ignore[operator,return-value]


def measure(name: str, sequences: int, steps: int, compiled: bool, device: str) -> dict[str, Any]:
    """Times steps of forward, backward, clipping and update."""
    torch.manual_seed(0)
    model = build(name, device)
    if compiled:
        model.model = torch.compile(model.model)
    matmul = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    length = LENGTH if device == "cuda" else 64
    tokens = torch.randint(VOCABULARY, (4, sequences, length + 1), device=device)
    times = []
    for step in range(steps + 3):
        began = time.perf_counter()
        inputs, targets = tokens[step % 4, :, :-1], tokens[step % 4, :, 1:]
        with torch.autocast(device, torch.bfloat16):
            value = loss(model, inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        times.append(time.perf_counter() - began)
    layers, heads = MODELS[name][1:3]
    median = statistics.median(times[3:])
    # 6 for each weight that meets a token and 12 L d S for attention, as Braeburn counts.
    flops = (6 * matmul + 12 * layers * heads * 128 * length) * sequences * length / median
    return {
        "model": name,
        "framework": f"PyTorch {torch.__version__}" + (", torch.compile" if compiled else ""),
        "batch_tokens": sequences * length,
        "step_seconds_median": median,
        "first_step_seconds": times[0],
        "tokens_per_second": sequences * length / median,
        "model_flops_per_second": flops,
        "mfu_of_989": flops / 989e12,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "last_loss": value.item(),
    }


def main() -> int:
    """Measures one model; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument(
        "--sequences",
        type=int,
        nargs="+",
        help="sequences of 4096 tokens in a batch; the first that fits is timed",
    )
    parser.add_argument("--steps", type=int, default=8, help="steps to time")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for sequences in arguments.sequences or [16, 8, 4, 2, 1]:
        try:
            result = measure(arguments.model, sequences, arguments.steps, arguments.compile, device)
        except RuntimeError as error:
            # PyTorch's own error, or that of cuBLAS, for whose workspace nothing was left.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "ALLOC_FAILED" not in str(
                error
            ):
                raise
            print(f"{sequences} sequences do not fit", file=sys.stderr)
            torch.cuda.empty_cache()
            continue
        print(json.dumps(result))
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
