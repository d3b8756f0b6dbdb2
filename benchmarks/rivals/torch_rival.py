"""PyTorch with transformers' Qwen3: eager or compiled, attention by scaled_dot_product_attention, a
fused AdamW.
"""

import time

BEGAN = time.perf_counter()

import protocol  # noqa: E402


def main() -> None:
    """Serves steps of the model."""
    serving = protocol.Serving(BEGAN)
    work = serving.work
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=work.vocab,
        hidden_size=work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        head_dim=work.head_dim,
        intermediate_size=work.ffn,
        max_position_embeddings=work.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).to(torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=protocol.LEARNING_RATE,
        betas=(protocol.BETA1, protocol.BETA2),
        eps=protocol.EPSILON,
        weight_decay=protocol.WEIGHT_DECAY,
        fused=True,
    )
    batches = [
        torch.from_numpy(protocol.tokens_of(work, batch)).long()
        for batch in range(protocol.BATCHES)
    ]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, work.vocab), tokens[:, 1:].reshape(-1)
        )

    compiled = bool(work.setting.get("compile"))
    if compiled:
        loss_of = torch.compile(loss_of, **work.setting.get("compile_options", {}))

    def step(batch: int) -> float:
        loss = loss_of(batches[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    first = step(0)
    serving.ready(
        first,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        parameters=sum(each.numel() for each in model.parameters()),
    )
    serving.serve(step)


if __name__ == "__main__":
    main()
