"""Levanter: its Trainer and its Qwen3, a step at a time."""

import time

BEGAN = time.perf_counter()

import protocol  # noqa: E402


def main() -> None:
    """Serves steps of the model."""
    serving = protocol.Serving(BEGAN)
    work = serving.work
    import functools
    import tempfile
    from importlib.metadata import version

    import haliax
    import jax
    import jax.numpy as jnp
    import levanter
    from levanter.layers.attention import AttentionMask
    from levanter.models.lm_model import LmExample, compute_next_token_loss
    from levanter.models.qwen import Qwen3Config
    from levanter.optim import AdamConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    model = Qwen3Config(
        seq_len=work.length,
        hidden_dim=work.width,
        intermediate_dim=work.ffn,
        num_layers=work.layers,
        num_heads=work.heads,
        head_dim=work.head_dim,
        num_kv_heads=work.kv_heads,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        **{"gradient_checkpointing": False, **work.setting},
    )
    optimizer = AdamConfig(
        learning_rate=protocol.LEARNING_RATE,
        weight_decay=protocol.WEIGHT_DECAY,
        beta1=protocol.BETA1,
        beta2=protocol.BETA2,
        epsilon=protocol.EPSILON,
        max_grad_norm=protocol.CLIP,
    )
    config = TrainerConfig(
        tracker=NoopConfig(),
        train_batch_size=work.sequences,
        num_train_steps=1_000_000,
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
        load_checkpoint=False,
        log_dir=tempfile.mkdtemp(),
    )
    levanter.initialize(config)
    vocabulary = haliax.Axis("vocab", work.vocab)
    loss = functools.partial(compute_next_token_loss, logsumexp_weight=0.0)
    with Trainer(config, optimizer.build(1_000_000), loss) as trainer:
        keys = jax.random.split(jax.random.PRNGKey(0))
        state = trainer.initial_state(
            keys[0], model_init=lambda: model.build(vocabulary, key=keys[1])
        )
        axes = (haliax.Axis("batch", work.sequences), model.Pos)

        @haliax.named_jit(axis_resources=trainer.compute_axis_mapping)
        def example(tokens: haliax.NamedArray) -> LmExample:
            mask = haliax.ones(axes, dtype=jnp.int32)
            return LmExample(tokens=tokens, loss_mask=mask, attn_mask=AttentionMask.causal())

        # Levanter shifts the tokens itself and so has no target for the last one.
        batches = [
            example(haliax.named(jnp.asarray(protocol.tokens_of(work, batch)[:, :-1]), axes))
            for batch in range(protocol.BATCHES)
        ]

        def step(batch: int) -> float:
            nonlocal state
            info = trainer.train_step(state, batches[batch])
            state = info.state
            jax.block_until_ready(jax.tree.leaves(state.trainable_model))
            return float(info.loss)

        first = step(0)
        serving.ready(first, versions={"levanter": version("levanter"), "jax": jax.__version__})
        serving.serve(step)


if __name__ == "__main__":
    main()
